"""The first thing that a pathologist sees of a segmented slide: slide, tissue map, areas, scale, in one picture."""

from __future__ import annotations

import math
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pistoseg.classes import TissueClasses
from pistoseg.outputs.pictures import overlay

PANEL = (900, 900)
"""Largest width and height of the slide and of the map, px."""
SMALLEST = 420
LARGEST_ZOOM = 8
PNG_LEVEL = 3
"""Of zlib: two thirds of the time of its default, and a hundredth larger."""
MARGIN = 28
LEGEND = 430
LINE = 34
INK = (32, 36, 42)
GREY = (110, 116, 124)
FRAME = (205, 209, 214)


def downsample_mask(mask: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """A mask at a fraction of its size: the px in the middle of each square of factor x factor px.

    One px stands for many, so that the shares of the classes stay what they are on average; only the rows that are
    needed are read.

    Args:
        mask: (h, w) uint8.
        factor: px of the mask per px of the result, at least 1.
    Returns:
        (ceil(h / factor), ceil(w / factor)) uint8.
    """
    rows, columns = (
        np.minimum((np.arange(math.ceil(size / factor)) + 0.5) * factor, size - 1).astype(np.int64)
        for size in mask.shape
    )
    small = np.empty((len(rows), len(columns)), np.uint8)
    for position, row in enumerate(rows):
        small[position] = mask[row][columns]
    return small


def write_overview(
    path: Path,
    thumbnail: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    classes: TissueClasses,
    areas: dict[str, Any],
    mpp: float,
    *,
    title: str = "",
    note: str = "",
) -> None:
    """Draw a slide, its tissue map, the classes' areas and a scale bar as a PNG.

    Args:
        path: local file to write.
        thumbnail: (h, w, 3) uint8 RGB of the slide.
        mask: class ids of the same field as (h', w') uint8; drawn at the thumbnail's size.
        classes: names and colours.
        areas: of `areas.slide_areas`.
        mpp: micrometres per px of the thumbnail.
        title: above the picture, the slide's name.
        note: below the areas, such as that the slide has no tissue.
    """
    height, width = thumbnail.shape[:2]
    zoom = min(PANEL[0] / width, PANEL[1] / height, LARGEST_ZOOM)
    size = max(1, round(width * zoom)), max(1, round(height * zoom))
    slide = Image.fromarray(thumbnail).resize(size, Image.Resampling.LANCZOS)
    ids = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    painted = Image.fromarray(_painted(np.asarray(slide), ids, classes))
    beside = size[0] <= 1.35 * size[1]
    top = MARGIN + (LINE + 10 if title else 0)
    step = (size[0] + MARGIN, 0) if beside else (0, size[1] + MARGIN)
    field = size[0] + step[0], size[1] + step[1]
    rows = len(classes) + 5 + bool(note)
    canvas_size = (field[0] + LEGEND + 3 * MARGIN, top + max(field[1], rows * LINE, SMALLEST) + MARGIN)
    canvas = Image.new("RGB", canvas_size, "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((MARGIN, MARGIN - 6), _shortened(title, canvas_size[0] - 2 * MARGIN, _font(26)), INK, _font(26))
    for number, picture in enumerate((slide, painted)):
        corner = MARGIN + number * step[0], top + number * step[1]
        canvas.paste(picture, corner)
        draw.rectangle((corner[0] - 1, corner[1] - 1, corner[0] + size[0], corner[1] + size[1]), outline=FRAME)
    _scale_bar(draw, (MARGIN, top + size[1]), size[0], mpp / zoom)
    _legend(draw, (field[0] + 2 * MARGIN, top), classes, areas, note)
    canvas.save(path, format="PNG", compress_level=PNG_LEVEL)


def _painted(slide: NDArray[np.uint8], mask: NDArray[np.uint8], classes: TissueClasses) -> NDArray[np.uint8]:
    """The map over the slide, with the borders of the classes in full colour so that the tissue shows through."""
    border = np.zeros(mask.shape, bool)
    border[1:] |= mask[1:] != mask[:-1]
    border[:-1] |= mask[1:] != mask[:-1]
    border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    border[:, :-1] |= mask[:, 1:] != mask[:, :-1]
    border &= mask < len(classes)
    picture = overlay(slide, mask, classes, opacity=0.45)
    picture[border] = classes.palette()[mask[border]]
    return picture


def _legend(
    draw: ImageDraw.ImageDraw, origin: tuple[int, int], classes: TissueClasses, areas: dict[str, Any], note: str
) -> None:
    """The classes with area and share of the tissue, the largest first."""
    left, y = origin
    right = left + LEGEND
    columns = right - 90, right  # right edges of the area and of the share
    draw.text((columns[0] - 20, y), "mm", GREY, _font(16), anchor="ra")
    draw.text((columns[0] - 14, y - 3), "2", GREY, _font(11), anchor="ra")
    draw.text((columns[1], y), "% of tissue", GREY, _font(16), anchor="ra")
    y += LINE
    by_area = sorted(classes.classes, key=lambda tissue: -areas["classes"][tissue.name]["um2"])
    for tissue in by_area:
        area = areas["classes"][tissue.name]
        color = INK if area["pixels"] else GREY
        draw.rounded_rectangle((left, y + 1, left + 20, y + 21), 4, fill=tissue.color, outline=INK)
        draw.text((left + 32, y), _shortened(tissue.name, LEGEND - 210, _font(20)), color, _font(20))
        draw.text((columns[0] - 14, y), _mm2(area["mm2"]), color, _font(20), anchor="ra")
        draw.text((columns[1], y), f"{100 * area['share']:.1f}", color, _font(20), anchor="ra")
        y += LINE
    draw.line((left, y + 2, right, y + 2), FRAME, 2)
    y += 12
    draw.text((left + 32, y), "all tissue", INK, _font(20))
    draw.text((columns[0] - 14, y), _mm2(areas["tissue_mm2"]), INK, _font(20), anchor="ra")
    if areas["tumor_stroma_ratio"] is not None:
        y += LINE
        draw.text((left + 32, y), "stroma / (tumor + stroma)", INK, _font(20))
        draw.text((columns[1], y), f"{100 * areas['tumor_stroma_ratio']:.1f}", INK, _font(20), anchor="ra")
    if note:
        draw.text((left, y + LINE + 4), _shortened(note, LEGEND, _font(18)), GREY, _font(18))


def _scale_bar(draw: ImageDraw.ImageDraw, bottom_left: tuple[int, int], width: int, mpp: float) -> None:
    """A bar of a round length, a quarter of the picture at most, on a plate that keeps it legible on any tissue."""
    length, label = round_length(width * mpp / 4)
    bar = max(2, round(length / mpp))
    x, y = bottom_left[0] + 14, bottom_left[1] - 14
    plate = max(bar, int(draw.textlength(label, _font(18)))) + 20
    draw.rounded_rectangle((x, y - 46, x + plate, y), 6, fill="white", outline=FRAME)
    draw.text((x + plate / 2, y - 22), label, INK, _font(18), anchor="mb")
    draw.rectangle((x + (plate - bar) / 2, y - 15, x + (plate + bar) / 2, y - 10), fill=INK)


def round_length(longest: float) -> tuple[float, str]:
    """The longest of 1, 2, 5, 10, 20 ... um that is not longer, in micrometres and as a label.

    The label is in mm at every scale: the font that Pillow brings has no micro sign.
    """
    power = 10.0 ** math.floor(math.log10(longest))
    length = max(digit * power for digit in (1, 2, 5) if digit == 1 or digit * power <= longest)
    return length, f"{length / 1e3:.12g} mm"


def _mm2(area: float) -> str:
    if 0 < area < 0.001:
        return "< 0.001"
    return f"{area:.3f}" if area < 1 else f"{area:.2f}" if area < 100 else f"{area:.0f}"


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A text that fits, in the letters that the font has."""
    text = unicodedata.normalize("NFKD", text)
    text = "".join(c if c.isascii() else "?" for c in text if not unicodedata.combining(c))
    while font.getlength(text) > width and len(text) > 4:
        text = text[: len(text) // 2 - 1] + "…" + text[len(text) // 2 + 1 :].lstrip("…")
    return text


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
