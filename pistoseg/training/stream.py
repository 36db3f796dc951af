"""Training samples through Ray Data: CPU actors make them, the trainer consumes them, nothing is written.

A stream is the addresses (epoch, k) of all samples that are still to come; actors turn addresses into pixels. So an
epoch is fresh, a resumed training starts its stream at the right epoch, and the number of actors changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray
from numpy.typing import NDArray

from pistoseg.actors import RESTARTS, TRIES, exit_in_time

Sample = tuple[NDArray[Any], ...]

SAMPLE_CPUS = 0.1
"""Of an actor that makes samples; the trainer's CPUs are set aside, and a mosaic costs a hundredth of its step."""
PREFETCHED = 2
"""Batches that a worker has Ray Data fetch before it takes one."""
BLOCK_BYTES = 8 << 20
"""Pixels of one block: large enough to be worth a task, small enough to be made ahead of need."""
IN_ORDER = ray.data.ExecutionOptions(preserve_order=True)
"""Without it Ray Data hands blocks out as they are finished, and batches as its threads are done with them."""


class Samples(Protocol):
    """Something that makes sample k of epoch e, the same whenever and wherever it is asked."""

    def sample(self, epoch: int, index: int) -> Sample:
        """The arrays of one sample, one for each of its source's columns; their shapes are those of every sample."""
        ...


@dataclass(frozen=True)
class SampleSource:
    """How an actor builds its `Samples`.

    Args:
        build: called once in every actor with `shared`'s value.
        shared: reference to the data that the actors of a node share without copying it.
        count: samples there are; an epoch without a given size takes all of them.
        size: height and width of a sample, px.
        columns: names of the arrays that a sample consists of, in their order.
    """

    build: Callable[[Any], Samples]
    shared: ray.ObjectRef
    count: int
    size: tuple[int, int]
    columns: tuple[str, ...] = ("image", "mask")


def sample_dataset(
    source: SampleSource,
    first_epoch: int,
    epochs: int,
    per_epoch: int,
    actors: int,
    workers: int = 1,
    progress: Any = None,
    batch_size: int = 0,
) -> ray.data.Dataset:
    """The samples of epochs first_epoch..epochs-1, in order, for an equal number of samples per worker and epoch.

    Columns: `epoch` and `index` int64, and the source's own, such as `image` (H, W, 3) uint8 and `mask` (H, W) uint8.

    Args:
        source: of the samples.
        first_epoch: where the stream begins.
        epochs: where it ends; at `first_epoch` for a training killed behind its last checkpoint: no sample is left.
        per_epoch: samples in an epoch.
        actors: that make samples.
        workers: that the samples are split between.
        progress: `TrainingProgress` actor, which holds the sample actors back; None: as fast as Ray lets them.
        batch_size: samples that a worker takes at a time; what it waits for is made whatever is held back.
    """
    height, width = source.size
    share = per_epoch // workers
    per_block = max(1, min(share, BLOCK_BYTES // (height * width * 4)))
    if workers > 1:
        # Ray hands whole blocks to the workers in turn: with other sizes one would be in the next epoch already.
        per_block = max(size for size in range(1, per_block + 1) if share % size == 0)
    starts = range(first_epoch * per_epoch, epochs * per_epoch, per_block)
    # A row is a range of samples. `from_items` makes its blocks here; `from_arrow` would start tasks that want a CPU
    # each, which wait for ever when a restarted training holds all of them already.
    rows = [{"start": start, "stop": min(start + per_block, epochs * per_epoch)} for start in starts]
    dataset = ray.data.from_items(rows, override_num_blocks=max(1, len(rows))).map_batches(
        _SampleActor,
        fn_constructor_kwargs={
            "build": source.build,
            "shared": [source.shared],
            "columns": source.columns,
            "progress": progress,
            "per_epoch": per_epoch,
            # Every actor works, every worker has a block in hand, one waiting, and the batches that it asks for before
            # it can say that one is used.
            "ahead": (actors + 2 * workers) * per_block + (PREFETCHED + 1) * batch_size * workers,
        },
        batch_size=None,
        batch_format="numpy",
        num_cpus=SAMPLE_CPUS,
        compute=ray.data.ActorPoolStrategy(size=actors),
        max_restarts=RESTARTS,
        max_task_retries=TRIES - 1,
    )
    dataset.context.execution_options = IN_ORDER
    return dataset


class _SampleActor:
    def __init__(
        self,
        build: Callable[[Any], Samples],
        shared: list[ray.ObjectRef],
        columns: tuple[str, ...],
        progress: Any,
        per_epoch: int,
        ahead: int,
    ) -> None:
        import cv2

        exit_in_time()
        cv2.setNumThreads(1)
        self.columns, self.progress, self.per_epoch, self.ahead = columns, progress, per_epoch, ahead
        self.samples = build(ray.get(shared[0]))

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        if self.progress is not None:
            ray.get(self.progress.wait.remote(int(batch["start"][0]) - self.ahead))
        ranges = zip(batch["start"], batch["stop"], strict=True)
        numbers = np.concatenate([np.arange(start, stop) for start, stop in ranges])
        epochs, indices = np.divmod(numbers, self.per_epoch)
        made = [self.samples.sample(int(e), int(k)) for e, k in zip(epochs, indices, strict=True)]
        arrays = zip(self.columns, zip(*made, strict=True), strict=True)
        return {"epoch": epochs, "index": indices} | {column: np.stack(items) for column, items in arrays}
