"""The stage graph, as data, and its runner.

A stage is a function of its settings and its input artifacts. The runner computes the fingerprints, reuses what is
committed, runs the rest in order, and commits it.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pistoseg import object_store, storage
from pistoseg.artifacts import CHECKPOINTS, Artifact, Workspace, fingerprint
from pistoseg.claims import claimed
from pistoseg.config import Config
from pistoseg.errors import PistoSegError
from pistoseg.hooks import Hooks
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
        train_callbacks: `ray.train.UserCallback`s of its training, if it trains.
        afterwards: called once the artifact is finished, to remove what only an unfinished one needs.
    """

    config: Config
    folder: str
    inputs: dict[str, Artifact]
    progress: Progress
    run: StageRun
    train_callbacks: tuple[Any, ...] = ()
    afterwards: list[Callable[[], None]] = field(default_factory=list)

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
    from pistoseg.slides.files import etag

    # What counts is the files, wherever they lie; the limits on their number are checked when they are there.
    read = config.data.model_dump(include={"layout", "table", "max_pixels", "min_size"})
    if config.data.label_holdout:
        read["label_holdout"] = config.data.label_holdout
    return _dump(config, "classes", "scale") | {"data": read, "files": training_digest(config, etag)}


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


def _network(config: Config, section: str) -> dict[str, Any]:
    """Settings of a network's training; of a file of encoder weights, its size and version as well."""
    from pistoseg.slides.files import etag

    settings = _dump(config, section, "seed")
    weights = settings[section]["weights"]
    if weights not in (None, "none", "imagenet") and storage.exists(weights):  # whoever reads it says that it is not
        settings["weights_file"] = etag(weights)
    return settings


def _training(config: Config, section: str) -> dict[str, Any]:
    from pistoseg.patches.digest import validation_folder

    settings = _network(config, section) | {
        "train_workers": config.compute.train_workers,
        "validation": config.evaluation.model_dump(include={"patch_size"}),
    }
    if settings[section]["samples_per_epoch"] is None:
        settings["count"] = config.synthesis.count  # the length of an epoch on streamed mosaics
    if config.data.label_holdout and validation_folder(config) is None:
        settings["label_agreement"] = BY_NAME["label_scores"].version  # of the score by which the best epoch is kept
    if section == "precise" and _takes_other_normalization(config):
        settings["normalization"] = "preliminary"
    return settings


def _takes_other_normalization(config: Config) -> bool:
    """Whether the preliminary model, from which the precise one starts, may have another than goes with its weights."""
    precise, preliminary = config.precise, config.preliminary
    # That of timm's encoders goes by their names; of the others only ImageNet's weights may have one of their own.
    by_weights = not precise.encoder.startswith("tu-")
    same = (precise.weights == "imagenet") == (preliminary.weights == "imagenet")
    return precise.initial == "preliminary" and by_weights and not same


MASK_STAGES = {"synthesized": "synthesis", "pseudo": "pseudo_masks", "cam": "cams"}
"""Where the masks come from that `precise.masks` names; all others are refined ones."""


def _precise_inputs(config: Config) -> dict[str, str]:
    masks = MASK_STAGES.get(config.precise.masks, "refined_masks")
    inputs = {"patches": "patches", "validation": "validation", "masks": masks}
    return inputs | _initial(config.precise.initial)


def _initial(initial: str) -> dict[str, str]:
    return {"initial": "preliminary"} if initial == "preliminary" else {}


def _on_labels(config: Config, section: str) -> dict[str, Any]:
    """Settings of a network that is trained on image-level labels."""
    return _network(config, section) | {"train_workers": config.compute.train_workers}


def _subcategories(config: Config) -> dict[str, Any]:
    own = config.cams.model_dump(include={"subcategories", "subcategory_weight"})
    return _on_labels(config, "classifier") | own


def _cams(config: Config) -> dict[str, Any]:
    own = config.cams.model_dump(mode="json", exclude={"subcategories", "subcategory_weight"})
    return {"cams": own} | _background(config)


