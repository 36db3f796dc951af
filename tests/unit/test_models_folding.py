"""Folding batch norms: the same output from a network without them, and nothing where it would not be the same."""

import copy

import pytest
import torch
from torch import nn

from pistoseg.models import segmentation
from pistoseg.models.folding import fold_batch_norms


def trained(network):
    """Statistics and weights as training leaves them, in evaluation mode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return network.eval()


def norms(network):
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize(
    ("architecture", "encoder", "left"),
    [
        ("unet", "tu-tf_efficientnet_lite0", 0),
        ("unetplusplus", "resnet18", 0),
        ("deeplabv3plus", "tu-mobilenetv3_small_050", 0),
        ("fpn", "resnet18", 0),
        ("unetplusplus", "efficientnet-b0", 1),  # the encoder computes its last norm for nobody
    ],
)
def test_the_output_stays_and_the_norms_go(architecture, encoder, left):
    network = trained(segmentation.build(architecture, encoder, 3, None))
    before = copy.deepcopy(network.state_dict())
    folded = fold_batch_norms(network)
    images = torch.randn(2, 3, 96, 64)
    with torch.inference_mode():
        expected = network(images)
        error = (folded(images) - expected).abs().max() / expected.abs().max()
    assert error < 1e-3
    assert norms(network) > 0
    assert norms(folded) == left
    assert not folded.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


class Branched(nn.Module):
    """A convolution that feeds more than its norm."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, images):
        maps = self.convolution(images)
        return maps + self.norm(maps)


class Twice(nn.Module):
    """A convolution with two norms."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, images):
        return self.second(self.convolution(self.first(self.convolution(images))))


class NormFirst(nn.Module):
    """A norm before its convolution."""

    def __init__(self):
        super().__init__()
        self.norm, self.convolution = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)

    def forward(self, images):
        return self.convolution(self.norm(images).relu())


@pytest.mark.parametrize("kind", [Branched, Twice, NormFirst])
def test_what_can_not_be_folded_stays(kind):
    network = trained(kind())
    folded = fold_batch_norms(network)
    assert norms(folded) == norms(network)
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(folded(images), network(images))


def test_a_network_without_norms_is_left_alone():
    network = nn.Conv2d(3, 2, 1)
    assert fold_batch_norms(network) is network
