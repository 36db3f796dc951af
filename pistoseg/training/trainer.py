"""Runs a training through Ray Train: one call, resumed by calling it again."""

from __future__ import annotations

import io
import json
import math
import signal
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from pistoseg import storage
from pistoseg.actors import start_here
from pistoseg.artifacts import CHECKPOINTS
from pistoseg.config import ComputeConfig, TrainingConfig
from pistoseg.errors import PistoSegError, explained
from pistoseg.training.loop import CHECKPOINT, FAILURE, TrainingJob, train_worker
from pistoseg.training.progress import TrainingProgress
from pistoseg.training.stream import IN_ORDER, SampleSource, sample_dataset
from pistoseg.training.tasks import Task

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""What `ray.train.Result.from_path` reads; Ray Train writes it with the first checkpoint."""
POLL_S = 0.5
ENDING_S = 2.0
"""How long an interrupt waits for what is shown: who sends SIGTERM kills after 10 to 30 s."""


@dataclass(frozen=True)
class Trained:
    """A trained network's state and how it got there.

    Args:
        state: tensors by name.
        epoch: whose model it is, from 0.
        history: metrics of every epoch.
    """

    state: dict[str, torch.Tensor]
    epoch: int
    history: list[dict[str, float]]


def train(
    network: torch.nn.Module,
    source: SampleSource,
    task: Task,
    config: TrainingConfig,
    compute: ComputeConfig,
    *,
    folder: str,
    seed: int,
    actors: int,
    threads: int,
    gpus: bool,
    on_step: Callable[[int, int, str], None],
    on_epoch: Callable[[dict[str, float]], None],
    callbacks: tuple[Any, ...] = (),
) -> Trained:
    """Train a network; continues from the last epoch of an interrupted call with the same folder.

    Args:
        network: at its start: a module with `normalization` and `encoder`.
        source: of the training samples.
        task: the network's loss and validation.
        config: training settings.
        compute: workers and retries.
        folder: URI of the artifact; checkpoints go to `ray_train/` in it.
        seed: of augmentation.
        actors: that make samples.
        threads: of a CPU worker.
        gpus: whether a worker gets a GPU.
        on_step: called with (steps done, steps in all, note).
        on_epoch: called with each new epoch's metrics.
        callbacks: `ray.train.UserCallback`s, called by Ray Train in its controller; one that is a `WorkersCallback`
            also hears of the workers.

    Raises:
        PistoSegError: when a loss is not finite; the batch is kept in the folder.
    """
    per_worker = images_per_worker(config, compute)
    steps = steps_per_epoch(config, compute, source.count)
    samples = steps * per_worker * compute.train_workers
    failure = storage.join(folder, FAILURE)
    if storage.exists(failure):
        storage.remove_file(failure)  # the user runs again on purpose: from the last good epoch
    progress = start_here(TrainingProgress)
    job = TrainingJob(
        config=config,
        network=ray.put(network),
        task=task,
        seed=seed,
        steps=steps,
        batch_size=per_worker,
        folder=folder,
        threads=threads,
        progress=progress,
        callbacks=callbacks,
    )
    file_system, path = storage.arrow_filesystem(folder)

    def dataset() -> ray.data.Dataset:
        # Called at every (re)start of the workers, so that the stream begins with the epoch they resume at.
        first = len(_last_history(folder))
        ray.get(progress.set_used.remote(first * samples))
        workers = compute.train_workers
        return sample_dataset(source, first, config.epochs, samples, actors, workers, progress, per_worker)

    by_score = config.keep == "best" and task.validates
    data = ray.train.DataConfig(
        # A stream that is not split needs no process to split it. It is then scheduled by a thread of the worker,
        # which hardly shows beside steps on a CPU, but would take Python's lock from the one that feeds a GPU.
        datasets_to_split=[] if compute.train_workers == 1 and not gpus else "all",
        execution_options=IN_ORDER,  # in place of the stream's own
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=compute.train_workers,
            use_gpu=gpus,
            resources_per_worker=worker_resources(threads, gpus),
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=path,
            storage_filesystem=file_system,
            callbacks=list(callbacks),
            failure_config=ray.train.FailureConfig(max_failures=compute.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute=task.score if by_score else None, checkpoint_score_order="max"
            ),
        ),
        datasets={"train": dataset},
        dataset_config=data,
    )
    with _Watch(progress, steps * config.epochs, on_step, on_epoch):
        try:
            with _interruptible():
                result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            known = explained(error, folder)
            if known is None:
                raise error from None
            raise known from error  # which says whether processes were lost, for a search's trial
    ray.kill(progress)
    if storage.exists(failure):
        reason = json.loads(storage.read_bytes(failure))
        raise PistoSegError(
            f"the loss is {reason['loss']} in epoch {reason['epoch'] + 1}, step {reason['step'] + 1}; the batch is "
            f"kept in {reason['batch']}",
            file=folder,
            remedy="look at that batch; a smaller lr, clip_norm, or precision=fp32 usually helps",
        )
    assert result.checkpoint is not None
    state = _load(result.checkpoint)
    full = json.loads(state["history"])
    if by_score and any(task.score in row for row in full):  # no epoch is better than the last one without a score
        best = result.get_best_checkpoint(task.score, "max")
        assert best is not None
        state = _load(best)
    return Trained(state["kept"], len(json.loads(state["history"])) - 1, full)


def images_per_worker(config: TrainingConfig, compute: ComputeConfig) -> int:
    """Images of an optimizer step that each training worker takes."""
    return max(1, config.batch_size // compute.train_workers)


def steps_per_epoch(config: TrainingConfig, compute: ComputeConfig, count: int) -> int:
    """Optimizer steps in an epoch on `count` samples, or on as many as are set."""
    return math.ceil((config.samples_per_epoch or count) / (images_per_worker(config, compute) * compute.train_workers))


def worker_resources(threads: int, gpus: bool) -> dict[str, float]:
    """What Ray sets aside for a training worker; some of a node's CPUs stay free for the actors that make samples."""
    if gpus:
        return {"CPU": 1, "GPU": 1}
    return {"CPU": threads - 1 if threads > 1 else 0.5}


