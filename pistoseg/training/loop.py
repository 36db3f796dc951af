"""What every training worker runs: epochs, validation, a checkpoint after each."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pistoseg import storage
from pistoseg.classes import TissueClasses
from pistoseg.config import TrainingConfig
from pistoseg.metrics import ConfusionMatrix
from pistoseg.models.bundle import Segmenter
from pistoseg.models.inference import resolve_precision
from pistoseg.models.losses import segmentation_loss
from pistoseg.models.segmentation import SegmentationNetwork
from pistoseg.patches.masked import MaskedImages
from pistoseg.training.augmentation import augment

CHECKPOINT = "training.pt"
FAILURE = "failure.json"
SCORE = "validation_miou"


@dataclass(frozen=True)
class TrainingJob:
    """What a training worker needs to know.

    Args:
        config: network and training settings.
        network: the network at its start.
        classes: the L tissues.
        seed: of augmentation.
        steps: optimizer steps in an epoch.
        batch_size: of one worker.
        folder: URI of the artifact; receives `failure.json` and the batch of a step that was not finite.
        validation: URI of the validation artifact, or None.
        info: of the bundle that will be made of it: scale and window of the validation.
        threads: of a CPU worker.
        monitor: actor that collects what the driver shows.
        pace: `Pace` actor, told how many samples are used.
    """

    config: TrainingConfig
    network: ray.ObjectRef
    classes: TissueClasses
    seed: int
    steps: int
    batch_size: int
    folder: str
    validation: str | None
    info: dict[str, Any]
    threads: int
    monitor: Any
    pace: Any


def train_worker(arguments: dict[str, Any]) -> None:
    """The train loop, given to Ray Train with `{"job": TrainingJob}`."""
    job: TrainingJob = arguments["job"]
    training = _Training(job)
    batches = iter(
        ray.train.get_dataset_shard("train").iter_torch_batches(
            batch_size=job.batch_size, prefetch_batches=2, drop_last=True
        )
    )
    # The stream's start-up is no waiting of the first epoch.
    batches = chain(list(islice(batches, 1)), batches)
    for epoch in range(training.epoch, job.config.epochs):
        if not training.run_epoch(epoch, batches):
            return


class _Training:
    def __init__(self, job: TrainingJob) -> None:
        self.job, self.config = job, job.config
        self.context = ray.train.get_context()
        self.rank, self.world = self.context.get_world_rank(), self.context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(job.threads)
        torch.manual_seed(job.seed)
        self.network: SegmentationNetwork = ray.get(job.network)
        self.network.to(device=self.device, memory_format=torch.channels_last)
        self.model: nn.Module = ray.train.torch.prepare_model(self.network, move_to_device=False)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=job.config.lr,
            weight_decay=job.config.weight_decay,
            fused=True,
        )
        # What is validated and kept: the network itself, or a running average of its weights and statistics.
        self.average = None
        if job.config.average_decay:
            average = get_ema_multi_avg_fn(job.config.average_decay)
            self.average = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        self.bf16 = resolve_precision(job.config.precision, self.device) == "bf16"
        self.history: list[dict[str, float]] = []
        self.epoch = 0
        self._resume()
        self.validation = MaskedImages.open(job.validation).shard(self.rank, self.world) if job.validation else None

    @property
    def _kept(self) -> SegmentationNetwork:
        kept = self.network if self.average is None else self.average.module
        assert isinstance(kept, SegmentationNetwork)
        return kept

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
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * self.config.lr_decay**epoch
        self.model.train()
        started, waited, losses, norms = time.monotonic(), 0.0, [], []
        for step in range(self.job.steps):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            loss, norm = self._step(batch, epoch, step)
            if not math.isfinite(loss):
                self._fail(batch, epoch, step, loss)
                return False
            losses.append(loss)
            norms.append(norm)
            self._say(epoch, step + 1, loss)
        trained = time.monotonic() - started
        row = {
            "epoch": epoch,
            "loss": float(np.mean(losses)),
            "gradient_norm": float(np.mean(norms)),
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": self.job.steps * self.job.batch_size * self.world / trained,
            "waiting_share": waited / trained,
        }
        last = epoch + 1 == self.config.epochs
        if self.validation is not None and (last or (epoch + 1) % self.config.validate_every == 0):
            row |= self._validate()
        row["seconds"] = time.monotonic() - started
        self.history.append(row)
        self._report(row)
        return True

    def _step(self, batch: dict[str, Tensor], epoch: int, step: int) -> tuple[float, float]:
        seed = int(np.random.SeedSequence((self.job.seed, epoch, step, self.rank)).generate_state(1)[0])
        images = batch["image"].to(self.device, non_blocking=True)
        masks = batch["mask"].to(self.device, non_blocking=True)
        images, masks = augment(images, masks, self.config.augmentation, seed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(self.network.normalization(images))
        loss = segmentation_loss(logits, masks, self.config.loss, len(self.job.classes))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = self.config.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        # Every rank must take the same decision, or the others would wait for this one for ever.
        value = loss.detach() if bool(torch.isfinite(norm)) else torch.full_like(loss.detach(), math.nan)
        if self.world > 1:
            torch.distributed.all_reduce(value)
            value /= self.world
        if bool(torch.isfinite(value)):
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.network)
        return float(value), float(norm)

    def _validate(self) -> dict[str, float]:
        assert self.validation is not None
        segmenter = Segmenter(self._kept, self.job.info, self.job.classes, self.device)
        matrix = ConfusionMatrix(len(self.job.classes))
        for item in self.validation:
            matrix.update(item.mask, segmenter.predict(item.image))
        if self.world > 1:
            counts = torch.from_numpy(matrix.counts).to(self.device)
            torch.distributed.all_reduce(counts)
            matrix = ConfusionMatrix(len(self.job.classes), counts.cpu().numpy())
        return {SCORE: matrix.miou(), "validation_fwiou": matrix.fwiou()}

    def _report(self, row: dict[str, float]) -> None:
        metrics = {SCORE: row.get(SCORE, -1.0), "epoch": row["epoch"]}
        if self.rank:
            ray.train.report(metrics)
            return
        ray.get(self.job.monitor.epoch.remote(row))
        with tempfile.TemporaryDirectory() as folder:
            state = {
                "kept": self._kept.state_dict(),
                "network": self.network.state_dict(),
                "average": self.average.state_dict() if self.average is not None else {},
                "optimizer": self.optimizer.state_dict(),
                "history": json.dumps(self.history),
            }
            torch.save(state, Path(folder) / CHECKPOINT)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def _say(self, epoch: int, step: int, loss: float) -> None:
        if self.rank == 0:
            done = epoch * self.job.steps + step
            self.job.pace.set.remote(done * self.job.batch_size * self.world)
            self.job.monitor.step.remote(done, f"epoch {epoch + 1}, loss {loss:.3f}")

    def _fail(self, batch: dict[str, Tensor], epoch: int, step: int, loss: float) -> None:
        name = f"failed-batch-rank{self.rank}.safetensors"
        storage.write_bytes(
            storage.join(self.job.folder, name), save({key: value.contiguous() for key, value in batch.items()})
        )
        if self.rank == 0:
            reason = {"epoch": epoch, "step": step, "loss": str(loss), "batch": name}
            storage.write_bytes(storage.join(self.job.folder, FAILURE), json.dumps(reason).encode())
