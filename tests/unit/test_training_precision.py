import pytest
import torch
import torch.nn.functional as F

from pistoseg.training.precision import autocast

CPU = torch.device("cpu")


def gradients(channels: int, groups: int, mixed: bool) -> list[torch.Tensor]:
    """Output of a convolution and its gradients by weight and input, for numbers that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    images, weight = (
        torch.randn(shape, generator=generator).bfloat16().float().requires_grad_()
        for shape in ((2, channels, 9, 9), (channels, channels // groups, 3, 3))
    )
    with autocast(CPU, mixed):
        output = F.conv2d(images, weight, padding=1, groups=groups)
    output.sum().backward()
    return [output.detach(), weight.grad, images.grad]


def test_depthwise_convolutions_are_computed_in_fp32_and_passed_on_in_bf16():
    output, by_weight, by_images = gradients(8, 8, mixed=True)
    exact = gradients(8, 8, mixed=False)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, exact[0].bfloat16())
    assert torch.equal(by_weight, exact[1])
    assert torch.equal(by_images, exact[2])


@pytest.mark.parametrize("groups", [1, 2])
def test_other_convolutions_are_in_bf16(groups):
    output, by_weight, _ = gradients(8, groups, mixed=True)
    exact = gradients(8, groups, mixed=False)
    assert output.dtype == torch.bfloat16
    assert not torch.equal(by_weight, exact[1])
    assert torch.allclose(by_weight, exact[1], rtol=0.02, atol=0.5)


def test_without_bf16_all_is_in_fp32():
    assert gradients(8, 1, mixed=False)[0].dtype == torch.float32


def test_a_part_that_asks_for_fp32_gets_it():
    with autocast(CPU, True), torch.autocast("cpu", enabled=False):
        assert F.conv2d(torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3), groups=4).dtype == torch.float32


def test_a_convolution_with_keyword_arguments_is_computed():
    images, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
    with autocast(CPU, True):
        named = torch.conv2d(input=images, weight=weight, groups=4)
        placed = torch.conv2d(images, weight, groups=4)
    torch.testing.assert_close(named, placed, rtol=0.05, atol=0.05)


def test_a_convolution_of_grey_images_is_not_depthwise():
    with autocast(CPU, True):
        output = F.conv2d(torch.ones(1, 1, 3, 3), torch.full((4, 1, 1, 1), 1.001))
    assert output.unique().item() == 1.0  # what bf16 makes of 1.001
