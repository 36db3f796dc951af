"""One confusion matrix, which adds up over images and workers, and every score that follows from it.

A class that no ground-truth pixel has can't be scored: its IoU and Dice are nan and means leave it out, so that a score
does not jump with the choice of images. Where such a class is predicted nevertheless, the pixels count against the
classes that they belong to. Means over nothing are nan.

The functions take (..., L, L) arrays, truth by row and prediction by column; `multilabel_scores` scores a classifier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Counts = NDArray[np.int64]
Scores = NDArray[np.float64]
BLOCK = 64
"""Resamplings that are drawn at a time."""


def confusion(truth: ArrayLike, prediction: ArrayLike, n_classes: int) -> Counts:
    """Count the pixels of one or more masks by true and predicted class.

    Args:
        truth: integer class ids of any shape; values of n_classes and above (background, 255) are not scored.
        prediction: integer class ids of the same shape, 0..n_classes-1 wherever the truth has a class.
        n_classes: L.
    Returns:
        (L, L) int64, truth by row and prediction by column.
    """
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    if truth.shape != prediction.shape:
        raise ValueError(f"truth is {truth.shape} but prediction is {prediction.shape}")
    scored = (truth >= 0) & (truth < n_classes)
    rows, columns = truth[scored].astype(np.int64), prediction[scored].astype(np.int64)
    if columns.size and (columns.min() < 0 or columns.max() >= n_classes):
        raise ValueError(f"the prediction has ids from {columns.min()} to {columns.max()} for {n_classes} classes")
    counts: Counts = np.bincount(rows * n_classes + columns, minlength=n_classes**2).reshape(n_classes, n_classes)
    return counts


def iou(counts: Counts) -> Scores:
    """Intersection over union by class, TP / (TP + FP + FN): (..., L, L) -> (..., L)."""
    hits, true, predicted = _parts(counts)
    return _share(hits, true + predicted - hits, true > 0)


def dice(counts: Counts) -> Scores:
    """Dice (F1) by class, 2 TP / (2 TP + FP + FN): (..., L, L) -> (..., L)."""
    hits, true, predicted = _parts(counts)
    return _share(2 * hits, true + predicted, true > 0)


def miou(counts: Counts) -> Scores:
    """Mean IoU over the classes of the ground truth: (..., L, L) -> (...)."""
    return _mean(iou(counts))


def mean_dice(counts: Counts) -> Scores:
    """Mean Dice over the classes of the ground truth: (..., L, L) -> (...)."""
    return _mean(dice(counts))


def fwiou(counts: Counts) -> Scores:
    """IoU weighted by the classes' frequency in the ground truth: (..., L, L) -> (...)."""
    _, true, _ = _parts(counts)
    weighted = (np.nan_to_num(iou(counts)) * true).sum(-1)
    return _share(weighted, true.sum(-1), true.sum(-1) > 0)


def pixel_accuracy(counts: Counts) -> Scores:
    """Share of the scored pixels that are right: (..., L, L) -> (...)."""
    hits, true, _ = _parts(counts)
    return _share(hits.sum(-1), true.sum(-1), true.sum(-1) > 0)


