"""One trial: a pipeline in a process of its own that shares artifacts with the others and reports its epochs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group
from rich.console import Console

from pistoseg import storage
from pistoseg.artifacts import Artifact, Workspace
from pistoseg.config import Config, TrackingConfig
from pistoseg.errors import UnavailableError, below, explained
from pistoseg.graph import Step
from pistoseg.hooks import Hooks
from pistoseg.pipeline import run_pipeline
from pistoseg.progress import Progress
from pistoseg.redaction import redact
from pistoseg.search.ablation import with_overrides
from pistoseg.search.objective import Objective
from pistoseg.stages import cluster, placement
from pistoseg.training.loop import WorkersCallback

UNAVAILABLE = "unavailable"
"""Key of a report: why the trial can't go on now, as the fields of the error."""
LOST = (
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
)
"""What Ray raises where processes or nodes went away."""


@dataclass(frozen=True)
class TrialJob:
    """What all trials of a search have in common.

    Args:
        config: that they vary.
        workspace: URI.
        objective: what they are scored by.
        compared: stages whose epochs are reported, in the order of running.
        shared: names of the stages that are the same in all trials.
        workers: `Workers` actor.
        parallel: trials at a time.
        places: what the driver sees on its disks, as `placement.local_places` has it.
    """

    config: Config
    workspace: str
    objective: Objective
    compared: tuple[str, ...]
    shared: frozenset[str]
    workers: Any
    parallel: int
    places: Mapping[str, str]


class Workers:
    """What the trials' training workers hold: an actor, which outlives the trials' processes."""

    def __init__(self) -> None:
        self._groups: dict[str, list[PlacementGroup]] = {}

    def hold(self, owner: str, group: PlacementGroup) -> None:
        """A trial's training workers have a placement group."""
        self._groups.setdefault(owner, []).append(group)

    def release(self, owner: str) -> None:
        """A trial ended: its workers' places are free."""
        for group in self._groups.pop(owner, ()):
            remove_placement_group(group)


class Held(WorkersCallback):
    """Says what a trial's training workers hold: Ray keeps it when the trial is stopped (ray#54305).

    Args:
        workers: `Workers` actor.
        owner: the trial.
    """

    def __init__(self, workers: Any, owner: str) -> None:
        self.workers, self.owner = workers, owner

    def on_workers(self, group: PlacementGroup) -> None:
        """Called in a training worker."""
        ray.get(self.workers.hold.remote(self.owner, group))


class EpochReport(TuneReportCallback):
    """Passes a training's epochs on to Tune, counted over all networks that are compared.

    Args:
        score: name of the validation's score.
        offset: epochs of the networks before this one.
    """

    def __init__(self, score: str, offset: int) -> None:
        super().__init__()
        self.score, self.offset = score, offset

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called in Ray Train's controller."""
        if metrics[0].get(self.score, -1.0) >= 0:
            row = {"objective": metrics[0][self.score], "epoch": self.offset + int(metrics[0]["epoch"]) + 1}
            super().after_report(run_context, [row], None)


class _TrialHooks(Hooks):
    def __init__(self, job: TrialJob, config: Config, owner: str) -> None:
        self.job, self.owner = job, owner
        self.found: set[str] = set()
        self.offsets: dict[str, int] = {}
        epochs = 0
        for name in job.compared:
            self.offsets[name] = epochs
            epochs += getattr(config, name).epochs
        self.epochs = epochs

    def train_callbacks(self, step: Step) -> tuple[Any, ...]:
        """Epochs of the compared networks go to Tune."""
        held = Held(self.job.workers, self.owner)
        if step.stage.name not in self.offsets:
            return (held,)
        return held, EpochReport(self.job.objective.of_epoch, self.offsets[step.stage.name])

    def reused(self, artifact: Artifact) -> None:
        """Report the epochs of a network that is there, so that all trials are compared at the same ones."""
        self.found.add(artifact.stage)
        for epoch, value in self.curve(artifact):
            tune.report({"objective": value, "epoch": epoch})

    def curve(self, artifact: Artifact) -> list[tuple[int, float]]:
        """(epoch, objective) of a network that is done; empty for one that is not compared."""
        if artifact.stage not in self.offsets:
            return []
        rows = json.loads(storage.read_bytes(artifact.path("epochs.json")))
        first, score = self.offsets[artifact.stage] + 1, self.job.objective.of_epoch
        return [(first + int(row["epoch"]), float(row[score])) for row in rows if score in row]


