"""What verbs print when they are done: scores, where things are, and what to do next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pistoseg import parquet, storage
from pistoseg.artifacts import Artifact, Workspace
from pistoseg.config import Config

if TYPE_CHECKING:
    from pistoseg.stages.slides import Estimate

SHOWN = 3
"""Names of slides in a line."""


def print_scores(console: Console, artifacts: dict[str, Artifact]) -> None:
    """The scores of a run's models, if there are any."""
    reports = {
        name: artifacts[stage].summary["report"]
        for name, stage in (("preliminary", "preliminary_evaluation"), ("precise", "evaluation"))
        if stage in artifacts and artifacts[stage].summary["images"]
    }
    if reports:
        console.print(score_table(reports))
    if "label_scores" in artifacts:
        held_out = artifacts["patches"].summary["held_out"]["images"]
        console.print(label_table(artifacts["label_scores"].summary["report"], held_out))


def score_table(reports: dict[str, dict[str, Any]], title: str = "IoU on the validation images") -> Table:
    """A row per class and score, a column per model."""
    table = Table(title=escape(title), title_justify="left")
    table.add_column("")
    for model in reports:
        table.add_column(Text(model), justify="right", overflow="fold")
    for name in next(iter(reports.values()))["iou"]:
        table.add_row(Text(name), *(_number(report["iou"][name]) for report in reports.values()))
    table.add_section()
    for name, key in (("mIoU", "miou"), ("fwIoU", "fwiou")):
        table.add_row(name, *(_number(report[key]) for report in reports.values()))
        intervals = [report.get("confidence_interval_95", {}).get(key) for report in reports.values()]
        table.add_row("  95 %", *(" to ".join(map(_number, ends)) if ends else "-" for ends in intervals))
    counts = (f"{report['images']}{'' if report['complete'] else ' (incomplete)'}" for report in reports.values())
    table.add_row("images", *counts)
    return table


def label_table(report: dict[str, Any], images: int) -> Table:
    """A row per class and score of the precise model by image-level labels; images: that were held out."""
    table = Table(title=f"IoU by labels of {images} held-out images", title_justify="left")
    table.add_column("")
    table.add_column("precise", justify="right")
    for name, value in report["by_class"].items():
        table.add_row(Text(name), _number(value))
    table.add_section()
    table.add_row("mean", _number(report["label_iou"]))
    table.add_row("mean average precision", _number(report["label_map"]))
    table.add_row("windows", str(report["windows"]))
    return table


def mask_table(reports: dict[str, dict[str, Any]]) -> Table:
    """A row per kind of mask, a column per class and score."""
    first = next(iter(reports.values()))
    table = Table(title=f"Masks of {first['images']} training images", title_justify="left")
    table.add_column("")
    for title in (*first["iou"], "mIoU", "fwIoU", "no class"):
        table.add_column(Text(title), justify="right")
    for name, report in reports.items():
        stage, key, *kind = name.split("/")
        values = [*report["iou"].values(), report["miou"], report["fwiou"], report["without_class"]]
        table.add_row(" ".join([stage, *kind, key[:6]]), *map(_number, values))
    return table


def estimate_lines(found: Estimate, workers: int) -> list[str]:
    """What a dry run prints."""
    lines = [f"about {found.tiles:,} tiles, from {found.sampled} slides that were opened"]
    if found.tiles_per_s is not None:
        speed = f"{found.tiles_per_s:.1f} tiles a second on this machine, workers: {workers}"
        lines.append(f"about {found.seconds / 60:,.1f} minutes: {speed}")
    return lines + [f"would fail: {line}" for line in _by_reason([vars(row) for row in found.unreadable])]


def print_slides(out: str, record: Mapping[str, Any]) -> None:
    """The failures and where things are."""
    counts = record["slides"]
    print(f"{counts['completed']} completed, {counts['failed']} failed, {counts['skipped']} were up to date")
    columns = ["slide_id", "slide", "status", "reason"]
    rows = parquet.read(storage.join(out, "summary.parquet"), columns).to_pylist()
    for line in _by_reason([row for row in rows if row["status"] == "failed"], " (see summary.csv)"):
        print(f"failed: {line}")
    print(out)
    print("  slides/<slide_id>/  mask.tif regions.geojson overview.png areas.json slide.json")
    print("  summary.md summary.csv summary.parquet run.json")


def _by_reason(failed: list[dict[str, Any]], see: str = "") -> list[str]:
    """A line for each reason for which slides fail; many have the same, but for the name of their file."""
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for row in failed:
        _, named, reason = row["reason"].partition(f"{storage.name(row['slide'])}: ")
        by_reason.setdefault(reason if named else row["reason"], []).append(row)
    lines = []
    for reason, rows in by_reason.items():
        if len(rows) == 1:
            lines.append(f"{rows[0]['slide_id']}: {rows[0]['reason']}")
        else:
            some = ", ".join(row["slide_id"] for row in rows[:SHOWN])
            more = "" if len(rows) <= SHOWN else f" and {len(rows) - SHOWN} more{see}"
            lines.append(f"{len(rows)} slides, {some}{more}: {reason}")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def next_lines(config: Config, workspace: str, artifacts: dict[str, Artifact]) -> Iterator[str]:
    """Why there are no scores, where the model is, and commands to copy."""
    if not artifacts["evaluation"].summary["images"] and "label_scores" not in artifacts:
        yield (
            "not scored: there are no validation images; add some with masks (img/ and mask/, or data.validation), "
            "or set data.label_holdout to score by image-level labels"
        )
    model = artifacts["precise"].path("bundle")
    scale = "" if config.scale.mpp else " --mpp UM"
    yield f"model:   {model}"
    yield f"next:    pistoseg segment --model {shlex.quote(model)}{scale} --slides SLIDES --out maps"
    yield from browse_lines(config, workspace)


def browse_lines(config: Config, workspace: str) -> Iterator[str]:
    """The command to look at runs with, unless they go with the folder of the job that this is."""
    from pistoseg.submission import IN_JOB
    from pistoseg.tracking.server import is_own, tracking_uri

    place = Workspace(storage.absolute(workspace))
    kept_here = not storage.is_local(workspace) and is_own(tracking_uri(config.tracking, place), place)
    if not (kept_here and IN_JOB in os.environ):
        yield f"browse:  pistoseg ui --workspace {shlex.quote(workspace)}"


def print_tree(console: Console, workspace: Workspace, artifacts: dict[str, Artifact]) -> None:
    """The folders of a run, with what is in them."""
    console.print(workspace.root, highlight=False, markup=False, soft_wrap=True)
    notes = {
        "patches": "images/ windows/ rejected.parquet",
        "validation": "images/",
        "synthesis": "preview.png, mosaics/ when stored",
        "preliminary": "bundle/ epochs.json",
        "preliminary_evaluation": "metrics.json per_image.csv predictions.png",
        "pseudo_masks": "masks/ masks.png",
        "classifier": "model/ epochs.json windows/ contradictions.csv",
        "subcategories": "model/ epochs.json features/",
        "cams": "masks/ masks.png",
        "refiner": "model/ epochs.json",
        "refined_masks": "masks/ masks.png",
        "precise": "bundle/ (the model) epochs.json",
        "evaluation": "metrics.json per_image.csv predictions.png",
        "label_scores": "label_scores.json windows/",
    }
    for stage, artifact in artifacts.items():
        # Without validation images there is only a manifest.
        note = "" if artifact.summary.get("images") == 0 else notes[stage]
        console.print(f"  {stage}/{artifact.fingerprint}/  {note}".rstrip(), highlight=False, soft_wrap=True)
