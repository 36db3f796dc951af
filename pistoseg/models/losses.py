"""Losses of segmentation networks, as pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("bce", "dice", "bce+dice")


def segmentation_loss(logits: Tensor, target: Tensor, kind: str, n_classes: int) -> Tensor:
    """The loss of a segmentation network; pixels without a class do not count.

    Args:
        logits: (N, L, H, W) float.
        target: (N, H, W) uint8 or int64 class ids; values of n_classes and above (background, 255) are ignored.
        kind: `bce` (the paper's), `dice`, or `bce+dice`, their sum.
        n_classes: L.
    Returns:
        () float32; 0 with a gradient of 0 when every pixel is ignored.
    """
    if kind == "bce":
        return bce_loss(logits, target, n_classes)
    if kind == "dice":
        return dice_loss(logits, target, n_classes)
    if kind == "bce+dice":
        return bce_loss(logits, target, n_classes) + dice_loss(logits, target, n_classes)
    raise ValueError(f"unknown loss {kind!r}; use one of {', '.join(KINDS)}")


def bce_loss(logits: Tensor, target: Tensor, n_classes: int) -> Tensor:
    """Binary cross-entropy of every class against the one-hot mask.

        L = -1 / (|V| L) sum_{p in V} sum_c [ y_pc log s(x_pc) + (1 - y_pc) log(1 - s(x_pc)) ]

    with V the pixels that have a class, x the logits, s the sigmoid and y the one-hot mask. Arguments as in
    `segmentation_loss`.
    """
    valid, one_hot = _one_hot(target, n_classes)
    loss = F.binary_cross_entropy_with_logits(logits.float(), one_hot, reduction="none")
    return (loss * valid).sum() / (valid.sum() * n_classes).clamp(min=1)


def dice_loss(logits: Tensor, target: Tensor, n_classes: int) -> Tensor:
    """Multi-class soft Dice over the whole batch.

        L = 1 - 1 / |C| sum_{c in C} 2 sum_{p in V} q_pc y_pc / sum_{p in V} (q_pc + y_pc)

    with V the pixels that have a class, q the softmax of the logits, y the one-hot mask, and C the classes that occur
    in the mask. Arguments as in `segmentation_loss`.
    """
    valid, one_hot = _one_hot(target, n_classes)
    probabilities = logits.float().softmax(1) * valid
    axes = (0, 2, 3)
    amount = one_hot.sum(axes)
    overlap = (probabilities * one_hot).sum(axes)
    dice = 2 * overlap / (probabilities.sum(axes) + amount).clamp(min=1e-7)
    present = (amount > 0).float()
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)


def _one_hot(target: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """Valid pixels (N, 1, H, W) and the one-hot mask (N, L, H, W), both float32, both 0 at ignored pixels."""
    ids = torch.arange(n_classes, device=target.device, dtype=torch.int64).view(1, -1, 1, 1)
    one_hot = (target.long().unsqueeze(1) == ids).float()
    return one_hot.sum(1, keepdim=True), one_hot
