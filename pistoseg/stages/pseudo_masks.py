"""Pseudo-masks: what the preliminary model sees in the real training images, held against their image-level labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pistoseg import parquet
from pistoseg.config import Config
from pistoseg.graph import StageContext
from pistoseg.models import bundle
from pistoseg.patches.store import PatchSet
from pistoseg.stages import masks


def run(context: StageContext) -> dict[str, Any]:
    """Write `masks/` (see `masks`; the scores are logits) and `masks.png`."""
    arguments = {"model": context.inputs["model"].path("bundle")}
    masks.over_images(context, _Predict, arguments, context.path(masks.FOLDER))
    return masks.finish(context)


class _Predict:
    def __init__(self, config: Config, patches: str, model: str) -> None:
        self.settings = settings = config.pseudo_masks
        self.predictor = bundle.load(model, masks.device_of(config)).predictor(
            tile=settings.patch_size,
            stride=settings.step,
            symmetries=settings.symmetries,
            scales=(1.0,),
            window="gaussian",
            batch_size=settings.batch_size,
            average="logits",
        )
        self.patches = PatchSet.open(patches)
        self.writer = masks.MaskWriter(self.patches, config.classes.tissue(), config.data, settings.constrain)

    def __call__(self, number: int, shard: list[int], part: str) -> None:
        images = list(self.patches.images(shard))

        def row(index: int, logits: NDArray[np.float32]) -> dict[str, Any]:
            scores = masks.to_grid(logits, masks.grid_size(images[index], self.settings))
            return self.writer.row(shard[index], images[index], {"": scores}, logits=True)

        rows = self.predictor.logits_each(images, row)
        parquet.write(pa.Table.from_pylist(rows, masks.schema()), part, row_group_size=64)
