"""One interface to the synthesis strategies that the paper compares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import count, starmap
from typing import TYPE_CHECKING, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from pistoseg.errors import PistoSegError
from pistoseg.synthesis.bank import BACKGROUND, TissueBank
from pistoseg.synthesis.crops import CropSource
from pistoseg.synthesis.mosaic import Mosaic
from pistoseg.synthesis.sampling import Addresses, ImageSampler, Numbers

if TYPE_CHECKING:
    from pistoseg.config import SynthesisConfig


Sample = tuple[NDArray[np.uint8], NDArray[np.uint8]]

_AHEAD, _AHEAD_PX = 64, 2 << 20
"""Samples that are drawn at a time: so many, or as few as have so many pixels, which is a block of a training's stream.
For one alone NumPy's calls would take longer than all else; others make those that come after a block."""


class Strategy(Protocol):
    """A way to make labelled images."""

    def samples(self, numbers: Numbers) -> Iterator[Sample]:
        """For each stream of numbers (H, W, 4) uint8 whose first three bytes are RGB, and (H, W) uint8: class ids and
        `BACKGROUND`. All that is random is drawn with the first one; each is made when it is asked for."""
        ...


class Gridding:
    """Splices n_h x n_w crops and leaves it at that."""

    def __init__(self, source: CropSource, config: SynthesisConfig) -> None:
        self._source = source
        self._n_h = config.n_h
        self._n_w = config.n_w

    def samples(self, numbers: Numbers) -> Iterator[Sample]:
        """See `Strategy.samples`."""
        cells = self._n_h * self._n_w
        crops = self._source.draw(numbers, np.full(len(numbers), cells))
        for i in range(len(numbers)):
            packed = self._source.splice(crops.grid(i * cells, self._n_h, self._n_w))
            yield packed, packed[..., 3].copy()


class OneLabel:
    """A part of one single-tissue image at its own pixel size; an image that is too small is enlarged to fit."""

    def __init__(self, bank: TissueBank, sampler: ImageSampler, height: int, width: int) -> None:
        self._bank = bank
        self._sampler = sampler
        self._height = height
        self._width = width

    def samples(self, numbers: Numbers) -> Iterator[Sample]:
        """See `Strategy.samples`."""
        return starmap(self.part, self.draw(numbers))

    def draw(self, numbers: Numbers) -> list[tuple[int, float, float]]:
        """For each sample an image's number, and where in it the part lies: shares of the room down and across."""
        images = self._sampler.draw(numbers, 1).tolist()
        downs, acrosses = numbers.take(2).reshape(-1, 2).T.tolist()
        return list(zip(images, downs, acrosses, strict=True))

    def part(self, image: int, down: float, across: float) -> Sample:
        """What was drawn for a sample: image and mask."""
        packed = self._bank.packed(image)
        height, width = packed.shape[:2]
        tissue = packed[..., 3]
        enlarge = max(self._height / height, self._width / width)
        if enlarge > 1:
            # round() may fall a pixel short of the target on the other side.
            height, width = max(self._height, round(height * enlarge)), max(self._width, round(width * enlarge))
            packed = cv2.resize(packed, (width, height), interpolation=cv2.INTER_LINEAR)
            # Both sample at pixel centres; INTER_NEAREST would not, and the mask would be half a pixel off.
            tissue = cv2.resize(np.ascontiguousarray(tissue), (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        top, left = int(down * (height - self._height + 1)), int(across * (width - self._width + 1))
        place = np.s_[top : top + self._height, left : left + self._width]
        return packed[place], tissue[place].copy()


class CutMix:
    """A rectangle of one single-tissue image in another one (Yun et al., ICCV 2019).

    The rectangle's share of the area is uniform in 0-1 before it is clipped to the image, its centre anywhere.
    """

    def __init__(self, images: OneLabel) -> None:
        self._images = images

    def samples(self, numbers: Numbers) -> Iterator[Sample]:
        """See `Strategy.samples`."""
        first, second = self._images.draw(numbers), self._images.draw(numbers)
        rectangles = numbers.take(3).reshape(-1, 3).tolist()
        for one, another, (share, y, x) in zip(first, second, rectangles, strict=True):
            image, mask = self._images.part(*one)
            other, other_mask = self._images.part(*another)
            height, width = mask.shape
            side = math.sqrt(share)
            top, bottom = _clipped(y * height, side * height, height)
            left, right = _clipped(x * width, side * width, width)
            image = image.copy()
            image[top:bottom, left:right] = other[top:bottom, left:right]
            mask[top:bottom, left:right] = other_mask[top:bottom, left:right]
            yield image, mask


class Synthesizer:
    """Makes sample k of epoch e, a function of (seed, e, k) alone; for one thread at a time.

    Whoever asks for one sample mostly asks for the next one next, so that some are drawn at a time.

    Args:
        bank: single-tissue images, packed for this config's crop.
        config: the synthesis section.
        class_names: the L class names.
        background_id: mask value where there is no tissue.
        seed: the run's seed.
    Raises:
        PistoSegError: a class has no single-tissue image, class weights do not fit the classes, or images are smaller
            than a crop.
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
        self._ahead = max(1, min(_AHEAD, _AHEAD_PX // (config.height * config.width)))
        self._next: tuple[int, int] | None = None
        self._coming: Iterator[Sample] = iter(())

    def sample(self, epoch: int, index: int) -> Sample:
        """Sample `index` of `epoch`.

        Returns:
            (H, W, 3) uint8 RGB and its mask, (H, W) uint8: class ids, and background_id where there is no tissue.
        """
        if (epoch, index) != self._next:
            self._coming = self._from(epoch, index)
        self._next = None  # one that fails is begun anew
        image, mask = next(self._coming)
        self._next = (epoch, index + 1)
        if self._ids is not None:
            mask = cv2.LUT(mask, self._ids)
        return cv2.cvtColor(image, cv2.COLOR_RGBA2RGB), mask

    def _from(self, epoch: int, index: int) -> Iterator[Sample]:
        """The samples of an epoch from one on, without end."""
        for first in count(index, self._ahead):
            yield from self._strategy.samples(Numbers(self._addresses, epoch, range(first, first + self._ahead)))


def _strategy(bank: TissueBank, config: SynthesisConfig, class_names: Sequence[str]) -> Strategy:
    sampler = ImageSampler(bank.labels, class_names, config.class_sampling, bank.left_out)
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
