"""Work in shards, in parallel on Ray's nodes; what is finished survives a crash."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import ray

from pistoseg import storage
from pistoseg.actors import RESTARTS, TRIES, exit_in_time
from pistoseg.config import ComputeConfig
from pistoseg.errors import PistoSegError, UnavailableError, explained
from pistoseg.memory import give_back, keep_freed_memory
from pistoseg.progress import Progress
from pistoseg.stages import cluster

IDLE_S = 10.0
"""How long a process keeps what it built for a stage without a shard of it."""
PER_ACTOR = 2
"""Shards that an actor is given at a time; one waits."""
SHOWN = 5
"""Names of images in an error."""


def run_shards(
    worker: type,
    arguments: dict[str, Any],
    shards: list[Any],
    folder: str,
    *,
    actors: int,
    resources: dict[str, float],
    progress: Progress,
    weight: Callable[[Any], int] = len,
    names: Callable[[Any], list[str]] | None = None,
    threads: int | None = None,
) -> None:
    """Process shards in parallel; each leaves `part-<number>.parquet` in a folder, which marks it as done.

    Without a GPU the shards are Ray tasks: processes that Ray keeps at hand have the libraries loaded from stage to
    stage. A GPU's memory is free only when its process ends, so there the shards go to actors.

    Args:
        worker: class whose instances take (number, shard, part's URI) and write that part; a process makes one.
        arguments: of the class.
        shards: JSON values, the same in every run of the same artifact.
        folder: where the parts go; those that are there are kept.
        actors: that work at the same time.
        resources: of each actor, as Ray names them.
        progress: told the weight of the finished shards.
        weight: images (or mosaics) in a shard.
        names: of the images in a shard, for an error that ended its process.
        threads: PyTorch's, for a worker that holds a network; None: it holds none.
    Raises:
        UnavailableError: the first that a worker raised, at once.
        PistoSegError: at once, when a shard's process has died in every one of `TRIES`.
        PistoSegError: what else the workers raised, all together, after the other shards are done.
    """
    todo, total = _unfinished(shards, folder), sum(map(weight, shards))
    done = total - sum(map(weight, todo.values()))
    progress.update(done, total)
    if not todo:
        return
    setup = (worker, arguments, folder, threads, bool(resources.get("num_gpus")))
    size = min(actors, len(todo))
    problems: dict[str, None] = {}  # in the order of their coming, each once
    try:
        for row in arriving_rows(_results(todo, setup, size, resources)):
            if row["away"]:  # the other shards would end the same way
                raise UnavailableError(**json.loads(row["problem"]))
            if row["problem"]:
                problems[row["problem"]] = None
            done += weight(todo.pop(int(row["number"])))
            progress.update(done, total)
    except ray.exceptions.RayError as error:
        known = explained(error, folder)
        if known is None:
            raise
        if names is not None and not isinstance(known, UnavailableError):
            # Shards are begun in their order, so that those that were in work are the first ones without a part.
            begun = [shard for number, shard in _unfinished(shards, folder).items() if number in todo]
            at_once = size * PER_ACTOR if resources.get("num_gpus") else size
            known = _at(known, [name for shard in begun[:at_once] for name in names(shard)])
        raise known from error
    errors = [PistoSegError(**json.loads(problem)) for problem in problems]
    if len(errors) > 1:
        raise PistoSegError("\n".join([f"{len(errors)} problems:", *map(str, errors)]).rstrip("."))
    if errors:
        raise errors[0]


def _unfinished(shards: list[Any], folder: str) -> dict[int, Any]:
    """Shards that have no part yet, by number."""
    finished = {storage.name(item) for item in storage.list_dir(folder)}
    return {number: shard for number, shard in enumerate(shards) if part_name(number) not in finished}


def _results(todo: dict[int, Any], setup: tuple[Any, ...], size: int, resources: dict[str, float]) -> ray.data.Dataset:
    """What becomes of shards: `number`, and the `problem` that ended it and whether something is `away`."""
    rows = [{"number": number, "shard": json.dumps(shard)} for number, shard in todo.items()]
    items = ray.data.from_items(rows, override_num_blocks=len(rows))
    if not resources.get("num_gpus"):
        run, tasks = uuid.uuid4().hex, ray.data.TaskPoolStrategy(size)
        return items.map(_shard, fn_args=(run, *setup), compute=tasks, max_retries=TRIES - 1, **resources)
    return items.map(
        _ShardWorker,
        fn_constructor_args=setup,
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=PER_ACTOR),
        max_restarts=RESTARTS,
        max_task_retries=TRIES - 1,
        **resources,
    )


def _at(error: PistoSegError, names: list[str]) -> PistoSegError:
    """An error that says which images were in work."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    reason = f"{error.reason}, at work on {', '.join(names[:SHOWN])}{more}"
    return PistoSegError(reason, file=error.file, remedy=error.remedy)


def run_networks(
    worker: type,
    arguments: dict[str, Any],
    shards: list[Any],
    folder: str,
    *,
    config: ComputeConfig,
    progress: Progress,
    names: Callable[[Any], list[str]] | None = None,
) -> None:
    """`run_shards` with a network in every worker, which gets a GPU, or the threads of a node."""
    actors, resources = cluster.network_pool(config)
    run_shards(
        worker,
        arguments,
        shards,
        folder,
        actors=actors,
        resources=resources,
        progress=progress,
        names=names,
        threads=cluster.node_threads(),
    )


def arriving_rows(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """Rows of a dataset in the order in which they are done.

    Every five seconds `Dataset.iter_rows` tells Ray's statistics about each block that went in. Where every item is a
    block, as here, so that whoever is free takes the next one, a driver of 100,000 items does little else.
    """
    for bundle in dataset.iter_internal_ref_bundles():
        for block in ray.get(bundle.block_refs):
            yield from block.to_pylist()


class _ShardWorker:
    def __init__(
        self, worker: type, arguments: dict[str, Any], folder: str, threads: int | None, has_gpu: bool
    ) -> None:
        exit_in_time()
        self.worker: Any = None
        self.folder, self.threads, self.has_gpu = folder, threads, has_gpu
        self.broken = _problem_of(lambda: self._build(worker, arguments))

    def _build(self, worker: type, arguments: dict[str, Any]) -> None:
        if self.threads:
            import torch

            torch.set_num_threads(self.threads)
        if self.has_gpu:
            cluster.require_cuda()
        self.worker = worker(**{key: _fetched(value) for key, value in arguments.items()})

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["number"])
        shard, part = json.loads(row["shard"]), storage.join(self.folder, part_name(number))
        with keep_freed_memory() if self.threads else nullcontext():
            problem, away = self.broken if self.broken[0] else _problem_of(lambda: self.worker(number, shard, part))
        return {"number": number, "problem": problem, "away": away}


_at_hand: tuple[str, _ShardWorker] | None = None
"""What this process built for the stage whose shard it did last."""
_idle: threading.Timer | None = None


def _shard(row: dict[str, Any], run: str, *setup: Any) -> dict[str, Any]:
    global _at_hand, _idle
    if _idle is not None:
        _idle.cancel()
    kept = _at_hand
    if kept is None or kept[0] != run:
        kept = _at_hand = None  # its memory, before the next one needs some
        kept = _at_hand = run, _ShardWorker(*setup)
    result = kept[1](row)
    _idle = threading.Timer(IDLE_S, _put_away)
    _idle.daemon = True
    _idle.start()
    return result


def _put_away() -> None:
    """Let go of a network, images and maps once their stage has ended: the process stays, beside later trainings."""
    global _at_hand
    _at_hand = None
    give_back()


def _problem_of(action: Callable[[], None]) -> tuple[str, bool]:
    """The fields of the `PistoSegError` that an action raised, as JSON, and whether it is an `UnavailableError`.

    Empty when it raised none. Ray Data would wrap the error and forget what it came from, so that the user would get a
    traceback instead of what is wrong with the input.
    """
    try:
        action()
    except Exception as error:
        known = explained(error)
        if known is None:
            raise
        return json.dumps(known.fields()), isinstance(known, UnavailableError)
    return "", False


def _fetched(value: Any) -> Any:
    return ray.get(value) if isinstance(value, ray.ObjectRef) else value


def part_name(number: int) -> str:
    """File name of a shard's result."""
    return f"part-{number:05d}.parquet"
