"""Where which tissue is: the mask is made first, the drawing follows it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pistoseg.classes import TissueClass, TissueClasses
from pistoseg.phantom.noise import Window, noise, scalar

TUMOR, STROMA, LYMPHOCYTES, NECROSIS, ALVEOLI, BACKGROUND = range(6)

PHANTOM_CLASSES = TissueClasses(
    (
        TissueClass("tumor", (205, 51, 51)),
        TissueClass("stroma", (0, 150, 110)),
        TissueClass("lymphocytes", (40, 40, 160)),
        TissueClass("necrosis", (140, 90, 40)),
        TissueClass("alveoli", (243, 152, 0)),
    ),
    background_id=BACKGROUND,
)

REFERENCE_MPP = 0.5
DOMAIN = 130.0
"""Size of a tissue's patches in micrometres."""


def draw_mask(
    seed: int,
    height: int,
    width: int,
    mpp: float = REFERENCE_MPP,
    classes: Sequence[int] = range(5),
    *,
    origin: tuple[int, int] = (0, 0),
    step: int = 1,
    domain: float = DOMAIN,
    extent: tuple[int, int] | None = None,
) -> NDArray[np.uint8]:
    """A window of the endless tissue map of a case.

    Air in alveoli and the lumens of tumor glands are background, as annotators of H&E mark them.

    Args:
        seed: of the case; windows of one seed fit together.
        height: rows of the result.
        width: columns of the result.
        mpp: micrometres per pixel.
        classes: class ids that may occur.
        origin: (y, x) of the window's first pixel in the case, px; may be negative.
        step: px between samples.
        domain: typical size of a connected piece of one tissue, micrometres.
        extent: (height, width) of a slide in px; beyond an organic outline in it all is background.
    Returns:
        (height, width) uint8 of class ids and the background's id, 5.
    """
    window = Window(*origin, height, width, step)
    px = 1 / mpp
    best = np.full((height, width), -np.inf, np.float32)
    mask = np.full((height, width), BACKGROUND, np.uint8)
    for tissue in classes:
        score = noise(seed, f"tissue {tissue}", window, domain * px)
        score += 0.4 * noise(seed, f"nests {tissue}", window, 0.3 * domain * px)
        score += 0.1 * noise(seed, f"edge {tissue}", window, 9 * px) + scalar(seed, f"share {tissue}", -0.35, 0.35)
        if tissue == ALVEOLI:
            score += 0.3  # most of it is air
        mask[score > best] = tissue
        np.maximum(best, score, out=best)
    if (mask == ALVEOLI).any():
        mask[(mask == ALVEOLI) & (_septum_distance(seed, window, px) > 0)] = BACKGROUND
    if (mask == TUMOR).any():
        if STROMA in classes:
            mask[(mask == TUMOR) & (_strand_distance(seed, window, px) < 0)] = STROMA
        lumen = noise(seed, "lumen", window, 17 * px) + 0.25 * noise(seed, "lumen edge", window, 5 * px)
        mask[(mask == TUMOR) & (lumen > scalar(seed, "lumens", 1.6, 3.2))] = BACKGROUND
    if extent is not None:
        mask[_outside(seed, window, px, extent)] = BACKGROUND
    return mask


def _septum_distance(seed: int, window: Window, px: float) -> NDArray[np.float32]:
    """Px from the surface of the nearest septum, negative in it: walls of air sacs of two sizes."""
    distance = np.minimum(
        _curve_distance(seed, "septa 0", window, scalar(seed, "sacs 0", 24, 38) * px, px),
        _curve_distance(seed, "septa 1", window, scalar(seed, "sacs 1", 17, 28) * px, px),
    )
    thickness = 1.0 + 0.35 * noise(seed, "thickness", window, 30 * px) + 0.2 * noise(seed, "knots", window, 7 * px)
    thickness += 0.12 * noise(seed, "rough", window, 2.5 * px)
    distance -= np.maximum(thickness * scalar(seed, "septum", 2.4, 4.2), 0.6) * px
    return distance


def _strand_distance(seed: int, window: Window, px: float) -> NDArray[np.float32]:
    """The same for strands of stroma that part some tumors into nests."""
    distance = _curve_distance(seed, "strands", window, 42 * px, px)
    width = noise(seed, "strand width", window, 90 * px) + scalar(seed, "desmoplasia", -1.6, 0.4)
    distance -= (6.0 * np.minimum(width, 1.2) + 0.7 * noise(seed, "strand edge", window, 6 * px)) * px
    return distance


def _curve_distance(seed: int, name: str, window: Window, scale: float, px: float) -> NDArray[np.float32]:
    """Px to the zero line of a random field: (height, width) float32, not negative, right near the line only."""
    step = window.step
    window = Window(window.y - step, window.x - step, window.height + 2, window.width + 2, step)  # for the slopes
    field = noise(seed, name, window, scale) + 0.12 * noise(seed, f"{name} waves", window, 9 * px)
    slope_y, slope_x = np.gradient(field, step)
    distance = np.abs(field) / np.maximum(np.hypot(slope_y, slope_x), 0.3 / scale)
    return np.asarray(distance[1:-1, 1:-1], np.float32)


def _outside(seed: int, window: Window, px: float, extent: tuple[int, int]) -> NDArray[np.bool_]:
    y = ((window.rows() + 0.5) / extent[0] * 2 - 1)[:, None]
    x = ((window.columns() + 0.5) / extent[1] * 2 - 1)[None, :]
    ragged = noise(seed, "outline", window, max(extent) / 7) * 0.07 + noise(seed, "rim", window, 40 * px) * 0.012
    edge = 0.86 + ragged
    return np.asarray(np.abs(y) ** 3 + np.abs(x) ** 3 > edge * edge * edge, bool)
