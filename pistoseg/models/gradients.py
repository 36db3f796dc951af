"""Operations of networks whose gradients take CPUs about as long as what they are gradients of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from pistoseg.models import depthwise


class FastGradients(TorchFunctionMode):
    """A block in which modules on CPUs get fast gradients of three operations; the others stay PyTorch's.

    These are depthwise convolutions (see `depthwise.convolve`), means of feature maps as squeeze and excitation has
    them, and nearest-neighbour upsampling by 2 as decoders have it. The gradients of the last two are PyTorch's to the
    last bit. Its own (torch 2.14.1) lay a channels_last map's mean out as NCHW, to be added up against the order of
    memory, and copy the slices that `torch.cat` gives back: 3 to 5 times as long each, 5 % of a step of UNet++ on
    efficientnet-b0 in bf16.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d and not kwargs and depthwise.is_depthwise(*args):
            return depthwise.convolve(*args)
        if func is F.adaptive_avg_pool2d and not kwargs and _is_mean(*args):
            return _Mean.apply(args[0])
        if func is F.interpolate and len(args) == 1 and _is_doubling(args[0], **kwargs):
            return _Doubled.apply(args[0])
        return func(*args, **kwargs)


def _is_batch(maps: Tensor) -> bool:
    return maps.device.type == "cpu" and maps.dim() == 4


def _is_mean(maps: Tensor, size: Any) -> bool:
    return size == 1 and _is_batch(maps)


def _is_doubling(
    maps: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **others: Any
) -> bool:
    if not _is_batch(maps) or mode != "nearest" or any(others.values()):
        return False
    if size is None:
        return bool(scale_factor == 2)
    height, width = maps.shape[2:]
    return scale_factor is None and isinstance(size, Sequence) and tuple(size) == (2 * height, 2 * width)


class _Mean(torch.autograd.Function):
    """(N, C, H, W) -> (N, C, 1, 1)."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        ctx.shape = maps.shape
        return F.adaptive_avg_pool2d(maps, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient / (ctx.shape[2] * ctx.shape[3])).expand(ctx.shape)


class _Doubled(torch.autograd.Function):
    """(N, C, H, W) -> (N, C, 2H, 2W), each pixel four times."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        return F.interpolate(maps, scale_factor=2.0, mode="nearest")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return F.avg_pool2d(gradient, 2, divisor_override=1)
