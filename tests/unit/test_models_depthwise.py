import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pistoseg.models.gradients import FastGradients

CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 5, "padding": 2},
    {"kernel_size": 5, "stride": 2, "padding": 1},
    {"kernel_size": 4, "padding": 1},
    {"kernel_size": 7, "stride": 3, "padding": 3},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2)},
    {"kernel_size": (5, 2), "stride": (1, 2), "padding": (3, 1)},
    {"kernel_size": 5, "dilation": 2, "padding": 4},
    {"kernel_size": 5, "dilation": (2, 1), "bias": True},
    {"kernel_size": 1},
]


def module(channels=6, **options):
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels, groups=channels, **{"bias": False, **options})


def images(channels=6):
    generator = torch.Generator().manual_seed(1)
    made = torch.randn(2, channels, 17, 14, generator=generator)
    return made.to(memory_format=torch.channels_last).requires_grad_()


def results(convolution, given, mixed=False):
    """Output, gradient by the images and gradients by the parameters."""
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        output = convolution(given)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weights).sum().backward()
    found = [output.detach(), given.grad, *(parameter.grad for parameter in convolution.parameters())]
    for parameter in convolution.parameters():
        parameter.grad = None
    given.grad = None
    return found


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_gradients_are_those_of_pytorch(options):
    convolution, given = module(**options), images()
    expected = results(convolution, given)
    with FastGradients():
        found = results(convolution, given)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_in_bf16_they_are_as_close_to_fp32_as_those_of_pytorch(options):
    convolution, given = module(**options), images()
    exact, theirs = results(convolution, given), results(convolution, given, mixed=True)
    with FastGradients():
        ours = results(convolution, given, mixed=True)
    assert [found.dtype for found in ours] == [found.dtype for found in theirs]
    assert torch.equal(ours[0], theirs[0])
    for found, expected, of in zip(ours, theirs, exact, strict=True):
        assert (found - of).norm() <= 1.1 * (expected - of).norm() + 1e-6 * of.norm()


def test_memory_format_stays():
    given = images()
    with FastGradients():
        output = module(kernel_size=5, stride=2)(given)
    output.sum().backward()
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert given.grad.is_contiguous(memory_format=torch.channels_last)


def test_what_is_frozen_gets_no_gradient():
    convolution, given = module(kernel_size=5), images()
    with FastGradients():
        convolution.requires_grad_(False)(given).sum().backward()
        assert convolution.weight.grad is None
        assert given.grad is not None
        convolution.requires_grad_(True)(given.detach()).sum().backward()
    assert convolution.weight.grad is not None


@pytest.mark.parametrize(
    "call",
    [
        lambda: nn.Conv2d(4, 8, 3)(torch.ones(1, 4, 9, 9)),
        lambda: nn.Conv2d(4, 4, 3, groups=2)(torch.ones(1, 4, 9, 9)),
        lambda: nn.Conv2d(4, 8, 3, groups=4)(torch.ones(1, 4, 9, 9)),
        lambda: nn.Conv2d(1, 4, 3)(torch.ones(1, 1, 9, 9)),
        lambda: nn.Conv2d(4, 4, 3, groups=4, padding="same")(torch.ones(1, 4, 9, 9)),
        lambda: nn.Conv2d(4, 4, 3, groups=4)(torch.ones(4, 9, 9)),
        lambda: F.conv2d(torch.ones(1, 4, 9, 9), torch.ones(4, 1, 3, 3), groups=4),
    ],
    ids=["dense", "groups", "more outputs", "grey", "same", "one image", "keywords"],
)
def test_other_convolutions_are_left_to_pytorch(call):
    with FastGradients():
        output = call()
    assert torch.isfinite(output).all()
    assert "_DepthwiseBackward" not in type(output.grad_fn).__name__
