"""ResNet38d, the encoder of the published CAM and refining networks.

Model A1 of Wu, Shen and van den Hengel (Wider or Deeper, 2016; 38 layers) with dilation instead of its last strides.
Modules carry the names of the published PyTorch weights.
"""

from __future__ import annotations

from torch import Tensor, nn

OUTPUT_STRIDE = 8

# Blocks by name: channels in, between and out, stride, dilation of the first and of the second 3x3 convolution.
_WIDE = {
    "b2": (64, 128, 128, 2, 1, 1),
    "b2_1": (128, 128, 128, 1, 1, 1),
    "b2_2": (128, 128, 128, 1, 1, 1),
    "b3": (128, 256, 256, 2, 1, 1),
    "b3_1": (256, 256, 256, 1, 1, 1),
    "b3_2": (256, 256, 256, 1, 1, 1),
    "b4": (256, 512, 512, 2, 1, 1),
    **{f"b4_{number}": (512, 512, 512, 1, 1, 1) for number in range(1, 6)},
    "b5": (512, 512, 1024, 1, 1, 2),
    "b5_1": (1024, 512, 1024, 1, 2, 2),
    "b5_2": (1024, 512, 1024, 1, 2, 2),
}
_TAPS = {"b3": 128, "b4": 256, "b5": 512, "b6": 1024}
_FROZEN = ("conv1a", "b2", "b2_1", "b2_2")


class ResNet38d(nn.Module):
    """Wide ResNet-38 with output stride 8.

    Its feature maps are what the next block convolves, after that block's batch norm and ReLU, as the published
    networks take them:

        image            3 channels   1/1
        conv2 (b2_2)   128 channels   1/2
        conv3 (b3_2)   256 channels   1/4
        conv4 (b4_5)   512 channels   1/8
        conv5 (b5_2)  1024 channels   1/8
        conv6 (b7)    4096 channels   1/8, after bn7 and ReLU

    Attributes:
        out_channels: channels of these maps.
        output_stride: input px per px of the last map.
        frozen: whether `freeze` was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = [3, *_TAPS.values(), 4096]
        self.output_stride = OUTPUT_STRIDE
        self.frozen = False
        self.conv1a = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        for name, settings in _WIDE.items():
            self.add_module(name, _WideBlock(*settings))
        self.add_module("b6", _Bottleneck(1024, 2048, dilation=4, dropout=0.3))
        self.add_module("b7", _Bottleneck(2048, 4096, dilation=4, dropout=0.5))
        self.bn7 = nn.BatchNorm2d(4096)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of normalised images, (N, 3, H, W) float -> six (N, C, h, w) float maps, finest first."""
        maps = [images]
        x = self.conv1a(images)
        for name in (*_WIDE, "b6", "b7"):
            activated, x = self.get_submodule(name)(x)
            if name in _TAPS:
                maps.append(activated)
        maps.append(self.relu(self.bn7(x)))
        return maps

    def freeze(self) -> None:
        """Fix what the published trainings fix: all batch norms (statistics too), conv1a and b2, b2_1, b2_2.

        ImageNet's statistics are better than those of small batches of few tissues. A network without pretrained
        weights has no such statistics and must not be frozen.
        """
        self.frozen = True
        fixed = [self.get_submodule(name) for name in _FROZEN]
        fixed += [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in fixed:
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> ResNet38d:
        """As for every module, but the batch norms of a frozen network keep their statistics."""
        super().train(mode)
        if self.frozen:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


class _WideBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions; gives its activated input too."""

    def __init__(self, inside: int, between: int, out: int, stride: int, first_dilation: int, dilation: int) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(inside)
        self.conv_branch2a = _conv3x3(inside, between, stride, first_dilation)
        self.bn_branch2b1 = nn.BatchNorm2d(between)
        self.conv_branch2b1 = _conv3x3(between, out, 1, dilation)
        self.changes_shape = inside != out or stride != 1
        if self.changes_shape:
            self.conv_branch1 = nn.Conv2d(inside, out, 1, stride, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        activated = self.relu(self.bn_branch2a(x))
        shortcut = self.conv_branch1(activated) if self.changes_shape else x
        residual = self.conv_branch2a(activated)
        residual = self.conv_branch2b1(self.relu(self.bn_branch2b1(residual)))
        return activated, shortcut + residual


class _Bottleneck(nn.Module):
    """Pre-activation residual block of 1x1, dilated 3x3 and 1x1 convolutions; gives its activated input too."""

    def __init__(self, inside: int, out: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(inside)
        self.conv_branch2a = nn.Conv2d(inside, out // 4, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(out // 4)
        self.conv_branch2b1 = _conv3x3(out // 4, out // 2, 1, dilation)
        self.bn_branch2b2 = nn.BatchNorm2d(out // 2)
        self.conv_branch2b2 = nn.Conv2d(out // 2, out, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(inside, out, 1, bias=False)
        self.dropout = nn.Dropout2d(dropout)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        activated = self.relu(self.bn_branch2a(x))
        residual = self.conv_branch2a(activated)
        residual = self.conv_branch2b1(self.dropout(self.relu(self.bn_branch2b1(residual))))
        residual = self.conv_branch2b2(self.dropout(self.relu(self.bn_branch2b2(residual))))
        return activated, self.conv_branch1(activated) + residual


def _conv3x3(inside: int, out: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(inside, out, 3, stride, padding=dilation, dilation=dilation, bias=False)
