"""The one place that knows how data sets are laid out in folders.

Training images: a table of windows, a folder per class, or labels in file names. Evaluation images: img/ and mask/.
Below them, everything is a `SourceImage` or an `EvaluationPair`.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from pistoseg import storage
from pistoseg.classes import TissueClasses, composed
from pistoseg.config import DataConfig
from pistoseg.errors import PistoSegError, suggestion
from pistoseg.patches import labels, table
from pistoseg.patches.source import (
    EvaluationListing,
    EvaluationPair,
    Listing,
    Rejection,
    SourceImage,
    Window,
    readable,
    require_utf8,
)

SPLITS = {
    "training": ("1.training", "training", "train"),
    "validation": ("2.validation", "validation", "val", "valid"),
    "testing": ("3.testing", "testing", "test"),
}
IMAGE_FOLDERS = ("img", "images", "image", "imgs")
MASK_FOLDERS = ("mask", "masks")
BACKGROUND_FOLDERS = ("background-mask", "background_mask", "background-masks")
_MASKS = MASK_FOLDERS + BACKGROUND_FOLDERS
_OTHER_IMAGES = (".bmp", ".gif", ".webp", ".jp2", ".heic", ".avif", ".dcm", ".svs", ".ndpi", ".mrxs", ".scn")


def find_split(data_uri: str, split: str) -> str | None:
    """Find the folder of a split in a data set.

    Args:
        data_uri: the data set's folder, or its training folder itself.
        split: `training`, `validation` or `testing`.
    Returns:
        The folder's URI; data_uri itself for the training split of a folder without any split or img/ in it;
        None where there is no such split. Of validation and testing it has img/ and mask/.
    Raises:
        PistoSegError: data_uri is no folder.
    """
    _require_folder(data_uri)
    children = _children(data_uri)
    if split != "training":
        return next(filter(_has_masks, _folders(children, SPLITS[split])), None)
    found = _first(children, SPLITS[split])
    if found is not None:
        return found
    has_split = any(_first(children, names) for names in SPLITS.values())
    is_evaluation = _first(children, MASK_FOLDERS) is not None
    return None if has_split or is_evaluation else data_uri


def find_training(data_uri: str, classes: TissueClasses, config: DataConfig) -> str | None:
    """`find_split` of the training images, or data_uri itself where they lie beside its other splits or masks.

    Args:
        data_uri: the data set's folder, or its training folder itself.
        classes: after which folders beside mask/ may be named.
        config: its layout and table.
    Raises:
        PistoSegError: data_uri is no folder.
    """
    found = find_split(data_uri, "training")
    if found is not None:
        return found
    files = training_files(data_uri)
    is_evaluation = _first(_children(data_uri), MASK_FOLDERS) is not None
    try:
        if config.layout in ("auto", "table") and table.find_table(data_uri, files, classes, config.table):
            return data_uri
    except PistoSegError:  # reading the images says it
        return None if is_evaluation else data_uri
    images = filter(labels.is_image, files)
    if is_evaluation:
        images = filter(lambda name: labels.parse_folder(name.split("/")[0], classes), images)
    return data_uri if any(images) else None


def split_without_masks(data_uri: str, split: str) -> str | None:
    """The folder that is called like a split and is not taken for it, as it has no img/ and mask/; or None."""
    named = _first(_children(data_uri), SPLITS[split])
    return named if named is not None and find_split(data_uri, split) is None else None


def _splits_beside(uri: str) -> frozenset[str]:
    """Names of the folders in a folder of training images that hold other splits, with img/ and mask/."""
    if storage.name(uri).lower() in SPLITS["training"]:
        return frozenset()
    named = _folders(_children(uri), SPLITS["validation"] + SPLITS["testing"])
    return frozenset(storage.name(folder) for folder in named if _has_masks(folder))


def masks_beside(uri: str) -> list[str]:
    """Names of the folders in a folder of training images that hold masks."""
    return [storage.name(folder) for folder in _folders(_children(uri), _MASKS)]


def other_files(uri: str) -> Callable[[str], bool]:
    """What tells of paths below a folder of training images which ones are in other splits, or among masks."""
    splits = _splits_beside(uri)

    def is_other(name: str) -> bool:
        folder, slash, _ = name.partition("/")
        return bool(slash) and (folder in splits or folder.lower() in _MASKS)

    return is_other


def training_files(uri: str) -> dict[str, str]:
    """Every file below a folder of training images, as `relative_files` has them, but for `other_files`."""
    files = relative_files(uri)
    folders = {name.split("/")[0].lower() for name in files if "/" in name}
    if folders.isdisjoint(SPLITS["validation"] + SPLITS["testing"] + _MASKS):  # a million images are not listed twice
        return files
    is_other = other_files(uri)
    return {name: file for name, file in files.items() if not is_other(name)}


def scan_training(uri: str, classes: TissueClasses, config: DataConfig) -> Listing:
    """List the training images of a folder with their labels, without reading any image.

    Args:
        uri: the training folder.
        classes: what labels must fit.
        config: `layout`, or `auto`: a table if there is one with the right columns, else folders named like classes,
            else labels in file names.
    Raises:
        PistoSegError: no such folder, nothing in it, no layout that fits, or a table that cannot be read or used.
    """
    _require_folder(uri)
    files = training_files(uri)
    layout: str = config.layout
    table_uri: str | None = None
    if layout in ("auto", "table"):
        table_uri = table.find_table(uri, files, classes, config.table, required=layout == "table")
    if layout == "auto":
        layout = "table" if table_uri else _detect(uri, files, classes)
    if table_uri is not None:
        images, rejected = table.read_windows(table_uri, uri, files, classes)
    elif layout == "folders":
        images, rejected = _scan_folders(files, classes, refuse_flags=config.layout == "auto")
    else:
        images, rejected = _scan_names(files, classes)
    if not images:
        why = f"none of the {len(rejected)} images can be used; the first, {rejected[0].name}: {rejected[0].reason}"
        raise PistoSegError(
            why if rejected else "has no training images",
            file=uri,
            field=rejected[0].field if rejected else None,
            remedy=rejected[0].remedy if rejected else "put labelled PNG, JPEG or TIFF images there",
        )
    return Listing(_numbered(images), rejected, layout)


def scan_evaluation(uri: str) -> EvaluationListing:
    """List images with their masks, matched by the file name without its suffix.

    Args:
        uri: the folder with img/ and mask/ (or images/, masks/, and WSSS4LUAD's background-mask/), or a data set,
            whose validation split is taken.
    Raises:
        PistoSegError: no such folder, no images in it, or two files of one name.
    """
    _require_folder(uri)
    children = _children(uri)
    image_folder, mask_folder = _first(children, IMAGE_FOLDERS), _first(children, MASK_FOLDERS)
    if image_folder is None or mask_folder is None:
        split = _first(children, SPLITS["validation"])
        if split is not None:
            return scan_evaluation(split)
        raise PistoSegError(
            "has no img/ and mask/ folders",
            file=uri,
            remedy=f"put images into img/ and masks of the same names into mask/; there is {_some(children)}",
        )
    images, masks = _by_stem(image_folder), _by_stem(mask_folder)
    background_folder = _first(children, BACKGROUND_FOLDERS)
    backgrounds = _by_stem(background_folder) if background_folder else {}
    if not images and not masks:
        raise PistoSegError("has no images", file=image_folder, remedy="put PNG, JPEG or TIFF images there")
    return EvaluationListing(
        [EvaluationPair(name, images[name], masks.get(name), backgrounds.get(name)) for name in sorted(images)],
        missing_images=sorted(masks.keys() - images.keys()),
        missing_masks=sorted(images.keys() - masks.keys()),
        folder=uri,
    )


def relative_files(uri: str) -> dict[str, str]:
    """Every file below a folder: path relative to it -> URI, in the order of the paths."""
    path = storage.local_path(uri)
    if path is not None:
        root = str(path.absolute())
    else:
        backend, inner = storage.filesystem(uri)
        root = str(backend.unstrip_protocol(inner))
    prefix = root.rstrip("/") + "/"
    return {item.removeprefix(prefix): item for item in storage.list_files(uri)}


def _detect(uri: str, files: dict[str, str], classes: TissueClasses) -> str:
    """The layout of a folder without a table."""
    images = [name for name in files if labels.is_image(name)]
    folders = {name.split("/")[0] for name in images if "/" in name}
    if any(labels.parse_folder(folder, classes) for folder in folders):
        return "folders"
    if any(_carries_label(posixpath.basename(name), classes) for name in images):
        return "flags"
    if not images:
        seen = f"it holds {_some(files)}" if files else "it is empty"
        raise PistoSegError(
            f"has no training images ({seen})",
            file=uri,
            remedy="give the folder with the labelled PNG, JPEG or TIFF images, or one with training/ in it",
        )
    raise PistoSegError(
        f"holds {len(images)} images ({_some(images)}) but no labels that PistoSeg knows: no table "
        f"({table.expected_columns(classes)}), no folder named like a class ({_some(classes.names)}), no flags like "
        f"{labels.format_flags(labels.one_hot(0, len(classes)))} or prefix like "
        f"{classes.names[0]}{labels.PREFIX_SEPARATOR} in file names",
        file=uri,
        field="layout",
        remedy="label the images in one of these ways, or check that the classes are those of this data set",
    )


def _carries_label(file_name: str, classes: TissueClasses) -> bool:
    """Whether a name has a label, be it right or wrong."""
    try:
        return labels.parse_name(file_name, classes) is not None
    except PistoSegError:
        return True


def _scan_folders(
    files: dict[str, str], classes: TissueClasses, *, refuse_flags: bool
) -> tuple[list[SourceImage], list[Rejection]]:
    in_classes = (name for name in files if labels.is_image(name) and labels.parse_folder(name.split("/")[0], classes))
    all_flagged = refuse_flags and all(_flags_of(posixpath.basename(name), classes) for name in in_classes)

    def label(name: str) -> list[int]:
        folder = name.split("/")[0] if "/" in name else ""
        found = labels.parse_folder(folder, classes)
        if found is None:
            where = "it is in no class folder"
            if folder:
                like = suggestion(folder, classes.names)
                where = f"no class is called {folder!r}, the folder that it is in{like}"
            raise PistoSegError(
                where, field="label", remedy=f"move it to a folder named like a class: {', '.join(classes.names)}"
            )
        base = posixpath.basename(name)
        # Of two classes, [10] may be a number; where all names have such ones, they are flags.
        are_flags = all_flagged or len(classes) > 2 or labels.are_apart(base)
        flags = _flags_of(base, classes) if refuse_flags and are_flags else None
        if flags not in (None, found):
            raise PistoSegError(
                f"the flags in its name and its folder {folder!r} contradict each other",
                field="label",
                remedy="set data.layout to the one that is right, flags or folders",
            )
        return found

    return _scan(files, label)


def _flags_of(file_name: str, classes: TissueClasses) -> list[int] | None:
    """The flags of a name that is labelled with one for each class; brackets of anything else are none."""
    try:
        return labels.parse_flags(file_name, len(classes)) if classes.codec != "prefix" else None
    except PistoSegError:
        return None


def _scan_names(files: dict[str, str], classes: TissueClasses) -> tuple[list[SourceImage], list[Rejection]]:
    def label(name: str) -> list[int]:
        found = labels.parse_name(posixpath.basename(name), classes)
        example = labels.format_flags(labels.one_hot(0, len(classes)))
        if found is None:
            raise PistoSegError(
                "its name carries no label",
                field="label",
                remedy=f"end the name with one flag per class, e.g. {example}",
            )
        return found

    return _scan(files, label)


def _scan(files: dict[str, str], label: Callable[[str], list[int]]) -> tuple[list[SourceImage], list[Rejection]]:
    images, rejected = [], []
    for name, uri in files.items():
        try:
            if name.lower().endswith(_OTHER_IMAGES):
                raise PistoSegError("is of a format that is not read", field="format", remedy="save it as PNG or TIFF")
            if labels.is_image(name):
                require_utf8(name)
                images.append(SourceImage(name, uri, (Window.whole(label(name)),)))
        except PistoSegError as error:
            rejected.append(Rejection.of(error, readable(name)))
    return images, rejected


def _numbered(images: list[SourceImage]) -> list[SourceImage]:
    """Fill in the ids: positions before anything is rejected on reading, so that they depend on the listing alone."""
    numbered, first_window = [], 0
    for index, image in enumerate(images):
        numbered.append(replace(image, index=index, first_window=first_window))
        first_window += len(image.windows)
    return numbered


def _children(uri: str) -> list[str]:
    return [child for child in storage.list_dir(uri) if not storage.name(child).startswith(".")]


def _folders(children: list[str], names: tuple[str, ...]) -> Iterator[str]:
    """The folders of these names, in any case and in the order of the names."""
    by_name = {storage.name(child).lower(): child for child in children}
    return (by_name[name] for name in names if name in by_name and storage.is_dir(by_name[name]))


def _first(children: list[str], names: tuple[str, ...]) -> str | None:
    """The first folder of these names, in any case."""
    return next(_folders(children, names), None)


def _has_masks(uri: str) -> bool:
    """Whether `scan_evaluation` finds img/ and mask/ in a folder, or in the validation split in it."""
    children = _children(uri)
    if all(_first(children, names) for names in (IMAGE_FOLDERS, MASK_FOLDERS)):
        return True
    split = _first(children, SPLITS["validation"])
    return split is not None and _has_masks(split)


def _by_stem(folder: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, uri in relative_files(folder).items():
        if not labels.is_image(name):
            continue
        require_utf8(name)
        stem = composed(labels.stem(name))
        if stem in found:
            raise PistoSegError(
                f"{storage.name(found[stem])} and {storage.name(uri)} have the same name but for the suffix",
                file=folder,
                remedy="keep one of the two",
            )
        found[stem] = uri
    return found


def _require_folder(uri: str) -> None:
    if not storage.is_dir(uri):
        problem = "is not a folder" if storage.exists(uri) else "does not exist"
        raise PistoSegError(problem, file=uri, remedy="give the folder of the data set (--data)")


def _some(names: Iterable[str]) -> str:
    listed = [readable(storage.name(name)) for name in names]
    if not listed:
        return "nothing"
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
