"""Labelled windows out of annotated tissue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from pistoseg.config import DataConfig
from pistoseg.errors import PistoSegError
from pistoseg.patches.annotations import Annotations
from pistoseg.patches.source import Window

_ROWS = 64
"""Rows of the grid that are measured at a time: memory does not grow with the slide."""


@dataclass(frozen=True)
class Cut:
    """What a slide's annotations gave.

    Args:
        windows: from top to bottom, in level-0 px.
        partly: windows over annotated tissue that were left out because they are partly unannotated.
        overlap: share of the annotated area on which annotations of several classes lie.
    """

    windows: tuple[Window, ...]
    partly: int
    overlap: float


def cut_windows(
    annotations: Annotations,
    width: int,
    height: int,
    scale: tuple[float, float],
    n_classes: int,
    data: DataConfig,
) -> Cut:
    """Cut windows on a grid from the top left corner of a slide, with the classes that they show.

    A window shows every class that covers at least `window_min_share` of it. It is left out where that much of it or
    more is not annotated, as an unseen tissue could be there, and where it shows no class. So a window inside of one
    class is a single-tissue image, and one over several classes carries all of them. Where annotations lie over each
    other, a window shows what each of them says.

    Args:
        annotations: in level-0 px.
        width: of level 0, px.
        height: of level 0, px.
        scale: level-0 px per network px, (x, y).
        n_classes: L; higher ids of annotations are background.
        data: `window` and `window_stride` in network px, and `window_min_share`.
    """
    if not annotations.areas:
        return Cut((), 0, 0.0)
    everything = shapely.union_all(list(annotations.areas.values()))
    left, top, right, bottom = shapely.bounds(everything)
    stride = data.window_stride or data.window
    xs, box_width = _starts(width, scale[0], data.window, stride, left, right)
    ys, box_height = _starts(height, scale[1], data.window, stride, top, bottom)
    windows: list[Window] = []
    partly = 0
    for first in range(0, len(ys), _ROWS):
        rows = ys[first : first + _ROWS]
        shares = np.zeros((n_classes, len(rows), len(xs)))
        for tissue, area in annotations.areas.items():
            if tissue < n_classes:
                shares[tissue] = _shares(area, xs, rows, box_width, box_height)
        shown = shares >= data.window_min_share
        whole = 1 - _shares(everything, xs, rows, box_width, box_height) < data.window_min_share
        partly += int((shown.any(0) & ~whole).sum())
        for row, column in np.argwhere(shown.any(0) & whole):
            labels = tuple(shown[:, row, column].astype(int).tolist())
            windows.append(Window(int(xs[column]), int(rows[row]), box_width, box_height, labels))
    total = float(shapely.area(everything))
    overlap = (sum(float(shapely.area(area)) for area in annotations.areas.values()) - total) / total
    return Cut(tuple(windows), partly, max(0.0, overlap))


def _starts(side: int, scale: float, size: int, stride: int, low: float, high: float) -> tuple[NDArray[np.int64], int]:
    """Where windows that reach between low and high begin along one axis, and how long they are; level-0 px."""
    length = round(size * scale)
    if length < 1:
        raise PistoSegError(
            f"{size} px are less than one px of the slide", field="data.window", remedy="cut larger windows"
        )
    count = max(0, int((side - length) / (stride * scale)) + 1)
    starts = np.unique(np.round(np.arange(count) * stride * scale).astype(np.int64))
    starts = starts[starts + length <= side]
    return starts[(starts + length > low) & (starts < high)], length


def _shares(area: Any, xs: NDArray[np.int64], ys: NDArray[np.int64], width: int, height: int) -> NDArray[np.float64]:
    """Share of windows that an area covers, (len(ys), len(xs)).

    The grid is halved until windows lie inside or outside as a whole, or stand alone, so that every cut is made on
    what is left of the area there.
    """
    shares = np.zeros((len(ys), len(xs)))
    if not len(xs) or not len(ys):
        return shares
    box = shapely.box(xs[0], ys[0], xs[-1] + width, ys[-1] + height)
    inside = shapely.intersection(area, box)
    if inside.is_empty:
        return shares
    share = float(inside.area / box.area)
    if shares.size == 1 or share > 1 - 1e-12:
        shares[:] = share
    elif len(xs) > len(ys):
        half = len(xs) // 2
        shares[:, :half] = _shares(inside, xs[:half], ys, width, height)
        shares[:, half:] = _shares(inside, xs[half:], ys, width, height)
    else:
        half = len(ys) // 2
        shares[:half] = _shares(inside, xs, ys[:half], width, height)
        shares[half:] = _shares(inside, xs, ys[half:], width, height)
    return shares
