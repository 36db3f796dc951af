"""Nuclei: what each kind looks like, pre-rendered, and where it is put."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from pistoseg.phantom.geometry import ALVEOLI, LYMPHOCYTES, NECROSIS, STROMA, TUMOR
from pistoseg.phantom.noise import Window, sites

ANGLES = 16
_VARIANTS = 6
_OVERSAMPLING = 3


@dataclass(frozen=True)
class Kind:
    """One kind of nucleus (or debris).

    Args:
        pitch: distance between places where one may be, micrometres.
        chance: by class id, the chance that a place is taken: (everywhere, more per unit of the cluster field).
        diameter: mean and spread, micrometres.
        aspect: least and greatest ratio of the short to the long axis.
        amount: least and greatest haematoxylin, optical density.
        clumps: contrast of the chromatin.
        rim: darkening of the membrane.
        nucleolus: chance of each of two nucleoli.
        roughness: deviation of the outline from an ellipse.
        oriented: whether the long axis follows the fibres.
    """

    name: str
    pitch: float
    chance: dict[int, tuple[float, float]]
    diameter: tuple[float, float]
    aspect: tuple[float, float]
    amount: tuple[float, float]
    clumps: float = 0.2
    rim: float = 0.0
    nucleolus: float = 0.0
    roughness: float = 0.05
    oriented: bool = False


KINDS = (
    Kind("ghost", 8.5, {NECROSIS: (0.5, 0.2)}, (7.6, 0.2), (0.6, 1.0), (0.07, 0.17), 0.35, 0.07, roughness=0.12),
    Kind("tumor", 8.6, {TUMOR: (0.84, 0.05), NECROSIS: (0.02, 0.03), STROMA: (0.006, 0.006), LYMPHOCYTES: (0.015, 0.0)},
         (8.3, 0.22), (0.55, 1.0), (0.22, 0.56), 0.17, 0.1, 0.6, 0.08),
    Kind("spindle", 8.5, {STROMA: (0.3, 0.06), ALVEOLI: (0.2, 0.05), LYMPHOCYTES: (0.05, 0.05), TUMOR: (0.01, 0.02)},
         (4.8, 0.28), (0.22, 0.6), (0.28, 0.62), 0.12, roughness=0.08, oriented=True),
    Kind("septal", 5.4, {ALVEOLI: (0.42, 0.1)}, (4.9, 0.2), (0.4, 0.9), (0.36, 0.7), 0.2, 0.05),
    Kind("lymphocyte", 6.0,
         {LYMPHOCYTES: (0.86, 0.09), STROMA: (0.03, 0.06), TUMOR: (0.012, 0.03), ALVEOLI: (0.05, 0.06),
          NECROSIS: (0.02, 0.035)},
         (5.6, 0.11), (0.76, 1.0), (0.42, 0.8), 0.2, 0.05),
    Kind("fragment", 4.2, {NECROSIS: (0.1, 0.14), TUMOR: (0.004, 0.012), STROMA: (0.004, 0.006)},
         (2.2, 0.45), (0.35, 1.0), (0.25, 0.85), 0.1, roughness=0.25),
)  # fmt: skip

BORDER_UM = 3.5
"""How far, in micrometres, cells stray over the border of their tissue."""


def plant(
    kind: Kind,
    canvas: NDArray[np.float32],
    mask: NDArray[np.uint8],
    window: Window,
    seed: int,
    *,
    px: float,
    size: float,
    darkness: float,
    clusters: NDArray[np.float32],
    angle: NDArray[np.float64] | None,
) -> None:
    """Draw all nuclei of one kind into a haematoxylin canvas.

    Args:
        kind: what to draw.
        canvas: (height, width) float32, haematoxylin; the thicker of two overlapping nuclei counts.
        mask: (height, width) uint8 of class ids; a nucleus belongs to the tissue near its centre.
        window: of the canvas in the case.
        seed: of the case.
        px: pixels per micrometre.
        size: factor on the diameter.
        darkness: below 1 the dark ones of the kind are more frequent, above 1 the pale ones.
        clusters: (height, width) float32, unit variance: where a kind is more frequent.
        angle: (height, width) float64, direction of the fibres in radians.
    """
    y, x, taken, which, turn, stray_y, stray_x = sites(seed, kind.name, window, kind.pitch * px)
    row, column = y.astype(np.int64), x.astype(np.int64)
    base, more = np.zeros((2, 256), np.float32)
    for tissue, (everywhere, clustered) in kind.chance.items():
        base[tissue], more[tissue] = everywhere, clustered
    stray_row = np.clip(y + (stray_y - 0.5) * 2 * BORDER_UM * px, 0, mask.shape[0] - 1).astype(np.int64)
    stray_column = np.clip(x + (stray_x - 0.5) * 2 * BORDER_UM * px, 0, mask.shape[1] - 1).astype(np.int64)
    tissue_at = np.where(mask[row, column] > ALVEOLI, 255, mask[stray_row, stray_column])
    keep = taken < base[tissue_at] + more[tissue_at] * clusters[row, column]
    row, column, which, turn = row[keep], column[keep], which[keep], turn[keep]
    stamps = _stamps(kind.name, round(size * px / 0.1) * 0.1)
    variant = (which**darkness * _VARIANTS).astype(np.int64)
    bins = np.floor(turn * ANGLES).astype(np.int64)
    if kind.oriented and angle is not None:
        direction = angle[row, column] + (turn - 0.5) * 0.5
        bins = np.mod(np.rint(direction / np.pi * ANGLES).astype(np.int64), ANGLES)
    side = stamps.shape[-1]
    half = side // 2
    height, width = canvas.shape
    for index, angle_bin, top, left in zip(variant, bins, row - half, column - half, strict=True):
        upper, lower = max(top, 0), min(top + side, height)
        begin, end = max(left, 0), min(left + side, width)
        place = canvas[upper:lower, begin:end]
        np.maximum(place, stamps[index, angle_bin, upper - top : lower - top, begin - left : end - left], out=place)


@lru_cache(maxsize=64)
def _stamps(name: str, scale: float) -> NDArray[np.float32]:
    """(variants, angles, side, side) float32 haematoxylin of a kind, from dark to pale; scale in px per micrometre."""
    kind = next(kind for kind in KINDS if kind.name == name)
    largest = kind.diameter[0] * (1 + 2 * kind.diameter[1]) / kind.aspect[0] ** 0.5 * (1 + 2 * kind.roughness)
    side = 2 * int(np.ceil(largest * scale / 2 + 1.5)) + 1
    stamps = np.empty((_VARIANTS, ANGLES, side, side), np.float32)
    for variant in range(_VARIANTS):
        dark = 1 - (variant + 0.5) / _VARIANTS
        for angle_bin in range(ANGLES):
            rng = np.random.default_rng([*name.encode(), variant, angle_bin])
            stamps[variant, angle_bin] = _nucleus(kind, dark, np.pi * angle_bin / ANGLES, side, scale, rng)
    stamps.setflags(write=False)
    return stamps


def _nucleus(
    kind: Kind, dark: float, angle: float, side: int, scale: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """One nucleus in a (side, side) float32 square, off-centre by less than a pixel."""
    fine = side * _OVERSAMPLING
    diameter = kind.diameter[0] * (1 + kind.diameter[1] * float(np.clip(rng.standard_normal(), -2, 2))) * scale
    aspect = rng.uniform(*kind.aspect)
    long, short = diameter / aspect**0.5 / 2, diameter * aspect**0.5 / 2
    axis = (np.arange(fine) + 0.5) / _OVERSAMPLING - side / 2
    y, x = axis[:, None] + rng.uniform(-0.5, 0.5), axis[None, :] + rng.uniform(-0.5, 0.5)
    along, across = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    across = across + rng.normal(0, 0.08) * along**2 / max(long, 1)  # a slight bend
    theta = np.arctan2(across / short, along / long)
    outline = 1 + sum(
        kind.roughness * rng.standard_normal() / order**0.5 * np.cos(order * theta + rng.uniform(0, 2 * np.pi))
        for order in (2, 3, 4, 5)
    )
    depth = 1 - np.hypot(along / long, across / short) / np.maximum(outline, 0.4)  # 0 on the outline, 1 in the centre
    texture = rng.spawn(1)[0]  # takes as many numbers as there are pixels; the outline must not depend on them
    chromatin = cv2.GaussianBlur(texture.standard_normal((fine, fine)), (0, 0), 0.5 * scale * _OVERSAMPLING)
    chromatin /= chromatin.std()
    low, high = kind.amount
    amount = (low + (high - low) * (dark + rng.uniform(-0.1, 0.1))) * (1 + kind.clumps * np.clip(chromatin, -2, 2))
    amount = amount + kind.rim * (1.3 - dark) * np.exp(-(((depth - 0.1) / 0.1) ** 2))
    for _ in range(2):
        if rng.random() < kind.nucleolus * (1.2 - dark):
            at_y, at_x = rng.normal(0, 0.25, 2) * short
            spot = np.exp(-((y - at_y) ** 2 + (x - at_x) ** 2) / (2 * (0.55 * scale * rng.uniform(0.8, 1.4)) ** 2))
            amount = amount + 0.45 * spot
    body = np.clip(depth * short / 1.6 + 0.4, 0, 1)
    return np.asarray(cv2.resize(np.asarray(amount * body, np.float32), (side, side), interpolation=cv2.INTER_AREA))