class ConfusionMatrix:
    """Pixel counts by true and predicted class; matrices of parts of the data add up to that of the whole.

    Args:
        n_classes: L.
        counts: (L, L) integers to start from.
    """

    def __init__(self, n_classes: int, counts: ArrayLike | None = None) -> None:
        self.counts: Counts = np.zeros((n_classes, n_classes), np.int64)
        if counts is not None:
            given = np.asarray(counts, dtype=np.int64)
            if given.shape != self.counts.shape:
                raise ValueError(f"counts are {given.shape} for {n_classes} classes")
            self.counts = given.copy()

    @property
    def n_classes(self) -> int:
        """L."""
        return len(self.counts)

    def update(self, truth: ArrayLike, prediction: ArrayLike) -> Counts:
        """Add masks, as `confusion` takes them; returns what was added, for a table by image."""
        added = confusion(truth, prediction, self.n_classes)
        self.counts += added
        return added

    def add(self, other: ConfusionMatrix) -> None:
        """Add the counts of another part of the data."""
        self.counts += other.counts

    def iou(self) -> Scores:
        """(L,) IoU by class."""
        return iou(self.counts)

    def dice(self) -> Scores:
        """(L,) Dice by class."""
        return dice(self.counts)

    def miou(self) -> float:
        """Mean IoU."""
        return float(miou(self.counts))

    def fwiou(self) -> float:
        """Frequency-weighted IoU."""
        return float(fwiou(self.counts))

    def pixel_accuracy(self) -> float:
        """Share of the scored pixels that are right."""
        return float(pixel_accuracy(self.counts))

    def to_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """All scores as JSON takes them; None stands for nan.

        Args:
            names: class names by class id.
        Returns:
            `miou`, `fwiou`, `mean_dice`, `pixel_accuracy`, `iou` and `dice` by class name, `pixels` by class name,
            `confusion` (truth by row).
        """
        return {
            "miou": _or_none(self.miou()),
            "fwiou": _or_none(self.fwiou()),
            "mean_dice": _or_none(float(mean_dice(self.counts))),
            "pixel_accuracy": _or_none(self.pixel_accuracy()),
            "iou": {name: _or_none(value) for name, value in zip(names, self.iou(), strict=True)},
            "dice": {name: _or_none(value) for name, value in zip(names, self.dice(), strict=True)},
            "pixels": {name: int(value) for name, value in zip(names, self.counts.sum(1), strict=True)},
            "confusion": self.counts.tolist(),
        }


def bootstrap_interval(
    matrices: Counts,
    statistic: Callable[[Counts], Scores] = miou,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Any, Any]:
    """Percentile bootstrap interval of a score, with images as the units that are drawn.

    Args:
        matrices: (n_images, L, L) int64, one confusion matrix an image.
        statistic: a score of this module, from (..., L, L) to (...) or (..., L).
        n: number of resamplings.
        seed: of the draws.
        level: coverage.
    Returns:
        Lower and upper end, floats or (L,) arrays as the score is; nan where no resampling has a value.
    """
    matrices = np.asarray(matrices, np.int64)
    if matrices.ndim != 3 or not len(matrices) or n < 1:
        raise ValueError(f"needs (n_images, L, L) matrices of at least one image and n >= 1, not {matrices.shape}, {n}")
    images, rng = len(matrices), np.random.default_rng(seed)
    chances, counts = np.full(images, 1 / images), matrices.reshape(images, -1).astype(np.float64)
    sums = []
    for start in range(0, n, BLOCK):  # pixels are whole numbers below 2**53: float64 adds them up exactly, and fast
        draws = rng.multinomial(images, chances, size=min(BLOCK, n - start)).astype(np.float64)
        sums.append((draws @ counts).astype(np.int64).reshape(-1, *matrices.shape[1:]))
    scores = statistic(np.concatenate(sums))
    tail = 50 * (1 - level)
    low, high = (_percentile(scores, q) for q in (tail, 100 - tail))
    return (float(low), float(high)) if low.ndim == 0 else (low, high)


def image_table(names: Sequence[str], matrices: Counts, class_names: Sequence[str]) -> dict[str, list[Any]]:
    """Scores by image, as columns.

    Args:
        names: n image names.
        matrices: (n, L, L) int64.
        class_names: L class names.
    Returns:
        `image`, `pixels` (scored), `pixel_accuracy`, `miou`, and `iou_NAME` by class; None stands for nan.
    """
    counts = np.asarray(matrices, np.int64).reshape(len(names), len(class_names), len(class_names))
    by_class = iou(counts)
    return {
        "image": list(names),
        "pixels": counts.sum((1, 2)).tolist(),
        "pixel_accuracy": [_or_none(value) for value in pixel_accuracy(counts)],
        "miou": [_or_none(value) for value in miou(counts)],
        **{f"iou_{name}": [_or_none(value) for value in by_class[:, k]] for k, name in enumerate(class_names)},
    }


