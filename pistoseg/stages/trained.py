"""What the stages that train a network have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from pistoseg import storage
from pistoseg.config import TrainingConfig
from pistoseg.pipeline import StageContext
from pistoseg.stages import cluster
from pistoseg.training.stream import SampleSource
from pistoseg.training.tasks import Task
from pistoseg.training.trainer import remove_checkpoints, train

Save = Callable[[dict[str, str], dict[str, float]], None]
"""Writes the trained network, given its lineage and the metrics of the epoch that is kept."""


@contextmanager
def first_weights(seed: int) -> Iterator[None]:
    """Networks that are built inside start from weights that the seed decides; later draws are what they would be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


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

    def on_epoch(row: dict[str, float]) -> None:
        context.run.metrics(row, step=int(row["epoch"]))
        shown = {key: value for key, value in row.items() if key.startswith(("loss", "validation"))}
        text = ", ".join(f"{key} {value:.3f}" for key, value in shown.items())
        context.progress.event("epoch", f"epoch {row['epoch'] + 1:.0f}: {text}", epoch=int(row["epoch"]) + 1, **shown)

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
