"""Depthwise convolutions whose gradients take CPUs about as long as what they are gradients of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight

WIDTH = 3
"""Of the widest kernels of whose weights oneDNN has a gradient for depthwise convolutions, px."""


def convolve(images: Tensor, *others: Any) -> Tensor:
    """A depthwise convolution, with all arguments of `torch.conv2d`, in the precision that autocast asks for.

    For two kinds of gradients oneDNN takes its kernels for groups of channels (torch 2.14.1, AVX512 and AMX): those by
    the weights of kernels that are wider than 3 px, which take 8 to 12 times as long as the output in fp32 and 37 to 50
    times in bf16, and in bf16 those by the images of strided convolutions, which take 33 to 50 times as long.
    EfficientNets have both: with PyTorch's, a step of UNet++ on efficientnet-b0 in bf16 takes 1.2 times as long.
    """
    if torch.is_autocast_enabled("cpu"):
        images = images.to(torch.get_autocast_dtype("cpu"))
    with torch.autocast("cpu", enabled=False):
        convolved: Tensor = _Depthwise.apply(images, *others)
    return convolved


def is_depthwise(images: Tensor, weight: Tensor, *others: Any) -> bool:
    """Whether each channel has one kernel, in a call as modules make it: with all arguments, and pairs of numbers."""
    if len(others) != 5 or images.device.type != "cpu" or images.dim() != 4:
        return False
    *pairs, groups = others[1:]
    if any(isinstance(pair, (int, str)) for pair in pairs):
        return False
    return 1 < groups == weight.shape[0] == images.shape[1]


class _Options(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


class _Depthwise(torch.autograd.Function):
    """A convolution of (N, C, H, W) with (C, 1, kh, kw), in the precision of the images."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.options = _Options(*options)
        return F.conv2d(images, weight.to(images.dtype), None if bias is None else bias.to(images.dtype), *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        by_images = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_images = _by_images(images, weight, gradient, ctx.options)
        if ctx.needs_input_grad[1]:
            by_weight = _by_weight(images, weight, gradient, ctx.options)
        if ctx.needs_input_grad[2]:
            by_bias = gradient.sum((0, 2, 3), dtype=weight.dtype)
        return by_images, by_weight, by_bias, None, None, None, None


def _by_images(images: Tensor, weight: Tensor, gradient: Tensor, options: _Options) -> Tensor:
    """The gradient by the images, (N, C, H, W); of a strided convolution it is computed in the weights' precision."""
    stride, padding, dilation, groups = options
    dtype = gradient.dtype if max(stride) == 1 else weight.dtype
    unseen = [  # rows and columns at the end that a stride does not reach
        images.shape[axis + 2]
        - (gradient.shape[axis + 2] - 1) * stride[axis]
        + 2 * padding[axis]
        - dilation[axis] * (weight.shape[axis + 2] - 1)
        - 1
        for axis in (0, 1)
    ]
    by_images = F.conv_transpose2d(
        gradient.to(dtype), weight.to(dtype), None, stride, padding, unseen, groups, dilation
    )
    return by_images.to(images.dtype)


def _by_weight(images: Tensor, weight: Tensor, gradient: Tensor, options: _Options) -> Tensor:
    """The gradient by the weights, (C, 1, kh, kw), a few columns of the kernels at a time.

    Columns x to x + 2 of a kernel see of the images what a kernel of three columns sees whose first is at x.
    """
    stride, padding, dilation, groups = options
    width = weight.shape[3]
    if width <= WIDTH or dilation[1] != 1:
        whole = conv2d_weight(images, weight.shape, gradient, stride, padding, dilation, groups)
        return whole.to(weight.dtype)
    images = F.pad(images, (padding[1], padding[1]))
    seen = (gradient.shape[3] - 1) * stride[1] + WIDTH
    by_weight = torch.empty_like(weight)
    for x in (*range(0, width - WIDTH, WIDTH), width - WIDTH):
        part = images[..., x : x + seen].contiguous(memory_format=torch.channels_last)
        shape = (*weight.shape[:3], WIDTH)
        columns = conv2d_weight(part, shape, gradient, stride, (padding[0], 0), dilation, groups)
        by_weight[..., x : x + WIDTH] = columns
    return by_weight
