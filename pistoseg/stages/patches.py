"""Training images: read, checked, brought to the networks' pixel size, kept as Parquet with their labelled windows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, TypeVar

import pyarrow as pa

from pistoseg import parquet, storage
from pistoseg.classes import TissueClasses
from pistoseg.config import Config, DataConfig, ScaleConfig
from pistoseg.errors import PistoSegError
from pistoseg.graph import StageContext
from pistoseg.patches.crops import CutNote, ingest_slide, network_mpp, note_lines
from pistoseg.patches.digest import training_folder
from pistoseg.patches.judging import few_single_tissue
from pistoseg.patches.layouts import scan_training
from pistoseg.patches.manifest import in_shards, is_manifest, scan_slides
from pistoseg.patches.source import (
    Listing,
    SlideListing,
    SlideSource,
    SourceImage,
    Window,
    count_unread,
    too_many_bad,
)
from pistoseg.patches.store import IMAGES_SCHEMA, REJECTED_SCHEMA, WINDOWS_SCHEMA, PatchSet, ingest
from pistoseg.stages import cluster, sharding
from pistoseg.stages.slide_images import SlideOpener

SHARD_IMAGES = 128
SHARD_WINDOWS = 256
Named = TypeVar("Named", SourceImage, SlideSource)


def run(context: StageContext) -> dict[str, Any]:
    """Write `images/`, `windows/` and `rejected.parquet`; see `pistoseg.patches.store` for their columns."""
    config = context.config
    classes = config.classes.tissue()
    uri = training_folder(config)
    read = _from_slides if is_manifest(uri) else _from_images
    listing = read(uri, classes, context)
    rejected = [asdict(item) for item in listing.rejected]
    for folder in (context.folder, held_out_folder(context.folder)):
        for part in storage.list_dir(storage.join(folder, "rejected")):
            rejected += parquet.read(part).to_pylist()
    parquet.write(pa.Table.from_pylist(rejected, REJECTED_SCHEMA), context.path("rejected.parquet"))
    patches = PatchSet.open(context.folder)
    summary = _summary(patches, classes, listing, rejected)
    if config.data.label_holdout:
        summary |= _held_out_summary(context.folder, patches, classes)
    for line in note_lines(_cut_notes(context), classes):
        context.progress.say(f"warning: {line}")
    _judge(summary, config.data, classes, context)
    return summary


def _from_images(uri: str, classes: TissueClasses, context: StageContext) -> Listing:
    """Read the images of a folder, and say what was found there."""
    listing = scan_training(uri, classes, context.config.data)
    for folder, images in _parts(listing.images, context):
        rows = [asdict(image) for image in images]
        shards = [rows[start : start + SHARD_IMAGES] for start in range(0, len(rows), SHARD_IMAGES)]
        arguments = {"data": context.config.data, "scale": context.config.scale, "folder": folder}
        _run(_Ingest, arguments, shards, len, context)
    return listing


def _from_slides(uri: str, classes: TissueClasses, context: StageContext) -> SlideListing:
    """Read the windows of a manifest's slides, and say what was found there."""
    listing = scan_slides(uri, classes)
    network_mpp(context.config.scale)
    for folder, slides in _parts(listing.slides, context):
        shards = [[asdict(slide) for slide in shard] for shard in in_shards(slides, SHARD_WINDOWS)]
        arguments = {"config": context.config, "folder": folder}
        _run(_IngestSlides, arguments, shards, _n_windows, context)
    return listing


def held_out_folder(uri: str) -> str:
    """URI of the images of a `patches` artifact on which nothing is trained; they are a `PatchSet` of their own."""
    return storage.join(uri, "held_out")


def _parts(sources: list[Named], context: StageContext) -> list[tuple[str, list[Named]]]:
    """Folders and what goes into them: the images or slides to train on, and those that are held out by their names."""
    share = context.config.data.label_holdout
    order = sorted(sources, key=lambda source: hashlib.sha256(source.name.encode()).hexdigest())
    held = {source.name for source in order[: round(share * len(sources))]}
    parts = [(context.folder, [source for source in sources if source.name not in held])]
    if held:
        parts.append((held_out_folder(context.folder), [source for source in sources if source.name in held]))
    return parts


def _held_out_summary(folder: str, patches: PatchSet, classes: TissueClasses) -> dict[str, Any]:
    """How many images and windows are held out; refused where they take away all there is of a class."""
    if not storage.exists(held_out_folder(folder)):
        raise PistoSegError(
            "holds no image out: there are too few", field="data.label_holdout", remedy="raise it, or set it to 0"
        )
    held = PatchSet.open(held_out_folder(folder))
    lost = (held.labels.max(0) > patches.labels.max(0)).tolist()
    if any(lost):
        names = [name for name, gone in zip(classes.names, lost, strict=True) if gone]
        raise PistoSegError(
            f"holds out every image with {', '.join(names)}", field="data.label_holdout", remedy="make it smaller"
        )
    return {"held_out": {"images": len(held), "windows": len(held.labels)}}