def multilabel_scores(labels: ArrayLike, probabilities: ArrayLike) -> dict[str, Any]:
    """Scores of a multi-label classifier, over images or windows.

    Args:
        labels: (n, L) flags.
        probabilities: (n, L) in 0..1.
    Returns:
        `average_precision` (area under the precision-recall steps) and `f1` (at a probability of 0.5) by class, None
        for a class without positives; `map` and `mean_f1`, their means over the others, None where there are none.
    """
    from sklearn.metrics import average_precision_score

    true, given = np.asarray(labels) == 1, np.asarray(probabilities, np.float64)
    if true.shape != given.shape or true.ndim != 2:
        raise ValueError(f"labels are {true.shape} but probabilities are {given.shape}; both must be (n, L)")
    positive = true.any(0)
    precision = [
        average_precision_score(true[:, c], given[:, c]) if positive[c] else np.nan for c in range(true.shape[1])
    ]
    found = given >= 0.5
    f1 = _share(2.0 * (found & true).sum(0), (found.sum(0) + true.sum(0)).astype(np.float64), positive)
    return {
        "map": _or_none(float(_mean(np.array(precision)))),
        "mean_f1": _or_none(float(_mean(f1))),
        "average_precision": [_or_none(value) for value in precision],
        "f1": [_or_none(value) for value in f1],
    }


def label_agreement(labels: ArrayLike, areas: ArrayLike) -> Scores:
    """How well the areas of segmented windows agree with their labels, by class: an IoU that needs no masks.

    A class's area counts as right in windows that name it, and as wrong in the others; what it should have covered and
    did not is known where a window names nothing else. With single-tissue windows alone it is the IoU itself.

    Args:
        labels: (n, L) flags of n windows.
        areas: (n, L) share of a window that each class covers.
    Returns:
        (L,) in 0..1; 0 for a class that no window shows, nan for one that no window names.
    """
    true, given = np.asarray(labels) == 1, np.asarray(areas, np.float64)
    if true.shape != given.shape or true.ndim != 2:
        raise ValueError(f"labels are {true.shape} but areas are {given.shape}; both must be (n, L)")
    alone = true & (true.sum(1, keepdims=True) == 1)
    hits = (given * true).sum(0)
    false = (given * ~true).sum(0)
    missed = ((1 - given) * alone).sum(0)
    whole = hits + false + missed  # 0 as well for a class that is named beside others only and is never found
    return _share(hits, np.where(whole > 0, whole, 1), true.any(0))


def mean_over_classes(scores: Scores) -> float | None:
    """Mean of (L,) scores over the classes that have one; None where none has."""
    return _or_none(float(_mean(scores)))


def _parts(counts: Counts) -> tuple[Scores, Scores, Scores]:
    """True positives, pixels of the truth and pixels of the prediction by class, (..., L) float64 each."""
    counts = np.asarray(counts)
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    return hits.astype(np.float64), counts.sum(-1).astype(np.float64), counts.sum(-2).astype(np.float64)


def _share(part: Scores, whole: Scores, defined: NDArray[np.bool_]) -> Scores:
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=defined)


def _mean(scores: Scores) -> Scores:
    known = ~np.isnan(scores)
    amount = known.sum(-1).astype(np.float64)
    return _share(np.where(known, scores, 0).sum(-1), amount, amount > 0)


def _percentile(scores: Scores, q: float) -> Scores:
    columns = np.asarray(scores).reshape(len(scores), -1)
    values = [np.percentile(c[~np.isnan(c)], q) if (~np.isnan(c)).any() else np.nan for c in columns.T]
    return np.reshape(values, np.shape(scores)[1:])


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
