"""Scores of a model on images with masks: one confusion matrix per image, and what follows from them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from pistoseg import metrics, parquet, storage
from pistoseg.artifacts import fingerprint
from pistoseg.claims import claimed
from pistoseg.classes import TissueClasses
from pistoseg.config import ComputeConfig, EvaluationConfig
from pistoseg.errors import PistoSegError
from pistoseg.graph import BY_NAME, StageContext
from pistoseg.models import bundle
from pistoseg.outputs.pictures import Panel, sheet, shrunk
from pistoseg.patches.decode import decode_ids, encode_mask, encode_png
from pistoseg.patches.digest import files_digest
from pistoseg.patches.layouts import scan_evaluation
from pistoseg.patches.masked import FOLDER, MaskedImages
from pistoseg.progress import Progress
from pistoseg.redaction import redact
from pistoseg.stages import sharding
from pistoseg.stages.validation import collect

SHARD_IMAGES = 16
PICTURES = 16
WORK = ".evaluation"
"""Folder of a report for what is only needed until it is written, in a folder by what that depends on."""
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
        parts=storage.join(context.folder, "parts"),
        classes=context.config.classes.tissue(),
        device=context.config.compute.device,
        seed=context.config.seed,
        missing=missing,
        progress=context.progress,
        check=context.check,
    )
    if said := other_protocol(context.inputs["model"].path("bundle"), context.config.evaluation):
        context.progress.say(said)
    scores = {key: report[key] for key in ("miou", "fwiou", "mean_dice", "pixel_accuracy")}
    scores |= {f"iou/{name}": value for name, value in report["iou"].items()}
    known = {key: value for key, value in scores.items() if value is not None}
    return {"images": report["images"], "metrics": known, "report": report, "pictures": ["predictions.png"]}


def other_protocol(model: str, config: EvaluationConfig) -> str | None:
    """What to say where a bundle predicts otherwise than it is scored: by `--protocol`, or by a run that reuses it.

    Args:
        model: URI of the bundle, which is not changed: it may be registered, and slides be segmented with it.
        config: by which it is scored.
    """
    own, ours = bundle.protocol_of(bundle.read_info(model)), json.loads(json.dumps(config.resolved()))
    other = [f"{key} {own[key]}, here {value}" for key, value in ours.items() if own[key] != value]
    if not other:
        return None
    return f"{model}: predicts by the evaluation section of the run that trained it ({'; '.join(other)})"


def evaluate_folder(
    model: str,
    data: str,
    out: str,
    config: EvaluationConfig,
    *,
    classes: TissueClasses | None,
    device: str,
    max_pixels: int,
    progress: Progress,
) -> dict[str, Any]:
    """Score a model bundle on a folder with img/ and mask/; the report goes to `out`.

    Of two runs into one folder the second waits. A run that was interrupted is gone on with, unless it was of another
    model, other images or other settings.

    Args:
        model: URI of a bundle.
        data: URI of the folder.
        out: URI of a folder for `metrics.json`, `per_image.csv` and `predictions.png`; what else is in it stays.
        config: protocol and confidence intervals.
        classes: what the values of the masks mean, class by class of the model; None: as the model says.
        device: where the network runs.
        max_pixels: larger images are refused.
        progress: told what is read and scored.
    Returns:
        What `metrics.json` holds.
    Raises:
        PistoSegError: the classes or images are wrong, or another run has taken the folder over.
    """
    of_model = TissueClasses.from_json(bundle.read_info(model))
    classes = classes or of_model
    if len(classes) != len(of_model):
        raise PistoSegError(
            f"gives {len(classes)} classes, the model has {len(of_model)}: {', '.join(of_model.names)}",
            field="--classes",
            remedy="name the model's classes, in its order",
        )
    scored = scan_evaluation(data).folder
    if scored != data:
        progress.say(f"the images of {scored} are scored, the validation split of {data}")
    with claimed(out, say=progress.say) as claim:
        assert claim is not None, "no report is ready before it is asked for"
        key = _work_key(model, scored, config, classes, device, max_pixels)
        work = storage.join(out, WORK, key)
        for other in storage.list_dir(storage.join(out, WORK)):
            if storage.name(other) != key:
                with suppress(OSError, PistoSegError):  # what stays are whole parts, good for its own key
                    storage.remove_tree(other)
        storage.remove_parts(work)
        with progress.stage("Reading images and masks"):
            summary = collect(data, work, classes, max_pixels=max_pixels, actors=1, progress=progress)
        with progress.stage("Scoring"):
            report = evaluate(
                model,
                work,
                out,
                config,
                parts=storage.join(work, "parts"),
                classes=classes,
                device=device,
                seed=0,
                missing=summary["missing_images"],
                progress=progress,
                check=claim.check,
            )
        claim.check()
        with suppress(OSError, PistoSegError):  # the scores are written; what is left takes room and harms nothing
            storage.remove_tree(storage.join(out, WORK))
    return report


def _work_key(
    model: str, data: str, config: EvaluationConfig, classes: TissueClasses, device: str, max_pixels: int
) -> str:
    """Hash of everything that unfinished work of `evaluate_folder` depends on; the intervals are made at its end."""
    read = {"classes": classes.to_json(), "max_pixels": max_pixels}
    images = fingerprint("validation", BY_NAME["validation"].version, read, {"files": files_digest(data)})
    settings = config.model_dump(mode="json", exclude={"bootstrap"}) | {"device": device}
    inputs = {"model": bundle.fingerprint(model), "validation": images}
    return fingerprint("evaluation", BY_NAME["evaluation"].version, settings, inputs)


def evaluate(
    model: str,
    images: str,
    folder: str,
    config: EvaluationConfig,
    *,
    parts: str,
    classes: TissueClasses,
    device: str,
    seed: int,
    missing: list[str],
    progress: Progress,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Score a model bundle on the images of a `validation` artifact.

    Args:
        model: URI of a bundle.
        images: URI of the artifact.
        folder: where the report goes.
        config: protocol and confidence intervals.
        parts: where the scores and predictions of images go first; what is there is not done again.
        classes: names and colours for the report.
        device: where the network runs.
        seed: of the bootstrap.
        missing: images that the ground truth names but that are not there.
        progress: told the number of finished images.
        check: called before the report is written; raises when the folder has become another run's.
    Returns:
        What `metrics.json` holds.
    Raises:
        PistoSegError: the parts are not of these images.
    """
    names = parquet.read(storage.join(images, FOLDER), columns=["name"])["name"].to_pylist()
    positions = list(range(len(names)))
    shards = [positions[start : start + SHARD_IMAGES] for start in range(0, len(names), SHARD_IMAGES)]
    sharding.run_networks(
        _Score,
        {
            "model": model,
            "images": images,
            "protocol": config.resolved() | {"batch_size": config.batch_size},
            "device": device,
        },
        shards,
        parts,
        config=ComputeConfig.model_validate({"device": device}),
        progress=progress,
        names=lambda shard: [names[position] for position in shard],
    )
    table = parquet.read(parts)
    if len(table) != len(names):
        raise PistoSegError(
            f"holds the scores of {len(table)} images, and {len(names)} are to be scored",
            file=parts,
            remedy="something else changed it meanwhile: delete it, and run the same command again",
        )
    matrices = np.array(table["matrix"].to_pylist(), np.int64).reshape(-1, len(classes), len(classes))
    if said := _unseen(matrices, classes.names):
        progress.say(said)
    report = _report(matrices, classes.names, config, seed) | {
        "protocol": config.protocol,
        "settings": config.resolved(),
        "complete": not missing,
        "missing_images": missing,
        "model": redact(model),
    }
    if missing:
        progress.say(f"warning: incomplete: the ground truth names {len(missing)} images that are not there")
    check()
    storage.write_bytes(storage.join(folder, "metrics.json"), json.dumps(report, indent=2).encode())
    storage.write_bytes(
        storage.join(folder, "per_image.csv"), _per_image(table["name"].to_pylist(), matrices, classes.names)
    )
    storage.write_bytes(storage.join(folder, "predictions.png"), _picture(images, table, classes))
    return report