def remove_checkpoints(folder: str) -> None:
    """Delete the checkpoints of a training that needs them no more."""
    storage.remove_tree(storage.join(folder, CHECKPOINTS))


def remove_unreadable_checkpoints(folder: str) -> str:
    """Delete the checkpoints of an interrupted training that were cut off; what was done, empty where nothing was.

    Ray Train writes them, and the list of them, without waiting for the disk: a full one or a loss of power leaves half
    of them or nothing. It then refuses to start in this folder, for ever, or the training does.
    """
    run = storage.join(folder, CHECKPOINTS)
    snapshot = storage.join(run, SNAPSHOT)
    if not storage.exists(snapshot):
        return ""
    content = storage.read_bytes(snapshot)  # not below: errors of a storage that is away are ValueErrors, too
    try:
        state = json.loads(content)
    except ValueError:
        remove_checkpoints(folder)
        return "the list of the checkpoints was cut off; the training begins anew"
    names = [result["checkpoint_dir_name"] for result in state["checkpoint_results"]]
    whole = [_is_whole(storage.join(run, name, CHECKPOINT)) for name in names]
    if all(whole):
        return ""
    if not any(whole):
        remove_checkpoints(folder)
        return "the checkpoints were cut off; the training begins anew"
    for column in ("checkpoint_results", "checkpoint_report_indices"):
        state[column] = list(compress(state[column], whole))
    reports = state["checkpoint_report_indices"]
    state["latest_checkpoint_result"] = state["checkpoint_results"][reports.index(max(reports))]
    storage.write_bytes(snapshot, json.dumps(state).encode())
    for name, is_whole in zip(names, whole, strict=True):
        if not is_whole:
            storage.remove_tree(storage.join(run, name))
    epoch = state["latest_checkpoint_result"]["metrics"]["epoch"] + 1
    return f"a checkpoint was cut off; the training goes on behind epoch {epoch}"


def _is_whole(uri: str) -> bool:
    """Whether a checkpoint is there and as it was written: it is a zip archive, which has sums of its content."""
    if not storage.is_local(uri):  # an object is there as a whole or not at all, and far away
        return storage.exists(uri)
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


def _load(checkpoint: ray.train.Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        state: dict[str, Any] = torch.load(Path(folder) / CHECKPOINT, map_location="cpu", weights_only=True)
    return state


def _last_history(folder: str) -> list[dict[str, float]]:
    """Metrics of the epochs that a checkpoint holds."""
    run = storage.join(folder, CHECKPOINTS)
    if not storage.exists(storage.join(run, SNAPSHOT)):
        return []
    file_system, path = storage.arrow_filesystem(run)
    result = ray.train.Result.from_path(path, storage_filesystem=file_system)
    return json.loads(_load(result.checkpoint)["history"]) if result.checkpoint is not None else []


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end a training as it ends everything else, by `KeyboardInterrupt`.

    Ray Train puts a handler in place that aborts the workers, ends by `SystemExit`, and would stay for later stages.
    """
    if threading.current_thread() is not threading.main_thread():  # as in a search's trial: it puts none in place
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


class _Watch:
    """Passes what the workers said to the driver's callbacks while the training runs."""

    def __init__(
        self,
        progress: Any,
        total: int,
        on_step: Callable[[int, int, str], None],
        on_epoch: Callable[[dict[str, float]], None],
    ) -> None:
        self.progress, self.total, self.on_step, self.on_epoch = progress, total, on_step, on_epoch
        self._stop, self._interrupted = threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self._stop.set()
        self._thread.join(ENDING_S if self._interrupted else None)

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            self._fetch()
        if not self._interrupted:
            self._fetch()

    def _fetch(self) -> None:
        try:
            done, note, rows = ray.get(self.progress.fetch.remote(), timeout=30)
        except ray.exceptions.RayError:
            return  # shown again at the next poll; a lost actor costs the display, not the training
        self.on_step(done, self.total, note)
        for row in rows:
            self.on_epoch(row)
