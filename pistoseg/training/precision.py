"""The precision that a training step computes in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def autocast(device: torch.device, bf16: bool) -> Iterator[None]:
    """A block whose forward passes are in bf16 where that is fast and safe, their gradients with them.

    Args:
        device: where the network is.
        bf16: whether the hardware is good at it; without, all stays in fp32.
    """
    slow_in_bf16 = bf16 and device.type == "cpu"
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        _DepthwiseInFp32() if slow_in_bf16 else nullcontext(),
    ):
        yield


class _DepthwiseInFp32(TorchFunctionMode):
    """Keeps autocast from depthwise convolutions.

    On CPUs the gradient of those that are 5 x 5 or strided takes oneDNN 4 to 10 times as long in bf16 as in fp32, and
    that of the others a fifth longer (torch 2.14.1, AMX): a fifth of a step of UNet++ on efficientnet-b0. Their output
    is as fast in either.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # Keyword arguments for images or weights are left to autocast: right as well, if slower.
        if func is not torch.conv2d or not torch.is_autocast_enabled("cpu") or len(args) < 2:
            return func(*args, **kwargs)
        images, weight, *others = args
        if not (weight.shape[1] == 1 and images.shape[-3] > 1):  # of which each channel has kernels of its own
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            maps = func(images.float(), weight, *others, **kwargs)
        return maps.to(torch.get_autocast_dtype("cpu"))
