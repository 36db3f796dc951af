"""What training samples are made of: mosaics drawn afresh, stored mosaics, or real images with pseudo-masks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pistoseg import storage
from pistoseg.classes import IGNORE_ID
from pistoseg.config import SynthesisConfig
from pistoseg.patches.decode import decode_ids, decode_png
from pistoseg.synthesis import Synthesizer, TissueBank

Sample = tuple[NDArray[np.uint8], NDArray[np.uint8]]

CACHE_BYTES = 256 << 20
"""Decoded pixels that one actor keeps."""


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
    """The mosaics of a `synthesis` artifact, in their order, over and over.

    Args:
        shared: `folder` with the Parquet parts, `count` of mosaics, `part_size` of a part, `per_epoch` samples.
    """

    def __init__(self, shared: dict[str, Any]) -> None:
        self.parts = [item for item in storage.list_dir(shared["folder"]) if item.endswith(".parquet")]
        self.count, self.part_size, self.per_epoch = shared["count"], shared["part_size"], shared["per_epoch"]
        self._table: tuple[int, pa.Table] = (-1, pa.table({}))

    def sample(self, epoch: int, index: int) -> Sample:
        """Mosaic (H, W, 3) and mask (H, W), uint8."""
        number, row = divmod((epoch * self.per_epoch + index) % self.count, self.part_size)
        if self._table[0] != number:
            self._table = (number, storage.read_parquet(self.parts[number]))
        table = self._table[1]
        return decode_png(table["image"][row].as_py()), decode_ids(table["mask"][row].as_py())


class MaskedCrops:
    """Random crops of real images and their pseudo-masks.

    An image is used once per epoch for each `patch_size` x `patch_size` that its area holds, at least once, times its
    weight; the order is a permutation drawn from (seed, epoch).

    Args:
        shared: `images` and `masks`, tables with a binary column `png` each and rows that belong together; `rows`,
            their numbers as often as an epoch uses them (`crop_rows`); `patch_size`; `seed`.
    """

    def __init__(self, shared: dict[str, Any]) -> None:
        self.images, self.masks = shared["images"]["png"], shared["masks"]["png"]
        self.size, self.seed = shared["patch_size"], shared["seed"]
        self.rows = shared["rows"] if "rows" in shared else crop_rows(shared["areas"], self.size)
        self._order: tuple[int, NDArray[np.int64]] = (-1, self.rows)
        self._cache: OrderedDict[int, Sample] = OrderedDict()
        self._cached = 0

    def sample(self, epoch: int, index: int) -> Sample:
        """Image (patch_size, patch_size, 3) and mask (patch_size, patch_size), uint8."""
        # More samples than crops: further rounds, each in an order of its own.
        turn, place = divmod(index, len(self.rows))
        image, mask = self._decoded(int(self._permutation(epoch, turn)[place]))
        rng = np.random.Generator(np.random.Philox(key=[self.seed, (epoch << 32) + index]))
        top, left = (int(rng.integers(0, max(0, side - self.size) + 1)) for side in mask.shape)
        window = np.s_[top : top + self.size, left : left + self.size]
        return self._padded(image[window], mask[window])

    def _padded(self, image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> Sample:
        down, right = (max(0, self.size - side) for side in mask.shape)
        if down or right:
            image = np.pad(image, ((0, down), (0, right), (0, 0)), mode="symmetric")
            mask = np.pad(mask, ((0, down), (0, right)), constant_values=IGNORE_ID)
        return np.ascontiguousarray(image), np.ascontiguousarray(mask)

    def _permutation(self, epoch: int, turn: int) -> NDArray[np.int64]:
        key = (epoch << 20) + turn
        if self._order[0] != key:
            rng = np.random.default_rng([self.seed, epoch, turn])
            self._order = (key, rng.permutation(self.rows))
        return self._order[1]

    def _decoded(self, row: int) -> Sample:
        if row in self._cache:
            self._cache.move_to_end(row)
            return self._cache[row]
        sample = decode_png(self.images[row].as_py()), decode_ids(self.masks[row].as_py())
        self._cache[row] = sample
        self._cached += 4 * sample[1].size
        while self._cached > CACHE_BYTES and len(self._cache) > 1:
            _, (_, old) = self._cache.popitem(last=False)
            self._cached -= 4 * old.size
        return sample


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
