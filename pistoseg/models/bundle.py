"""The model bundle: a folder with `model.safetensors` and `model.json`, enough to segment. Nothing is pickled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError, model_validator

from pistoseg import storage
from pistoseg.classes import TissueClasses
from pistoseg.config import EvaluationConfig, ScaleConfig
from pistoseg.config.base import refuse_gaps
from pistoseg.errors import PistoSegError
from pistoseg.models import files, inference, segmentation
from pistoseg.models.folding import fold_batch_norms
from pistoseg.models.inference import Predictor
from pistoseg.models.segmentation import Normalization, SegmentationNetwork
from pistoseg.patches.background import BackgroundRule, check_background
from pistoseg.patches.decode import read_rgb
from pistoseg.slides.resolution import check_mpp

if TYPE_CHECKING:
    from pistoseg.slides.job import SlideResult

FORMAT = "pistoseg-model"
MAX_PIXELS = 178_956_970
"""Largest image file that is segmented in one piece, px: Pillow's limit."""

Size = Annotated[int, Field(ge=1, strict=True)]

_REQUIRED = ("architecture", "encoder", "decoder_attention", "normalization", "classes", "patch_size", "scale")
_PROTOCOL = ("tile", "stride", "scales", "symmetries", "window", "average", "batch_size")


