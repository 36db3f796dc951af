"""Sheets of images with masks drawn over them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pistoseg.classes import TissueClasses

CELL = 224
MARGIN = 8
TEXT = 16


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


def sheet(rows: list[list[Panel]], classes: TissueClasses, columns: int = 2) -> NDArray[np.uint8]:
    """Lay rows of panels out, `columns` rows side by side, above a legend of the classes.

    Args:
        rows: panels that belong together.
        classes: colours and names of the legend.
        columns: rows beside each other.
    Returns:
        (H, W, 3) uint8 RGB.
    """
    width = max((len(row) for row in rows), default=1)
    group = width * (CELL + MARGIN) + MARGIN
    lines = -(-len(rows) // columns)
    line = CELL + TEXT + MARGIN
    canvas = Image.new("RGB", (columns * group, lines * line + TEXT + 3 * MARGIN), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for number, row in enumerate(rows):
        top, left = MARGIN + number // columns * line, MARGIN + number % columns * group
        for place, panel in enumerate(row):
            x = left + place * (CELL + MARGIN)
            draw.text((x, top), _short(panel.title), "black", font)
            pixels = panel.image if panel.mask is None else overlay(panel.image, panel.mask, classes)
            canvas.paste(_fitted(pixels), (x, top + TEXT))
    legend(draw, classes, (MARGIN, lines * line + 2 * MARGIN), font)
    return np.asarray(canvas)


def legend(
    draw: ImageDraw.ImageDraw,
    classes: TissueClasses,
    origin: tuple[int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Draw a square and a name for each class, from left to right."""
    x, y = origin
    for tissue in classes.classes:
        draw.rectangle((x, y, x + TEXT - 4, y + TEXT - 4), tissue.color, "black")
        draw.text((x + TEXT, y - 1), tissue.name, "black", font)
        x += TEXT + MARGIN * 2 + int(draw.textlength(tissue.name, font))


def _fitted(pixels: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(pixels)
    ratio = CELL / max(image.size)
    size = tuple(max(1, round(side * ratio)) for side in image.size)
    return image.resize((size[0], size[1]), Image.Resampling.BILINEAR)


def _short(text: str, length: int = 34) -> str:
    return text if len(text) <= length else text[: length // 2 - 1] + "…" + text[-length // 2 :]
