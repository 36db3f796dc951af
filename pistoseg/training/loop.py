"""What every training worker runs: epochs, validation, a checkpoint after each."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray.util.placement_group import PlacementGroup
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pistoseg import storage
from pistoseg.actors import exit_in_time
from pistoseg.config import TrainingConfig
from pistoseg.memory import keep_freed_memory
from pistoseg.models.inference import resolve_precision
from pistoseg.training.augmentation import augment
from pistoseg.training.precision import autocast
from pistoseg.training.stream import PREFETCHED
from pistoseg.training.tasks import Task

CHECKPOINT = "training.pt"
FAILURE = "failure.json"


class WorkersCallback(ray.train.UserCallback):
    """A callback of Ray Train that also wants to know what a training's workers hold."""

    def on_workers(self, group: PlacementGroup) -> None:
        """Called in the first worker before its first step."""


@dataclass(frozen=True)
class TrainingJob:
    """What a training worker needs to know.

    Args:
        config: training settings.
        network: the network at its start: a module with `normalization` and `encoder`.
        task: its loss and its validation.
        seed: of augmentation and dropout.
        steps: optimizer steps in an epoch.
        batch_size: of one worker.
        folder: URI of the artifact; receives `failure.json` and the batch of a step that was not finite.
        threads: of a CPU worker.
        progress: `TrainingProgress` actor, told how far the training is.
        callbacks: those that are `WorkersCallback`s hear of the workers.
    """

    config: TrainingConfig
    network: ray.ObjectRef
    task: Task
    seed: int
    steps: int
    batch_size: int
    folder: str
    threads: int
    progress: Any
    callbacks: tuple[Any, ...] = ()


def train_worker(arguments: dict[str, Any]) -> None:
    """The train loop, given to Ray Train with `{"job": TrainingJob}`."""
    exit_in_time()
    job: TrainingJob = arguments["job"]
    stream = iter(
        ray.train.get_dataset_shard("train").iter_torch_batches(
            batch_size=job.batch_size,
            prefetch_batches=PREFETCHED,
            drop_last=True,
            # Copied to the GPU by the thread that prefetches, while the network is at the batch before.
            pin_memory=ray.train.torch.get_device().type == "cuda",
        )
    )
    # The actors that make samples start while this process imports and builds its network.
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(list, islice(stream, 1))
        training = _Training(job)
        batches = chain(first.result(), stream)
    group = ray.util.get_current_placement_group()
    if training.rank == 0 and group is not None:
        for callback in job.callbacks:
            if isinstance(callback, WorkersCallback):
                callback.on_workers(group)
    with keep_freed_memory():
        for epoch in range(training.epoch, job.config.epochs):
            if not training.run_epoch(epoch, batches):
                return


