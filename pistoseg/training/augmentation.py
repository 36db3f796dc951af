"""Random changes of training images and of what belongs to them, batched on the training device."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pistoseg.classes import IGNORE_ID
from pistoseg.config import AugmentationConfig

# Optical densities of haematoxylin, eosin and DAB (Ruifrok and Johnston 2001); rows are stains.
STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


def augment(batch: dict[str, Tensor], config: AugmentationConfig, seed: int) -> dict[str, Tensor]:
    """Change a batch at random; the same seed gives the same changes, whatever belongs to the images.

    Args:
        batch: `image` (N, H, W, 3) uint8 RGB; and, where present,
            `mask` (N, H, W) uint8 class ids and `regions` (N, H, W) uint8 numbers: pixels that come from outside of the
            image become `IGNORE_ID`; a small region may lose all of its pixels;
            `maps` (N, C, h, w) float on any grid over the image's area, mirrored outside as the image is;
            others, which pass unchanged.
        config: which changes, and how strong.
        seed: of this batch.
    Returns:
        A new batch of the same keys, shapes and types; `maps` are float32.
    """
    generator = torch.Generator().manual_seed(seed)
    images = batch["image"]
    matrix = _geometry(images, config, generator)
    changed = dict(batch)
    for name in {"mask", "regions"} & batch.keys():
        changed[name] = _warp_ids(batch[name], matrix)
    if "maps" in batch:
        changed["maps"] = _warp(batch["maps"].float(), matrix)
    images = _warp(images.permute(0, 3, 1, 2).float(), matrix).permute(0, 2, 3, 1)
    if config.stain:
        images = _stain(images, config.stain, generator)
    if config.brightness:
        images = _brightness(images, config.brightness, generator)
    changed["image"] = images.round().clamp(0, 255).to(torch.uint8)
    return changed


def _geometry(images: Tensor, config: AugmentationConfig, generator: torch.Generator) -> Tensor:
    """Flips, quarter turns, rotation, zoom and crop of (N, H, W, 3) as one matrix (N, 2, 3) for `affine_grid`.

    Its coordinates run from -1 to 1 over each side, so that it moves a grid of any size over the image alike.
    """
    n, height, width, _ = images.shape
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
    return torch.stack(
        [
            torch.stack([cos * flip, -sin / aspect, shift[:, 0]], 1),
            torch.stack([sin * flip * aspect, cos, shift[:, 1]], 1),
        ],
        1,
    ).to(images.device)


def _warp(maps: Tensor, matrix: Tensor) -> Tensor:
    """Sample (N, C, h, w) float bilinearly, mirrored outside."""
    grid = F.affine_grid(matrix, list(maps.shape), align_corners=False)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _warp_ids(ids: Tensor, matrix: Tensor) -> Tensor:
    """Sample (N, H, W) uint8 at the nearest pixels, `IGNORE_ID` outside."""
    # Ids are shifted so that the zero padding of grid_sample means "outside", which is ignored.
    shifted = (ids.float() + 1)[:, None]
    grid = F.affine_grid(matrix, list(shifted.shape), align_corners=False)
    warped = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)[:, 0]
    warped = torch.where(warped == 0, torch.full_like(warped, float(IGNORE_ID)), warped - 1)
    return warped.round().to(torch.uint8)


def _stain(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Scale and shift the amounts of the stains (Tellez et al. 2018)."""
    n = len(images)
    # Inverted on the CPU: a solver on the GPU would have to be waited for.
    stains = F.normalize(STAINS, dim=1)
    unmix, stains = (matrix.to(images.device) for matrix in (torch.linalg.inv(stains), stains))
    gain = (1 + torch.randn(n, 1, 1, 3, generator=generator) * sigma * 3).clamp(0.5, 1.5).to(images.device)
    offset = (torch.randn(n, 1, 1, 3, generator=generator) * sigma).to(images.device)
    density = -torch.log((images + 1) / 256)
    amounts = density @ unmix
    return torch.exp(-((amounts * gain + offset) @ stains)) * 256 - 1


def _brightness(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    n = len(images)
    contrast, brightness = (
        (1 + (2 * torch.rand(n, 1, 1, 1, generator=generator) - 1) * strength).to(images.device) for _ in range(2)
    )
    mean = images.mean(dim=(1, 2), keepdim=True)
    return ((images - mean) * contrast + mean) * brightness
