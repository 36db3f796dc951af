"""Both trained segmentation models: the preliminary one on mosaics, the precise one on real images."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

from pistoseg import parquet
from pistoseg.config import Config, PreciseConfig, SegmentationConfig
from pistoseg.errors import PistoSegError
from pistoseg.graph import StageContext
from pistoseg.models import bundle, segmentation
from pistoseg.patches.background import background_rule
from pistoseg.patches.store import PatchSet
from pistoseg.stages import masks
from pistoseg.stages.patches import held_out_folder
from pistoseg.stages.synthesis import mosaics
from pistoseg.stages.trained import encoder_weights, first_weights, train_stage
from pistoseg.training.labelled_images import LabelledImages
from pistoseg.training.samples import MaskedCrops, StoredMosaics, crop_rows, fresh_mosaics, rare_class_weights
from pistoseg.training.stream import SampleSource
from pistoseg.training.tasks import SegmentationTask


def preliminary(context: StageContext) -> dict[str, Any]:
    """Train on mosaics; write `bundle/` and `epochs.json`."""
    return _run(context, context.config.preliminary, _mosaic_source(context, context.config.preliminary))


def precise(context: StageContext) -> dict[str, Any]:
    """Train on the masks that `precise.masks` names; write `bundle/` and `epochs.json`."""
    training = context.config.precise
    if training.masks == "synthesized":
        return _run(context, training, _mosaic_source(context, training))
    return _run(context, training, _masked_source(context, training))


def _run(context: StageContext, training: SegmentationConfig, source: SampleSource) -> dict[str, Any]:
    config = context.config
    classes = config.classes.tissue()
    with first_weights(config.seed):
        network = segmentation.build(
            training.architecture,
            training.encoder,
            len(classes),
            encoder_weights(training),
            training.decoder_attention,
        )
    if "initial" in context.inputs:
        initial = bundle.load(context.inputs["initial"].path("bundle"), "cpu").model
        network.load_state_dict(initial.state_dict())
        network.normalization = initial.normalization
    has_validation = context.inputs["validation"].summary["images"] > 0
    validation = context.inputs["validation"].uri if has_validation else None
    task = SegmentationTask(
        classes,
        training.loss,
        validation,
        _validation_info(config),
        labelled=None if validation else _labelled(context),
    )

    def save(lineage: dict[str, str], metrics: dict[str, float]) -> None:
        bundle.save(
            context.path("bundle"),
            network,
            classes=classes,
            patch_size=source.size[0],
            scale=config.scale.model_dump(),
            background=background_rule(config.data),
            evaluation=config.evaluation.resolved() | {"config": config.evaluation.model_dump(mode="json")},
            lineage=lineage,
            metrics=metrics,
        )

    return train_stage(context, network, source, task, training, save)


def _labelled(context: StageContext) -> LabelledImages | None:
    if not context.config.data.label_holdout:
        return None
    return LabelledImages(held_out_folder(context.inputs["patches"].uri), context.config.data)


def _validation_info(config: Config) -> dict[str, Any]:
    """Scale and window of the validation between epochs: one scale and no symmetries, for it runs often."""
    window = config.evaluation.patch_size
    evaluation = {"tile": window, "stride": window * 3 // 4, "window": "gaussian"}
    return {"patch_size": window, "scale": config.scale.model_dump(), "evaluation": evaluation}


def _mosaic_source(context: StageContext, training: SegmentationConfig) -> SampleSource:
    config, synthesis = context.config, context.config.synthesis
    size = (synthesis.height, synthesis.width)
    artifact = context.inputs["masks"]
    if synthesis.mode == "stored":
        count = artifact.summary["count"]
        shared = {
            "folder": artifact.path("mosaics"),
            "count": count,
            "part_size": artifact.summary["part_size"],
            "per_epoch": training.samples_per_epoch or count,
            "seed": config.seed,
        }
        return SampleSource(StoredMosaics, ray.put(shared), count, size)
    return SampleSource(fresh_mosaics, ray.put(mosaics(config, context.inputs["patches"])), synthesis.count, size)


def _masked_source(context: StageContext, training: PreciseConfig) -> SampleSource:
    kind = training.masks.removeprefix("refined_") if training.masks.startswith("refined_") else ""
    sizes = ["height", "width", "grid_height", "grid_width"]
    columns = [masks.column(name, kind) for name in ("png", "confidence")]
    artifact = context.inputs["masks"]
    table = parquet.read(artifact.path(masks.FOLDER), columns=["image", *sizes, *columns])
    patches = PatchSet.open(context.inputs["patches"].uri, hold=True)
    images = patches.table
    if images["image"].to_pylist() != table["image"].to_pylist():
        raise PistoSegError("masks and images do not belong together", file=artifact.uri, remedy="delete that folder")
    table = table.select([*sizes, *columns]).rename_columns([*sizes, "png", "confidence"])
    areas = table["height"].to_numpy().astype(np.int64) * table["width"].to_numpy()
    weights = rare_class_weights(patches.image_labels()) if training.class_sampling == "rare" else None
    rows = crop_rows(areas, training.patch_size, weights)
    shared = {
        "images": images.select(["png"]),
        "masks": table.select(["png", "confidence", "grid_height", "grid_width"]),
        "min_confidence": training.min_confidence,
        "rows": rows,
        "patch_size": training.patch_size,
        "seed": context.config.seed,
    }
    return SampleSource(MaskedCrops, ray.put(shared), len(rows), (training.patch_size,) * 2)
