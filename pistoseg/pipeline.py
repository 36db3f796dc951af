"""The stage graph, as data, and its runner.

A stage is a function of its settings and its input artifacts. The runner computes the fingerprints, reuses what is
committed, runs the rest in order, and commits it.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pistoseg import storage
from pistoseg.artifacts import Artifact, Workspace, fingerprint
from pistoseg.config import Config
from pistoseg.progress import Progress
from pistoseg.tracking import StageRun, Tracker

Settings = Callable[[Config], dict[str, Any]]
Inputs = Callable[[Config], dict[str, str]]


@dataclass(frozen=True)
class StageContext:
    """What a stage's function gets.

    Args:
        config: the whole config; a stage reads only what its `settings` name.
        folder: URI of the artifact to write; may hold unfinished work of an earlier run.
        inputs: artifacts by role.
        progress: for saying how far the stage is.
        run: its MLflow run.
    """

    config: Config
    folder: str
    inputs: dict[str, Artifact]
    progress: Progress
    run: StageRun

    def path(self, *parts: str) -> str:
        """URI of a file in the artifact."""
        return storage.join(self.folder, *parts)


@dataclass(frozen=True)
class Stage:
    """One box of the graph.

    Args:
        name: name of its folder in the workspace.
        title: what the progress bar says.
        function: `module:function` in `pistoseg.stages`, called with a `StageContext`, returns a JSON summary.
        settings: the settings its result depends on.
        inputs: role -> stage name.
        version: format version; raise it when the result changes for the same settings.
    """

    name: str
    title: str
    function: str
    settings: Settings
    inputs: Inputs = field(default=lambda config: {})
    version: int = 1

    def run(self, context: StageContext) -> dict[str, Any]:
        """Import the stage's code and call it."""
        module, function = self.function.split(":")
        summary: dict[str, Any] = getattr(importlib.import_module(f"pistoseg.stages.{module}"), function)(context)
        return summary


def _dump(config: Config, *sections: str) -> dict[str, Any]:
    return config.model_dump(mode="json", include=set(sections))


def _training_images(config: Config) -> dict[str, Any]:
    from pistoseg.patches.digest import training_digest

    # What counts is the files, wherever they lie; the limits on their number are checked when they are there.
    read = config.data.model_dump(include={"layout", "table", "max_pixels", "min_size"})
    return _dump(config, "classes", "scale") | {"data": read, "files": training_digest(config)}


def _validation_images(config: Config) -> dict[str, Any]:
    from pistoseg.patches.digest import validation_digest

    settings = {"classes": _dump(config, "classes"), "max_pixels": config.data.max_pixels}
    return settings | {"files": validation_digest(config)}


def _synthesis(config: Config) -> dict[str, Any]:
    settings = _dump(config, "synthesis", "seed")
    settings["background"] = _background(config)
    if config.synthesis.mode == "streamed":
        settings["synthesis"].pop("count")
    return settings


def _background(config: Config) -> dict[str, Any]:
    return config.data.model_dump(include={"background", "background_grey", "background_min_area"})


def _training(config: Config, section: str) -> dict[str, Any]:
    settings = _dump(config, section, "seed") | {
        "train_workers": config.compute.train_workers,
        "validation": config.evaluation.model_dump(include={"patch_size"}),
    }
    if settings[section]["samples_per_epoch"] is None:
        settings["count"] = config.synthesis.count  # the length of an epoch on streamed mosaics
    return settings


def _precise_inputs(config: Config) -> dict[str, str]:
    inputs = {"patches": "patches", "validation": "validation"}
    inputs["masks"] = "synthesis" if config.precise.masks == "synthesized" else "pseudo_masks"
    if config.precise.initial == "preliminary":
        inputs["initial"] = "preliminary"
    return inputs


STAGES = (
    Stage("patches", "Reading training images", "patches:run", _training_images),
    Stage("validation", "Reading validation images", "validation:run", _validation_images),
    Stage("synthesis", "Making mosaics", "synthesis:run", _synthesis, lambda config: {"patches": "patches"}),
    Stage(
        "preliminary",
        "Training the preliminary model",
        "segmentation:preliminary",
        lambda config: _training(config, "preliminary"),
        lambda config: {"patches": "patches", "masks": "synthesis", "validation": "validation"},
    ),
    Stage(
        "preliminary_evaluation",
        "Scoring the preliminary model",
        "evaluation:run",
        lambda config: _dump(config, "evaluation", "seed"),
        lambda config: {"model": "preliminary", "validation": "validation"},
    ),
    Stage(
        "pseudo_masks",
        "Making pseudo-masks",
        "pseudo_masks:run",
        lambda config: _dump(config, "pseudo_masks") | _background(config),
        lambda config: {"patches": "patches", "model": "preliminary"},
    ),
    Stage(
        "precise",
        "Training the precise model",
        "segmentation:precise",
        lambda config: _training(config, "precise"),
        _precise_inputs,
    ),
    Stage(
        "evaluation",
        "Scoring the precise model",
        "evaluation:run",
        lambda config: _dump(config, "evaluation", "seed"),
        lambda config: {"model": "precise", "validation": "validation"},
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}


def needed(config: Config, targets: tuple[str, ...]) -> list[Stage]:
    """The stages that lead to some targets, in the order of running."""
    wanted, queue = set(targets), list(targets)
    while queue:
        for source in BY_NAME[queue.pop()].inputs(config).values():
            if source not in wanted:
                wanted.add(source)
                queue.append(source)
    return [stage for stage in STAGES if stage.name in wanted]


def run_pipeline(
    config: Config,
    workspace: Workspace,
    targets: tuple[str, ...] = ("preliminary_evaluation", "evaluation"),
    *,
    progress: Progress | None = None,
) -> dict[str, Artifact]:
    """Compute the targets and whatever they need; reuse what is there.

    Args:
        config: a validated config whose `data.uri` is set.
        workspace: where artifacts are kept.
        targets: names of stages.
        progress: where to say what happens.
    Returns:
        Artifacts by stage name.
    """
    progress = progress or Progress()
    artifacts: dict[str, Artifact] = {}
    with Tracker.start(config, workspace) as tracker:
        stages = needed(config, targets)
        for number, stage in enumerate(stages, 1):
            inputs = {role: artifacts[source] for role, source in stage.inputs(config).items()}
            settings = json.loads(json.dumps(stage.settings(config)))
            keys = {role: item.fingerprint for role, item in inputs.items()}
            key = fingerprint(stage.name, stage.version, settings, keys)
            found = workspace.find(stage.name, key)
            with progress.stage(f"[{number}/{len(stages)}] {stage.title}", reused=found is not None):
                if found is None:
                    found = _compute(stage, key, settings, inputs, config, workspace, progress, tracker)
                else:
                    tracker.reused(found)
            artifacts[stage.name] = found
        tracker.finish(artifacts)
    return artifacts


def _compute(
    stage: Stage,
    key: str,
    settings: Mapping[str, Any],
    inputs: dict[str, Artifact],
    config: Config,
    workspace: Workspace,
    progress: Progress,
    tracker: Tracker,
) -> Artifact:
    started = time.monotonic()
    folder = workspace.folder(stage.name, key)
    with tracker.stage(stage.name, key, settings, inputs) as run:
        summary = stage.run(StageContext(config, folder, inputs, progress, run))
        artifact = workspace.commit(
            stage.name,
            key,
            version=stage.version,
            settings=settings,
            inputs=inputs,
            summary=summary,
            seconds=time.monotonic() - started,
        )
        run.finish(artifact)
    return artifact
