"""Training samples through Ray Data: CPU actors make them, the trainer consumes them, nothing is written.

A stream is the addresses (epoch, k) of all samples that are still to come; actors turn addresses into pixels. So an
epoch is fresh, a resumed training starts its stream at the right epoch, and the number of actors changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

Sample = tuple[NDArray[np.uint8], NDArray[np.uint8]]

BLOCK_BYTES = 8 << 20
"""Pixels of one block: large enough to be worth a task, small enough to be made ahead of need."""


class Samples(Protocol):
    """Something that makes sample k of epoch e, the same whenever and wherever it is asked."""

    def sample(self, epoch: int, index: int) -> Sample:
        """An image (H, W, 3) uint8 and its mask (H, W) uint8."""
        ...


@dataclass(frozen=True)
class SampleSource:
    """How an actor builds its `Samples`.

    Args:
        build: called once in every actor with `shared`'s value.
        shared: reference to the data that the actors of a node share without copying it.
        count: samples there are; an epoch without a given size takes all of them.
        size: height and width of a sample, px.
    """

    build: Callable[[Any], Samples]
    shared: ray.ObjectRef
    count: int
    size: tuple[int, int]


def sample_dataset(
    source: SampleSource, first_epoch: int, epochs: int, per_epoch: int, actors: int, workers: int = 1
) -> ray.data.Dataset:
    """The samples of epochs first_epoch..epochs-1, in order, for an equal number of samples per worker and epoch.

    Columns: `epoch` and `index` int64, `image` (H, W, 3) uint8, `mask` (H, W) uint8.
    """
    height, width = source.size
    share = per_epoch // workers
    per_block = max(1, min(share, BLOCK_BYTES // (height * width * 4)))
    if workers > 1:
        # Ray hands whole blocks to the workers in turn: with other sizes one would be in the next epoch already.
        per_block = max(size for size in range(1, per_block + 1) if share % size == 0)
    total = np.arange(first_epoch * per_epoch, epochs * per_epoch)
    blocks = [
        pa.table({"epoch": part // per_epoch, "index": part % per_epoch})
        for part in np.split(total, range(per_block, len(total), per_block))
    ]
    return ray.data.from_arrow(blocks).map_batches(
        _SampleActor,
        fn_constructor_args=(source.build, [source.shared]),
        batch_size=None,
        batch_format="numpy",
        # The trainer's CPUs are set aside already, and a mosaic costs a hundredth of a training step.
        num_cpus=0.1,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )


class _SampleActor:
    def __init__(self, build: Callable[[Any], Samples], shared: list[ray.ObjectRef]) -> None:
        import cv2

        cv2.setNumThreads(1)
        self.samples = build(ray.get(shared[0]))

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        made = [self.samples.sample(int(e), int(k)) for e, k in zip(batch["epoch"], batch["index"], strict=True)]
        images, masks = zip(*made, strict=True)
        return {"epoch": batch["epoch"], "index": batch["index"], "image": np.stack(images), "mask": np.stack(masks)}
