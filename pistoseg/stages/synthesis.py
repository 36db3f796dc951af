"""Mosaics: stored as Parquet, or only looked at, when the trainer gets them as a stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import ray

from pistoseg import parquet, storage
from pistoseg.artifacts import Artifact
from pistoseg.classes import TissueClasses
from pistoseg.config import Config
from pistoseg.graph import StageContext
from pistoseg.outputs.pictures import Panel, colored, sheet
from pistoseg.patches.background import background_rule
from pistoseg.patches.decode import encode_mask, encode_png
from pistoseg.patches.store import PatchSet
from pistoseg.stages import cluster, sharding
from pistoseg.synthesis import TissueBank
from pistoseg.training.samples import MOSAICS_TOGETHER, fresh_mosaics, mosaic_source

PART_MOSAICS = 256
PREVIEW = 16
SCHEMA = pa.schema([("index", pa.int64()), ("image", pa.binary()), ("mask", pa.binary())])


def run(context: StageContext) -> dict[str, Any]:
    """Write `preview.png` and, when stored, `mosaics/` (index, image and mask as PNG)."""
    config = context.config
    source = mosaics(config, context.inputs["patches"])
    sizes = _small_images(TissueBank.from_arrays(source["bank"]), config, context)
    if config.synthesis.mode == "stored":
        _store(source, config, context)
    else:
        context.progress.say("mosaics are streamed: made afresh in every epoch, nothing is written")
    synthesizer = fresh_mosaics(source)
    samples = [synthesizer.sample(0, index) for index in range(PREVIEW)]
    storage.write_bytes(context.path("preview.png"), preview(samples, config.classes.tissue()))
    stored = {"count": config.synthesis.count, "part_size": PART_MOSAICS} if config.synthesis.mode == "stored" else {}
    summary = {"mode": config.synthesis.mode, "pictures": ["preview.png"], **stored}
    return summary | sizes | {"shares": _shares(samples, config)}


def _small_images(bank: TissueBank, config: Config, context: StageContext) -> dict[str, Any]:
    """Say which single-tissue images are smaller than a crop; what the summary says of them, if there are any."""
    crop = f"a crop of {bank.crop[0]}x{bank.crop[1]} px (synthesis.crop_height, synthesis.crop_width)"
    found: dict[str, Any] = {}
    if any(bank.left_out):
        names = config.classes.tissue().names
        found["left_out"] = {name: count for name, count in zip(names, bank.left_out, strict=True) if count}
        there = np.bincount(bank.labels, minlength=len(names)) + bank.left_out
        counts = [f"{count} of {there[names.index(name)]} of {name}" for name, count in found["left_out"].items()]
        context.progress.say(
            f"warning: single-tissue images smaller than half of {crop} are left out: {', '.join(counts)}"
        )
    if bank.padded:
        found["padded"] = bank.padded
        context.progress.say(f"{bank.padded} single-tissue images smaller than {crop} are padded by reflection")
    return found


def mosaics(config: Config, patches: Artifact) -> dict[str, Any]:
    """The single-tissue images of a `patches` artifact, ready for `fresh_mosaics`."""
    classes = config.classes.tissue()
    height, width = config.synthesis.crop_height, config.synthesis.crop_width
    bank = TissueBank.from_images(
        PatchSet.open(patches.uri).single_tissue(),
        len(classes),
        background_rule(config.data),
        crop=(height, width),
    ).with_rejection(height, width, config.synthesis.background_threshold)
    return mosaic_source(bank, config.synthesis, classes.names, classes.background_id, config.seed)


def preview(samples: list[tuple[np.ndarray, np.ndarray]], classes: TissueClasses) -> bytes:
    """A PNG sheet of mosaics, (H, W, 3) uint8, beside their masks, (H, W) uint8."""
    rows = [
        [Panel(f"mosaic {index}", image), Panel("mask", colored(mask, classes))]
        for index, (image, mask) in enumerate(samples)
    ]
    return encode_png(sheet(rows, classes, columns=min(4, len(rows))))


def _store(source: dict[str, Any], config: Config, context: StageContext) -> None:
    starts = range(0, config.synthesis.count, PART_MOSAICS)
    shards = [[start, min(start + PART_MOSAICS, config.synthesis.count)] for start in starts]
    sharding.run_shards(
        _Make,
        {"source": ray.put(source), "classes": config.classes.tissue()},
        shards,
        context.path("mosaics"),
        actors=cluster.cpu_pool(config.compute),
        resources={"num_cpus": 1},
        progress=context.progress,
        weight=lambda shard: shard[1] - shard[0],
    )


class _Make:
    def __init__(self, source: dict[str, Any], classes: TissueClasses) -> None:
        import cv2

        cv2.setNumThreads(1)
        self.samples, self.classes = fresh_mosaics(source), classes

    def __call__(self, number: int, shard: list[int], part: str) -> None:
        rows = []
        for index in range(*shard):
            image, mask = self.samples.sample(0, index)
            rows.append({"index": index, "image": encode_png(image), "mask": encode_mask(mask, self.classes)})
        parquet.write(pa.Table.from_pylist(rows, SCHEMA), part, row_group_size=MOSAICS_TOGETHER)


def _shares(samples: list[tuple[np.ndarray, np.ndarray]], config: Config) -> dict[str, float]:
    """Share of the previewed pixels by class."""
    classes = config.classes.tissue()
    counts = np.bincount(np.concatenate([mask.ravel() for _, mask in samples]), minlength=256)
    named = dict(zip(classes.names, counts[: len(classes)].tolist(), strict=True))
    named[classes.no_class("background")] = int(counts[classes.background_id])
    return {name: round(count / counts.sum(), 4) for name, count in named.items()}
