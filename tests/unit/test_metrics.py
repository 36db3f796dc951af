import json
import math
import tracemalloc

import numpy as np
import pytest

from pistoseg import metrics
from pistoseg.metrics import ConfusionMatrix, bootstrap_interval, confusion, image_table, multilabel_scores


def masks(seed, shape=(17, 23), n_classes=4):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, n_classes + 1, shape).astype(np.uint8)
    truth[rng.random(shape) < 0.1] = 255
    prediction = np.where(rng.random(shape) < 0.6, truth, rng.integers(0, n_classes, shape)).astype(np.uint8)
    prediction[truth >= n_classes] = 0
    return truth, prediction


def scores_by_sets(truth, prediction, n_classes):
    """IoU, Dice and frequency by class, from sets of pixel numbers."""
    truth, prediction = truth.ravel(), prediction.ravel()
    scored = {k for k in range(truth.size) if truth[k] < n_classes}
    iou, dice, frequency = [], [], []
    for c in range(n_classes):
        true = {k for k in scored if truth[k] == c}
        found = {k for k in scored if prediction[k] == c}
        iou.append(len(true & found) / len(true | found) if true else math.nan)
        dice.append(2 * len(true & found) / (len(true) + len(found)) if true else math.nan)
        frequency.append(len(true) / len(scored))
    return np.array(iou), np.array(dice), np.array(frequency)


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_a_count_by_sets(seed):
    truth, prediction = masks(seed)
    matrix = ConfusionMatrix(4)
    matrix.update(truth, prediction)
    iou, dice, frequency = scores_by_sets(truth, prediction, 4)
    np.testing.assert_allclose(matrix.iou(), iou)
    np.testing.assert_allclose(matrix.dice(), dice)
    assert matrix.miou() == pytest.approx(iou.mean())
    assert matrix.fwiou() == pytest.approx((iou * frequency).sum())
    assert matrix.pixel_accuracy() == pytest.approx((truth == prediction)[truth < 4].mean())
    assert matrix.counts.dtype == np.int64


def test_background_and_unknown_pixels_are_not_scored():
    truth = np.array([0, 1, 2, 255], np.uint8)
    assert confusion(truth, np.array([0, 1, 1, 0], np.uint8), 2).tolist() == [[1, 0], [0, 1]]


def test_parts_add_up_to_the_whole():
    (truth_a, prediction_a), (truth_b, prediction_b) = masks(1), masks(2)
    whole, part, other = ConfusionMatrix(4), ConfusionMatrix(4), ConfusionMatrix(4)
    whole.update(np.stack([truth_a, truth_b]), np.stack([prediction_a, prediction_b]))
    part.update(truth_a, prediction_a)
    other.update(truth_b, prediction_b)
    part.add(other)
    np.testing.assert_array_equal(part.counts, whole.counts)


def test_a_class_without_ground_truth_is_left_out_of_the_mean():
    matrix = ConfusionMatrix(3, [[8, 0, 2], [0, 10, 0], [0, 0, 0]])
    np.testing.assert_allclose(matrix.iou(), [0.8, 1.0, math.nan])
    assert matrix.miou() == pytest.approx(0.9)
    assert matrix.fwiou() == pytest.approx(0.9)
    written = matrix.to_dict(["tumor", "stroma", "normal"])
    assert written["iou"] == {"tumor": 0.8, "stroma": 1.0, "normal": None}
    assert json.loads(json.dumps(written, allow_nan=False)) == written


def test_nothing_scored_is_nan_and_no_zero():
    matrix = ConfusionMatrix(2)
    assert math.isnan(matrix.miou())
    assert math.isnan(matrix.fwiou())
    assert matrix.to_dict(["a", "b"])["pixel_accuracy"] is None


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="truth is"):
        confusion(np.zeros((2, 3), int), np.zeros((3, 2), int), 2)
    with pytest.raises(ValueError, match="ids from 0 to 7"):
        confusion(np.zeros(2, int), np.array([0, 7]), 2)


