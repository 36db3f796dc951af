"""Sheets of images with masks drawn over them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pistoseg.classes import TissueClasses

CELL = 224
LARGEST = 4 * CELL
"""Sides of images that are coloured at their own size, px; larger ones are shrunk before."""
MARGIN = 8
TEXT = 16
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Panel:
    """One picture of a sheet.

    Args:
        title: written above it.
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8 class ids drawn over the image, or None.
    """

    title: str
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8] | None = None


def overlay(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], classes: TissueClasses, opacity: float = 0.55
) -> NDArray[np.uint8]:
    """Class colours over an image, (H, W, 3) uint8; background and unknown pixels stay as they are."""
    colors = classes.palette()[mask].astype(np.float32)
    strength = np.where(mask < len(classes), opacity, 0.0)[..., None]
    return np.round(image * (1 - strength) + colors * strength).astype(np.uint8)


def colored(mask: NDArray[np.uint8], classes: TissueClasses) -> NDArray[np.uint8]:
    """A mask in the classes' colours, (H, W) uint8 -> (H, W, 3) uint8."""
    return classes.palette()[mask]


def shrunk(panel: Panel) -> Panel:
    """A panel of at most `LARGEST` px a side, of which a sheet shows as much as of the whole."""
    if max(panel.image.shape[:2]) <= LARGEST:
        return panel
    size = _fitted_size(panel.image, LARGEST)
    image = np.asarray(Image.fromarray(panel.image).resize(size, Image.Resampling.BILINEAR))
    if panel.mask is None:
        return Panel(panel.title, image)
    return Panel(panel.title, image, np.asarray(Image.fromarray(panel.mask).resize(size, Image.Resampling.NEAREST)))


def sheet(rows: list[list[Panel]], classes: TissueClasses, columns: int = 2) -> NDArray[np.uint8]:
    """Lay rows of panels out, `columns` rows side by side, above a legend of the classes.

    Args:
        rows: panels that belong together.
        classes: colours and names of the legend.
        columns: rows beside each other.
    Returns:
        (H, W, 3) uint8 RGB.
    """
    rows = [[shrunk(panel) for panel in row] for row in rows]
    width = max((len(row) for row in rows), default=1)
    group = width * (CELL + MARGIN) + MARGIN
    lines = [rows[start : start + columns] for start in range(0, len(rows), columns)]
    heights = [TEXT + MARGIN + max(_fitted_size(panel.image)[1] for row in line for panel in row) for line in lines]
    font = ImageFont.load_default(12)
    places = legend_places(classes, columns * group - 2 * MARGIN, font)
    canvas = Image.new("RGB", (columns * group, sum(heights) + places[-1][1] + TEXT + 3 * MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    top = MARGIN
    for line, height in zip(lines, heights, strict=True):
        for number, row in enumerate(line):
            for column, panel in enumerate(row):
                x = MARGIN + number * group + column * (CELL + MARGIN)
                draw.text((x, top), _short(panel.title), "black", font)
                pixels = panel.image if panel.mask is None else overlay(panel.image, panel.mask, classes)
                fitted = Image.fromarray(pixels).resize(_fitted_size(pixels), Image.Resampling.BILINEAR)
                canvas.paste(fitted, (x, top + TEXT))
        top += height
    for tissue, place in zip(classes.classes, places, strict=True):
        x, y = MARGIN + place[0], top + MARGIN + place[1]
        draw.rectangle((x, y, x + TEXT - 4, y + TEXT - 4), tissue.color, "black")
        draw.text((x + TEXT, y - 1), _short(tissue.name), "black", font)
    return np.asarray(canvas)


def legend_places(classes: TissueClasses, width: int, font: Font) -> list[tuple[int, int]]:
    """Where the squares of a legend go, a name beside each, from left to right in lines of this width: x and y, px."""
    places, x, y = [], 0, 0
    for tissue in classes.classes:
        taken = TEXT + int(font.getlength(_short(tissue.name)))
        if x and x + taken > width:
            x, y = 0, y + TEXT
        places.append((x, y))
        x += taken + 2 * MARGIN
    return places


def _fitted_size(pixels: NDArray[np.uint8], side: int = CELL) -> tuple[int, int]:
    """Width and height at which an image fits into a square, by default a cell."""
    height, width = pixels.shape[:2]
    ratio = side / max(height, width)
    return max(1, round(width * ratio)), max(1, round(height * ratio))


def _short(text: str, length: int = 34) -> str:
    return text if len(text) <= length else text[: length // 2 - 1] + "…" + text[-length // 2 :]