def run_trial(parameters: Mapping[str, Any], job: TrialJob) -> None:
    """What Tune runs: the pipeline of one setting; its last report is the result, or why there is none.

    Args:
        parameters: `number`, and `overrides` as JSON.
        job: what the search's trials have in common.
    """
    overrides = json.loads(parameters["overrides"])
    try:
        tune.report(_run(overrides, int(parameters["number"]), job))
    except Exception as error:  # whatever ends a trial is its result; the search goes on
        known = explained(error)
        if isinstance(known, UnavailableError) and not _asks_for_more(known.field, overrides, job.config):
            tune.report({UNAVAILABLE: json.dumps(known.fields())})
        elif is_lost(error):
            raise  # no result: Tune starts it again
        else:
            tune.report({"problem": explain(error)})


def _asks_for_more(field: str | None, overrides: Mapping[str, Any], own: Config) -> bool:
    """Whether a trial lacks what the setting that all vary would not ask for: then it would not end the others, too.

    Args:
        field: of the error.
        overrides: of the trial.
        own: the config that they vary.
    """
    section, _, name = (field or "").partition(".")
    if section != "compute":
        return False
    wanted, enough = (getattr(config.compute, name) for config in (with_overrides(own, overrides), own))
    return bool(wanted != enough if name == "device" else wanted > enough)


def _run(overrides: Mapping[str, Any], number: int, job: TrialJob) -> dict[str, Any]:
    placement.require_seen(job.places)  # its node may be a new one, where no file is, and no fingerprint, as elsewhere
    config = with_overrides(job.config, overrides)
    config = config.model_copy(update={"tracking": TrackingConfig(enabled=False)})  # the driver keeps the trial's run
    cluster.share_cluster(job.parallel)
    workspace, hooks = Workspace(job.workspace), _TrialHooks(job, config, str(number))
    targets = job.objective.targets
    with open("/dev/null", "w") as nowhere:
        progress = Progress(Console(file=nowhere))
        artifacts = run_pipeline(config, workspace, targets, progress=progress, hooks=hooks)
    own = [item for item in artifacts.values() if item.stage not in job.shared]
    details = {
        "scores": job.objective.scores(artifacts),
        "artifacts": {name: item.fingerprint for name, item in artifacts.items()},
        "computed": [name for name in artifacts if name not in hooks.found],
        "curve": [point for item in artifacts.values() for point in hooks.curve(item)],
    }
    return {
        "objective": job.objective.value(artifacts),
        "epoch": hooks.epochs + 1,
        "finished": True,
        "seconds": sum(item.manifest["seconds"] for item in own),
        "details": json.dumps(details),  # Tune takes keys with slashes apart
    }


def is_lost(error: BaseException) -> bool:
    """Whether processes or nodes went away, which says nothing of what they were at."""
    return any(isinstance(item, LOST) for item in below(error))


def explain(error: BaseException) -> str:
    """Why a trial failed, in a line or two without secrets."""
    if known := explained(error):
        return redact(str(known))
    text = redact(f"{type(error).__name__}: {error}".strip())
    if isinstance(error, MemoryError) or "out of memory" in text.casefold() or "OutOfMemory" in text:
        return f"out of memory: {_last_line(text)}"
    return _last_line(text) if "\n" in text else text


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), text)[:500]
