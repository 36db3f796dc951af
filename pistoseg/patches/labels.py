"""Image-level labels in file and folder names: every way in which published releases write them.

A label is one flag (0 or 1) per tissue class, in the order of the classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pistoseg.classes import TissueClasses
from pistoseg.errors import PistoSegError, suggestion

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")

_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_SEPARATORS = re.compile(r"[\s,;_]+")
PREFIX_SEPARATOR = "___"


def is_image(file_name: str) -> bool:
    """Whether the name ends like a PNG, JPEG or TIFF, in any case."""
    return file_name.lower().endswith(IMAGE_SUFFIXES)


def stem(file_name: str) -> str:
    """The name without its image suffix; other dots belong to the name (`a.b-[1, 0]` has none to lose)."""
    lowered = file_name.lower()
    for suffix in IMAGE_SUFFIXES:
        if lowered.endswith(suffix):
            return file_name[: -len(suffix)]
    return file_name


def parse_flags(file_name: str, n_classes: int) -> list[int] | None:
    """Read the flags in the last pair of brackets of a file name.

    Understands `x-[1, 0, 1].png`, `x[101].png`, `x[1 0 1].png` and `x+0[101].png`.

    Args:
        file_name: the last part of a path, with or without its suffix.
        n_classes: how many flags there must be.
    Returns:
        n_classes values of 0 or 1; None when the name has no brackets, or only words in them (`[copy]`).
    Raises:
        PistoSegError: the brackets hold another number of flags, or other values than 0 and 1.
    """
    groups = _BRACKETS.findall(stem(file_name))
    if not groups:
        return None
    content = groups[-1].strip()
    if content and not any(c.isdigit() for c in content):
        return None
    tokens = [token for token in _SEPARATORS.split(content) if token]
    if len(tokens) == 1 and len(tokens[0]) > 1 and tokens[0].isdecimal():
        tokens = list(tokens[0])
    wrong = [token for token in tokens if token not in ("0", "1")]
    if wrong:
        raise PistoSegError(
            f"the label [{content}] has the value {wrong[0]}, and a flag is 0 or 1",
            file=file_name,
            field="label",
            remedy=f"write one flag of 0 or 1 for each of the {n_classes} classes",
        )
    if len(tokens) != n_classes:
        raise PistoSegError(
            f"the label [{content}] has {len(tokens)} flags, and there are {n_classes} classes",
            file=file_name,
            field="label",
            remedy="rename the file, or choose the classes that it was labelled with (--preset or classes)",
        )
    return [int(token) for token in tokens]


def are_apart(file_name: str) -> bool:
    """Whether the last brackets of a file name hold values apart, as `[1, 0]`, and no number like that of `[10]`."""
    groups = _BRACKETS.findall(stem(file_name))
    return bool(groups) and _SEPARATORS.search(groups[-1].strip()) is not None


def format_flags(labels: Sequence[int]) -> str:
    """Write flags as WSSS4LUAD does: `[1, 0, 1]`."""
    return "[" + ", ".join(str(int(flag)) for flag in labels) + "]"


def class_named(name: str, classes: TissueClasses) -> int | None:
    """The id of the class with this name, in any case; None when there is none."""
    try:
        return classes.index(name)
    except KeyError:
        return None


def parse_prefix(file_name: str, classes: TissueClasses) -> list[int] | None:
    """Read the class before the three underscores of names like `TUM___x.jpg`.

    Returns:
        One flag per class with exactly one set; None when the name has no such prefix.
    Raises:
        PistoSegError: the prefix is no class.
    """
    prefix, separator, _ = file_name.partition(PREFIX_SEPARATOR)
    if not separator:
        return None
    index = class_named(prefix, classes)
    if index is None:
        raise PistoSegError(
            f"no class is called {prefix!r}{suggestion(prefix, classes.names)}",
            file=file_name,
            field="label",
            remedy=f"rename the file, or add the class; the classes are {', '.join(classes.names)}",
        )
    return one_hot(index, len(classes))


def parse_name(file_name: str, classes: TissueClasses) -> list[int] | None:
    """Read the label of a file name as the classes' codec says: flags in brackets, a class prefix, or either.

    Returns:
        One flag per class, or None when the name carries no label.
    Raises:
        PistoSegError: the name carries a label that does not fit the classes.
    """
    flags = parse_flags(file_name, len(classes)) if classes.codec != "prefix" else None
    if flags is None and classes.codec != "flags":
        return parse_prefix(file_name, classes)
    return flags


def parse_folder(folder_name: str, classes: TissueClasses) -> list[int] | None:
    """Read a folder's name as a class, in any case; None when it is no class."""
    index = class_named(folder_name, classes)
    return None if index is None else one_hot(index, len(classes))


def one_hot(index: int, n_classes: int) -> list[int]:
    """A label with one class set."""
    return [int(i == index) for i in range(n_classes)]
