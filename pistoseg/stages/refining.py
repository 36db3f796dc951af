"""The refining module: a network trained for attention-based feature consistency, and the masks that it refines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from pistoseg import parquet
from pistoseg.config import Config
from pistoseg.graph import StageContext
from pistoseg.models import refiner
from pistoseg.models.inference import Predictor
from pistoseg.models.refiner import RefineModel
from pistoseg.patches.store import PatchSet
from pistoseg.stages import masks as mask_files
from pistoseg.stages.classification import crop_settings, start_from_preliminary
from pistoseg.stages.trained import encoder_weights, first_weights, train_stage
from pistoseg.training.labelled import LabelledCrops, labelled_source
from pistoseg.training.stream import SampleSource
from pistoseg.training.tasks import RefiningTask


def run(context: StageContext) -> dict[str, Any]:
    """Train the refining network on the training images, their pseudo-masks and CAMs; write `model/`, `epochs.json`."""
    config, settings = context.config, context.config.refiner
    patches = PatchSet.open(context.inputs["patches"].uri, hold=True)
    n_classes = patches.labels.shape[1]
    with first_weights(config.seed):
        network = refiner.build(
            settings.encoder,
            n_classes,
            encoder_weights(settings),
            settings.output_stride,
            settings.attention_channels,
            settings.normalize,
            settings.feature_norm,
        )
    if "initial" in context.inputs:
        start_from_preliminary(network, context)
    # The maps keep the detail of the pseudo-masks until the network brings them to its own grid.
    grid = max(1, round(settings.patch_size * config.pseudo_masks.grid / config.pseudo_masks.patch_size))
    shared = labelled_source(patches, maps=_maps(context, patches), grid=grid, **crop_settings(config, settings))
    source = SampleSource(
        LabelledCrops,
        ray.put(shared),
        len(shared["labels"]),
        (settings.patch_size,) * 2,
        columns=("image", "regions", "labels", "maps"),
    )

    def save(lineage: dict[str, str], metrics: dict[str, float]) -> None:
        refiner.save(context.path("model"), network, config.classes.tissue(), lineage=lineage, metrics=metrics)

    return train_stage(context, network, source, RefiningTask(n_classes, settings), settings, save)


def _maps(context: StageContext, patches: PatchSet) -> list[pa.Table]:
    """M_pseudo and M_CAM of every training image."""
    return [
        mask_files.read_maps(context.inputs["pseudo_masks"].uri, patches, logits=True),
        mask_files.read_maps(context.inputs["cams"].uri, patches, logits=False),
    ]


def masks(context: StageContext) -> dict[str, Any]:
    """Write `masks/` of the kinds `pseudo`, `cam` and `cnn` (see `stages.masks`; scores are 0 to 1) and its picture."""
    maps = _maps(context, PatchSet.open(context.inputs["patches"].uri))
    arguments = {"maps": ray.put(maps), "model": context.inputs["model"].path("model")}
    mask_files.over_images(context, _Refine, arguments, context.path(mask_files.FOLDER))
    return mask_files.finish(context, mask_files.KINDS)


class _Refine:
    def __init__(self, config: Config, patches: str, maps: list[pa.Table], model: str) -> None:
        self.settings = settings = config.refined_masks
        network = refiner.load(model, mask_files.device_of(config))
        self.predictor = Predictor(
            RefineModel(network),
            network.normalization,
            tile=settings.patch_size,
            stride=settings.step,
            symmetries=settings.symmetries,
            window="gaussian",
            device=mask_files.device_of(config),
            batch_size=settings.batch_size,
            average="logits",
        )
        self.maps = maps
        self.patches = PatchSet.open(patches)
        self.writer = mask_files.MaskWriter(self.patches, config.classes.tissue(), config.data, settings.constrain)

    def __call__(self, number: int, shard: list[int], part: str) -> None:
        images = list(self.patches.images(shard))
        companions = [self._companions(position) for position in shard]

        def row(index: int, maps: NDArray[np.float32]) -> dict[str, Any]:
            grid = mask_files.to_grid(maps, mask_files.grid_size(images[index], self.settings))
            scores = dict(zip(mask_files.KINDS, np.split(grid, len(mask_files.KINDS)), strict=True))
            return self.writer.row(shard[index], images[index], scores, logits=False)

        rows = self.predictor.logits_each(images, row, companions=companions)
        schema = mask_files.schema(mask_files.KINDS)
        parquet.write(pa.Table.from_pylist(rows, schema), part, row_group_size=64)

    def _companions(self, position: int) -> NDArray[np.float32]:
        """M_pseudo, M_CAM and what the labels allow, (3 L, h, w) float32 on the grid of the pseudo-masks."""
        pseudo, cam = (self._read(table, position) for table in self.maps)
        size = pseudo.shape[1:]
        allowed = mask_files.allowed_on_grid(self.patches.allowed(position), size).astype(np.float32)
        return np.concatenate([pseudo, mask_files.to_grid(cam, size), allowed])

    def _read(self, table: pa.Table, position: int) -> NDArray[np.float32]:
        height, width = table["grid_height"][position].as_py(), table["grid_width"][position].as_py()
        values = np.frombuffer(table["maps"][position].as_py(), np.float16).reshape(-1, height, width)
        return values.astype(np.float32)
