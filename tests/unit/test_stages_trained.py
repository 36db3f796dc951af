"""What the stages that train have in common."""

import torch
from torch import nn

from pistoseg.stages.trained import first_weights


def test_the_seed_alone_decides_the_first_weights_and_later_draws_are_left_alone():
    def built(seed):
        with first_weights(seed):
            return nn.Linear(8, 8).weight

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = built(0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(built(0), first)
    assert not torch.equal(built(1), first)
