"""A model as two files, `model.safetensors` and `model.json`, on any file system. Nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import safetensors.torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from pistoseg import __version__, storage
from pistoseg.errors import PistoSegError

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
INFO = "model.json"


def write_model(uri: str, module: nn.Module, info: Mapping[str, Any]) -> None:
    """Write a model; `model.json`, written last, completes it.

    Args:
        uri: folder, local or on any fsspec file system.
        module: the network, on any device.
        info: what rebuilds the network, with the kind of model as `format`; NumPy values are allowed. The versions of
            the layout and of PistoSeg are added.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    versions = {"format": info["format"], "format_version": FORMAT_VERSION, "pistoseg_version": __version__}
    text = json.dumps(versions | dict(info), indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
    storage.write_bytes(storage.join(uri, WEIGHTS), safetensors.torch.save(tensors))
    storage.write_bytes(storage.join(uri, INFO), (text + "\n").encode())


def read_model(
    uri: str, expected_format: str, required: Iterable[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a model.

    Args:
        uri: the folder, local or on any fsspec file system.
        expected_format: the kind of model that it must hold.
        required: keys that `model.json` must have.
    Returns:
        What `model.json` says, and the tensors by name, on the CPU.
    Raises:
        PistoSegError: where the folder holds no such model, is of a newer layout, or is damaged.
    """
    info = read_info(uri, expected_format, required)
    source = storage.join(uri, WEIGHTS)
    try:
        return info, safetensors.torch.load(storage.read_bytes(source))
    except FileNotFoundError:
        raise PistoSegError(
            "is missing; the bundle is incomplete", file=source, remedy="copy the whole folder"
        ) from None
    except SafetensorError as error:
        raise PistoSegError(
            f"is not a safetensors file: {error}", file=source, remedy="copy the bundle again"
        ) from error


def read_info(uri: str, expected_format: str, required: Iterable[str] = ()) -> dict[str, Any]:
    """What `model.json` says, checked; no weights are read. Arguments and errors as in `read_model`."""
    path = storage.join(uri, INFO)
    try:
        content = storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise PistoSegError(
            f"is no model bundle: it has no {INFO}",
            file=uri,
            remedy="give the folder that `pistoseg train` printed, WORKSPACE/precise/.../bundle, or one to which "
            "`pistoseg models export NAME@ALIAS --workspace WORKSPACE --out FOLDER` wrote a registered model",
        ) from None
    try:
        info = json.loads(content)
    except ValueError as error:  # also bytes that are no text
        raise PistoSegError(f"is not valid JSON: {error}", file=path, remedy="copy the bundle again") from error
    found = info.get("format") if isinstance(info, dict) else None
    if found != expected_format:
        raise PistoSegError(
            f"does not describe a PistoSeg model of this kind ({found!r}, not {expected_format!r})",
            file=path,
            field="format",
        )
    if not isinstance(info.get("format_version"), int) or info["format_version"] > FORMAT_VERSION:
        raise PistoSegError(
            f"the bundle has format {info.get('format_version')}, this PistoSeg reads up to {FORMAT_VERSION}",
            file=path,
            field="format_version",
            remedy=f"upgrade PistoSeg (the bundle was written by {info.get('pistoseg_version', 'a newer one')})",
        )
    for key in required:
        if key not in info:
            raise PistoSegError("is missing", file=path, field=key, remedy="copy the bundle again")
    return info


def damaged(uri: str, info: Mapping[str, Any], error: Exception, remedy: str = "") -> PistoSegError:
    """What to tell a user whose `model.json` has values that make no sense, at least to this version of PistoSeg.

    Args:
        uri: of the bundle's folder.
        info: what its `model.json` says.
        error: what is wrong with it.
        remedy: what helps as well; empty: nothing.
    """
    file, said = storage.join(uri, INFO), _in_a_line(error)
    version, remedies = info.get("pistoseg_version"), ["copy the bundle again"]
    reason = f"is damaged: {said}"
    if version not in (None, __version__):
        reason = f"was written by PistoSeg {version}, and {__version__} can't make sense of it: {said}"
        remedies.append(f"use PistoSeg {version}")
    return PistoSegError(reason, file=file, remedy=", or ".join([*remedies, remedy] if remedy else remedies))


def _in_a_line(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    problems = [(".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")) for item in error.errors()]
    return "; ".join(f"{where}: {message}" if where else message for where, message in problems)


def fill(module: nn.Module, state: Mapping[str, Tensor], uri: str) -> None:
    """Load the tensors of the model at `uri` into the network that its description gave; they must fit exactly."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise PistoSegError(
            f"its weights do not fit the network that {INFO} describes ({lines[min(1, len(lines) - 1)].strip()})",
            file=storage.join(uri, WEIGHTS),
            remedy="keep the two files of a bundle together",
        ) from error


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays as JSON writes them."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} can't be written to {INFO}")