def _n_windows(shard: list[dict[str, Any]]) -> int:
    """Windows in a shard; a slide from which they are yet to be cut counts as one."""
    return sum(len(slide["windows"]) or 1 for slide in shard)


def _run(
    worker: type, arguments: dict[str, Any], shards: list[Any], weight: Callable[[Any], int], context: StageContext
) -> None:
    sharding.run_shards(
        worker,
        arguments,
        shards,
        storage.join(arguments["folder"], "images"),
        actors=cluster.cpu_pool(context.config.compute),
        resources={"num_cpus": 1},
        progress=context.progress,
        weight=weight,
        names=lambda shard: [source["name"] for source in shard],
    )


def _cut_notes(context: StageContext) -> list[CutNote]:
    parts = [json.loads(storage.read_text(part)) for part in storage.list_dir(context.path("cuts"))]
    return [CutNote(**note) for part in parts for note in part]


class _Ingest:
    def __init__(self, data: DataConfig, scale: ScaleConfig, folder: str) -> None:
        self.data, self.scale, self.folder = data, scale, folder

    def __call__(self, number: int, shard: list[dict[str, Any]], part: str) -> None:
        windows, rejected = [], []
        with _images(part) as add:
            for row in shard:
                source = SourceImage(**row | {"windows": tuple(Window(**window) for window in row["windows"])})
                image, its_windows, its_rejections = ingest(source, self.data, self.scale)
                if image is not None:
                    add(image)
                windows += its_windows
                rejected += [asdict(item) for item in its_rejections]
            _write_others(self.folder, part, windows, rejected)


class _IngestSlides:
    def __init__(self, config: Config, folder: str) -> None:
        self.config, self.folder = config, folder
        self.classes = config.classes.tissue()
        self.opener = SlideOpener(network_mpp(config.scale))

    def __call__(self, number: int, shard: list[dict[str, Any]], part: str) -> None:
        windows, rejected, notes = [], [], []
        with _images(part) as add:
            for row in shard:
                source = SlideSource(**row | {"windows": tuple(Window(**window) for window in row["windows"])})
                rows = ingest_slide(source, self.opener, self.classes, self.config.data, self.config.scale, add)
                windows += rows.windows
                rejected += [asdict(item) for item in rows.rejected]
                notes += [asdict(note) for note in rows.notes]
            if notes:
                name = storage.name(part).removesuffix(".parquet") + ".json"
                storage.write_bytes(storage.join(self.folder, "cuts", name), json.dumps(notes).encode())
            _write_others(self.folder, part, windows, rejected)


def _images(part: str) -> AbstractContextManager[Callable[[dict[str, Any]], None]]:
    """Takes the images of a shard; their part appears last, at the end of the block, as it marks the shard as done."""
    return parquet.writing_rows(part, IMAGES_SCHEMA, row_group_size=8)


def _write_others(folder: str, part: str, windows: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> None:
    """Write all of a shard but its images."""
    name = storage.name(part)
    parquet.write(pa.Table.from_pylist(rejected, REJECTED_SCHEMA), storage.join(folder, "rejected", name))
    parquet.write(pa.Table.from_pylist(windows, WINDOWS_SCHEMA), storage.join(folder, "windows", name))


def _summary(
    patches: PatchSet, classes: TissueClasses, listing: Listing | SlideListing, rejected: list[dict[str, Any]]
) -> dict[str, Any]:
    labels = patches.labels
    sources = listing.slides if isinstance(listing, SlideListing) else listing.images
    single = labels.sum(axis=1) == 1
    counts = {"images": len(patches), "windows": len(labels), "single_tissue_windows": int(single.sum())}
    return {
        "metrics": counts | {"rejected": len(rejected)},
        "layout": listing.layout,
        "images": len(patches),
        "windows": len(labels),
        "rejected": len(rejected),
        "found": len(sources),
        "unread": count_unread(sources, (item["name"] for item in rejected)),
        "by_class": dict(zip(classes.names, labels.sum(axis=0).tolist(), strict=True)),
        "single_tissue": dict(zip(classes.names, labels[single].sum(axis=0).tolist(), strict=True)),
    }


def _judge(summary: dict[str, Any], data: DataConfig, classes: TissueClasses, context: StageContext) -> None:
    """Say what is odd about the training images; refuse what can't be trained on."""
    file = context.path("rejected.parquet")
    if summary["rejected"]:
        context.progress.say(f"{summary['rejected']} images or windows were rejected; reasons: {file}")
    refuse_rejected(summary, data, file)
    for name, count in summary["single_tissue"].items():
        if count < data.min_single_tissue:
            context.progress.say(f"warning: {few_single_tissue(name, count, data, context.config.synthesis)}")


def refuse_rejected(summary: dict[str, Any], data: DataConfig, file: str) -> None:
    """Refuse training images of which too many are bad.

    Args:
        summary: of the artifact.
        data: how many may be.
        file: that lists them.
    """
    problem = too_many_bad(summary, data.max_rejected)
    if problem is not None:
        raise PistoSegError(
            problem,
            file=file,
            remedy="mend them (`pistoseg data check` lists them), or raise data.max_rejected",
        )
