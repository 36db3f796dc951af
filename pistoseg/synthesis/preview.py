"""A contact sheet of synthesized images for people to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pistoseg.classes import IGNORE_ID, TissueClasses

_GAP = 8  # px between pictures
_LINE = 24  # height of a line of the legend (px)
_INK = (40, 40, 40)


def sheet(
    samples: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]], classes: TissueClasses, columns: int | None = None
) -> NDArray[np.uint8]:
    """Show images with their masks beside them, in the colours of the classes, over a legend.

    Args:
        samples: (H, W, 3) uint8 RGB images with their (H, W) uint8 masks.
        classes: names and colours; the legend says which share of all pixels each class has.
        columns: pairs in a row; None: about as wide as high.
    Returns:
        (h, w, 3) uint8 RGB.
    """
    if not samples:
        raise ValueError("a sheet needs at least one sample")
    columns = min(len(samples), columns or max(1, round(math.sqrt(len(samples) / 2))))
    rows = math.ceil(len(samples) / columns)
    height = max(image.shape[0] for image, _ in samples)
    width = max(image.shape[1] for image, _ in samples)
    legend = _legend(samples, classes)
    pair = 2 * width + 2
    lines = _wrapped(legend, columns * (pair + _GAP) - _GAP)
    size = (rows * (height + _GAP) + _GAP + len(lines) * _LINE, columns * (pair + _GAP) + _GAP, 3)
    canvas = np.full(size, 255, np.uint8)
    for i, (image, mask) in enumerate(samples):
        top, left = _GAP + i // columns * (height + _GAP), _GAP + i % columns * (pair + _GAP)
        _put(canvas, image, top, left)
        _put(canvas, _framed(classes.palette()[mask]), top, left + width + 2)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        _draw_line(draw, line, rows * (height + _GAP) + _GAP + row * _LINE)
    return np.asarray(picture)


_Entry = tuple[str, tuple[int, int, int]]


def _legend(samples: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]], classes: TissueClasses) -> list[_Entry]:
    counts = np.sum([np.bincount(mask.ravel(), minlength=256) for _, mask in samples], axis=0)
    ids = list(range(len(classes)))
    names = [*classes.names]
    for value, name in ((classes.background_id, "background"), (IGNORE_ID, "unknown")):
        if counts[value] and value not in ids:
            ids.append(value)
            names.append(name)
    colors = classes.palette()[ids].tolist()
    shares = counts[ids] / counts.sum()
    return [(f"{name} {share:.0%}", tuple(color)) for name, color, share in zip(names, colors, shares, strict=True)]


def _wrapped(entries: list[_Entry], width: int) -> list[list[tuple[int, _Entry]]]:
    """Lines of entries with their places from the left (px)."""
    lines: list[list[tuple[int, _Entry]]] = [[]]
    x = _GAP
    for entry in entries:
        length = _LINE + int(_font().getlength(entry[0])) + 2 * _GAP
        if lines[-1] and x + length > width:
            lines.append([])
            x = _GAP
        lines[-1].append((x, entry))
        x += length
    return lines


def _draw_line(draw: ImageDraw.ImageDraw, line: list[tuple[int, _Entry]], top: int) -> None:
    for x, (text, color) in line:
        draw.rectangle((x, top + 4, x + 15, top + 19), fill=color, outline=_INK)
        draw.text((x + _LINE, top + _LINE // 2), text, fill=_INK, font=_font(), anchor="lm")


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(14)


def _put(canvas: NDArray[np.uint8], picture: NDArray[np.uint8], top: int, left: int) -> None:
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture


def _framed(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A white background would not show where a mask ends."""
    mask[[0, -1]] = 200
    mask[:, [0, -1]] = 200
    return mask
