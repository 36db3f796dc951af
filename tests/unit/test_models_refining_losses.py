import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pistoseg.models.refiner import Refined
from pistoseg.models.refining_losses import consistency_loss, cross_loss, min_pooling_loss, pseudo_loss, refining_loss

N, L, H, W, R = 3, 2, 4, 5, 2


def rand(*shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def maps():
    """M_pseudo, M_CAM and the same projected."""
    return [rand(N, L, H, W, seed=seed) for seed in range(4)]


@pytest.fixture
def valid():
    """Some cells outside, some partly outside; no sample like another."""
    weights = torch.ones(N, 1, H, W, dtype=torch.float64)
    weights[0, 0, :, 3:] = 0
    weights[1, 0, 2] = 0.25
    return weights


def mean_difference(first, second, valid):
    total, weight = 0.0, 0.0
    for n, c, y, x in np.ndindex(*first.shape):
        total += float(valid[n, 0, y, x]) * abs(float(first[n, c, y, x]) - float(second[n, c, y, x]))
        weight += float(valid[n, 0, y, x])
    return total / weight


def test_consistency_is_the_mean_difference_of_the_projected_maps(maps, valid):
    _, _, refined_pseudo, refined_cam = maps
    expected = mean_difference(refined_pseudo, refined_cam, valid)
    assert float(consistency_loss(refined_pseudo, refined_cam, valid)) == pytest.approx(expected, rel=1e-12)


def test_cross_compares_each_map_with_the_other_one_projected(maps, valid):
    pseudo, cam, refined_pseudo, refined_cam = maps
    expected = mean_difference(pseudo, refined_cam, valid) + mean_difference(cam, refined_pseudo, valid)
    assert float(cross_loss(*maps, valid)) == pytest.approx(expected, rel=1e-12)


def test_gradients_are_signs_over_the_number_of_values(maps, valid):
    pseudo, cam, refined_pseudo, refined_cam = (item.requires_grad_() for item in maps)
    weights = (valid / (valid.sum() * L)).expand(N, L, H, W)
    found = torch.autograd.grad(consistency_loss(refined_pseudo, refined_cam, valid), (refined_pseudo, refined_cam))
    expected = weights * torch.sign(refined_pseudo - refined_cam).detach()
    torch.testing.assert_close(found, (expected, -expected))
    found = torch.autograd.grad(cross_loss(*maps, valid), maps)
    first, second = ((weights * torch.sign(a - b)).detach() for a, b in ((pseudo, refined_cam), (cam, refined_pseudo)))
    torch.testing.assert_close(found, (first, second, -second, -first))


@pytest.mark.parametrize("hardest", [1.0, 0.2, 0.33])
def test_losses_pass_gradcheck(maps, valid, hardest):
    inputs = [item.requires_grad_() for item in maps]
    assert torch.autograd.gradcheck(lambda *items: consistency_loss(items[2], items[3], valid), inputs)
    assert torch.autograd.gradcheck(lambda *items: cross_loss(*items, valid, hardest), inputs)
    activations = (maps[0].detach() - 0.4).requires_grad_()
    assert torch.autograd.gradcheck(lambda item: min_pooling_loss(item, valid), [activations])


def test_the_hardest_fifth_is_averaged_in_every_sample_and_term(maps):
    pseudo, cam, refined_pseudo, refined_cam = (item.numpy() for item in maps)
    expected = 0.0
    for first, second in ((pseudo, refined_cam), (cam, refined_pseudo)):
        for n in range(N):
            differences = sorted(np.abs(first[n] - second[n]).ravel(), reverse=True)
            expected += np.mean(differences[: L * H * W // 5]) / N
    everywhere = torch.ones(N, 1, H, W, dtype=torch.float64)
    assert float(cross_loss(*maps, everywhere, hardest=0.2)) == pytest.approx(expected, rel=1e-12)


def test_the_hardest_are_among_the_valid_cells_by_their_weights(maps, valid):
    pseudo, cam, refined_pseudo, refined_cam = (item.numpy() for item in maps)
    share, expected = 0.33, 0.0
    for first, second in ((pseudo, refined_cam), (cam, refined_pseudo)):
        taken, used = 0.0, 0.0
        for n in range(N):
            pairs = [
                (abs(first[n, c, y, x] - second[n, c, y, x]), float(valid[n, 0, y, x]))
                for c, y, x in np.ndindex(L, H, W)
            ]
            room = share * sum(weight for _, weight in pairs)
            used += room
            for difference, weight in sorted(pairs, reverse=True):
                part = min(weight, room)
                taken, room = taken + part * difference, room - part
        expected += taken / used
    assert float(cross_loss(*maps, valid, hardest=share)) == pytest.approx(expected, rel=1e-12)


def test_min_pooling_is_the_mean_of_the_lowest_quarter(valid):
    activations = rand(N, L, H, W, seed=5) - 0.4
    everywhere = torch.ones_like(valid)
    expected = []
    for n in range(N):
        largest = sorted(max(0.0, *(float(activations[n, c, y, x]) for c in range(L))) for y, x in np.ndindex(H, W))
        expected += largest[: H * W // 4]
    assert float(min_pooling_loss(activations, everywhere)) == pytest.approx(np.mean(expected), rel=1e-12)
    outside = torch.where(valid == 0, -10.0, activations)  # low activations outside count for nothing
    assert float(min_pooling_loss(outside, valid)) == pytest.approx(float(min_pooling_loss(activations, valid)))


def test_the_class_map_learns_the_pseudo_mask_by_binary_cross_entropy(maps, valid):
    class_map, target = 6 * maps[0] - 3, maps[1]
    total, weight = 0.0, 0.0
    for n, c, y, x in np.ndindex(N, L, H, W):
        share = 1 / (1 + math.exp(-float(class_map[n, c, y, x])))
        wanted = float(target[n, c, y, x])
        entropy = -(wanted * math.log(share) + (1 - wanted) * math.log(1 - share))
        total += float(valid[n, 0, y, x]) * entropy
        weight += float(valid[n, 0, y, x])
    assert float(pseudo_loss(class_map, target, valid)) == pytest.approx(total / weight, rel=1e-12)
    assert torch.autograd.gradcheck(lambda item: pseudo_loss(item, target, valid), [class_map.requires_grad_()])


@pytest.mark.parametrize("hardest", [1.0, 0.2])
def test_cells_outside_have_no_say(maps, valid, hardest):
    pseudo, cam, refined_pseudo, refined_cam = maps
    changed = refined_cam + (valid == 0) * 50.0
    before = cross_loss(pseudo, cam, refined_pseudo, refined_cam, valid, hardest)
    assert float(cross_loss(pseudo, cam, refined_pseudo, changed, valid, hardest)) == pytest.approx(float(before))
    before = consistency_loss(refined_pseudo, refined_cam, valid)
    assert float(consistency_loss(refined_pseudo, changed, valid)) == pytest.approx(float(before))


@pytest.mark.parametrize("hardest", [1.0, 0.2])
def test_losses_do_not_depend_on_the_size_of_the_grid(maps, valid, hardest):
    finer = [F.interpolate(item, scale_factor=3) for item in maps]
    fine_valid = F.interpolate(valid, scale_factor=3)
    expected = float(cross_loss(*maps, valid, hardest))
    assert float(cross_loss(*finer, fine_valid, hardest)) == pytest.approx(expected)
    assert float(min_pooling_loss(finer[0], fine_valid)) == pytest.approx(float(min_pooling_loss(maps[0], valid)))


def test_a_batch_without_valid_cells_is_zero_with_a_gradient(maps):
    nowhere = torch.zeros(N, 1, H, W)
    inputs = [item.float().requires_grad_() for item in maps]
    value = (
        consistency_loss(inputs[2], inputs[3], nowhere)
        + cross_loss(*inputs, nowhere, 0.2)
        + min_pooling_loss(inputs[0], nowhere)
    )
    value.backward()
    assert float(value.detach()) == 0.0
    assert all(float(item.grad.abs().sum()) == 0.0 for item in inputs)


@pytest.fixture
def refined(maps):
    pseudo, cam, refined_pseudo, refined_cam = maps
    class_map, cnn, refined_cnn, active = (rand(N, L, H, W, seed=seed) for seed in (10, 11, 12, 13))
    return Refined(class_map, pseudo, cam, cnn, refined_pseudo, refined_cam, refined_cnn, active)


@pytest.fixture
def labelled():
    """Logits of two windows per sample and their labels; the last window is unused."""
    labels = torch.tensor([[[1, 0], [0, 1]], [[1, 1], [0, 1]], [[1, 0], [255, 255]]], dtype=torch.uint8)
    return rand(N, R, L, seed=20) * 4 - 2, labels


def classification(logits, labels):
    terms = []
    for n, r, c in np.ndindex(N, R, L):
        if labels[n, r, c] != 255:
            p = 1 / (1 + math.exp(-float(logits[n, r, c])))
            terms.append(-math.log(p if labels[n, r, c] else 1 - p))
    return np.mean(terms)


def test_the_total_is_the_weighted_sum_of_its_terms(refined, labelled, valid):
    total, parts = refining_loss(
        refined, *labelled, valid, lambda_cls=0.5, lambda_cons=2.0, lambda_cross=3.0, hardest=0.2, min_pooling=True
    )
    expected = {
        "cls": classification(*labelled),
        "min_pooling": float(min_pooling_loss(refined.active, valid)),
        "cons": mean_difference(refined.refined_pseudo, refined.refined_cam, valid),
        "cross": float(
            cross_loss(refined.pseudo, refined.cam, refined.refined_pseudo, refined.refined_cam, valid, 0.2)
        ),
    }
    assert {name: float(value) for name, value in parts.items()} == pytest.approx(expected)
    weights = {"cls": 0.5, "min_pooling": 0.5, "cons": 2.0, "cross": 3.0}
    assert float(total) == pytest.approx(sum(weights[name] * value for name, value in expected.items()))


def test_by_default_it_is_the_papers_sum_of_three(refined, labelled, valid):
    total, parts = refining_loss(refined, *labelled, valid)
    assert sorted(parts) == ["cls", "cons", "cross"]
    assert float(total) == pytest.approx(sum(float(value) for value in parts.values()))


def test_the_total_passes_gradcheck(refined, labelled, valid):
    logits, labels = labelled
    inputs = [*refined, logits]

    def loss(*items):
        return refining_loss(Refined(*items[:-1]), items[-1], labels, valid, hardest=0.2, min_pooling=True)[0]

    assert torch.autograd.gradcheck(loss, [item.requires_grad_() for item in inputs])


@pytest.mark.parametrize("off", ["cls", "cons", "cross"])
def test_a_weight_of_zero_switches_a_term_off(refined, labelled, valid, off):
    logits, labels = labelled
    poison = torch.full_like(refined.cam, math.nan)  # would spoil the sum even when it is multiplied by 0
    if off == "cls":
        logits = torch.full_like(logits, math.nan)
        refined = refined._replace(active=poison)
    elif off == "cross":
        refined = refined._replace(pseudo=poison, cam=poison)
    full = dict.fromkeys(("cls", "cons", "cross"), 1.0)
    weights = {f"lambda_{name}": 0.0 if name == off else value for name, value in full.items()}
    total, parts = refining_loss(refined, logits, labels, valid, min_pooling=off == "cls", **weights)
    assert sorted(parts) == sorted(set(full) - {off})
    assert float(total) == pytest.approx(sum(float(value) for value in parts.values()))


def test_a_loss_without_terms_is_refused(refined, labelled, valid):
    with pytest.raises(ValueError, match="nothing would be learned"):
        refining_loss(refined, *labelled, valid, lambda_cls=0.0, lambda_cons=0.0, lambda_cross=0.0)
