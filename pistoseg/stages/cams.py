"""CAMs: where the CAM network sees each tissue in the real training images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pistoseg import parquet
from pistoseg.config import Config
from pistoseg.graph import StageContext
from pistoseg.models import cams, classifier
from pistoseg.models.inference import Predictor
from pistoseg.patches.store import PatchSet
from pistoseg.stages import masks


def run(context: StageContext) -> dict[str, Any]:
    """Write `masks/` (see `masks`; the scores are activations of 0 to 1) and `masks.png`."""
    arguments = {"model": context.inputs["model"].path("model")}
    masks.over_images(context, _Activate, arguments, context.path(masks.FOLDER))
    return masks.finish(context)


class _Activate:
    def __init__(self, config: Config, patches: str, model: str) -> None:
        self.settings = settings = config.cams
        network = classifier.load(model, masks.device_of(config))
        method = "cam" if settings.method == "sc_cam" else settings.method
        self.predictor = Predictor(
            cams.CamModel(network, method),
            network.normalization,
            tile=settings.patch_size,
            stride=settings.step,
            symmetries=settings.symmetries,
            scales=settings.scales,
            window="gaussian",
            device=masks.device_of(config),
            batch_size=settings.batch_size,
            average="logits",
        )
        self.patches = PatchSet.open(patches)
        self.writer = masks.MaskWriter(self.patches, config.classes.tissue(), config.data, constrain=True)

    def __call__(self, number: int, shard: list[int], part: str) -> None:
        images = list(self.patches.images(shard))

        def row(index: int, maps: NDArray[np.float32]) -> dict[str, Any]:
            position, image = shard[index], images[index]
            grid = masks.grid_size(image, self.settings)
            allowed = masks.allowed_on_grid(self.patches.allowed(position), grid)
            scores = cams.normalize_cams(masks.to_grid(maps, grid), allowed)
            return self.writer.row(position, image, {"": scores}, logits=False)

        rows = self.predictor.logits_each(images, row)
        parquet.write(pa.Table.from_pylist(rows, masks.schema()), part, row_group_size=64)
