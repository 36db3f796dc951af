"""What a data set holds, in one hash: changed, added or removed files change it, moving the folder does not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from pistoseg import storage
from pistoseg.config import Config
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.patches.layouts import find_split, other_files, scan_training, split_without_masks, training_files
from pistoseg.patches.manifest import is_manifest, scan_slides
from pistoseg.patches.table import find_table, images_elsewhere, is_elsewhere

_THREADS = 16  # object storage answers many questions at once
_CUTTING = 2  # raised when other windows are cut from the same annotations


def training_folder(config: Config) -> str:
    """URI of the folder with the training images, or of the manifest of slides."""
    if not config.data.uri:
        raise PistoSegError("no training data is given", field="data.uri", remedy="add --data FOLDER")
    uri = storage.absolute(config.data.uri)
    if not storage.exists(uri):
        raise PistoSegError("does not exist", file=uri, field="data.uri", remedy="give --data the data set's folder")
    if is_manifest(uri):
        return uri
    return find_split(uri, "training") or uri


def check_labels(config: Config) -> None:
    """Refuse training data without a label that can be used, as the stage `patches` does; no image is read."""
    uri, classes = training_folder(config), config.classes.tissue()
    if is_manifest(uri):
        scan_slides(uri, classes)
    else:
        scan_training(uri, classes, config.data)


def validation_folder(config: Config) -> str | None:
    """URI of the folder with img/ and mask/ of the validation images, or None where there are none.

    One that `data.validation` names may be without these: whoever reads it refuses it.
    """
    if config.data.validation:
        uri = storage.absolute(config.data.validation)
        if not storage.is_dir(uri):
            raise PistoSegError("is no folder", file=uri, field="data.validation")
        return uri
    uri = storage.absolute(config.data.uri or "")
    return None if is_manifest(uri) else find_split(uri, "validation")


def scored_by_labels(config: Config) -> bool:
    """Whether labels of held-out images are all that models can be scored by: there are no images with masks."""
    return config.data.label_holdout > 0 and validation_folder(config) is None


def unscored_folder(config: Config) -> str | None:
    """URI of the data set's own folder of that name that is no validation split for lack of img/ and mask/, or None."""
    uri = storage.absolute(config.data.uri or "")
    return None if is_manifest(uri) or config.data.validation else split_without_masks(uri, "validation")


def training_digest(config: Config, etag: Callable[[str], str]) -> str:
    """Hash of the training files' names, sizes and versions.

    Where a table of windows lies outside of the training folder, or names images there, it is a hash of these, too.
    Of a manifest of slides it is a hash of its bytes, of what `etag` says about every slide, of the annotations'
    versions, and of the settings by which windows are cut from these.

    Args:
        config: with `data.uri`.
        etag: a string that changes when a slide does (`pistoseg.slides.files.etag`); `PistoSegError` without a slide.
    """
    uri = training_folder(config)
    if is_manifest(uri):
        return _slides_digest(uri, config, etag)
    tables: dict[str, str] = {}
    is_other = other_files(uri)
    own = files_digest(uri, tables, is_other)
    outside = _table_digest(uri, tables, is_other, config, etag)
    return _hash([own, outside]) if outside else own


def validation_digest(config: Config) -> str:
    """Hash of the validation files' names, sizes and versions; empty where there are none."""
    folder = validation_folder(config)
    return files_digest(folder) if folder else ""


def files_digest(
    uri: str, tables: dict[str, str] | None = None, is_other: Callable[[str], bool] = lambda name: False
) -> str:
    """Hash of the names, sizes and versions of the files below a folder.

    It is what `_hash` makes of their list, without a list: a data set may have a million.

    Args:
        uri: of their folder.
        tables: gets the CSV and Parquet files directly in it, name -> URI.
        is_other: tells of a path below it whether it does not count.
    """
    digest = hashlib.sha256(b"[")
    counted = (item for item in storage.iter_details(uri) if not is_other(item[0]))
    for number, item in enumerate(counted):
        digest.update(f"{', ' if number else ''}{json.dumps(item)}".encode())
        if tables is not None and "/" not in item[0] and item[0].lower().endswith((".csv", ".parquet")):
            tables[item[0]] = storage.join(uri, item[0])
    digest.update(b"]")
    return digest.hexdigest()[:16]


def _table_digest(
    uri: str, tables: dict[str, str], is_other: Callable[[str], bool], config: Config, etag: Callable[[str], str]
) -> str:
    """Hash of a table of windows outside of the training folder, and of images there that one names; empty for none."""
    if config.data.layout not in ("auto", "table"):
        return ""
    table = find_table(uri, tables, config.classes.tissue(), config.data.table)
    if table is None:
        return ""
    images = images_elsewhere(table, uri, lambda: training_files(uri), is_other)
    outside = is_elsewhere(table, uri)
    if not images and not outside:
        return ""
    content = hashlib.sha256(storage.read_bytes(table)).hexdigest() if outside else ""
    versions = _first_versions(images.values(), etag)
    there = {name: version for name, version in zip(images, versions, strict=True) if version}
    return _hash([content, list(there), list(there.values())]) if there or outside else ""


def _slides_digest(uri: str, config: Config, etag: Callable[[str], str]) -> str:
    slides = scan_slides(uri, config.classes.tissue()).slides
    files = [slide.uri for slide in slides] + [slide.annotations for slide in slides if slide.annotations]
    versions = _versions(files, etag)
    cutting = None
    if len(files) > len(slides):
        settings = config.data.model_dump(include={"window", "window_stride", "window_min_share"})
        cutting = settings | {"version": _CUTTING}
    return _hash([hashlib.sha256(storage.read_bytes(uri)).hexdigest(), versions, cutting])


def _versions(files: Iterable[str], etag: Callable[[str], str]) -> list[str]:
    def version(file: str) -> str:
        try:
            return etag(file)
        except UnavailableError:
            raise
        except PistoSegError as error:  # it will be rejected; when it comes, it is read
            return error.reason

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(version, files))


def _first_versions(places: Iterable[list[str]], etag: Callable[[str], str]) -> list[str | None]:
    """The version of the first file in each of some lists of URIs; None where none is there."""

    def version(uris: list[str]) -> str | None:
        for uri in uris:
            try:
                return etag(uri)
            except UnavailableError:
                raise
            except (PistoSegError, ValueError):  # not there, a folder, or no path at all: the stage `patches` says so
                continue
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(version, places))


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
