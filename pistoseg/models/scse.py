"""Attention by spatial and channel squeeze and excitation (scSE), with few passes over memory on CPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ScSE(nn.Module):
    """Features scaled by what their channel and their pixel are worth: y = x c + x s.

    c = sigmoid(W2 relu(W1 mean(x) + b1) + b2) is one value a channel of an image, s = sigmoid(w x + b) one a pixel
    (Roy et al., MICCAI 2018). On a CPU that is little to compute and much to fetch: written out, it takes UNet++ a
    third of a training step. There channels_last features are scaled by a function with a gradient of its own.

    Args:
        attention: smp's module of the same; its parameters become this one's, by the same names.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.cSE, self.sSE = attention.cSE, attention.sSE

    def forward(self, features: Tensor) -> Tensor:
        """Scale (N, C, H, W) float features."""
        if features.device.type != "cpu" or not features.is_contiguous(memory_format=torch.channels_last):
            scaled: Tensor = features * self.cSE(features) + features * self.sSE(features)
            return scaled
        layers = (self.cSE[1], self.cSE[3], self.sSE[0])
        weights = [tensor for layer in layers for tensor in (layer.weight.flatten(1), layer.bias)]
        with torch.autocast("cpu", enabled=False):  # maps in the precision that they are in, sums in fp32
            scaled = _Scaled.apply(features.permute(0, 2, 3, 1), *weights).permute(0, 3, 1, 2)
        return scaled


class _Scaled(torch.autograd.Function):
    """y = x (c + s) of (N, H, W, C) maps, with the gradient g (c + s) + w ds + dm / (H W), for g that of y.

    ds is the gradient of a pixel's w x + b, dm that of an image's mean(x). Left to autograd, the three terms are maps
    of full size, to be added up. Sums over pixels, and the two sums of outer products, are matrix products: in bf16
    oneDNN makes these faster than PyTorch adds and broadcasts.
    """

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, w: Tensor, b: Tensor
    ) -> Tensor:
        n, height, width, channels = maps.shape
        means = _sum(maps, maps.new_ones(n, height, width)) / (height * width)
        hidden = F.linear(means, weight1, bias1).relu()
        c = F.linear(hidden, weight2, bias2).sigmoid()
        s = F.linear(maps.view(n, -1, channels), w.to(maps.dtype), b.to(maps.dtype)).sigmoid()
        ctx.save_for_backward(maps, means, hidden, c, s, weight1, weight2, w)
        return torch.bmm(*_outer(s, torch.ones_like(c), c)).view_as(maps).mul_(maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        maps, means, hidden, c, s, weight1, weight2, w = ctx.saved_tensors
        n, height, width, channels = maps.shape
        gradient = gradient.contiguous()
        product = gradient * maps
        # By what went into the sigmoids and into relu:
        dc = _sum(product, maps.new_ones(n, height, width)) * c * (1 - c)
        dhidden = (dc @ weight2) * (hidden > 0)
        dmeans = dhidden @ weight1
        worth = s.to(w.dtype)
        ds = (product.view(n, -1, channels) @ maps.new_ones(channels, 1)) * worth * (1 - worth)
        dw = _sum(maps, ds.to(maps.dtype).view(n, height, width)).sum(0, keepdim=True)
        dmaps = torch.bmm(*_outer(s, torch.ones_like(c), c)).view_as(maps).mul_(gradient)
        dmaps.view(n, -1, channels).baddbmm_(*_outer(ds.to(maps.dtype), w.expand_as(c), dmeans / (height * width)))
        return dmaps, dhidden.T @ means, dhidden.sum(0), dc.T @ hidden, dc.sum(0), dw, ds.sum().view(1)


def _sum(maps: Tensor, weights: Tensor) -> Tensor:
    """Sum over the pixels of (N, H, W, C) maps, weighted by (N, H, W): (N, C) of float32, or what is wider."""
    n, height, width, channels = maps.shape
    rows = torch.bmm(weights.view(-1, 1, width), maps.view(-1, width, channels))
    return rows.view(n, height, channels).sum(1, dtype=torch.promote_types(maps.dtype, torch.float32))


def _outer(pixels: Tensor, factors: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices an image whose product is, for each pixel and channel, pixel times factor plus offset.

    Args:
        pixels: (N, P, 1) float.
        factors, offsets: (N, C).
    Returns:
        (N, P, 2) and (N, 2, C) of the pixels' type.
    """
    ones = torch.ones_like(pixels)
    return torch.cat((pixels, ones), -1), torch.stack((factors, offsets), 1).to(pixels.dtype)
