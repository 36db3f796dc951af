"""Random changes of training images and their masks, batched on the training device."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pistoseg.classes import IGNORE_ID
from pistoseg.config import AugmentationConfig

# Optical densities of haematoxylin, eosin and DAB (Ruifrok and Johnston 2001); rows are stains.
STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def augment(images: Tensor, masks: Tensor, config: AugmentationConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Change a batch at random; the same seed gives the same changes.

    Args:
        images: (N, H, W, 3) uint8 RGB.
        masks: (N, H, W) uint8 class ids; pixels that come from outside of the image become `IGNORE_ID`.
        config: which changes, and how strong.
        seed: of this batch.
    Returns:
        images (N, H, W, 3) uint8 and masks (N, H, W) uint8.
    """
    generator = torch.Generator().manual_seed(seed)
    images, masks = _warp(images, masks, config, generator)
    if config.stain:
        images = _stain(images, config.stain, generator)
    if config.brightness:
        images = _brightness(images, config.brightness, generator)
    return images.round().clamp(0, 255).to(torch.uint8), masks


def _warp(
    images: Tensor, masks: Tensor, config: AugmentationConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Flips, quarter turns, rotation, zoom and crop as one sampling of each image."""
    n, height, width, _ = images.shape
    channels_first = images.permute(0, 3, 1, 2).float()
    uniform = torch.rand(n, 8, generator=generator)
    chosen = (uniform[:, 0] < config.probability).float()
    angle = (2 * uniform[:, 1] - 1) * math.radians(config.rotate) * chosen
    zoom = 1 + (2 * uniform[:, 2] - 1) * config.scale * chosen
    crop = config.crop_scale + (1 - config.crop_scale) * uniform[:, 3]
    flip = torch.ones(n)
    if config.flip:
        flip = torch.where(uniform[:, 4] < 0.5, -1.0, 1.0)
        if height == width:
            angle = angle + torch.floor(uniform[:, 5] * 4) * (math.pi / 2)
        else:
            angle = angle + (uniform[:, 5] < 0.5).float() * math.pi
    shrink = crop / zoom
    cos, sin = torch.cos(angle) * shrink, torch.sin(angle) * shrink
    aspect = width / height
    shift = (2 * uniform[:, 6:8] - 1) * (1 - crop)[:, None]
    matrix = torch.stack(
        [
            torch.stack([cos * flip, -sin / aspect, shift[:, 0]], 1),
            torch.stack([sin * flip * aspect, cos, shift[:, 1]], 1),
        ],
        1,
    ).to(images.device)
    grid = F.affine_grid(matrix, [n, 3, height, width], align_corners=False)
    warped = F.grid_sample(channels_first, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    # Ids are shifted so that the zero padding of grid_sample means "outside", which is ignored.
    shifted = (masks.float() + 1)[:, None]
    labels = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)[:, 0]
    labels = torch.where(labels == 0, torch.full_like(labels, float(IGNORE_ID)), labels - 1)
    return warped.permute(0, 2, 3, 1), labels.round().to(torch.uint8)


def _stain(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Scale and shift the amounts of the stains (Tellez et al. 2018)."""
    n = len(images)
    stains = F.normalize(STAINS, dim=1).to(images.device)
    gain = (1 + torch.randn(n, 1, 1, 3, generator=generator) * sigma * 3).clamp(0.5, 1.5).to(images.device)
    offset = (torch.randn(n, 1, 1, 3, generator=generator) * sigma).to(images.device)
    density = -torch.log((images + 1) / 256)
    amounts = density @ torch.linalg.inv(stains)
    return torch.exp(-((amounts * gain + offset) @ stains)) * 256 - 1


def _brightness(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    n = len(images)
    contrast, brightness = (
        (1 + (2 * torch.rand(n, 1, 1, 1, generator=generator) - 1) * strength).to(images.device) for _ in range(2)
    )
    mean = images.mean(dim=(1, 2), keepdim=True)
    return ((images - mean) * contrast + mean) * brightness
