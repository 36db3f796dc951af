"""What training samples are made of: mosaics drawn afresh, stored mosaics, or real images with pseudo-masks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pistoseg import parquet, storage
from pistoseg.classes import IGNORE_ID
from pistoseg.config import SynthesisConfig
from pistoseg.patches.decode import decode_ids, decode_png
from pistoseg.synthesis import Synthesizer, TissueBank

Sample = tuple[NDArray[np.uint8], NDArray[np.uint8]]

CACHE_BYTES = 256 << 20
"""Decoded pixels that one actor keeps."""
MOSAICS_TOGETHER = 32
"""Of stored mosaics, those that lie in one row group and are read at once: about a block of the stream."""


def fresh_mosaics(shared: dict[str, Any]) -> Synthesizer:
    """Mosaics from the bank's arrays in `shared`; see `mosaic_source`."""
    bank = TissueBank.from_arrays(shared["bank"])
    return Synthesizer(bank, shared["config"], shared["class_names"], shared["background_id"], shared["seed"])


def mosaic_source(
    bank: TissueBank, config: SynthesisConfig, class_names: list[str], background_id: int, seed: int
) -> dict[str, Any]:
    """What `fresh_mosaics` needs; goes to the object store once, where the actors of a node share it."""
    return {
        "bank": bank.arrays(),
        "config": config,
        "class_names": class_names,
        "background_id": background_id,
        "seed": seed,
    }


class StoredMosaics:
    """The mosaics of a `synthesis` artifact, over and over, each time in another order, drawn from (seed, time).

    `MOSAICS_TOGETHER` neighbours stay together, in another order: they are read at once. As mosaics are drawn
    independently, those together are no more alike than others.

    Args:
        shared: `folder` with the Parquet parts, `count` of mosaics, `part_size` of a part, `per_epoch` samples, `seed`
            of the orders.
    """

    def __init__(self, shared: dict[str, Any]) -> None:
        self.parts = [item for item in storage.list_dir(shared["folder"]) if item.endswith(".parquet")]
        self.count, self.part_size, self.per_epoch = shared["count"], shared["part_size"], shared["per_epoch"]
        self.seed = shared["seed"]
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.arange(0))
        self._held: tuple[int, int, pa.Table] = (-1, 0, pa.table({}))

    def sample(self, epoch: int, index: int) -> Sample:
        """Mosaic (H, W, 3) and mask (H, W), uint8."""
        turn, place = divmod(epoch * self.per_epoch + index, self.count)
        if self._order[0] != turn:
            self._order = turn, self._drawn(turn)
        number, row = divmod(int(self._order[1][place]), self.part_size)
        part, first, rows = self._held
        if part != number or not first <= row < first + rows.num_rows:
            first, rows = parquet.read_around(self.parts[number], row, ["image", "mask"])
            self._held = number, first, rows
        return decode_png(rows["image"][row - first].as_py()), decode_ids(rows["mask"][row - first].as_py())

    def _drawn(self, turn: int) -> NDArray[np.int64]:
        rng = np.random.default_rng([self.seed, turn])
        starts = rng.permutation(np.arange(0, self.count, MOSAICS_TOGETHER))
        return np.concatenate([start + rng.permutation(min(MOSAICS_TOGETHER, self.count - start)) for start in starts])


