"""Which single-tissue image a crop comes from, and the random numbers of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pistoseg.classes import class_weights
from pistoseg.errors import PistoSegError

ClassSampling = Literal["natural", "balanced"] | Mapping[str, float]

_WORD = (1 << 64) - 1
_DOMAIN = 0x5049_5354_4F53_4547  # keeps these streams apart from any other use of Philox with the same seed


def address_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of sample `index` of `epoch`: a function of (seed, epoch, index) alone.

    Seed is the key and (epoch, index) the high half of the counter of a Philox generator, so that no two samples
    share numbers however many they draw.
    """
    key = np.array((seed & _WORD, _DOMAIN), np.uint64)  # a list with a word above 2**63 would become float64
    counter = np.array((0, 0, index & _WORD, epoch & _WORD), np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class Addresses:
    """`address_rng` for sample after sample of one seed, at a fifth of its cost: one generator is moved about.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self._rng = address_rng(seed, 0, 0)
        self._state = self._rng.bit_generator.state  # of a generator that has drawn nothing
        self.usual = 64  # numbers that a sample takes, as far as is known

    def rng(self, epoch: int, index: int) -> np.random.Generator:
        """The random numbers of `address_rng(seed, epoch, index)`, good until the next call."""
        counter = self._state["state"]["counter"]
        counter[2], counter[3] = index & _WORD, epoch & _WORD
        self._rng.bit_generator.state = self._state
        return self._rng


class Numbers:
    """Random numbers of some samples, taken for all of them at once.

    A sample has a stream of its own, that of `address_rng`, so that it gets the same numbers whatever others it is
    drawn with.

    Args:
        addresses: of the seed.
        epoch: of the samples.
        indices: their numbers in it.
    """

    def __init__(self, addresses: Addresses, epoch: int, indices: range) -> None:
        self._addresses, self._epoch, self._indices = addresses, epoch, indices
        self._taken = np.zeros(len(indices), np.int64)
        self._draw(addresses.usual)

    def __len__(self) -> int:
        return len(self._indices)

    def take(self, counts: int | NDArray[np.int64]) -> NDArray[np.float64]:
        """Numbers in [0, 1), uniform, that were not taken before.

        Args:
            counts: how many a sample gets: (n,), or one number for all of them.
        Returns:
            (sum of counts,) in the order of the samples.
        """
        counts = np.broadcast_to(counts, len(self))
        ends = self._taken + counts
        if ends.max(initial=0) > self._drawn.shape[1]:
            self._addresses.usual = 5 * int(ends.max()) // 4
            self._draw(self._addresses.usual)
        rows = np.arange(len(self)) * self._drawn.shape[1] + self._taken
        self._taken = ends
        return self._drawn.ravel().take(spans(rows, counts))

    def _draw(self, each: int) -> None:
        self._drawn = np.empty((len(self), each))
        for row, index in zip(self._drawn, self._indices, strict=True):
            self._addresses.rng(self._epoch, index).random(out=row)


def spans(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """starts[i], starts[i] + 1, ..., counts[i] of them, for one i after the other: (sum of counts,)."""
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)


class ImageSampler:
    """Draws image numbers by class.

    Args:
        labels: (n,) class id of each single-tissue image.
        class_names: the L class names.
        sampling: `natural` draws images uniformly, so that a class has its share of the images; `balanced` draws
            classes uniformly; a mapping gives a weight per class name.
        left_out: of each class, images that are too small for a crop, for the error; empty: none.
    Raises:
        PistoSegError: a class that is to be drawn has no single-tissue image, or the weights do not fit the classes.
    """

    def __init__(
        self,
        labels: NDArray[np.uint8],
        class_names: Sequence[str],
        sampling: ClassSampling,
        left_out: Sequence[int] = (),
    ) -> None:
        counts = np.bincount(labels, minlength=len(class_names))
        weights = _weights(class_names, sampling)
        self._refuse_absent(class_names, counts, drawn_classes(class_names, sampling), left_out)
        self.natural = sampling == "natural"
        self._n = len(labels)
        self._labels = labels
        self._order = np.argsort(labels, kind="stable")  # the images of class c are order[starts[c]:][:counts[c]]
        self._starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self._counts = counts
        self._edges = np.cumsum(weights)[:-1] / np.sum(weights)

    @staticmethod
    def _refuse_absent(
        names: Sequence[str], counts: NDArray[np.int64], drawn: Sequence[str], left_out: Sequence[int]
    ) -> None:
        rows = zip(names, counts, left_out or [0] * len(names), strict=True)
        absent = {name: small for name, count, small in rows if name in drawn and not count}
        if absent:
            found = [f"{name} ({n} are smaller than half a crop)" if n else name for name, n in absent.items()]
            smaller = "make synthesis.crop_height and synthesis.crop_width smaller, " if any(absent.values()) else ""
            raise PistoSegError(
                f"no single-tissue image of {', '.join(found)}, so that no mosaic could show it",
                field="synthesis.class_sampling",
                remedy=f"{smaller}add images or windows that show this tissue alone (one flag set), drop the class "
                "from the classes, or give it weight 0 in synthesis.class_sampling",
            )

    def draw(self, numbers: Numbers, counts: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """Draw image numbers, (sum of counts,) int64, as many for each of the samples as `counts` says."""
        if self.natural:
            return (numbers.take(counts) * self._n).astype(np.int64)
        return self._within(numbers, counts, np.searchsorted(self._edges, numbers.take(counts), side="right"))

    def redraw(self, numbers: Numbers, counts: NDArray[np.int64], images: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draw a substitute for each image, of which `counts` are each sample's.

        Where classes have set shares the substitute has the same class, so that rejecting crops does not shift the
        shares; with natural sampling it is any image.
        """
        if self.natural:
            return self.draw(numbers, counts)
        return self._within(numbers, counts, self._labels.take(images))

    def _within(
        self, numbers: Numbers, counts: int | NDArray[np.int64], classes: NDArray[np.integer]
    ) -> NDArray[np.int64]:
        places = (numbers.take(counts) * self._counts.take(classes)).astype(np.int64)
        return self._order.take(self._starts.take(classes) + places)


def drawn_classes(names: Sequence[str], sampling: ClassSampling) -> list[str]:
    """The classes, of all names, that are to be drawn, and need a single-tissue image each: those with a weight.

    Raises:
        PistoSegError: the weights do not fit the classes.
    """
    return [name for name, weight in zip(names, _weights(names, sampling), strict=True) if weight > 0]


def _weights(names: Sequence[str], sampling: ClassSampling) -> NDArray[np.float64]:
    if not isinstance(sampling, Mapping):
        return np.ones(len(names))  # natural does not use them, but needs every class as well
    return np.array(class_weights(sampling, names), np.float64)
