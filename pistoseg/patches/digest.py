"""What a data set holds, in one hash: changed, added or removed files change it, moving the folder does not."""

from __future__ import annotations

import hashlib
import json

from pistoseg import storage
from pistoseg.config import Config
from pistoseg.errors import PistoSegError
from pistoseg.patches.layouts import find_split


def training_folder(config: Config) -> str:
    """URI of the folder with the training images."""
    if not config.data.uri:
        raise PistoSegError("no training data is given", field="data.uri", remedy="add --data FOLDER")
    uri = storage.absolute(config.data.uri)
    if not storage.exists(uri):
        raise PistoSegError("does not exist", file=uri, field="data.uri", remedy="give --data the data set's folder")
    return find_split(uri, "training") or uri


def validation_folder(config: Config) -> str | None:
    """URI of the folder with img/ and mask/ of the validation images, or None where there are none."""
    if config.data.validation:
        uri = storage.absolute(config.data.validation)
        if not storage.is_dir(uri):
            raise PistoSegError("is no folder", file=uri, field="data.validation")
        return uri
    return find_split(storage.absolute(config.data.uri or ""), "validation")


def training_digest(config: Config) -> str:
    """Hash of the training files' names, sizes and versions."""
    return _digest(training_folder(config))


def validation_digest(config: Config) -> str:
    """Hash of the validation files' names, sizes and versions; empty where there are none."""
    folder = validation_folder(config)
    return _digest(folder) if folder else ""


def _digest(uri: str) -> str:
    return hashlib.sha256(json.dumps(storage.list_details(uri)).encode()).hexdigest()[:16]
