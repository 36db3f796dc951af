"""The CAM network: a classifier on the image-level labels, and the labels that it contradicts."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import ray
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pistoseg import parquet, storage
from pistoseg.config import Config, LabelledCropConfig
from pistoseg.graph import StageContext
from pistoseg.models import bundle, classifier
from pistoseg.models.classifier import Classifier
from pistoseg.models.inference import Predictor
from pistoseg.outputs.pictures import Panel, sheet, shrunk
from pistoseg.patches.decode import encode_png
from pistoseg.patches.store import PatchSet
from pistoseg.stages import masks
from pistoseg.stages.trained import encoder_weights, first_weights, train_stage
from pistoseg.training.labelled import LabelledCrops, labelled_source
from pistoseg.training.stream import SampleSource
from pistoseg.training.tasks import ClassificationTask

WINDOWS = "windows"
PICTURES = 24
SCHEMA = pa.schema(
    [
        ("window", pa.int64()),
        ("image", pa.int64()),
        ("labels", pa.list_(pa.uint8())),
        ("probabilities", pa.list_(pa.float32())),
    ]
)
CONTRADICTIONS = pa.schema(
    [
        ("name", pa.string()),
        *((side, pa.int64()) for side in ("x", "y", "width", "height")),
        ("class", pa.string()),
        ("label", pa.int64()),
        ("probability", pa.float64()),
    ]
)
"""Of `contradictions.csv`; x, y, width and height of the labelled window in network px."""


def run(context: StageContext) -> dict[str, Any]:
    """Train on the image-level labels.

    Writes `model/`, `epochs.json`, `windows/` (the classifier's probabilities for every labelled window),
    `contradictions.csv` and `contradictions.png` (the labels that it contradicts).
    """
    settings = context.config.classifier
    patches = PatchSet.open(context.inputs["patches"].uri, hold=True)
    with first_weights(context.config.seed):
        network = classifier.build(
            settings.encoder,
            patches.labels.shape[1],
            encoder_weights(settings),
            settings.output_stride,
            settings.dropout,
        )
    if "initial" in context.inputs:
        start_from_preliminary(network, context)
    summary = train_on_labels(context, network, patches)
    masks.over_images(context, _Judge, {"model": context.path("model")}, context.path(WINDOWS))
    return summary | _contradictions(context, patches)


def start_from_preliminary(network: Any, context: StageContext) -> None:
    """Give a network the encoder of the preliminary model, and the normalization that goes with it."""
    source = bundle.load(context.inputs["initial"].path("bundle"), "cpu").model
    network.encoder.load_state_dict(source.encoder.state_dict())
    network.normalization = source.normalization


def held_out(patches: PatchSet, share: float, seed: int) -> NDArray[np.bool_]:
    """Which images are left out of the classifier's training: a share of them, picked by name and seed.

    Returns:
        (images,) bool; none where so few images are left that some class would lose its last one.
    """
    names = patches.table["name"].to_pylist()
    order = np.argsort([hashlib.sha256(f"{seed}/{name}".encode()).hexdigest() for name in names])
    chosen = np.zeros(len(names), bool)
    chosen[order[: round(share * len(names))]] = True
    labels = patches.image_labels()
    if (labels[~chosen].any(0) < labels.any(0)).any():
        chosen[:] = False
    return chosen


def crop_settings(config: Config, section: LabelledCropConfig) -> dict[str, Any]:
    """Arguments of `labelled_source` that both networks on image-level labels share."""
    return {"size": section.patch_size, "regions": section.regions, "seed": config.seed}


def train_on_labels(
    context: StageContext,
    network: Classifier,
    patches: PatchSet,
    labels: NDArray[np.uint8] | None = None,
    weight: float = 0.0,
) -> dict[str, Any]:
    """Train a classifier as the config's `classifier` says; write `model/` and `epochs.json`.

    Args:
        context: of the stage.
        network: at its start.
        patches: the training images.
        labels: (windows, L + L k) flags of classes and sub-categories; None: those of the patches.
        weight: of the sub-categories' loss.
    Returns:
        The stage's summary.
    """
    config, settings = context.config, context.config.classifier
    left_out = held_out(patches, settings.holdout, config.seed)
    crops = crop_settings(config, settings)
    labelled = patches if labels is None else patches.with_labels(labels)
    shared = labelled_source(labelled, keep=~left_out, **crops)
    held = labelled_source(patches, keep=left_out, **crops | {"regions": 1}) if left_out.any() else None
    task = ClassificationTask(
        tuple(config.classes.tissue().names),
        settings.regions,
        None if held is None else ray.put(held),
        subcategory_weight=weight,
    )
    source = SampleSource(
        LabelledCrops,
        ray.put(shared),
        len(shared["labels"]),
        (settings.patch_size,) * 2,
        columns=("image", "regions", "labels"),
    )

    def save(lineage: dict[str, str], metrics: dict[str, float]) -> None:
        classifier.save(context.path("model"), network, config.classes.tissue(), lineage=lineage, metrics=metrics)

    summary = train_stage(context, network, source, task, settings, save)
    return summary | {"held_out": int(left_out.sum())}


class _Judge:
    def __init__(self, config: Config, patches: str, model: str) -> None:
        settings = config.classifier
        network = classifier.load(model, masks.device_of(config))
        self.predictor = Predictor(
            _ClassMaps(network),
            network.normalization,
            tile=settings.patch_size,
            stride=settings.patch_size // 2,
            device=masks.device_of(config),
            batch_size=settings.batch_size,
        )
        self.patches = PatchSet.open(patches)

    def __call__(self, number: int, shard: list[int], part: str) -> None:
        images = list(self.patches.images(shard))

        def windows(index: int, maps: NDArray[np.float32]) -> list[dict[str, Any]]:
            rows = []
            for window, (x, y, width, height) in self.patches.boxes(shard[index]):
                logits = maps[:, y : y + height, x : x + width].mean((1, 2))
                rows.append(
                    {
                        "window": window,
                        "image": shard[index],
                        "labels": self.patches.labels[window],
                        "probabilities": 1 / (1 + np.exp(-logits)),
                    }
                )
            return rows

        rows = [row for found in self.predictor.logits_each(images, windows) for row in found]
        parquet.write(pa.Table.from_pylist(rows, SCHEMA), part)


class _ClassMaps(nn.Module):
    """A classifier's class map at the size of its input, as `Predictor` wants it."""

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        maps = self.network(images)[:, : self.network.n_classes]
        return F.interpolate(maps, size=images.shape[-2:], mode="bilinear", align_corners=False)


def _contradictions(context: StageContext, patches: PatchSet) -> dict[str, Any]:
    """Write the labels that the classifier is at least `contradiction` sure are wrong, the surest first."""
    names = context.config.classes.tissue().names
    table = parquet.read(context.path(WINDOWS))
    labels = np.array(table["labels"].to_pylist(), np.uint8).reshape(-1, len(names))
    probabilities = np.array(table["probabilities"].to_pylist(), np.float32).reshape(-1, len(names))
    doubt = np.where(labels == 1, 1 - probabilities, probabilities)
    found = np.argwhere(doubt >= context.config.classifier.contradiction)
    found = found[np.argsort(-doubt[tuple(found.T)], kind="stable")]
    rows = []
    for line, tissue in found.tolist():
        window, position = table["window"][line].as_py(), table["image"][line].as_py()
        x, y, width, height = patches.box(window)
        rows.append(
            {
                "name": patches.table["name"][position].as_py(),
                "x": x,
                "y": y,
                "width": width,
                "height": height,
                "class": names[tissue],
                "label": int(labels[line, tissue]),
                "probability": round(float(probabilities[line, tissue]), 4),
            }
        )
    out = pa.BufferOutputStream()
    pyarrow.csv.write_csv(pa.Table.from_pylist(rows, CONTRADICTIONS), out)
    storage.write_bytes(context.path("contradictions.csv"), out.getvalue().to_pybytes())
    if not rows:
        return {"contradictions": 0}
    panels = []
    for (line, _), row in zip(found[:PICTURES].tolist(), rows, strict=False):
        x, y, width, height = (row[side] for side in ("x", "y", "width", "height"))
        title = (
            f"{row['name']}: {row['class']} {'labelled' if row['label'] else 'not labelled'}, p {row['probability']}"
        )
        crop = patches.image(table["image"][line].as_py())[y : y + height, x : x + width]
        panels.append(shrunk(Panel(title, crop.copy())))  # not to keep the whole image
    grid = [panels[start : start + 4] for start in range(0, len(panels), 4)]
    storage.write_bytes(context.path("contradictions.png"), encode_png(sheet(grid, context.config.classes.tissue())))
    return {"contradictions": len(rows), "pictures": ["contradictions.png"]}
