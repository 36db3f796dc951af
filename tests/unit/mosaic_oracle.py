"""The paper's text on splicing and Mosaic, step by step on whole images: slow, and easy to check by eye.

Two uses: `draw` makes mosaics with random numbers of its own, to compare distributions; `compose` repeats a mosaic that
PistoSeg drew, to compare pixels.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import cv2
import numpy as np


@dataclass
class Tissue:
    """A single-tissue image, its mask with background, and its class."""

    image: np.ndarray
    mask: np.ndarray
    label: int


@dataclass
class Facts:
    """What was drawn for one mosaic."""

    anchor: tuple[int, int]
    crops: list[tuple[int, int, int]]  # image, top, left


def draw(tissues, config, background_id, rng: random.Random):
    """One mosaic: image, mask, facts."""
    crops: list[tuple[int, int, int]] = []
    spliced = [splice(tissues, config, background_id, rng, crops) for _ in range(4)]
    transformed = [transform(image, mask, config, rng) for image, mask in spliced]
    anchor_y = rng.randint(int(np.ceil(config.alpha * config.height)), int(np.floor(config.beta * config.height)))
    anchor_x = rng.randint(int(np.ceil(config.alpha * config.width)), int(np.floor(config.beta * config.width)))
    pieces = []
    for (image, mask), (height, width) in zip(transformed, quadrant_sizes(anchor_y, anchor_x, config), strict=True):
        top, left = rng.randint(0, config.height - height), rng.randint(0, config.width - width)
        pieces.append((image[top : top + height, left : left + width], mask[top : top + height, left : left + width]))
    return (
        corners([piece[0] for piece in pieces]),
        corners([piece[1] for piece in pieces]),
        Facts((anchor_y, anchor_x), crops),
    )


def splice(tissues, config, background_id, rng, crops):
    """n_h x n_w single-tissue images, each cropped to H_p x W_p, gridded in raster order."""
    rows = []
    for _ in range(config.n_h):
        row = [crop(tissues, config, background_id, rng, crops) for _ in range(config.n_w)]
        rows.append((np.hstack([image for image, _ in row]), np.hstack([mask for _, mask in row])))
    return np.vstack([image for image, _ in rows]), np.vstack([mask for _, mask in rows])


def crop(tissues, config, background_id, rng, crops):
    """A random crop of a random image, redrawn while it is mostly background."""
    label = None
    for _ in range(1 + config.max_redraws):
        if config.class_sampling == "natural":
            chosen = rng.randrange(len(tissues))
        else:
            if label is None:
                label = rng.choice(sorted({tissue.label for tissue in tissues}))
            chosen = rng.choice([i for i, tissue in enumerate(tissues) if tissue.label == label])
        image, mask = tissues[chosen].image, tissues[chosen].mask
        top = rng.randint(0, image.shape[0] - config.crop_height)
        left = rng.randint(0, image.shape[1] - config.crop_width)
        place = np.s_[top : top + config.crop_height, left : left + config.crop_width]
        if np.mean(mask[place] == background_id) <= config.background_threshold:
            break
    crops.append((chosen, top, left))
    return image[place], mask[place]


def transform(image, mask, config, rng):
    """Random flips, then random rotation, scaling and shift."""
    if rng.random() < config.flip:
        image, mask = image[::-1], mask[::-1]
    if rng.random() < config.flip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    image, mask = np.ascontiguousarray(image), np.ascontiguousarray(mask)
    if rng.random() < config.transform_probability:
        height, width = mask.shape
        centre = ((width - 1) / 2, (height - 1) / 2)
        angle = rng.uniform(-config.rotate, config.rotate)
        scale = rng.uniform(1 - config.scale, 1 + config.scale)
        matrix = cv2.getRotationMatrix2D(centre, angle, scale)
        matrix[0, 2] += rng.uniform(-config.shift, config.shift) * width
        matrix[1, 2] += rng.uniform(-config.shift, config.shift) * height
        image = cv2.warpAffine(
            image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        )
        mask = cv2.warpAffine(mask, matrix, (width, height), flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)
    return image, mask


def quadrant_sizes(anchor_y, anchor_x, config):
    """Height and width of I1'' to I4''."""
    below, beside = config.height - anchor_y, config.width - anchor_x
    return [(anchor_y, anchor_x), (below, anchor_x), (anchor_y, beside), (below, beside)]


def corners(pieces):
    """Eq. 1: I = [[I1, I3], [I2, I4]]."""
    first, second, third, fourth = pieces
    return np.vstack([np.hstack([first, third]), np.hstack([second, fourth])])


def compose(tissues, config, quadrants, crops, bank, rng: np.random.Generator):
    """The mosaics that PistoSeg drew, by whole-image operations; cells that it says are not visible are noise here."""
    drawn = iter(zip(*(values.tolist() for values in crops), strict=True))
    for mosaic in zip(*quadrants, strict=True):
        pieces = [
            piece(tissues, config, type(quadrants)(*values), drawn, bank, rng) for values in zip(*mosaic, strict=True)
        ]
        yield tuple(corners(parts) for parts in zip(*pieces, strict=True))


def piece(tissues, config, quadrant, drawn, bank, rng):
    """One quadrant, with image and mask: spliced, flipped, warped and cropped as a whole image."""
    image = rng.integers(0, 256, (config.height, config.width, 3), np.uint8)
    mask = rng.integers(0, 256, (config.height, config.width), np.uint8)
    for cell in np.ndindex(*quadrant.cells):
        number, start, stride = next(drawn)
        top, left = divmod(start - int(bank.offsets[number]), stride)
        source = np.s_[top : top + config.crop_height, left : left + config.crop_width]
        y, x = (quadrant.first_cell + cell) * (config.crop_height, config.crop_width)
        image[y : y + config.crop_height, x : x + config.crop_width] = tissues[number].image[source]
        mask[y : y + config.crop_height, x : x + config.crop_width] = tissues[number].mask[source]
    for axis in range(2):
        if quadrant.flipped[axis]:
            image, mask = cv2.flip(image, axis), cv2.flip(mask, axis)
    size = (config.width, config.height)
    linear, nearest = cv2.WARP_INVERSE_MAP | cv2.INTER_LINEAR, cv2.WARP_INVERSE_MAP | cv2.INTER_NEAREST
    image = cv2.warpAffine(image, quadrant.warp, size, flags=linear, borderMode=cv2.BORDER_REFLECT_101)
    mask = cv2.warpAffine(mask, quadrant.warp, size, flags=nearest, borderMode=cv2.BORDER_REFLECT_101)
    (top, left), (height, width) = quadrant.crop, quadrant.size
    place = np.s_[top : top + height, left : left + width]
    return image[place], mask[place]
