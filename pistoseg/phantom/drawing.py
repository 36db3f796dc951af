"""From a mask to RGB: amounts of haematoxylin and eosin, then Beer-Lambert, then the scanner."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pistoseg.phantom.geometry import LYMPHOCYTES, NECROSIS, REFERENCE_MPP, STROMA, TUMOR
from pistoseg.phantom.noise import Window, grain, noise, stream, warped
from pistoseg.phantom.nuclei import KINDS, plant

CONTEXT_UM = 16.0
"""How far, in micrometres, a pixel's surroundings reach into its colour: half a nucleus and the blurs."""


@dataclass(frozen=True)
class Look:
    """How a case was cut, stained and scanned; drawn once per seed."""

    haematoxylin: NDArray[np.float64]  # (3,) unit vector of optical densities in R, G, B
    eosin: NDArray[np.float64]
    amounts: tuple[float, float]
    white: NDArray[np.float64]  # (3,) grey levels of the empty glass
    blur: float  # micrometres
    sharpening: float
    noise: float  # grey levels
    size: float  # of nuclei
    darkness: float  # exponent, see `plant`
    infiltration: float  # of lymphocytes elsewhere
    fibres: float  # radians, main direction
    loose: float  # of the stroma
    tint: NDArray[np.float64]  # (5, 2) per class, additional haematoxylin and eosin

    @classmethod
    def of(cls, seed: int) -> Look:
        """The look of a case."""
        rng = np.random.default_rng(stream(seed, "look"))
        lilac = rng.random()  # laboratories range from pink to lilac
        haematoxylin = np.array([0.57 - 0.08 * lilac, 0.74 + 0.03 * lilac, 0.36 + 0.06 * lilac])
        eosin = np.array([0.09 + 0.08 * lilac, 0.86, 0.47 - 0.08 * rng.random()])
        haematoxylin += rng.normal(0, 0.02, 3)
        eosin += rng.normal(0, 0.02, 3)
        return cls(
            haematoxylin / np.linalg.norm(haematoxylin),
            eosin / np.linalg.norm(eosin),
            (rng.uniform(0.85, 1.25), rng.uniform(0.85, 1.35)),
            rng.uniform(236, 246) + rng.normal(0, 1.2, 3),
            rng.uniform(0.26, 0.5),
            rng.uniform(0.0, 0.7),
            rng.uniform(1.0, 2.6),
            float(rng.choice([0.92, 1.0, 1.1])),
            float(np.exp(rng.normal(0, 0.35))),
            rng.uniform(0.4, 1.6),
            rng.uniform(0, np.pi),
            rng.uniform(0.0, 1.0),
            rng.normal(0, 0.018, (5, 2)),
        )


def draw_image(
    mask: NDArray[np.uint8],
    seed: int,
    mpp: float = REFERENCE_MPP,
    *,
    origin: tuple[int, int] = (0, 0),
    margin: int = 0,
) -> NDArray[np.uint8]:
    """Draw the tissue that a mask describes.

    Args:
        mask: (H, W) uint8 of class ids; every value above 4 is drawn as empty glass.
        seed: of the case: stain, scanner and the place of every nucleus. Windows of one case fit together.
        mpp: micrometres per pixel.
        origin: (y, x) of the mask's first pixel in the case, px.
        margin: rim of the mask, px, that gives context only; 0 mirrors the mask at its border instead.
    Returns:
        (H - 2 * margin, W - 2 * margin, 3) uint8 RGB.
    """
    px = 1 / mpp
    context = margin or int(np.ceil(CONTEXT_UM * px))
    if not margin:
        mask = cv2.copyMakeBorder(mask, *(context,) * 4, cv2.BORDER_REFLECT)
        origin = (origin[0] - context, origin[1] - context)
    window = Window(*origin, *mask.shape)
    look = Look.of(seed)
    haematoxylin, eosin = _tissue(mask, window, seed, look, px)
    rgb = _scan(haematoxylin, eosin, window, seed, look, px)
    return rgb[context:-context, context:-context]


