"""Scores of a model on images with masks: one confusion matrix per image, and what follows from them."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import numpy as np
import pyarrow as pa

from pistoseg import storage
from pistoseg.config import EvaluationConfig
from pistoseg.metrics import ConfusionMatrix, bootstrap_interval
from pistoseg.models import bundle
from pistoseg.outputs.pictures import Panel, sheet
from pistoseg.patches.decode import decode_ids, encode_mask, encode_png
from pistoseg.patches.masked import MaskedImages
from pistoseg.pipeline import StageContext
from pistoseg.progress import Progress
from pistoseg.stages import cluster

SHARD_IMAGES = 16
PICTURES = 16
SCHEMA = pa.schema([("name", pa.string()), ("matrix", pa.list_(pa.int64())), ("prediction", pa.binary())])


def run(context: StageContext) -> dict[str, Any]:
    """Score the artifact's model; write `metrics.json`, `per_image.csv`, `predictions.png` and `parts/`."""
    validation = context.inputs["validation"]
    if not validation.summary["images"]:
        return {"images": 0, "metrics": {}}
    missing = validation.summary["missing_images"]
    report = evaluate(
        context.inputs["model"].path("bundle"),
        validation.uri,
        context.folder,
        context.config.evaluation,
        device=context.config.compute.device,
        seed=context.config.seed,
        missing=missing,
        progress=context.progress,
    )
    metrics = {"miou": report["miou"], "fwiou": report["fwiou"], "accuracy": report["accuracy"]}
    metrics |= {f"iou/{name}": value for name, value in report["iou"].items() if value is not None}
    return {"images": report["images"], "metrics": metrics, "report": report, "pictures": ["predictions.png"]}


def evaluate(
    model: str,
    images: str,
    folder: str,
    config: EvaluationConfig,
    *,
    device: str,
    seed: int,
    missing: list[str],
    progress: Progress,
) -> dict[str, Any]:
    """Score a model bundle on the images of a `validation` artifact.

    Args:
        model: URI of a bundle.
        images: URI of the artifact.
        folder: where the report goes.
        config: protocol and confidence intervals.
        device: where the network runs.
        seed: of the bootstrap.
        missing: images that the ground truth names but that are not there.
        progress: told the number of finished images.
    Returns:
        What `metrics.json` holds.
    """
    count = len(MaskedImages.open(images))
    positions = list(range(count))
    shards = [positions[start : start + SHARD_IMAGES] for start in range(0, count, SHARD_IMAGES)]
    actors, resources = _pool(device)
    cluster.run_shards(
        _Score,
        {"model": model, "images": images, "protocol": _predictor_settings(config), "device": device, "threads": cluster.node_threads()},
        shards,
        storage.join(folder, "parts"),
        actors=actors,
        resources=resources,
        progress=progress,
    )
    table = storage.read_parquet(storage.join(folder, "parts"))
    classes = bundle.load(model, "cpu").classes
    matrices = np.array(table["matrix"].to_pylist(), np.int64).reshape(-1, len(classes), len(classes))
    report = _report(matrices, classes.names, config, seed) | {
        "protocol": config.protocol,
        "settings": config.resolved(),
        "complete": not missing,
        "missing_images": missing,
        "model": model,
    }
    if missing:
        progress.say(f"warning: incomplete: the ground truth names {len(missing)} images that are not there")
    storage.write_bytes(storage.join(folder, "metrics.json"), json.dumps(report, indent=2).encode())
    storage.write_bytes(storage.join(folder, "per_image.csv"), _per_image(table["name"].to_pylist(), matrices, classes.names))
    storage.write_bytes(storage.join(folder, "predictions.png"), _picture(images, table, classes))
    return report


def _pool(device: str) -> tuple[int, dict[str, float]]:
    from pistoseg.config import ComputeConfig

    return cluster.network_pool(ComputeConfig.model_validate({"device": device}))


def _predictor_settings(config: EvaluationConfig) -> dict[str, Any]:
    return config.resolved() | {"batch_size": config.batch_size * config.resolved()["symmetries"]}


class _Score:
    def __init__(self, model: str, images: str, protocol: dict[str, Any], device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        loaded = bundle.load(model, None if device == "auto" else device)
        info = loaded.info | {"evaluation": protocol}
        self.segmenter = bundle.Segmenter(loaded.model, info, loaded.classes, loaded.device)
        self.images = MaskedImages.open(images)

    def __call__(self, number: int, shard: list[int], part: str) -> None:
        classes = self.segmenter.classes
        rows = []
        for position in shard:
            item = self.images[position]
            prediction = self.segmenter.predict(item.image)
            matrix = ConfusionMatrix(len(classes))
            matrix.update(item.mask, prediction)
            rows.append(
                {"name": item.name, "matrix": matrix.counts.ravel(), "prediction": encode_mask(prediction, classes)}
            )
        storage.write_parquet(pa.Table.from_pylist(rows, SCHEMA), part)


def _report(matrices: np.ndarray, names: list[str], config: EvaluationConfig, seed: int) -> dict[str, Any]:
    total = ConfusionMatrix(len(names), matrices.sum(0))
    report = {
        "images": len(matrices),
        "miou": total.miou(),
        "fwiou": total.fwiou(),
        "accuracy": total.accuracy(),
        "iou": dict(zip(names, _numbers(total.iou()), strict=True)),
        "dice": dict(zip(names, _numbers(total.dice()), strict=True)),
        "confusion_matrix": {"rows": "truth", "columns": "prediction", "classes": names, "pixels": total.counts.tolist()},
    }
    if config.bootstrap:
        interval = {
            "miou": bootstrap_interval(matrices, ConfusionMatrix.miou, config.bootstrap, seed),
            "fwiou": bootstrap_interval(matrices, ConfusionMatrix.fwiou, config.bootstrap, seed),
        }
        report["confidence_interval_95"] = {key: list(value) for key, value in interval.items()}
    return report


def _numbers(values: np.ndarray) -> list[float | None]:
    return [None if value != value else float(value) for value in values]


def _per_image(images: list[str], matrices: np.ndarray, names: list[str]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["image", "miou", "fwiou", "accuracy", *(f"iou {name}" for name in names), "pixels"])
    for image, counts in zip(images, matrices, strict=True):
        matrix = ConfusionMatrix(len(names), counts)
        values = [matrix.miou(), matrix.fwiou(), matrix.accuracy(), *matrix.iou()]
        writer.writerow([image, *("" if value != value else f"{value:.4f}" for value in values), counts.sum()])
    return text.getvalue().encode()


def _picture(images: str, table: pa.Table, classes: Any) -> bytes:
    """Image, truth and prediction of the first images."""
    rows = []
    for position, item in enumerate(MaskedImages.open(images)):
        if position == PICTURES:
            break
        prediction = decode_ids(table["prediction"][position].as_py())
        panels = [Panel(item.name, item.image), Panel("ground truth", item.image, item.mask)]
        rows.append([*panels, Panel("prediction", item.image, prediction)])
    return encode_png(sheet(rows, classes))
