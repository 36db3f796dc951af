"""Training images: read, checked, brought to the networks' pixel size, kept as Parquet with their labelled windows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pyarrow as pa

from pistoseg import storage
from pistoseg.classes import TissueClasses
from pistoseg.config import DataConfig, ScaleConfig
from pistoseg.errors import PistoSegError
from pistoseg.patches.digest import training_folder
from pistoseg.patches.layouts import scan_training
from pistoseg.patches.source import SourceImage, Window
from pistoseg.patches.store import IMAGES_SCHEMA, REJECTED_SCHEMA, WINDOWS_SCHEMA, PatchSet, ingest
from pistoseg.pipeline import StageContext
from pistoseg.stages import cluster

SHARD_IMAGES = 128


def run(context: StageContext) -> dict[str, Any]:
    """Write `images/`, `windows/` and `rejected.parquet`; see `pistoseg.patches.store` for their columns."""
    config = context.config
    classes = config.classes.tissue()
    listing = scan_training(training_folder(config), classes, config.data)
    rows = [asdict(image) for image in listing.images]
    shards = [rows[start : start + SHARD_IMAGES] for start in range(0, len(rows), SHARD_IMAGES)]
    cluster.run_shards(
        _Ingest,
        {"data": config.data, "scale": config.scale, "folder": context.folder},
        shards,
        context.path("images"),
        actors=cluster.cpu_pool(config.compute),
        resources={"num_cpus": 1},
        progress=context.progress,
    )
    rejected = [asdict(item) for item in listing.rejected]
    for part in storage.list_dir(context.path("rejected")):
        rejected += storage.read_parquet(part).to_pylist()
    storage.write_parquet(pa.Table.from_pylist(rejected, REJECTED_SCHEMA), context.path("rejected.parquet"))
    patches = PatchSet.open(context.folder)
    summary = _summary(patches, classes, listing.layout, rejected)
    _judge(summary, config.data, classes, context)
    return summary


class _Ingest:
    def __init__(self, data: DataConfig, scale: ScaleConfig, folder: str) -> None:
        self.data, self.scale, self.folder = data, scale, folder

    def __call__(self, number: int, shard: list[dict[str, Any]], part: str) -> None:
        images, windows, rejected = [], [], []
        for row in shard:
            source = SourceImage(**row | {"windows": tuple(Window(**window) for window in row["windows"])})
            image, its_windows, its_rejections = ingest(source, self.data, self.scale)
            if image is not None:
                images.append(image)
            windows += its_windows
            rejected += [asdict(item) for item in its_rejections]
        # The images' part is written last: it marks the shard as done.
        name = storage.name(part)
        storage.write_parquet(
            pa.Table.from_pylist(rejected, REJECTED_SCHEMA), storage.join(self.folder, "rejected", name)
        )
        storage.write_parquet(pa.Table.from_pylist(windows, WINDOWS_SCHEMA), storage.join(self.folder, "windows", name))
        storage.write_parquet(pa.Table.from_pylist(images, IMAGES_SCHEMA), part, row_group_size=32)


def _summary(patches: PatchSet, classes: TissueClasses, layout: str, rejected: list[dict[str, Any]]) -> dict[str, Any]:
    labels = patches.labels
    single = labels.sum(axis=1) == 1
    counts = {"images": len(patches), "windows": len(labels), "single_tissue_windows": int(single.sum())}
    return {
        "metrics": counts | {"rejected": len(rejected)},
        "layout": layout,
        "images": len(patches),
        "windows": len(labels),
        "rejected": len(rejected),
        "by_class": dict(zip(classes.names, labels.sum(axis=0).tolist(), strict=True)),
        "single_tissue": dict(zip(classes.names, labels[single].sum(axis=0).tolist(), strict=True)),
    }


def _judge(summary: dict[str, Any], data: DataConfig, classes: TissueClasses, context: StageContext) -> None:
    """Say what is odd about the training images; refuse what can't be trained on."""
    refused = summary["rejected"]
    file = context.path("rejected.parquet")
    if refused:
        context.progress.say(f"{refused} images or windows were rejected; reasons: {file}")
    if not summary["images"] or refused > data.max_rejected * (refused + summary["windows"]):
        raise PistoSegError(
            f"{refused} of {refused + summary['windows']} images or windows are bad, more than data.max_rejected "
            f"({data.max_rejected:.0%}) allows",
            file=file,
            remedy="mend them (`pistoseg data check` lists them), or raise data.max_rejected",
        )
    for name, count in summary["single_tissue"].items():
        if count < data.min_single_tissue:
            context.progress.say(
                f"warning: class {name!r} has {count} single-tissue images (fewer than data.min_single_tissue = "
                f"{data.min_single_tissue}); mosaics will repeat them"
            )
