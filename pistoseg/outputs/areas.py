"""Areas of tissue classes on a slide, and what follows from them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pistoseg.classes import IGNORE_ID, TissueClasses

TUMOR = re.compile(r"tumou?r([ _-]epitheli(al|um))?([ _-](tissue|cells|area|region))?", re.IGNORECASE)
STROMA = re.compile(r"(tumou?r[ _-](associated[ _-])?)?stroma([ _-](tissue|area|region))?", re.IGNORECASE)
TSR_DEFINITION = "stroma / (tumor + stroma), by area on the whole slide"


def count_classes(mask: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Px of each mask value, (256,) int64, of an (h, w) uint8 mask that is read band by band."""
    counts = np.zeros(256, np.int64)
    step = max(1, 2**20 // max(1, mask.shape[1]))  # bincount makes int64 of every px
    for top in range(0, mask.shape[0], step):
        counts += np.bincount(mask[top : top + step].ravel(), minlength=256)
    return counts


def slide_areas(counts: NDArray[np.int64], mpp: float, classes: TissueClasses) -> dict[str, Any]:
    """What areas.json says of a slide.

    Args:
        counts: (256,) px by mask value, of `count_classes`.
        mpp: micrometres per px of the mask.
        classes: names of the ids.
    Returns:
        mpp: micrometres per px that the areas were measured at.
        tissue_um2, tissue_mm2: of all classes together.
        no_tissue_mm2: looked at, without tissue.
        not_looked_at_mm2: left out by the tissue mask.
        classes: by name: pixels, um2, mm2, and share of the tissue (0-1; 0 on a slide without tissue).
        tumor_stroma_ratio: stroma / (tumor + stroma), or None where the model has no such classes or the slide has
            neither tissue.
        tumor_stroma_ratio_definition: this formula, with the names of the classes.
    """
    pixel = mpp**2
    tissue = int(counts[: len(classes)].sum())
    by_class = {
        name: {
            "pixels": int(counts[position]),
            "um2": round(int(counts[position]) * pixel, 2),
            "mm2": round(int(counts[position]) * pixel / 1e6, 6),
            "share": round(int(counts[position]) / tissue, 6) if tissue else 0.0,
        }
        for position, name in enumerate(classes.names)
    }
    ratio, definition = _tumor_stroma_ratio(counts, classes)
    return {
        "mpp": mpp,
        "tissue_um2": round(tissue * pixel, 2),
        "tissue_mm2": round(tissue * pixel / 1e6, 6),
        "no_tissue_mm2": round(int(counts[classes.background_id]) * pixel / 1e6, 6),
        "not_looked_at_mm2": round(int(counts[IGNORE_ID]) * pixel / 1e6, 6),
        "classes": by_class,
        "tumor_stroma_ratio": ratio,
        "tumor_stroma_ratio_definition": definition,
    }


def _tumor_stroma_ratio(counts: NDArray[np.int64], classes: TissueClasses) -> tuple[float | None, str]:
    tumor, stroma = (
        [position for position, name in enumerate(classes.names) if pattern.fullmatch(name.strip())]
        for pattern in (TUMOR, STROMA)
    )
    if not tumor or not stroma:
        return None, "the model has no classes of tumor and stroma"
    names = [" + ".join(classes.names[position] for position in group) for group in (tumor, stroma)]
    tumor_px, stroma_px = (int(counts[group].sum()) for group in (tumor, stroma))
    ratio = round(stroma_px / (tumor_px + stroma_px), 6) if tumor_px + stroma_px else None
    return ratio, f"{TSR_DEFINITION}; tumor: {names[0]}; stroma: {names[1]}"
