"""The losses of the refining network (eqs. 6 to 9), as pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pistoseg.models.classifier import classification_loss
from pistoseg.models.refiner import Refined


def consistency_loss(refined_pseudo: Tensor, refined_cam: Tensor, valid: Tensor) -> Tensor:
    """L_cons: in the attention space, pseudo-mask and CAM of an image should agree (eq. 7).

        L_cons = || ^M_pseudo - ^M_CAM ||_1

    The norm is taken as the mean over valid cells and classes, so that lambda_cons does not depend on the size of the
    grid, the number of classes or the padding.

    Args:
        refined_pseudo, refined_cam: (N, L, h, w) float, the projected maps (eqs. 4, 5).
        valid: (N, 1, h, w) float weights of the cells: 1 inside labelled windows, 0 in padding.
    Returns:
        () float; 0 with a gradient of 0 where no cell is valid.
    """
    return _mean_difference(refined_pseudo, refined_cam, valid, hardest=1.0)


def cross_loss(
    pseudo: Tensor, cam: Tensor, refined_pseudo: Tensor, refined_cam: Tensor, valid: Tensor, hardest: float = 1.0
) -> Tensor:
    """L_cross: the attention space must not drift away from the maps themselves (eq. 8).

        L_cross = || M_pseudo - ^M_CAM ||_1 + || M_CAM - ^M_pseudo ||_1

    Norms are means over valid cells and classes, as in `consistency_loss`.

    Args:
        pseudo, cam: (N, L, h, w) float, M_pseudo and M_CAM on the grid.
        refined_pseudo, refined_cam: (N, L, h, w) float, the same projected.
        valid: (N, 1, h, w) float weights of the cells.
        hardest: share of every sample's largest differences that each of the two terms averages; 1 for all (the
            paper's), 0.2 in the authors' code.
    Returns:
        () float.
    """
    return _mean_difference(pseudo, refined_cam, valid, hardest) + _mean_difference(cam, refined_pseudo, valid, hardest)


def min_pooling_loss(maps: Tensor, valid: Tensor) -> Tensor:
    """The authors' addition to L_cls, from SEAM: a quarter of an image should be active for no class.

        L_min = 1 / |B| sum_{p in B} max(0, max_c M_cp)

    with B the lowest quarter of a sample's valid cells, by their largest activation.

    Args:
        maps: (N, L, h, w) float activations, each class's as a share of its highest; classes that the label excludes
            are 0.
        valid: (N, 1, h, w) float weights of the cells.
    Returns:
        () float.
    """
    return _extreme_mean(maps.amax(1).relu().flatten(1), valid.flatten(1), share=0.25, largest=False)


def pseudo_loss(class_map: Tensor, pseudo: Tensor, valid: Tensor) -> Tensor:
    """L_pseudo: the CNN's class map learns the pseudo-mask itself. Not in the paper.

        L_pseudo = -1 / (|V| L) sum_{p in V} sum_c [ M_cp log s(f_cp) + (1 - M_cp) log(1 - s(f_cp)) ]

    with V the valid cells, f the class map, s the sigmoid and M = M_pseudo.

    Args:
        class_map: (N, L, h, w) float.
        pseudo: (N, L, h, w) float 0..1, M_pseudo on the grid.
        valid: (N, 1, h, w) float weights of the cells.
    Returns:
        () float.
    """
    difference = F.binary_cross_entropy_with_logits(class_map.to(pseudo.dtype), pseudo, reduction="none")
    weights = valid.expand_as(difference)
    return _extreme_mean(difference.flatten(1), weights.flatten(1), 1.0, largest=True)


def refining_loss(
    refined: Refined,
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    *,
    lambda_cls: float = 1.0,
    lambda_cons: float = 1.0,
    lambda_cross: float = 1.0,
    lambda_pseudo: float = 0.0,
    hardest: float = 1.0,
    min_pooling: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The refining network's loss (eq. 9).

        L = lambda_cls L_cls + lambda_cons L_cons + lambda_cross L_cross (+ lambda_pseudo L_pseudo, our own)

    Args:
        refined: what the network returned.
        logits: (N, R, L) float, `refined.class_map` pooled over the labelled windows.
        labels: (N, R, L) uint8 flags of the windows; rows of unused windows are 255.
        valid: (N, 1, h, w) float weights of the cells: 1 inside labelled windows, 0 in padding.
        lambda_cls, lambda_cons, lambda_cross, lambda_pseudo: weights; a term of weight 0 is not computed.
        hardest: see `cross_loss`.
        min_pooling: add `min_pooling_loss` of the class map's activation to L_cls. In class shares it would be a
            constant in an image of one tissue, which has all of every cell.
    Returns:
        The loss, () float, and its unweighted terms `cls`, `cons`, `cross`, `pseudo` and `min_pooling`, as far as
        they are computed, detached.
    """
    terms: list[tuple[str, float, Tensor]] = []
    if lambda_cls:
        terms.append(("cls", lambda_cls, classification_loss(logits, labels)))
        if min_pooling:
            terms.append(("min_pooling", lambda_cls, min_pooling_loss(refined.active, valid)))
    if lambda_cons:
        terms.append(("cons", lambda_cons, consistency_loss(refined.refined_pseudo, refined.refined_cam, valid)))
    if lambda_cross:
        maps = (refined.pseudo, refined.cam, refined.refined_pseudo, refined.refined_cam)
        terms.append(("cross", lambda_cross, cross_loss(*maps, valid, hardest)))
    if lambda_pseudo:
        terms.append(("pseudo", lambda_pseudo, pseudo_loss(refined.class_map, refined.pseudo, valid)))
    if not terms:
        raise ValueError("all weights are 0; nothing would be learned")
    total = torch.stack([weight * value for _, weight, value in terms]).sum()
    return total, {name: value.detach() for name, _, value in terms}


def _mean_difference(first: Tensor, second: Tensor, valid: Tensor, hardest: float) -> Tensor:
    difference = (first - second).abs()
    weights = valid.expand_as(difference)
    return _extreme_mean(difference.flatten(1), weights.flatten(1), hardest, largest=True)


def _extreme_mean(values: Tensor, weights: Tensor, share: float, largest: bool) -> Tensor:
    """Weighted mean of every sample's largest or smallest values, that hold a share of its weight.

    Args:
        values, weights: (N, K) float; weights are at least 0.
        share: in (0, 1]. A value on the boundary counts with the part of its weight that is still missing.
        largest: take the largest values instead of the smallest.
    """
    if share < 1:
        values, order = values.sort(1, descending=largest)
        weights = weights.gather(1, order)
        missing = share * weights.sum(1, keepdim=True) - (weights.cumsum(1) - weights)
        weights = weights.minimum(missing.clamp(min=0))
    return (values * weights).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
