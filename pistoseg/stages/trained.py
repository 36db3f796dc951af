"""What the stages that train a network have in common."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from pistoseg import storage
from pistoseg.config import Config, SegmentationConfig, TrainingConfig
from pistoseg.errors import PistoSegError
from pistoseg.graph import StageContext
from pistoseg.models import encoders, segmentation
from pistoseg.stages import cluster
from pistoseg.stages.placement import TRAINED
from pistoseg.training.stream import SampleSource
from pistoseg.training.tasks import Task
from pistoseg.training.trainer import (
    images_per_worker,
    remove_checkpoints,
    remove_unreadable_checkpoints,
    steps_per_epoch,
    train,
)

POOLED = ("deeplabv3plus", "pan")
"""Architectures with a batch norm on maps that are pooled to one cell, which has no variance over one image."""
AVERAGED_SPANS = 3
"""Spans 1/(1 - average_decay) of a running average after which 5 % of what it began with are left: exp(-3)."""
Save = Callable[[dict[str, str], dict[str, float]], None]
"""Writes the trained network, given its lineage and the metrics of the epoch that is kept."""


@contextmanager
def first_weights(seed: int) -> Iterator[None]:
    """Networks that are built inside start from weights that the seed decides; later draws are what they would be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def encoder_weights(settings: Any) -> str | None:
    """The weights that a section's network is built with; None where those of the preliminary model replace them."""
    return None if getattr(settings, "initial", None) == "preliminary" else settings.weights


def check_buildable(config: Config, stages: Sequence[str]) -> None:
    """Refuse networks that can't be built, and files of weights that are not there: no weights are read or fetched.

    Args:
        config: of the run.
        stages: names of those that are to be computed; the ones that train no network are passed over.
    Raises:
        PistoSegError: naming the setting.
    """
    for name, settings in _trainings(config, stages):
        try:
            encoders.require_file(encoder_weights(settings))
            _build(settings, len(config.classes.tissue()))
        except PistoSegError as error:
            field = f"{name}.{error.field}" if error.field else name
            raise type(error)(error.reason, file=error.file, field=field, remedy=error.remedy) from error


def fetch_weights(config: Config, stages: Sequence[str]) -> None:
    """Fetch the ImageNet weights that networks start from, which these then find in the hub's cache.

    Args:
        config: of the run.
        stages: names of those that are to be computed; the ones that train no network are passed over.
    Raises:
        PistoSegError: naming all settings whose weights can't be had.
    """
    wanted: dict[str, list[str]] = {}
    for name, settings in _trainings(config, stages):
        if encoder_weights(settings) == "imagenet":
            wanted.setdefault(settings.encoder, []).append(f"{name}.weights")
    fields: list[str] = []
    errors: list[PistoSegError] = []
    for encoder, keys in wanted.items():
        try:
            encoders.fetch_imagenet(encoder)
        except PistoSegError as error:
            fields += keys
            errors.append(error)
    if errors:
        reasons = "; ".join(error.reason for error in errors)
        raise PistoSegError(reasons, field=", ".join(fields), remedy=errors[0].remedy) from errors[0]


def check_batches(config: Config, stages: Sequence[str], say: Callable[[str], None]) -> None:
    """Refuse batches that a network can't be trained on; say which ones are not of the size that is set.

    Args:
        config: of the run.
        stages: names of those that are to be computed; the ones that train no network are passed over.
        say: told once for each setting.
    Raises:
        PistoSegError: naming the setting.
    """
    workers = config.compute.train_workers
    for name, settings in _trainings(config, stages):
        each = images_per_worker(settings, config.compute)
        if each < 2 and getattr(settings, "architecture", None) in POOLED:
            raise PistoSegError(
                f"{settings.architecture} is trained on two images a worker or more, and a step of "
                f"{settings.batch_size} on {workers} workers is one each",
                field=f"{name}.batch_size",
                remedy=f"set it to {2 * workers} or more, or compute.train_workers to fewer",
            )
        if each * workers != settings.batch_size:
            say(
                f"warning: {name}.batch_size is {settings.batch_size}, but {workers} workers take {each} images each: "
                f"{each * workers} in a step"
            )


