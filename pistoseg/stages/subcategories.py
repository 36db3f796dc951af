"""SC-CAM: sub-categories of each class, found in the classifier's features, and a classifier that learns both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pistoseg import parquet
from pistoseg.config import Config
from pistoseg.graph import StageContext
from pistoseg.models import classifier, subcategories
from pistoseg.models.classifier import pool_regions
from pistoseg.patches.store import PatchSet
from pistoseg.stages import masks, sharding
from pistoseg.stages.classification import crop_settings, train_on_labels
from pistoseg.stages.trained import encoder_weights, first_weights
from pistoseg.training.labelled import LabelledCrops, labelled_source

FEATURES = "features"
SHARD_WINDOWS = 512
SCHEMA = pa.schema([("window", pa.int64()), ("features", pa.list_(pa.float32()))])


def run(context: StageContext) -> dict[str, Any]:
    """Train the classifier further, on its classes and on sub-categories of each: clusters of its windows' features.

    One round of Chang et al. (CVPR 2020). Writes `features/` (per labelled window), `model/` and `epochs.json`.
    """
    config, settings = context.config, context.config.cams
    patches = PatchSet.open(context.inputs["patches"].uri, hold=True)
    features = _features(context, len(patches.labels))
    found = subcategories.cluster(features, patches.labels, settings.subcategories, config.seed)
    first = classifier.load(context.inputs["classifier"].path("model"), "cpu")
    with first_weights(config.seed):
        network = classifier.build(
            config.classifier.encoder,
            patches.labels.shape[1],
            encoder_weights(config.classifier),  # what they keep fixed stays fixed; the values come from the classifier
            config.classifier.output_stride,
            config.classifier.dropout,
            subcategories=settings.subcategories,
        )
    network.normalization = first.normalization
    network.encoder.load_state_dict(first.encoder.state_dict())
    labels = np.concatenate([patches.labels, found], 1)
    return train_on_labels(context, network, patches, labels, settings.subcategory_weight)


def _features(context: StageContext, count: int) -> np.ndarray:
    """The classifier's last feature map, pooled over every labelled window: (windows, C) float32."""
    sharding.run_networks(
        _Features,
        {
            "config": context.config,
            "patches": context.inputs["patches"].uri,
            "model": context.inputs["classifier"].path("model"),
        },
        [list(range(start, min(start + SHARD_WINDOWS, count))) for start in range(0, count, SHARD_WINDOWS)],
        context.path(FEATURES),
        config=context.config.compute,
        progress=context.progress,
    )
    table = parquet.read(context.path(FEATURES))
    order = np.argsort(table["window"].to_numpy())
    features: np.ndarray = table["features"].combine_chunks().flatten().to_numpy().reshape(len(order), -1)[order]
    return features


class _Features:
    def __init__(self, config: Config, patches: str, model: str) -> None:
        self.network = classifier.load(model, masks.device_of(config))
        self.device = next(self.network.parameters()).device
        settings = crop_settings(config, config.classifier) | {"regions": 1}
        self.crops = LabelledCrops(labelled_source(PatchSet.open(patches, hold=True), **settings))
        self.batch_size = config.classifier.batch_size

    def __call__(self, number: int, shard: list[int], part: str) -> None:
        rows = []
        for start in range(0, len(shard), self.batch_size):
            indices = shard[start : start + self.batch_size]
            samples = [self.crops.sample(0, index) for index in indices]
            images, regions = (np.stack(items) for items in list(zip(*samples, strict=True))[:2])
            with torch.inference_mode():
                maps = self.network.features(self.network.normalization(images, self.device))
                pooled = pool_regions(maps.float(), torch.from_numpy(regions).to(self.device), 1)[:, 0].cpu().numpy()
            windows = [self.crops.window(0, index) for index in indices]
            rows += [{"window": window, "features": row} for window, row in zip(windows, pooled, strict=True)]
        parquet.write(pa.Table.from_pylist(rows, SCHEMA), part)
