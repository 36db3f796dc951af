"""The verbs `models list|show|promote|export`: the registry on the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pistoseg import storage
from pistoseg.artifacts import Artifact, Workspace
from pistoseg.config import TrackingConfig
from pistoseg.errors import PistoSegError
from pistoseg.progress import Progress
from pistoseg.redaction import redact
from pistoseg.tracking.registry import (
    BUNDLE,
    CHAMPION,
    PREVIOUS,
    SCORES,
    ModelVersion,
    Registry,
    lineage,
    newest_scores,
    scored_by,
)

WIDTH = 200
"""Columns where the output is no terminal: nothing is folded in a log."""
INTERNALS = ("epoch", "gradient_norm", "images_per_s", "lr", "seconds", "waiting_share")
"""Metrics of a training that say how it ran."""


def list_models(workspace: str, tracking: TrackingConfig) -> int:
    """Print every version of every registered model with its aliases and mIoU.

    The mIoU is that of `_scores`; a dash where there is none, or where a version's storage can't be looked at.
    """
    registry, console = _registry(workspace, tracking), _console()
    table = Table(title=f"Models at {escape(redact(registry.uri))}", title_justify="left")
    for title in ("model", "version", "aliases", "mIoU", "registered", "bundle"):
        table.add_column(title, overflow="fold")
    versions = registry.versions()
    if not versions:
        where = f"no model is registered at {redact(registry.uri)}"
        print(f"{where}; --workspace names another workspace, MLFLOW_TRACKING_URI or --set tracking.uri=URL a server")
        return 0
    for version in versions:
        try:
            scores = _scores(version)
        except (PistoSegError, OSError):  # one that is away, or is not to be opened from here, hides no other version
            scores = {}
        miou = f"{scores['miou']:.4f}" if "miou" in scores else "-"
        bundle = version.tags.get("pistoseg.bundle", "-")
        cells = (version.name, version.version, ", ".join(version.aliases), miou, _date(version.created), bundle)
        table.add_row(*map(Text, cells))  # brackets of names and paths are no markup
    console.print(table)
    return 0


def show(model: str, workspace: str, tracking: TrackingConfig) -> int:
    """Print a version's scores, what it was made from, and where its pictures are."""
    registry, console = _registry(workspace, tracking), _console()
    version = registry.newest(model)
    title = f"{version.name} version {version.version} {', '.join(version.aliases)}"
    console.print(title.rstrip(), highlight=False, markup=False)
    rows = {"registered": _date(version.created), "bundle": version.bundle, "MLflow run": version.run_id or "-"}
    rows |= {key.removeprefix("pistoseg."): value for key, value in version.tags.items() if key == "pistoseg.search"}
    for title, value in rows.items():
        console.print(f"  {title}: {value}", highlight=False, markup=False, soft_wrap=True)
    for line in (*_score_lines(version), *_training_lines(registry.metrics(version), _scores(version))):
        console.print(line, highlight=False, markup=False)
    console.print("lineage", highlight=False)
    for manifest in lineage(version.bundle):
        inputs = ", ".join(f"{role} {item['fingerprint'][:6]}" for role, item in manifest["inputs"].items())
        made = f"  {manifest['stage']}/{manifest['fingerprint']}, {manifest['seconds']:.0f} s, {manifest['created']}"
        console.print(made + (f", from {inputs}" if inputs else ""), highlight=False, markup=False, soft_wrap=True)
    console.print("pictures", highlight=False)
    for uri in _pictures(version):
        console.print(f"  {uri}", highlight=False, markup=False, soft_wrap=True)
    return 0


def promote(name: str, version: str, alias: str, workspace: str, tracking: TrackingConfig) -> int:
    """Point an alias to a version."""
    registry = _registry(workspace, tracking)
    before = registry.promote(name, version, alias)
    print(f"models:/{name}@{alias} is version {version}")
    if before is not None and alias == CHAMPION:
        print(f"models:/{name}@{PREVIOUS} is version {before}")
        with suppress(PistoSegError, OSError):  # a storage that is away hides scores
            now, was = (_scores(registry.find(f"{name}/{number}")) for number in (version, before))
            key = next((key for key in SCORES if key in now and key in was), None)
            if key and now[key] < was[key]:
                text = f"version {version} has {SCORES[key]} {now[key]:.4f}, the champion before it {was[key]:.4f}"
                Progress().say(f"warning: {text}")
    return 0


def export(model: str, out: str, workspace: str, tracking: TrackingConfig) -> int:
    """Copy a version's bundle to a folder."""
    registry = _registry(workspace, tracking)
    for uri in registry.export(registry.newest(model), storage.absolute(out)):
        print(uri)
    return 0


def _registry(workspace: str, tracking: TrackingConfig) -> Registry:
    return Registry(tracking, Workspace(storage.absolute(workspace)))


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _scores(version: ModelVersion) -> dict[str, float]:
    """What scores a model in the workspace that it was registered from."""
    return {name: score for artifact in _scored(version) for name, score in artifact.summary.get("metrics", {}).items()}


def _scored(version: ModelVersion) -> list[Artifact]:
    return newest_scores(version.bundle) if BUNDLE in version.tags else []


def _score_lines(version: ModelVersion) -> Iterator[str]:
    """Scores by masks and by labels, with their intervals and how much was scored."""
    for artifact in _scored(version):
        report = artifact.summary.get("report", {})
        counts = [f"{report[what]} {what}" for what in ("images", "windows") if what in report]
        by = "labels" if artifact.stage == "label_scores" else "masks"
        yield f"scores by {by}{f' of {counts[0]}' if counts else ''}"
        for name, score in artifact.summary.get("metrics", {}).items():
            ends = report.get("confidence_interval_95", {}).get(name, [None])
            interval = "" if None in ends else f" (95 %: {' to '.join(f'{end:.4f}' for end in ends)})"
            yield f"  {name}: {score:.4f}{interval}"


def _training_lines(metrics: dict[str, float], scores: dict[str, float]) -> Iterator[str]:
    """What else the MLflow run measured: last what says how it ran, not what came out."""
    yield "training"
    for name in sorted(metrics.keys() - scores.keys(), key=lambda name: (name in INTERNALS, name)):
        # A run counts epochs from 0, the log and people from 1.
        yield f"  epochs: {metrics[name] + 1:.0f}" if name == "epoch" else f"  {name}: {metrics[name]:.4f}"


def _pictures(version: ModelVersion) -> list[str]:
    """Pictures of what scored it and of what it was made from."""
    found = [item.path(name) for item in scored_by(version.bundle) for name in item.summary.get("pictures", [])]
    for manifest in lineage(version.bundle):
        found += [storage.join(manifest["uri"], name) for name in manifest["summary"].get("pictures", [])]
    return found


def _date(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(milliseconds / 1000))
