"""The precision that a training step computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from pistoseg.models.gradients import FastGradients


@contextmanager
def autocast(device: torch.device, bf16: bool) -> Iterator[None]:
    """A block whose forward passes are in bf16 where that is fast and safe, their gradients with them.

    Args:
        device: where the network is.
        bf16: whether the hardware is good at it; without, all stays in fp32.
    """
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        FastGradients() if device.type == "cpu" else nullcontext(),
    ):
        yield
