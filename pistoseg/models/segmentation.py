"""The segmentation network: an encoder and decoder of segmentation-models-pytorch that takes images of any size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pistoseg.errors import PistoSegError
from pistoseg.models import encoders
from pistoseg.models.scse import ScSE

ATTENTION_ARCHITECTURES = ("unet", "unetplusplus")
"""Architectures whose decoder takes scSE attention; the others have none."""


@dataclass(frozen=True)
class Normalization:
    """How pixel values reach the network: (value / 255 - mean) / std.

    Args:
        mean: of R, G, B on a 0-1 scale.
        std: of R, G, B on a 0-1 scale.
    """

    mean: tuple[float, ...] = encoders.IMAGENET_MEAN
    std: tuple[float, ...] = encoders.IMAGENET_STD

    def __call__(self, images: Tensor | NDArray[np.uint8], device: torch.device | str | None = None) -> Tensor:
        """Normalise images on a device; bytes travel there, floats are made there.

        Args:
            images: (N, H, W, 3) uint8.
            device: where the result lives; the images' own by default.
        Returns:
            (N, 3, H, W) float32, channels_last.
        """
        pixels = torch.as_tensor(images)
        if device is not None:
            pixels = pixels.to(device, non_blocking=True)
        mean = torch.tensor(self.mean, device=pixels.device) * 255
        std = torch.tensor(self.std, device=pixels.device) * 255
        return ((pixels.float() - mean) / std).permute(0, 3, 1, 2)


def normalize(images: Tensor | NDArray[np.uint8], normalization: Normalization) -> Tensor:
    """Normalise (N, H, W, 3) uint8 images to (N, 3, H, W) float32 on the device that they are on."""
    return normalization(images)


class SegmentationNetwork(nn.Module):
    """An smp network with what is needed to use and rebuild it.

    Attributes:
        normalization: what its input went through.
        architecture, encoder_name, decoder_attention, n_classes: the arguments of `build`.
    """

    def __init__(
        self,
        network: nn.Module,
        normalization: Normalization,
        architecture: str,
        encoder_name: str,
        decoder_attention: str | None,
        n_classes: int,
    ) -> None:
        super().__init__()
        self.network = network
        self.normalization = normalization
        self.architecture = architecture
        self.encoder_name = encoder_name
        self.decoder_attention = decoder_attention
        self.n_classes = n_classes
        stride = int(network.encoder.output_stride)  # type: ignore[union-attr, arg-type]
        self.multiple = max(32, stride)
        self.minimum = 8 * stride if architecture == "pan" else 1  # PAN halves its last feature map three times

    @property
    def encoder(self) -> nn.Module:
        """The part that pretrained weights are for."""
        encoder: nn.Module = self.network.encoder  # type: ignore[assignment]
        return encoder

    def forward(self, images: Tensor) -> Tensor:
        """Class logits of normalised images, (N, 3, H, W) float -> (N, L, H, W) float, for any H and W."""
        height, width = images.shape[-2:]
        logits: Tensor = self.network(pad(images, self.multiple, self.minimum))
        return logits[..., :height, :width]


def pad(images: Tensor, multiple: int, minimum: int = 1) -> Tensor:
    """Extend images at the bottom and right, by reflection, or by the edge where they are too small for that.

    Args:
        images: (N, C, H, W) float.
        multiple: of which the new height and width are.
        minimum: of the new height and width (px).
    """
    height, width = images.shape[-2:]
    down, right = (max(minimum, side) - side for side in (height, width))
    down, right = down + -(height + down) % multiple, right + -(width + right) % multiple
    if not down and not right:
        return images
    mode = "reflect" if down < height and right < width else "replicate"
    return F.pad(images, (0, right, 0, down), mode=mode)


def build(
    architecture: str,
    encoder: str,
    n_classes: int,
    weights: str | None = "imagenet",
    decoder_attention: str | None = "scse",
) -> SegmentationNetwork:
    """Build a segmentation network.

    Args:
        architecture: `unetplusplus` (the paper's), `unet`, `fpn`, `deeplabv3plus`, `manet` or another one of smp.
        encoder: smp name, or `tu-` and a timm name.
        n_classes: L tissue classes; the background is no class.
        weights: of the encoder: `imagenet`, `none` or None, or a path or URI of a weights file.
        decoder_attention: `scse` or None; acts in `unet` and `unetplusplus`, the others have no such attention.
    Returns:
        A network from (N, 3, H, W) normalised RGB to (N, L, H, W) logits.
    """
    import segmentation_models_pytorch as smp

    known = smp.MODEL_ARCHITECTURES_MAPPING
    if architecture not in known:
        raise PistoSegError(
            f"there is no architecture {architecture!r}",
            field="architecture",
            remedy=f"use one of {', '.join(sorted(known))}",
        )
    attention = decoder_attention if architecture in ATTENTION_ARCHITECTURES else None
    options = {"decoder_attention_type": attention} if attention else {}
    try:
        network = smp.create_model(architecture, encoder, encoder_weights=None, classes=n_classes, **options)
    except encoders.BUILDING_ERRORS as error:
        raise encoders.unknown_encoder(encoder, error) from error
    if any(parameter.numel() == 0 for parameter in network.parameters()):
        raise PistoSegError(
            f"the stages of encoder {encoder!r} are too thin for {architecture}"
            + (" with scSE attention" if attention else ""),
            field="encoder",
            remedy="set decoder_attention to null, or use a wider encoder or another architecture",
        )
    if attention:
        for module in network.modules():
            if isinstance(module, smp.base.Attention):
                module.attention = ScSE(module.attention)
    encoders.load_weights(network.encoder, encoder, weights)
    mean, std = encoders.normalization(encoder, weights)
    return SegmentationNetwork(network, Normalization(mean, std), architecture, encoder, attention, n_classes)
