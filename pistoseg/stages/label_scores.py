"""Scores of a model without any masks: how well what it segments agrees with the labels of images it never saw."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa

from pistoseg import metrics, parquet, storage
from pistoseg.config import Config
from pistoseg.errors import PistoSegError
from pistoseg.graph import StageContext
from pistoseg.models import bundle
from pistoseg.patches.store import PatchSet
from pistoseg.stages import sharding
from pistoseg.stages.patches import held_out_folder
from pistoseg.training.labelled_images import LabelledImages, window_areas

SHARD_IMAGES = 64
SCHEMA = pa.schema(
    [
        ("labels", pa.list_(pa.uint8())),
        ("areas", pa.list_(pa.float64())),
        ("probabilities", pa.list_(pa.float32())),
    ]
)


def run(context: StageContext) -> dict[str, Any]:
    """Score the artifact's model on the held-out images; write `label_scores.json` and `windows/`.

    `label_iou` is the mean of `metrics.label_agreement`; `label_map` the mean average precision with which a window's
    mean probability of a class ranks the windows that name it.

    Raises:
        PistoSegError: no image is held out.
    """
    config = context.config
    if not config.data.label_holdout:
        raise PistoSegError(
            "0 holds no image out to score labels on", field="data.label_holdout", remedy="set it to 0.1"
        )
    folder = held_out_folder(context.inputs["patches"].uri)
    images = PatchSet.open(folder).table["name"].to_pylist()
    positions = list(range(len(images)))
    sharding.run_networks(
        _Score,
        {"config": config, "model": context.inputs["model"].path("bundle"), "images": folder},
        [positions[start : start + SHARD_IMAGES] for start in range(0, len(positions), SHARD_IMAGES)],
        context.path("windows"),
        config=config.compute,
        progress=context.progress,
        names=lambda shard: [images[position] for position in shard],
    )
    table = parquet.read(context.path("windows"))
    names = config.classes.tissue().names
    labels, areas, probabilities = (np.array(table[name].to_pylist()).reshape(-1, len(names)) for name in SCHEMA.names)
    agreement = metrics.label_agreement(labels, areas)
    ranked = metrics.multilabel_scores(labels, probabilities)
    report = {
        "windows": len(labels),
        "label_iou": metrics.mean_over_classes(agreement),
        "label_map": ranked["map"],
        "by_class": {name: None if math.isnan(value) else value for name, value in zip(names, agreement, strict=True)},
    }
    storage.write_bytes(context.path("label_scores.json"), json.dumps(report, indent=2).encode())
    scores = {key: report[key] for key in ("label_iou", "label_map") if report[key] is not None}
    return {"windows": len(labels), "metrics": scores, "report": report}


class _Score:
    def __init__(self, config: Config, model: str, images: str) -> None:
        device = config.compute.device
        loaded = bundle.load(model, None if device == "auto" else device)
        # One scale without symmetries, as the trainings validate: it ranks settings as well, and costs an eighth.
        window = config.evaluation.patch_size
        protocol = {"tile": window, "stride": window * 3 // 4, "window": "gaussian"}
        protocol["batch_size"] = config.evaluation.batch_size
        info = loaded.info | {"evaluation": protocol}
        # Not the segmenter itself, which would bring the images to the network's pixel size once more.
        self.predictor = bundle.Segmenter(loaded.model, info, loaded.classes, loaded.device).predictor()
        self.patches, self.images = PatchSet.open(images), LabelledImages(images, config.data)

    def __call__(self, number: int, shard: list[int], part: str) -> None:
        rows = []
        for position, image in zip(shard, self.patches.images(shard), strict=True):
            given = self.predictor.probabilities(image)
            labels, areas = window_areas(
                self.patches, position, given.argmax(0).astype(np.uint8), self.images.tissue(image)
            )
            means = self._means(position, given, image)
            rows += [
                {"labels": one, "areas": two, "probabilities": three}
                for one, two, three in zip(labels, areas, means, strict=True)
            ]
        parquet.write(pa.Table.from_pylist(rows, SCHEMA), part)

    def _means(self, position: int, given: np.ndarray, image: np.ndarray) -> list[np.ndarray]:
        """Mean probability of each class over the tissue of the windows that have any."""
        tissue, means = self.images.tissue(image), []
        for _, (x, y, width, height) in self.patches.boxes(position):
            inside = given[:, y : y + height, x : x + width][:, tissue[y : y + height, x : x + width]]
            if inside.shape[1]:
                means.append(inside.mean(1))
        return means
