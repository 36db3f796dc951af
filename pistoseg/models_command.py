"""The verbs `models list|show|promote|export`: the registry on the terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pistoseg import storage
from pistoseg.artifacts import Workspace
from pistoseg.config import TrackingConfig
from pistoseg.errors import PistoSegError
from pistoseg.redaction import redact
from pistoseg.tracking.registry import CHAMPION, PREVIOUS, ModelVersion, Registry, lineage, scored_by

WIDTH = 200
"""Columns where the output is no terminal: nothing is folded in a log."""


def list_models(workspace: str, tracking: TrackingConfig) -> int:
    """Print every version of every registered model with its aliases and mIoU.

    The mIoU is that of `_scores`; a dash where there is none, or where a version's storage can't be looked at.
    """
    registry, console = _registry(workspace, tracking), _console()
    table = Table(title=f"Models at {escape(redact(registry.uri))}", title_justify="left")
    for title in ("model", "version", "aliases", "mIoU", "registered", "bundle"):
        table.add_column(title, overflow="fold")
    for version in registry.versions():
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
    metrics = registry.metrics(version) | _scores(version)
    console.print("metrics", highlight=False)
    for name, score in sorted(metrics.items()):
        console.print(f"  {name}: {score:.4f}", highlight=False, markup=False)
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
    before = _registry(workspace, tracking).promote(name, version, alias)
    print(f"models:/{name}@{alias} is version {version}")
    if before is not None and alias == CHAMPION:
        print(f"models:/{name}@{PREVIOUS} is version {before}")
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
    """Of the newest evaluation, and the newest scores by labels, in the workspace that it was registered from.

    A model may be scored by several protocols.
    """
    newest: dict[str, dict[str, float]] = {}
    if "pistoseg.bundle" in version.tags:
        for artifact in sorted(scored_by(version.bundle), key=lambda item: str(item.manifest["created"])):
            newest[artifact.stage] = artifact.summary.get("metrics", {})
    return {name: score for metrics in newest.values() for name, score in metrics.items()}


def _pictures(version: ModelVersion) -> list[str]:
    """Pictures of what scored it and of what it was made from."""
    found = [item.path(name) for item in scored_by(version.bundle) for name in item.summary.get("pictures", [])]
    for manifest in lineage(version.bundle):
        found += [storage.join(manifest["uri"], name) for name in manifest["summary"].get("pictures", [])]
    return found


def _date(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(milliseconds / 1000))