class EpochOrder:
    """Which row a sample uses: an epoch takes every row once, in an order drawn from (seed, epoch).

    An epoch of more samples than rows goes round again, each round in an order of its own.

    Args:
        rows: what to choose from; a number may occur several times.
        seed: of the orders.
    """

    def __init__(self, rows: NDArray[np.int64], seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._order: tuple[int, NDArray[np.int64]] = (-1, rows)

    def row(self, epoch: int, index: int) -> int:
        """The row of sample `index` of `epoch`."""
        turn, place = divmod(index, len(self.rows))
        key = (epoch << 20) + turn
        if self._order[0] != key:
            rng = np.random.default_rng([self.seed, epoch, turn])
            self._order = (key, rng.permutation(self.rows))
        return int(self._order[1][place])


class PixelCache:
    """Decoded pixels by row number; those used last are kept, up to `CACHE_BYTES`.

    Args:
        decode: a row's arrays.
    """

    def __init__(self, decode: Callable[[int], tuple[NDArray[np.uint8], ...]]) -> None:
        self.decode = decode
        self._items: OrderedDict[int, tuple[NDArray[np.uint8], ...]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, row: int) -> tuple[NDArray[np.uint8], ...]:
        if row in self._items:
            self._items.move_to_end(row)
            return self._items[row]
        arrays = self._items[row] = self.decode(row)
        self._bytes += sum(array.nbytes for array in arrays)
        while self._bytes > CACHE_BYTES and len(self._items) > 1:
            _, old = self._items.popitem(last=False)
            self._bytes -= sum(array.nbytes for array in old)
        return arrays


class MaskedCrops:
    """Random crops of real images and their pseudo-masks.

    An image is used once per epoch for each `patch_size` x `patch_size` that its area holds, at least once, times its
    weight; the order is a permutation drawn from (seed, epoch).

    Args:
        shared: `images` and `masks`, tables with a binary column `png` each and rows that belong together; `rows`,
            their numbers as often as an epoch uses them (`crop_rows`); `patch_size`; `seed`. With `min_confidence`
            above 0, pixels whose confidence (uint8 on a grid in the masks' columns `confidence`, `grid_height` and
            `grid_width`; 255 = 1) is smaller are ignored.
    """

    def __init__(self, shared: dict[str, Any]) -> None:
        self.images, self.masks = shared["images"]["png"], shared["masks"]
        self.min_confidence = shared.get("min_confidence", 0.0)
        self.size, self.seed = shared["patch_size"], shared["seed"]
        self.rows = shared["rows"]
        self._order = EpochOrder(self.rows, self.seed)
        self._cache = PixelCache(self._decode)

    def sample(self, epoch: int, index: int) -> Sample:
        """Image (patch_size, patch_size, 3) and mask (patch_size, patch_size), uint8."""
        image, mask = self._cache[self._order.row(epoch, index)]
        rng = np.random.Generator(np.random.Philox(key=[self.seed, (epoch << 32) + index]))
        top, left = (int(rng.integers(0, max(0, side - self.size) + 1)) for side in mask.shape)
        mask = mask[top : top + self.size, left : left + self.size]
        down, right = (self.size - side for side in mask.shape)
        if down or right:
            mask = np.pad(mask, ((0, down), (0, right)), constant_values=IGNORE_ID)
        return crop_mirrored(image, top, left, self.size), np.ascontiguousarray(mask)

    def _decode(self, row: int) -> Sample:
        mask = decode_ids(self.masks["png"][row].as_py())
        if self.min_confidence:
            mask = np.where(self._confidence(row, mask.shape) < 255 * self.min_confidence, np.uint8(IGNORE_ID), mask)
        return decode_png(self.images[row].as_py()), mask

    def _confidence(self, row: int, size: tuple[int, ...]) -> NDArray[np.uint8]:
        height, width = (self.masks[name][row].as_py() for name in ("grid_height", "grid_width"))
        cells = np.frombuffer(self.masks["confidence"][row].as_buffer(), np.uint8).reshape(height, width)
        full: NDArray[np.uint8] = cv2.resize(cells, size[::-1], interpolation=cv2.INTER_LINEAR)
        return full


def crop_mirrored(image: NDArray[np.uint8], top: int, left: int, size: int) -> NDArray[np.uint8]:
    """Cut (size, size, 3) out of (H, W, 3); where the image ends before the crop does, it goes on mirrored."""
    crop = image[top : top + size, left : left + size]
    down, right = (size - side for side in crop.shape[:2])
    if down or right:
        crop = np.pad(crop, ((0, down), (0, right), (0, 0)), mode="symmetric")
    return np.ascontiguousarray(crop)


def crop_rows(areas: NDArray[np.int64], size: int, weights: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
    """Row numbers of images, each as often as a crop of size x size fits into its area (at least 1), times its weight.

    Args:
        areas: (n,) px.
        size: side of a crop, px.
        weights: (n,) of at least 1; fractions are carried over to the next image.
    """
    times = np.maximum(1, np.round(areas / size**2))
    ends = np.floor(np.cumsum(times if weights is None else times * weights) + 0.5).astype(np.int64)
    return np.repeat(np.arange(len(areas)), np.diff(ends, prepend=0))


def rare_class_weights(labels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How much more often images with a rare class are used: max over their classes c of sqrt(f_max / f_c).

    The square root is that of repeat factor sampling (Gupta et al., CVPR 2019).

    Args:
        labels: (n, L) flags of n images.
    Returns:
        (n,) of at least 1.
    """
    frequency = labels.mean(axis=0)
    factor = np.sqrt(frequency.max() / np.maximum(frequency, 1 / len(labels)))
    return np.maximum(1.0, (labels * factor).max(axis=1))