class _Score:
    def __init__(self, model: str, images: str, protocol: dict[str, Any], device: str) -> None:
        loaded = bundle.load(model, None if device == "auto" else device)
        info = loaded.info | {"evaluation": protocol}
        self.segmenter = bundle.Segmenter(loaded.model, info, loaded.classes, loaded.device)
        self.images = MaskedImages.open(images)

    def __call__(self, number: int, shard: list[int], part: str) -> None:
        classes = self.segmenter.classes
        rows = []
        for position in shard:
            item = self.images[position]
            prediction = self.segmenter.predict(item.image, background="none")  # the true mask says what counts
            matrix = metrics.confusion(item.mask, prediction, len(classes))
            rows.append({"name": item.name, "matrix": matrix.ravel(), "prediction": encode_mask(prediction, classes)})
        parquet.write(pa.Table.from_pylist(rows, SCHEMA), part)


def _unseen(matrices: np.ndarray, names: list[str]) -> str | None:
    """What to say of classes that no mask shows; where none shows any, that was said as they were read."""
    pixels = matrices.sum((0, 2))
    seen = [f"{name!r} (id {number})" for number, name in enumerate(names) if pixels[number]]
    unseen = [f"{name!r} (id {number})" for number, name in enumerate(names) if not pixels[number]]
    return f"no pixel of {', '.join(unseen)} in the masks, only of {', '.join(seen)}" if seen and unseen else None


def _report(matrices: np.ndarray, names: list[str], config: EvaluationConfig, seed: int) -> dict[str, Any]:
    report = {"images": len(matrices), **metrics.ConfusionMatrix(len(names), matrices.sum(0)).to_dict(names)}
    if config.bootstrap:
        intervals = {
            name: metrics.bootstrap_interval(matrices, score, config.bootstrap, seed)
            for name, score in (("miou", metrics.miou), ("fwiou", metrics.fwiou))
        }
        report["confidence_interval_95"] = {
            name: [None if math.isnan(end) else end for end in ends] for name, ends in intervals.items()
        }
    return report


def _per_image(images: list[str], matrices: np.ndarray, names: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pa.csv.write_csv(pa.table(metrics.image_table(images, matrices, names)), sink)
    return bytes(sink.getvalue())


def _picture(images: str, table: pa.Table, classes: TissueClasses) -> bytes:
    """Image, truth and prediction of the first images; what is not scored is left as it is."""
    rows = []
    for position, item in enumerate(MaskedImages.open(images)):
        if position == PICTURES:
            break
        prediction = decode_ids(table["prediction"][position].as_py())
        prediction = np.where(item.mask < len(classes), prediction, np.uint8(classes.background_id))
        truth = shrunk(Panel("ground truth", item.image, item.mask))  # whole ones may be as large as slides
        rows.append([Panel(item.name, truth.image), truth, shrunk(Panel("prediction", item.image, prediction))])
    return encode_png(sheet(rows, classes))