def _trainings(config: Config, stages: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(section, settings) of the networks that some stages train, each once."""
    # The sub-categories are learned by a network like the classifier.
    names = ("classifier" if stage == "subcategories" else stage for stage in stages if stage in TRAINED)
    for name in dict.fromkeys(names):
        yield name, getattr(config, name)


def _build(settings: Any, n_classes: int) -> None:
    with first_weights(0):
        if isinstance(settings, SegmentationConfig):
            segmentation.build(settings.architecture, settings.encoder, n_classes, None, settings.decoder_attention)
        else:
            encoders.create(settings.encoder, None, output_stride=settings.output_stride)


def _say_short_average(context: StageContext, settings: TrainingConfig, steps: int) -> None:
    """Warn of a running average that still holds much of the first weights, 5 % of them or more, when it is kept."""
    rest = 1 - settings.average_decay
    if not settings.average_decay or round(steps * rest, 6) >= AVERAGED_SPANS:
        return
    name = next(name for name, section in context.config if section is settings)
    lower = math.floor(100 * (1 - AVERAGED_SPANS / steps)) / 100
    remedy = f"set it to {lower:g} or less, or to 0 for none" if lower > 0 else "set it to 0 for none"
    context.progress.say(
        f"warning: {name}.average_decay is {settings.average_decay:g}, but the training has only {steps} steps, fewer "
        f"than {AVERAGED_SPANS}/(1 - average_decay): the first weights still make up "
        f"{settings.average_decay**steps:.0%} of the model that is kept; {remedy}"
    )


def train_stage(
    context: StageContext,
    network: torch.nn.Module,
    source: SampleSource,
    task: Task,
    settings: TrainingConfig,
    save: Save,
) -> dict[str, Any]:
    """Train a network, and write it and `epochs.json`; its checkpoints stay until the artifact is finished.

    Args:
        context: of the stage.
        network: at its start; holds the kept epoch's state afterwards.
        source: of its samples.
        task: its loss and validation.
        settings: of its training.
        save: called when it is trained.
    Returns:
        The stage's summary.
    """
    config = context.config
    _say_short_average(context, settings, steps_per_epoch(settings, config.compute, source.count) * settings.epochs)

    def on_epoch(row: dict[str, float]) -> None:
        context.run.metrics(row, step=int(row["epoch"]))
        shown = {key: value for key, value in row.items() if key.startswith(("loss", "validation"))}
        text = ", ".join(f"{key} {value:.3f}" for key, value in shown.items())
        context.progress.event("epoch", f"epoch {row['epoch'] + 1:.0f}: {text}", epoch=int(row["epoch"]) + 1, **shown)

    if removed := remove_unreadable_checkpoints(context.folder):
        context.progress.say(f"warning: {context.folder}: {removed}")
    trained = train(
        network,
        source,
        task,
        settings,
        config.compute,
        folder=context.folder,
        seed=config.seed,
        on_step=context.progress.update,
        on_epoch=on_epoch,
        callbacks=context.train_callbacks,
        **cluster.training_resources(config.compute),
    )
    context.check()
    for row in trained.history:  # the epochs before a crash, too
        context.run.metrics(row, step=int(row["epoch"]))
    network.load_state_dict(trained.state)
    kept = trained.history[trained.epoch]
    metrics = {name: value for name, value in kept.items() if name.startswith(("loss", "validation"))}
    lineage = {role: f"{item.stage}/{item.fingerprint}" for role, item in context.inputs.items()}
    save(lineage, metrics | {"epoch": trained.epoch})
    storage.write_bytes(context.path("epochs.json"), json.dumps(trained.history, indent=1).encode())
    context.afterwards.append(partial(remove_checkpoints, context.folder))
    speed = float(np.mean([row["images_per_s"] for row in trained.history]))
    return {"metrics": metrics | {"images_per_s": round(speed, 2)}, "epoch": trained.epoch, "samples": source.count}