def _tissue(
    mask: NDArray[np.uint8], window: Window, seed: int, look: Look, px: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Amounts of haematoxylin and eosin per pixel, (h, w) float32 optical densities each."""
    present = [tissue for tissue in range(5) if (mask == tissue).any()]
    if not present:
        return np.zeros(mask.shape, np.float32), np.zeros(mask.shape, np.float32)
    granules = grain(seed, "granules", window, 0.75 * px)
    patchy = noise(seed, "patchy", window, 5 * px)
    broad = noise(seed, "broad", window, 35 * px)
    clusters = noise(seed, "clusters", window, 22 * px)
    angle = None
    haematoxylin, eosin = np.zeros((2, *mask.shape), np.float32)
    for tissue in present:
        if tissue == STROMA:
            h, e, angle = _stroma(window, seed, look, granules, broad, px)
        elif tissue == TUMOR:
            cells = noise(seed, "cells", window, 2.6 * px)
            h = 0.12 + 0.02 * patchy + 0.03 * granules + 0.02 * broad + 0.03 * cells
            e = 0.18 + 0.02 * patchy - 0.02 * granules + 0.025 * broad - 0.03 * np.clip(cells - 0.6, 0, 2)
        elif tissue == LYMPHOCYTES:
            h, e = 0.08 + 0.04 * patchy + 0.02 * granules, 0.15 + 0.04 * patchy + 0.02 * broad
        elif tissue == NECROSIS:
            smear, dust = noise(seed, "smear", window, 8 * px), grain(seed, "dust", window, 0.4 * px)
            h = 0.07 + 0.02 * smear + 0.025 * clusters + 0.02 * granules + 0.018 * dust
            e = 0.22 + 0.022 * smear + 0.02 * patchy + 0.028 * granules + 0.014 * dust + 0.02 * broad
        else:
            h, e = 0.06 + 0.03 * patchy + 0.025 * granules, 0.19 + 0.05 * patchy + 0.04 * granules + 0.02 * broad
        weight = cv2.GaussianBlur((mask == tissue).astype(np.float32), (0, 0), 0.45 * px)
        haematoxylin += weight * np.maximum(h + float(look.tint[tissue, 0]), 0)
        eosin += weight * np.maximum(e + float(look.tint[tissue, 1]), 0.01)
    nuclei = _nuclei(mask, window, seed, look, clusters, angle, px)
    return _merge(haematoxylin, eosin, nuclei, px)


def _stroma(
    window: Window, seed: int, look: Look, granules: NDArray[np.float32], broad: NDArray[np.float32], px: float
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """Wavy collagen: haematoxylin, eosin and the direction of the fibres in radians, (h, w) each."""
    y, x = window.rows()[:, None].astype(np.float64), window.columns()[None, :].astype(np.float64)
    cosine, sine = np.cos(look.fibres), np.sin(look.fibres)
    bend = 110 * noise(seed, "turn", window, 220 * px) + 20 * noise(seed, "bend", window, 50 * px)
    across = (y * cosine - x * sine) / px + bend + 1.6 * noise(seed, "wave", window, 9 * px)
    along = (x * cosine + y * sine) / px + 12.0 * noise(seed, "slip", window, 40 * px)
    slope_y, slope_x = np.gradient(across)
    fibril = warped(across * 4.0, along * 0.5 + 600)
    fibre = warped(across * 1.8, along * 0.22)
    bundle = warped(across * 0.6, along * 0.12 + 300)
    density = 1.0 + 0.15 * broad - 0.25 * look.loose
    eosin = (0.19 + 0.022 * fibril + 0.03 * fibre + 0.028 * bundle + 0.012 * granules) * density
    cleft = np.clip((bundle + 0.6 * fibre - 1.9 + 0.7 * look.loose) / 0.5, 0, 1)
    eosin *= 1 - 0.75 * cleft
    haematoxylin = (0.035 + 0.012 * fibre + 0.01 * fibril + 0.03 * look.loose) * (1 - 0.6 * cleft)
    return np.asarray(haematoxylin, np.float32), np.asarray(eosin, np.float32), np.arctan2(-slope_x, slope_y)


def _nuclei(
    mask: NDArray[np.uint8],
    window: Window,
    seed: int,
    look: Look,
    clusters: NDArray[np.float32],
    angle: NDArray[np.float64] | None,
    px: float,
) -> NDArray[np.float32]:
    canvas = np.zeros(mask.shape, np.float32)
    present = set(np.unique(mask).tolist())
    for kind in KINDS:
        if not present.isdisjoint(kind.chance):
            spread = clusters * look.infiltration if kind.name == "lymphocyte" else clusters
            plant(kind, canvas, mask, window, seed, px=px, size=look.size, darkness=look.darkness,
                  clusters=spread, angle=angle)  # fmt: skip
    return canvas


def _merge(
    haematoxylin: NDArray[np.float32], eosin: NDArray[np.float32], nuclei: NDArray[np.float32], px: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Put nuclei into the tissue: they displace the cytoplasm and shrink away from it in the fixative."""
    cover = np.clip(nuclei * 4, 0, 1)
    halo = np.clip(cv2.GaussianBlur(cover, (0, 0), 0.9 * px) - cover, 0, 1)
    haematoxylin = np.maximum(haematoxylin * (1 - 0.5 * halo), nuclei)
    return haematoxylin, eosin * (1 - 0.15 * cover) * (1 - 0.45 * halo)


def _scan(
    haematoxylin: NDArray[np.float32],
    eosin: NDArray[np.float32],
    window: Window,
    seed: int,
    look: Look,
    px: float,
) -> NDArray[np.uint8]:
    """Beer-Lambert and the scanner: I = I0 * 10^-(amounts @ stain vectors), optics, illumination, sensor noise."""
    thickness = 1 + 0.08 * noise(seed, "thickness", window, 250 * px) + 0.09 * grain(seed, "fine", window, 0.45 * px)
    amounts = np.stack([haematoxylin * thickness * look.amounts[0], eosin * thickness * look.amounts[1]], axis=-1)
    vectors = np.stack([look.haematoxylin, look.eosin]).astype(np.float32)
    light = cv2.exp((amounts @ vectors) * np.float32(-np.log(10)))
    light = cv2.GaussianBlur(light, (0, 0), look.blur * px)
    if look.sharpening > 0:
        light += look.sharpening * (light - cv2.GaussianBlur(light, (0, 0), 1.0 * px))
    illumination = 1 + 0.012 * noise(seed, "illumination", window, 700 * px)
    light *= illumination[..., None] * look.white.astype(np.float32)
    for channel in range(3):
        light[..., channel] += look.noise * grain(seed, f"sensor {channel}", window, 0.0)
    return np.clip(np.rint(light), 0, 255).astype(np.uint8)