def save(
    uri: str,
    model: SegmentationNetwork,
    *,
    classes: TissueClasses,
    patch_size: int,
    scale: Mapping[str, Any] | None = None,
    background: BackgroundRule | None = None,
    evaluation: Mapping[str, Any] | None = None,
    lineage: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write a bundle; `model.json`, written last, completes it.

    Args:
        uri: folder, local or on any fsspec file system.
        model: the network, on any device.
        classes: tissue classes by class id.
        patch_size: side of the training samples (network px).
        scale: `mpp` (um per network px or null), `source_mpp`, `resize` (network px per image px), `fit`.
        background: which pixels the training left out; None: none.
        evaluation: how it was scored; the keys `tile`, `stride`, `scales`, `symmetries`, `window` and `average` are the
            defaults of its `Predictor`.
        lineage: artifact fingerprints, code version, data summary.
        metrics: scores.
    """
    info = {
        "format": FORMAT,
        "architecture": model.architecture,
        "encoder": model.encoder_name,
        "decoder_attention": model.decoder_attention,
        "normalization": {"mean": list(model.normalization.mean), "std": list(model.normalization.std)},
        **classes.to_json(),
        "patch_size": patch_size,
        "scale": {"mpp": None, "source_mpp": None, "resize": 1.0, "fit": None} | dict(scale or {}),
        "background": asdict(background) if background else None,
        "evaluation": dict(evaluation or {}),
        "lineage": dict(lineage or {}),
        "metrics": dict(metrics or {}),
    }
    files.write_model(uri, model, info)


def load(uri: str, device: str | torch.device | None = None) -> Segmenter:
    """Load a bundle.

    Args:
        uri: the folder, local or on any fsspec file system; that of a workspace, and `models:/` names, are for
            `pistoseg.load`.
        device: `cpu`, `cuda`...; None or `auto` for CUDA where there is one.
    Raises:
        PistoSegError: where the folder is no bundle, is of a newer format, or its parts do not fit each other.
    """
    uri = str(uri)
    info, state = files.read_model(uri, FORMAT, _REQUIRED)
    _check(uri, info)
    classes = TissueClasses.from_json(info)
    normalization = Normalization(tuple(info["normalization"]["mean"]), tuple(info["normalization"]["std"]))
    model = segmentation.build(info["architecture"], info["encoder"], len(classes), None, info["decoder_attention"])
    model.normalization = normalization
    files.fill(model, state, uri)
    return Segmenter(model.eval(), info, classes, device, uri)


def read_info(uri: str) -> dict[str, Any]:
    """What `model.json` says, checked; no weights are read."""
    info = files.read_info(uri, FORMAT, _REQUIRED)
    _check(uri, info)
    return info


def evaluation_config(uri: str, protocol: str | None = None) -> EvaluationConfig:
    """The evaluation section of the run that trained a bundle; its window and the defaults where it does not say it.

    Args:
        uri: of the bundle.
        protocol: to score it by; None: the section's own. Stride, scales and symmetries of the section are of its own
            protocol, so another one comes with those that it defines; the other keys are the section's in any case.
    Raises:
        PistoSegError: where the section is of another version of PistoSeg, and no protocol is given, beside which the
            window will do; the bundle's own predictions need it not.
    """
    info = read_info(uri)
    said = protocol_of(info)
    window = {"patch_size": said["tile"]} | {key: said[key] for key in ("batch_size",) if key in said}
    try:
        try:
            config = EvaluationConfig.model_validate(info.get("evaluation", {}).get("config", window))
        except ValidationError as error:
            if protocol is None:
                raise files.damaged(uri, info, error, "give --protocol") from error
            config = EvaluationConfig.model_validate(window)
        if protocol in (None, config.protocol):
            return config
        kept = config.model_dump(exclude={"stride", "scales", "symmetries"})
        return EvaluationConfig.model_validate(kept | {"protocol": protocol})
    except ValidationError as error:
        raise files.damaged(uri, info, error) from error


def protocol_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """What a bundle predicts by, as arguments of `Predictor`: what it says, else the defaults for its patch size.

    Args:
        info: what `model.json` says.
    """
    side, said = info["patch_size"], info.get("evaluation", {})
    defaults = {"tile": side, "stride": side // 2, "scales": [1.0], "symmetries": 1, "window": "gaussian"}
    return defaults | {key: said[key] for key in _PROTOCOL if said.get(key) is not None}


class _Background(BaseModel):
    """What a bundle says of the pixels that its training left out."""

    grey: int = Field(ge=1, le=254, strict=True)
    min_area: int = Field(ge=0, strict=True)


class _Protocol(BaseModel):
    """What a bundle says of its predictions; other keys are for people, or of a newer version."""

    patch_size: Size
    tile: Size | None = None
    stride: Size | None = None
    scales: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(None, min_length=1)
    symmetries: Literal[1, 2, 8] | None = None
    window: Literal["gaussian", "mean"] | None = None
    average: Literal["probabilities", "logits"] | None = None
    batch_size: Size | None = None

    @model_validator(mode="after")
    def _without_gaps(self) -> Self:
        refuse_gaps(self.stride or self.patch_size // 2, self.tile or self.patch_size)
        return self


def _check(uri: str, info: dict[str, Any]) -> None:
    """Refuse what `load` and `Segmenter` could do nothing with."""
    try:
        TissueClasses.from_json(info)
        Normalization(tuple(info["normalization"]["mean"]), tuple(info["normalization"]["std"]))
        ScaleConfig.model_validate(info["scale"])
        if info.get("background") is not None:
            _Background.model_validate(info["background"])
        evaluation = info.get("evaluation", {})
        if not isinstance(evaluation, dict):
            raise ValueError(f"evaluation is {evaluation!r}, no object")
        _Protocol.model_validate(evaluation | {"patch_size": info["patch_size"]})
    except (KeyError, TypeError, ValueError) as error:
        raise files.damaged(uri, info, error) from error


def fingerprint(uri: str) -> str:
    """Hash of a bundle's files, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in (files.INFO, files.WEIGHTS):
        digest.update(hashlib.sha256(storage.read_bytes(storage.join(uri, name))).digest())
    return digest.hexdigest()[:16]


class Segmenter:
    """A loaded bundle: segments images with the settings that the model's own run scored it with.

    Attributes:
        model: the network.
        info: what `model.json` says.
        classes: tissue classes by class id.
        uri: of the bundle; empty for a network that is in none yet.
    """

    def __init__(
        self,
        model: SegmentationNetwork,
        info: dict[str, Any],
        classes: TissueClasses,
        device: str | torch.device | None = None,
        uri: str = "",
    ) -> None:
        self.uri = uri
        self.model = model
        self.info = info
        self.classes = classes
        self.device = inference.resolve_device(device)
        self._default: Predictor | None = None

    def __repr__(self) -> str:
        parts = {key: self.info.get(key) for key in ("architecture", "encoder")}
        parts |= {"classes": self.classes.names, "mpp": self.info.get("scale", {}).get("mpp")}
        return f"Segmenter({', '.join(f'{key}={value!r}' for key, value in parts.items())})"

    @property
    def background(self) -> BackgroundRule | None:
        """Which pixels the training left out; None: none, or the bundle is older than this key."""
        said = self.info.get("background")
        return BackgroundRule(said["grey"], said["min_area"]) if said else None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the bundle's files."""
        return fingerprint(self.uri)

    def predictor(self, **settings: Any) -> Predictor:
        """A `Predictor` of this model; `settings` go before those of the bundle's evaluation protocol.

        All predictors compute with the weights that the model has when the first one is made.
        """
        merged = {"device": self.device} | protocol_of(self.info) | settings
        if "tile" in settings and "stride" not in settings:
            merged["stride"] = max(1, settings["tile"] // 2)
        return Predictor(self._folded, self.model.normalization, **merged)

    def factor(self, mpp: float | None = None) -> float:
        """Network px per image px, for an image of `mpp` um per px (default: that of the training images)."""
        scale = ScaleConfig.model_validate(self.info["scale"])
        if mpp is not None:
            check_mpp(mpp, None, "give the image's um per px, or leave mpp out for that of the training images")
        if mpp and not scale.mpp:
            raise PistoSegError(
                "the model's pixel size is unknown, so that an image's mpp can't be used",
                field="mpp",
                remedy="resize the image to the pixel size of the training images, and leave mpp out",
            )
        return scale.factor(mpp)

    def predict(self, image: Any, mpp: float | None = None, *, background: str = "model") -> NDArray[np.uint8]:
        """The class of every pixel.

        Args:
            image: (H, W, 3) uint8 array, PIL image, or path or URI of an image file.
            mpp: um per px of the image; None: as the training images.
            background: which pixels have none, as in `segment_slide`: `model` for those that its training left out as
                glass (see the attribute `background`), `none` for none.
        Returns:
            (H, W) uint8 class ids at the image's own size; names and colours are in `classes`, and what pixels without
            a class have is `classes.background_id`.
        """
        check_background(background)
        pixels, factor = read_image(image), self.factor(mpp)
        mask = self._predictor().predict(pixels, factor)
        if background == "model" and self.background:
            mask[self.background.scaled(pixels, factor)] = self.classes.background_id
        return mask

    def probabilities(self, image: Any, mpp: float | None = None) -> NDArray[np.float32]:
        """Class probabilities of every pixel, (L, H, W) float32 at the image's own size; arguments as in `predict`."""
        return self._predictor().probabilities(read_image(image), self.factor(mpp))

    def segment_slide(
        self,
        slide: str | Path,
        out: str | Path,
        *,
        slide_id: str | None = None,
        slide_mpp: float | None = None,
        tissue_mask: str | Path | None = None,
        readers: int = 2,
        **settings: Any,
    ) -> SlideResult:
        """Segment a whole slide of any size into `out/slides/<slide_id>/`, in this process.

        Args:
            slide: path or URI; of object storage, it is fetched into a temporary folder first.
            out: folder or URI.
            slide_id: name of its folder; None: the file's name.
            slide_mpp: um per level-0 px, where the slide does not say it or is wrong.
            tissue_mask: path or URI of a mask to use instead of the one that would be found.
            readers: threads that read ahead of the network.
            settings: as in `pistoseg.slides.network.SlideSettings`: mpp, stride, symmetries, batch_size, probabilities,
                tolerance_um, min_area_um2, background.
        Returns:
            Where the results are, what slide.json says, and the areas.
        Raises:
            PistoSegError: the slide cannot be read, nothing says its pixel size, or slide_id cannot name a folder;
                nothing is written then.
        """
        from pistoseg.slides.job import segment_one  # slides use models, and only here the other way round

        return segment_one(
            self,
            str(slide),
            str(out),
            slide_id=slide_id,
            slide_mpp=slide_mpp,
            tissue_mask=None if tissue_mask is None else str(tissue_mask),
            readers=readers,
            **settings,
        )

    @cached_property
    def _folded(self) -> torch.nn.Module:
        return fold_batch_norms(self.model)

    def _predictor(self) -> Predictor:
        if self._default is None:
            self._default = self.predictor()
        return self._default


def read_image(image: Any) -> NDArray[np.uint8]:
    """An (H, W, 3) uint8 array from an array, a PIL image, or the path or URI of an image file.

    Files are read as those that networks are trained on: upright, and 8-bit PNG, JPEG or TIFF of one page alone.
    """
    from PIL import Image, ImageOps

    if isinstance(image, (str, Path)):
        try:
            return read_rgb(str(image), max_pixels=MAX_PIXELS)
        except PistoSegError as error:
            if error.field == "size":  # its own remedy is about training images
                remedy = "segment it with `segment_slide`"
                raise PistoSegError(error.reason, file=error.file, field="size", remedy=remedy) from error
            raise
    if isinstance(image, Image.Image):
        return _rgb(ImageOps.exif_transpose(image))
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
        raise PistoSegError(
            f"an image must be (H, W, 3) uint8, not {pixels.shape} {pixels.dtype}", remedy="convert it to 8-bit RGB"
        )
    return pixels


def _rgb(image: Any) -> NDArray[np.uint8]:
    """8-bit RGB of a PIL image; alpha is laid on white, 16-bit grey is refused."""
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise PistoSegError(f"has pixels of mode {image.mode}", remedy="convert it to 8-bit RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(image.convert("RGB"))
