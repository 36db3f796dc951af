import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pistoseg.models.gradients import FastGradients


def squeezed(maps):
    return maps * F.adaptive_avg_pool2d(maps, 1).sigmoid()


def joined(maps):
    return torch.cat([F.interpolate(maps, scale_factor=2.0, mode="nearest"), torch.ones(2, 3, 14, 10)], 1)


def sized(maps):
    return F.interpolate(maps, size=(14, 10), mode="nearest")


def gradient(call, maps):
    output = call(maps)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    (found,) = torch.autograd.grad((output * weights).sum(), maps)
    return output, found


@pytest.mark.parametrize(
    "call", [squeezed, joined, sized, nn.UpsamplingNearest2d(scale_factor=2), nn.AdaptiveAvgPool2d(1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
def test_values_and_gradients_are_those_of_pytorch(call, dtype, form):
    maps = torch.randn(2, 6, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype, memory_format=form)
    output, expected = gradient(call, maps.requires_grad_())
    with FastGradients():
        ours, found = gradient(call, maps)
    assert "_Mean" in names(ours) or "_Doubled" in names(ours)
    assert torch.equal(ours, output)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride() or call is not squeezed


def names(output):
    """What autograd calls the operations that made a tensor."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        seen.add(type(node).__name__.removesuffix("Backward"))
        waiting += [below for below, _ in node.next_functions if below is not None]
    return seen


@pytest.mark.parametrize(
    "call",
    [
        lambda maps: F.adaptive_avg_pool2d(maps, 2),
        lambda maps: F.adaptive_avg_pool2d(maps, (1, 1)),
        lambda maps: F.adaptive_avg_pool2d(maps[0], 1),
        lambda maps: F.interpolate(maps, scale_factor=3.0, mode="nearest"),
        lambda maps: F.interpolate(maps, scale_factor=(2.0, 1.0), mode="nearest"),
        lambda maps: F.interpolate(maps, size=(14, 11), mode="nearest"),
        lambda maps: F.interpolate(maps, size=14, mode="nearest"),
        lambda maps: F.interpolate(maps, scale_factor=2.0, mode="bilinear", align_corners=True),
        lambda maps: F.interpolate(maps[0], scale_factor=2.0),
    ],
    ids=["2x2", "pair", "one image", "by 3", "by 2 and 1", "to a size", "to a square", "bilinear", "one row"],
)
def test_other_operations_are_left_to_pytorch(call):
    maps = torch.randn(2, 6, 7, 5, requires_grad=True)
    with FastGradients():
        output = call(maps)
    assert not {"_Mean", "_Doubled"} & names(output)
    output.sum().backward()
    assert torch.isfinite(maps.grad).all()