def test_bootstrap_interval_covers_the_score_and_depends_on_the_seed_alone():
    matrices = np.stack([confusion(*masks(seed), 4) for seed in range(40)])
    score = float(metrics.miou(matrices.sum(0)))
    low, high = bootstrap_interval(matrices, metrics.miou, n=500, seed=3)
    assert low < score < high
    assert high - low < 0.1
    assert (low, high) == bootstrap_interval(matrices, metrics.miou, n=500, seed=3)
    lows, highs = bootstrap_interval(matrices, metrics.iou, n=200)
    assert lows.shape == (4,)
    assert (lows < highs).all()


def test_bootstrap_draws_images_with_replacement():
    """The interval equals that of a loop which draws image by image, but for chance."""
    matrices = np.stack([confusion(*masks(seed), 4) for seed in range(12)])
    rng = np.random.default_rng(0)
    drawn = [float(metrics.miou(matrices[rng.integers(0, 12, 12)].sum(0))) for _ in range(2000)]
    low, high = bootstrap_interval(matrices, metrics.miou, n=2000)
    np.testing.assert_allclose([low, high], np.percentile(drawn, [2.5, 97.5]), atol=0.003)


@pytest.mark.parametrize("n", [1, 64, 1000])
def test_bootstrap_adds_up_whole_numbers_in_little_memory(n):
    rng = np.random.default_rng(1)
    matrices = rng.integers(0, 2**38, (3000, 2, 2))  # sums are beyond what float32 holds
    draws = np.random.default_rng(5).multinomial(3000, np.full(3000, 1 / 3000), size=n)
    sums = []
    tracemalloc.start()
    bootstrap_interval(matrices, lambda counts: sums.append(counts) or metrics.miou(counts), n=n, seed=5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(np.concatenate(sums), np.tensordot(draws, matrices, axes=1))
    assert peak < 8_000_000


def test_image_table_has_a_row_an_image():
    matrices = np.stack([confusion(*masks(seed), 4) for seed in range(2)])
    table = image_table(["a.png", "b.png"], matrices, ["t", "s", "l", "n"])
    assert list(table) == ["image", "pixels", "pixel_accuracy", "miou", "iou_t", "iou_s", "iou_l", "iou_n"]
    assert table["pixels"] == [int((masks(seed)[0] < 4).sum()) for seed in range(2)]
    assert table["iou_l"][1] == pytest.approx(ConfusionMatrix(4, matrices[1]).iou()[2])


def test_a_classifier_is_scored_by_its_ranking_and_by_its_decisions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (50, 3)).astype(np.uint8)
    probabilities = np.clip(0.3 * labels + rng.random((50, 3)) * 0.7, 0, 1)
    scores = multilabel_scores(labels, probabilities)
    for c in range(3):
        ranked = labels[np.argsort(-probabilities[:, c]), c]
        precisions = [ranked[: k + 1].mean() for k in range(50) if ranked[k]]
        assert scores["average_precision"][c] == pytest.approx(np.mean(precisions))
        true, found = ({k for k in range(50) if flag[k]} for flag in (labels[:, c], probabilities[:, c] >= 0.5))
        assert scores["f1"][c] == pytest.approx(2 * len(true & found) / (len(true) + len(found)))
    assert scores["map"] == pytest.approx(np.mean(scores["average_precision"]))
    assert scores["mean_f1"] == pytest.approx(np.mean(scores["f1"]))


def test_a_class_without_positives_is_not_scored():
    scores = multilabel_scores([[1, 0], [0, 0]], [[0.9, 0.9], [0.2, 0.1]])
    assert scores == {"map": 1.0, "mean_f1": 1.0, "average_precision": [1.0, None], "f1": [1.0, None]}
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    nothing = multilabel_scores(np.zeros((2, 1)), np.zeros((2, 1)))
    assert (nothing["map"], nothing["mean_f1"]) == (None, None)
    with pytest.raises(ValueError, match="labels are"):
        multilabel_scores(np.zeros((2, 1)), np.zeros((1, 2)))