class _Training:
    def __init__(self, job: TrainingJob) -> None:
        self.job, self.config, self.task = job, job.config, job.task
        self.context = ray.train.get_context()
        self.rank, self.world = self.context.get_world_rank(), self.context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(job.threads)
        self.network: Any = ray.get(job.network)
        self.network.to(device=self.device, memory_format=torch.channels_last)
        self.model: nn.Module = ray.train.torch.prepare_model(
            self.network,
            move_to_device=False,
            # Encoders have layers behind the last one that is used, decoders have blocks without a skip connection.
            parallel_strategy_kwargs={"find_unused_parameters": True},
        )
        self.optimizer = build_optimizer(self.network, job.config)
        # What is validated and kept: the network itself, or a running average of its weights and statistics.
        self.average = None
        if job.config.average_decay:
            average = get_ema_multi_avg_fn(job.config.average_decay)
            self.average = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        self.bf16 = resolve_precision(job.config.precision, self.device) == "bf16"
        self.own_loss = torch.zeros(())  # of the last step, before it is averaged over the workers
        self.history: list[dict[str, float]] = []
        self.epoch = 0
        self._resume()

    @property
    def _kept(self) -> Any:
        return self.network if self.average is None else self.average.module

    def _resume(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / CHECKPOINT, map_location="cpu", weights_only=True)
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = json.loads(state["history"])
        self.epoch = len(self.history)

    def run_epoch(self, epoch: int, batches: Iterator[dict[str, Tensor]]) -> bool:
        """Train one epoch, validate, report; False when a loss was not finite."""
        torch.manual_seed(self._seed(epoch))  # of dropout, so that an epoch after a crash draws what it would have
        self.model.train()
        started, waited, rows = time.monotonic(), 0.0, []
        lr = 0.0
        for step in range(self.job.steps):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            lr = learning_rate(self.config, epoch, step, self.job.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            values = self._step(batch, epoch, step)
            if not math.isfinite(values["loss"]):
                self._fail(batch, epoch, step, values["loss"])
                return False
            rows.append(values)
            self._say(epoch, step + 1, values["loss"])
        trained = time.monotonic() - started
        row = {
            "epoch": epoch,
            **{name: float(np.mean([values[name] for values in rows])) for name in rows[0]},
            "lr": lr,
            "images_per_s": self.job.steps * self.job.batch_size * self.world / trained,
            "waiting_share": waited / trained,
        }
        last = epoch + 1 == self.config.epochs
        if self.task.validates and (last or (epoch + 1) % self.config.validate_every == 0):
            self._say(epoch, self.job.steps, rows[-1]["loss"], ", validating")
            row |= self._validate()
            self._say(epoch, self.job.steps, rows[-1]["loss"])
        row["seconds"] = time.monotonic() - started
        self.history.append(row)
        self._report(row)
        return True

    def _step(self, batch: dict[str, Tensor], epoch: int, step: int) -> dict[str, float]:
        """One optimizer step; `loss` and its terms, and `gradient_norm`. The weights stay where any is not finite."""
        seed = self._seed(epoch, step)
        batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        losses = self.task.losses(self._forward, augment(batch, self.config.augmentation, seed))
        self.own_loss = losses["loss"].detach()
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        limit = self.config.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        # Every rank must take the same decision, or the others would wait for this one for ever.
        names, values = (
            [*losses, "gradient_norm"],
            torch.stack([*(term.detach().float() for term in losses.values()), norm]),
        )
        if not bool(torch.isfinite(norm)):
            values[0] = math.nan
        if self.world > 1:
            torch.distributed.all_reduce(values)
            values /= self.world
        if bool(torch.isfinite(values[0])):
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.network)
        return dict(zip(names, values.tolist(), strict=True))

    def _seed(self, *address: int) -> int:
        """What is drawn in an epoch, or in one of its steps, by this worker."""
        return int(np.random.SeedSequence((self.job.seed, *address, self.rank)).generate_state(1)[0])

    def _forward(self, images: Tensor, *maps: Tensor) -> Any:
        with autocast(self.device, self.bf16):
            return self.model(self.network.normalization(images), *maps)

    def _validate(self) -> dict[str, float]:
        if self.world > 1:
            # Running statistics are each worker's own between two steps; those of rank 0 are kept.
            for buffer in self._kept.buffers():
                torch.distributed.broadcast(buffer, 0)
        share = self.task.validate(self._kept, self.device, self.rank, self.world)
        shares = [share]
        if self.world > 1:
            shares = [None] * self.world
            torch.distributed.all_gather_object(shares, share)
        return self.task.scores(shares)

    def _report(self, row: dict[str, float]) -> None:
        metrics = {self.task.score: row.get(self.task.score, -1.0), "epoch": row["epoch"]}
        if self.rank:
            ray.train.report(metrics)
            return
        ray.get(self.job.progress.epoch.remote(row))
        with tempfile.TemporaryDirectory() as folder:
            state = {
                "kept": self._kept.state_dict(),
                "network": self.network.state_dict(),
                "average": self.average.state_dict() if self.average is not None else {},
                "optimizer": self.optimizer.state_dict(),
                "history": json.dumps(self.history),
            }
            with (Path(folder) / CHECKPOINT).open("wb") as file:  # PyTorch's own files hide that a disk is full
                torch.save(state, file)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _say(self, epoch: int, step: int, loss: float, doing: str = "") -> None:
        if self.rank == 0:
            done = epoch * self.job.steps + step
            used = done * self.job.batch_size * self.world
            self.job.progress.step.remote(done, used, f"epoch {epoch + 1}, loss {loss:.3f}{doing}")

    def _fail(self, batch: dict[str, Tensor], epoch: int, step: int, loss: float) -> None:
        own = bool(torch.isfinite(self.own_loss))
        finite = [own]
        if self.world > 1:
            finite = [True] * self.world
            torch.distributed.all_gather_object(finite, own)
        name = "failed-batch-rank{}.safetensors"
        storage.write_bytes(
            storage.join(self.job.folder, name.format(self.rank)),
            save({key: value.contiguous() for key, value in batch.items()}),
        )
        if self.rank == 0:
            # Of a gradient that is not finite, which all workers have in common, any batch may be the reason.
            guilty = 0 if all(finite) else finite.index(False)
            reason = {"epoch": epoch, "step": step, "loss": str(loss), "batch": name.format(guilty)}
            storage.write_bytes(storage.join(self.job.folder, FAILURE), json.dumps(reason).encode())


def build_optimizer(network: Any, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of a network; its parameter groups carry `factor`, theirs of the learning rate.

    Args:
        network: a module whose pretrained part is its `encoder`.
        config: optimizer, learning rate, weight decay and the factor of new layers.
    """
    pretrained = {id(parameter) for parameter in network.encoder.parameters()}
    old = [parameter for parameter in network.parameters() if id(parameter) in pretrained]
    new = [parameter for parameter in network.parameters() if id(parameter) not in pretrained]
    groups = [{"params": old, "factor": 1.0}, {"params": new, "factor": config.new_layers_factor}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def learning_rate(config: TrainingConfig, epoch: int, step: int, steps: int) -> float:
    """The learning rate of a step.

    Args:
        config: `lr` and its schedule.
        epoch: from 0.
        step: in the epoch, from 0.
        steps: in an epoch.
    """
    if config.schedule == "exponential":
        return config.lr * config.lr_decay**epoch
    return config.lr * (1 - (epoch * steps + step) / (config.epochs * steps)) ** config.lr_power
