"""The stages as data: what each depends on, and the steps in which a config runs them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pistoseg import storage
from pistoseg.artifacts import Artifact, Workspace, fingerprint
from pistoseg.config import Config
from pistoseg.progress import Progress
from pistoseg.tracking import StageRun

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
        check: raises when another run has taken the folder over. A stage calls it before it writes what need not come
            out the same in both runs; by then the other one may have finished the artifact.
    """

    config: Config
    folder: str
    inputs: dict[str, Artifact]
    progress: Progress
    run: StageRun
    train_callbacks: tuple[Any, ...] = ()
    afterwards: list[Callable[[], None]] = field(default_factory=list)
    check: Callable[[], None] = lambda: None

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
    else:
        settings["order"] = "shuffled"  # in which trainings take them, and for which they are laid out
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
    from pistoseg.patches.digest import scored_by_labels

    settings = _network(config, section) | {
        "train_workers": config.compute.train_workers,
        "validation": config.evaluation.model_dump(include={"patch_size"}),
    }
    if config.data.background != "none":
        settings["background"] = _background(config)  # which the bundle says
    if settings[section]["samples_per_epoch"] is None:
        settings["count"] = config.synthesis.count  # the length of an epoch on streamed mosaics
    if scored_by_labels(config):
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