STAGES = (
    Stage("patches", "Reading training images", "patches:run", _training_images, version=2),
    Stage("validation", "Reading validation images", "validation:run", _validation_images, version=2),
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
        version=3,
    ),
    Stage(
        "classifier",
        "Training the CAM network",
        "classification:run",
        lambda config: _on_labels(config, "classifier"),
        lambda config: {"patches": "patches"} | _initial(config.classifier.initial),
    ),
    Stage(
        "subcategories",
        "Training the CAM network on sub-categories",
        "subcategories:run",
        _subcategories,
        lambda config: {"patches": "patches", "classifier": "classifier"},
    ),
    Stage(
        "cams",
        "Making CAMs",
        "cams:run",
        _cams,
        lambda config: {
            "patches": "patches",
            "model": "subcategories" if config.cams.method == "sc_cam" else "classifier",
        },
        version=2,
    ),
    Stage(
        "refiner",
        "Training the refining network",
        "refining:run",
        lambda config: _on_labels(config, "refiner"),
        lambda config: (
            {"patches": "patches", "pseudo_masks": "pseudo_masks", "cams": "cams"} | _initial(config.refiner.initial)
        ),
        version=2,
    ),
    Stage(
        "refined_masks",
        "Refining the pseudo-masks",
        "refining:masks",
        lambda config: _dump(config, "refined_masks") | _background(config),
        lambda config: {"patches": "patches", "pseudo_masks": "pseudo_masks", "cams": "cams", "model": "refiner"},
        version=2,
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
    Stage(
        "label_scores",
        "Scoring the precise model by image-level labels",
        "label_scores:run",
        lambda config: _dump(config, "evaluation") | _background(config),
        lambda config: {"model": "precise", "patches": "patches"},
        version=2,
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


def check_weights(config: Config, targets: tuple[str, ...]) -> None:
    """Refuse ImageNet weights that nobody has; what else stops a training is seen once it is known what is to do."""
    for stage in needed(config, targets):
        section = getattr(config, stage.name, None)
        if getattr(section, "encoder", None) == "resnet38d" and getattr(section, "weights", None) == "imagenet":
            raise PistoSegError(
                "no hub and no package has the weights of resnet38d",
                field=f"{stage.name}.weights",
                remedy=f"set {stage.name}.weights to the path or URI of its published .pth file, or to null for none; "
                f"or choose another {stage.name}.encoder and output_stride",
            )


def check_trainings(config: Config, stages: Sequence[str], say: Callable[[str], None]) -> None:
    """Refuse networks that can't be built or trained.

    Args:
        config: of the run.
        stages: names of those that are to be computed; the ones that train no network are passed over.
        say: told of batches that are not of the size that is set.
    Raises:
        PistoSegError: naming the setting.
    """
    from pistoseg.stages import placement

    if any(stage in placement.TRAINED for stage in stages):
        from pistoseg.stages import trained

        trained.check_buildable(config, stages)
        trained.check_batches(config, stages, say)


@dataclass(frozen=True)
class Step:
    """A stage as a config runs it.

    Args:
        stage: the box of the graph.
        fingerprint: of its artifact.
        settings: what its result depends on, as JSON.
        inputs: role -> stage name.
    """

    stage: Stage
    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, str]

    def find(self, workspace: Workspace) -> Artifact | None:
        """Its artifact if it is committed."""
        return workspace.find(self.stage.name, self.fingerprint)


def plan(config: Config, targets: tuple[str, ...]) -> list[Step]:
    """The steps that lead to some targets, in the order of running.

    Nothing is looked at but the versions of the data set's files and of those with encoder weights.
    """
    steps: dict[str, Step] = {}
    for stage in needed(config, targets):
        settings = json.loads(json.dumps(stage.settings(config)))
        inputs = stage.inputs(config)
        keys = {role: steps[source].fingerprint for role, source in inputs.items()}
        key = fingerprint(stage.name, stage.version, settings, keys)
        steps[stage.name] = Step(stage, key, settings, inputs)
    return list(steps.values())


def run_pipeline(
    config: Config,
    workspace: Workspace,
    targets: tuple[str, ...] = ("preliminary_evaluation", "evaluation"),
    *,
    progress: Progress | None = None,
    run_name: str | None = None,
    parent_run: str | None = None,
    hooks: Hooks | None = None,
) -> dict[str, Artifact]:
    """Compute the targets and whatever they need; reuse what is there.

    Args:
        config: a validated config whose `data.uri` is set.
        workspace: where artifacts are kept.
        targets: names of stages.
        progress: where to say what happens.
        run_name: of its MLflow run; None: the data set's.
        parent_run: id of the MLflow run that it is a part of; then its model is not registered.
        hooks: called around the stages.
    Returns:
        Artifacts by stage name.
    """
    object_store.use(config.storage)
    progress, hooks = progress or Progress(), hooks or Hooks()
    artifacts: dict[str, Artifact] = {}
    with Tracker.start(config, workspace, run_name, parent_run) as tracker:
        steps = plan(config, targets)
        _check(config, workspace, steps, progress)
        for number, step in enumerate(steps, 1):
            found = step.find(workspace)
            title, name, key = f"[{number}/{len(steps)}] {step.stage.title}", step.stage.name, step.fingerprint
            with progress.stage(title, found is not None, stage=name, fingerprint=key):
                if found is None:
                    inputs = {role: artifacts[source] for role, source in step.inputs.items()}
                    found = _compute(step, inputs, config, workspace, progress, tracker, hooks)
                else:
                    _tidy(found)
                    tracker.reused(found)
                    hooks.reused(found)
                _refuse_rejected(found, config)
            artifacts[step.stage.name] = found
        tracker.finish(artifacts)
    return artifacts


def _tidy(artifact: Artifact) -> None:
    """Remove the checkpoints of a run that was killed when it had just finished an artifact."""
    from pistoseg.stages.placement import TRAINED

    if artifact.stage in TRAINED:
        checkpoints = artifact.path(CHECKPOINTS)
        with suppress(OSError, PistoSegError):  # the artifact may be another's, who alone may write it
            if storage.exists(checkpoints):
                storage.remove_tree(checkpoints)


def _refuse_rejected(artifact: Artifact, config: Config) -> None:
    """Hold images that were read under another limit against that of the config."""
    if artifact.stage == "patches" and artifact.summary.get("rejected"):
        from pistoseg.stages.patches import refuse_rejected

        refuse_rejected(artifact.summary, config.data, artifact.path("rejected.parquet"))


def _check(config: Config, workspace: Workspace, steps: list[Step], progress: Progress) -> None:
    """Refuse networks that can't be built or trained, and what the cluster can't give, before the first stage runs."""
    from pistoseg.stages import placement

    todo = [step.stage.name for step in steps if step.find(workspace) is None]
    check_trainings(config, todo, progress.say)
    if todo:
        read = {"data.uri": config.data.uri, "data.validation": config.data.validation}
        placement.check_shared(workspace.root, read)
        placement.check(config, todo, progress.say)


def _compute(
    step: Step,
    inputs: dict[str, Artifact],
    config: Config,
    workspace: Workspace,
    progress: Progress,
    tracker: Tracker,
    hooks: Hooks,
) -> Artifact:
    from pistoseg.stages import placement

    stage, key, settings = step.stage, step.fingerprint, step.settings
    placement.check(config, (stage.name,), progress.say)
    folder = workspace.folder(stage.name, key)
    with claimed(folder, lambda: step.find(workspace) is not None, progress.say) as claim:
        if claim is None:  # another run has made it in the meantime
            artifact = step.find(workspace)
            assert artifact is not None
            progress.say(f"{stage.name}/{key}: another run has finished it, reused")
            tracker.reused(artifact)
            hooks.reused(artifact)
            return artifact
        storage.remove_parts(folder)
        with tracker.stage(stage.name, key, settings, inputs) as run:
            started = time.monotonic()
            context = StageContext(config, folder, inputs, progress, run, hooks.train_callbacks(step))
            hooks.begun(step)
            summary = stage.run(context)
            claim.check()
            artifact = workspace.commit(
                stage.name,
                key,
                version=stage.version,
                settings=settings,
                inputs=inputs,
                summary=summary,
                seconds=time.monotonic() - started,
            )
            for tidy in context.afterwards:
                tidy()
            run.finish(artifact)
    return artifact
