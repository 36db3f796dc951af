import numpy as np
import pytest
import torch

from pistoseg.models.losses import segmentation_loss

L = 3


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, L, 5, 7)) * 3
    target = rng.choice([0, 1, 2, 3, 255], size=(2, 5, 7)).astype(np.uint8)
    return logits, target


def loss(logits, target, kind):
    return float(segmentation_loss(torch.from_numpy(logits).float(), torch.from_numpy(target), kind, L))


def test_bce_is_the_mean_over_valid_pixels_and_classes(batch):
    logits, target = batch
    terms = []
    for n, y, x in np.argwhere(target < L):
        for c in range(L):
            p = 1 / (1 + np.exp(-logits[n, c, y, x]))
            terms.append(-np.log(p) if target[n, y, x] == c else -np.log(1 - p))
    assert loss(logits, target, "bce") == pytest.approx(np.mean(terms), rel=1e-5)


def test_dice_is_over_the_batch_and_the_classes_that_occur(batch):
    logits, target = batch
    target[target == 1] = 3
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    valid = target < L
    scores = []
    for c in (0, 2):
        overlap = softmax[:, c][valid & (target == c)].sum()
        scores.append(2 * overlap / (softmax[:, c][valid].sum() + (target == c).sum()))
    assert loss(logits, target, "dice") == pytest.approx(1 - np.mean(scores), rel=1e-5)


def test_the_sum_is_the_sum(batch):
    assert loss(*batch, "bce+dice") == pytest.approx(loss(*batch, "bce") + loss(*batch, "dice"), rel=1e-6)


@pytest.mark.parametrize("kind", ["bce", "dice", "bce+dice"])
def test_ignored_pixels_have_no_say(batch, kind):
    logits, target = batch
    other = logits + (target >= L)[:, None] * 50.0
    assert loss(other, target, kind) == pytest.approx(loss(logits, target, kind), rel=1e-6)


@pytest.mark.parametrize("kind", ["bce", "dice", "bce+dice"])
def test_a_batch_without_classes_is_zero_with_a_gradient(kind):
    logits = torch.randn(2, L, 4, 4, requires_grad=True)
    value = segmentation_loss(logits, torch.full((2, 4, 4), 255, dtype=torch.uint8), kind, L)
    value.backward()
    assert float(value.detach()) == 0.0
    assert logits.grad is not None
    assert float(logits.grad.abs().sum()) == 0.0


@pytest.mark.parametrize("kind", ["bce", "dice", "bce+dice"])
def test_a_perfect_prediction_costs_nothing_and_extreme_logits_stay_finite(kind):
    target = torch.tensor([[[0, 1], [2, 255]]])
    logits = torch.full((1, L, 2, 2), -80.0)
    for y, x in ((0, 0), (0, 1), (1, 0)):
        logits[0, target[0, y, x], y, x] = 80.0
    assert float(segmentation_loss(logits, target, kind, L)) == pytest.approx(0, abs=1e-6)
    wrong = (-logits).requires_grad_()
    value = segmentation_loss(wrong, target, kind, L)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(wrong.grad).all()


def test_an_unknown_loss_is_refused(batch):
    with pytest.raises(ValueError, match="bce, dice"):
        loss(*batch, "focal")
