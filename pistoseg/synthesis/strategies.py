"""One interface to the synthesis strategies that the paper compares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from pistoseg.errors import PistoSegError
from pistoseg.synthesis.bank import BACKGROUND, TissueBank
from pistoseg.synthesis.crops import CropSource
from pistoseg.synthesis.mosaic import Mosaic
from pistoseg.synthesis.sampling import Addresses, ImageSampler

if TYPE_CHECKING:
    from pistoseg.config import SynthesisConfig


class Strategy(Protocol):
    """A way to make a labelled image."""

    def sample(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """(H, W, 4) uint8 whose first three bytes are RGB, and (H, W) uint8: class ids and `BACKGROUND`."""


class Gridding:
    """Splices n_h x n_w crops and leaves it at that."""

    def __init__(self, source: CropSource, config: SynthesisConfig) -> None:
        self._source = source
        self._n_h = config.n_h
        self._n_w = config.n_w

    def sample(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """See `Strategy.sample`."""
        crops = self._source.draw(rng, self._n_h * self._n_w)
        packed = self._source.splice(crops.grid(0, self._n_h, self._n_w))
        return packed, packed[..., 3].copy()


class OneLabel:
    """A part of one single-tissue image at its own pixel size; an image that is too small is enlarged to fit."""

    def __init__(self, bank: TissueBank, sampler: ImageSampler, height: int, width: int) -> None:
        self._bank = bank
        self._sampler = sampler
        self._height = height
        self._width = width

    def sample(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """See `Strategy.sample`."""
        packed = self._bank.packed(int(self._sampler.draw(rng, 1)[0]))
        height, width = packed.shape[:2]
        tissue = packed[..., 3]
        enlarge = max(self._height / height, self._width / width)
        if enlarge > 1:
            # round() may fall a pixel short of the target on the other side.
            height, width = max(self._height, round(height * enlarge)), max(self._width, round(width * enlarge))
            packed = cv2.resize(packed, (width, height), interpolation=cv2.INTER_LINEAR)
            # Both sample at pixel centres; INTER_NEAREST would not, and the mask would be half a pixel off.
            tissue = cv2.resize(np.ascontiguousarray(tissue), (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        u, v = rng.random(2).tolist()
        top, left = int(u * (height - self._height + 1)), int(v * (width - self._width + 1))
        place = np.s_[top : top + self._height, left : left + self._width]
        return packed[place], tissue[place].copy()


class CutMix:
    """A rectangle of one single-tissue image in another one (Yun et al., ICCV 2019).

    The rectangle's share of the area is uniform in 0-1 before it is clipped to the image, its centre anywhere.
    """

    def __init__(self, images: OneLabel) -> None:
        self._images = images

    def sample(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """See `Strategy.sample`."""
        image, mask = self._images.sample(rng)
        other, other_mask = self._images.sample(rng)
        height, width = mask.shape
        share, y, x = rng.random(3).tolist()
        side = math.sqrt(share)
        top, bottom = _clipped(y * height, side * height, height)
        left, right = _clipped(x * width, side * width, width)
        image = image.copy()
        image[top:bottom, left:right] = other[top:bottom, left:right]
        mask[top:bottom, left:right] = other_mask[top:bottom, left:right]
        return image, mask


class Synthesizer:
    """Makes sample k of epoch e, a function of (seed, e, k) alone; for one thread at a time.

    Args:
        bank: single-tissue images, packed for this config's crop.
        config: the synthesis section.
        class_names: the L class names.
        background_id: mask value where there is no tissue.
        seed: the run's seed.
    Raises:
        PistoSegError: a class has no single-tissue image, class weights do not fit the classes, images are smaller
            than a crop, or no anchor is possible.
    """

    def __init__(
        self, bank: TissueBank, config: SynthesisConfig, class_names: Sequence[str], background_id: int, seed: int
    ) -> None:
        self._addresses = Addresses(seed)
        self._ids: NDArray[np.uint8] | None = None  # of a mask's values; None: they are what they should be
        if bank.has_background and background_id != BACKGROUND:
            self._ids = np.arange(256, dtype=np.uint8)
            self._ids[BACKGROUND] = background_id
        self._strategy = _strategy(bank, config, class_names)

    def sample(self, epoch: int, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Sample `index` of `epoch`.

        Returns:
            (H, W, 3) uint8 RGB and its mask, (H, W) uint8: class ids, and background_id where there is no tissue.
        """
        image, mask = self._strategy.sample(self._addresses.rng(epoch, index))
        if self._ids is not None:
            mask = cv2.LUT(mask, self._ids)
        return cv2.cvtColor(image, cv2.COLOR_RGBA2RGB), mask


def _strategy(bank: TissueBank, config: SynthesisConfig, class_names: Sequence[str]) -> Strategy:
    sampler = ImageSampler(bank.labels, class_names, config.class_sampling)
    if config.strategy in ("one_label", "cutmix"):
        images = OneLabel(bank, sampler, config.height, config.width)
        return images if config.strategy == "one_label" else CutMix(images)
    source = CropSource(
        bank, sampler, config.crop_height, config.crop_width, config.background_threshold, config.max_redraws
    )
    if config.strategy == "gridding":
        return Gridding(source, config)
    if config.strategy == "mosaic":
        return Mosaic(source, config)
    raise PistoSegError(
        f"unknown strategy {config.strategy!r}",
        field="synthesis.strategy",
        remedy="use mosaic, one_label, cutmix or gridding",
    )


def _clipped(centre: float, length: float, side: int) -> tuple[int, int]:
    return max(0, round(centre - length / 2)), min(side, round(centre + length / 2))
