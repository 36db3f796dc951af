import pytest
import torch
from torch import nn

from pistoseg.training.precision import autocast

CPU = torch.device("cpu")


def convolved(bf16, groups=1):
    torch.manual_seed(0)
    with autocast(CPU, bf16):
        return nn.Conv2d(4, 4, 3, groups=groups)(torch.randn(1, 4, 5, 5))


@pytest.mark.parametrize("groups", [1, 4])
def test_bf16_where_it_is_asked_for(groups):
    assert convolved(True, groups).dtype == torch.bfloat16
    assert convolved(False, groups).dtype == torch.float32


@pytest.mark.parametrize("bf16", [True, False])
def test_depthwise_convolutions_have_gradients_of_their_own(bf16):
    assert "_Depthwise" in type(convolved(bf16, groups=4).grad_fn).__name__
    assert "_Depthwise" not in type(convolved(bf16, groups=2).grad_fn).__name__


def test_a_part_that_asks_for_fp32_gets_it():
    with autocast(CPU, True), torch.autocast("cpu", enabled=False):
        assert nn.Conv2d(4, 4, 3, groups=4)(torch.randn(1, 4, 5, 5)).dtype == torch.float32
