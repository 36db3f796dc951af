import numpy as np
import pytest
import torch

from pistoseg.classes import IGNORE_ID
from pistoseg.config import AugmentationConfig
from pistoseg.training.augmentation import augment

OFF = {"flip": False, "crop_scale": 1.0, "rotate": 0.0, "scale": 0.0, "stain": 0.0, "brightness": 0.0}
STRONG = {"flip": True, "crop_scale": 0.6, "rotate": 180.0, "scale": 0.4, "probability": 1.0}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**changes):
    return AugmentationConfig(**OFF | changes)


def coded(n=6, height=48, width=48, block=8, seed=0):
    """Masks of random blocks of three classes and images in which a pixel's colour is its class."""
    cells = np.random.default_rng(seed).integers(0, 3, (n, -(-height // block), -(-width // block)))
    masks = cells.repeat(block, 1).repeat(block, 2)[:, :height, :width].astype(np.uint8)
    return torch.from_numpy(np.eye(3, dtype=np.uint8)[masks] * 255), torch.from_numpy(masks)


def both(images, masks, settings, seed):
    changed = augment({"image": images, "mask": masks}, settings, seed)
    return changed["image"], changed["mask"]


@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 72), (72, 40)])
def test_the_mask_follows_the_image(height, width):
    images, masks = coded(16, height, width)
    warped, labels = both(images, masks, config(**STRONG), seed=3)
    assert warped.shape == images.shape
    assert labels.shape == masks.shape
    assert (warped.dtype, labels.dtype) == (torch.uint8, torch.uint8)
    pure = (warped == 255).any(-1) & (warped.sum(-1, dtype=torch.int32) == 255)  # not a mixture of neighbours
    inside = pure & (labels != IGNORE_ID)
    assert inside.float().mean() > 0.4
    assert torch.equal(warped.argmax(-1)[inside].to(torch.uint8), labels[inside])


def test_the_same_seed_makes_the_same_changes_and_another_seed_others():
    images, masks = coded()
    settings = AugmentationConfig()
    first, second, other = (both(images, masks, settings, seed) for seed in (5, 5, 6))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[1], other[1])


def test_every_image_of_a_batch_changes_in_its_own_way():
    images, masks = coded(1)
    _, labels = both(images.repeat(8, 1, 1, 1), masks.repeat(8, 1, 1), config(**STRONG), seed=0)
    assert len({item.numpy().tobytes() for item in labels}) == 8


def test_the_input_is_left_alone():
    images, masks = coded()
    copies = images.clone(), masks.clone()
    both(images, masks, AugmentationConfig(), seed=1)
    assert torch.equal(images, copies[0])
    assert torch.equal(masks, copies[1])


def test_with_everything_off_nothing_changes():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 33, 47, 3), dtype=torch.uint8, generator=generator)
    masks = torch.randint(0, 5, (4, 33, 47), dtype=torch.uint8, generator=generator)
    warped, labels = both(images, masks, config(), seed=9)
    assert torch.equal(warped, images)
    assert torch.equal(labels, masks)


def test_probability_0_switches_rotation_and_zoom_off():
    images, masks = coded()
    warped, labels = both(images, masks, config(rotate=90.0, scale=0.5, probability=0.0), seed=2)
    assert torch.equal(warped, images)
    assert torch.equal(labels, masks)


def test_flips_and_quarter_turns_are_exact_and_all_happen():
    images, masks = coded(1)
    wanted = {
        np.rot90(flipped, turns).tobytes(): None
        for flipped in (masks[0].numpy(), masks[0].numpy()[:, ::-1])
        for turns in range(4)
    }
    n = 64
    warped, labels = both(images.repeat(n, 1, 1, 1), masks.repeat(n, 1, 1), config(flip=True), seed=0)
    assert {item.numpy().tobytes() for item in labels} == set(wanted)
    assert torch.equal(warped.argmax(-1).to(torch.uint8), labels)


def test_pixels_from_outside_are_ignored_and_the_middle_is_not():
    images, masks = coded(16)
    _, labels = both(images, masks, config(rotate=45.0, probability=1.0), seed=1)
    outside = labels == IGNORE_ID
    assert not outside[:, 16:32, 16:32].any()
    corners = outside[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.any(1).float().mean() > 0.7


def test_a_crop_never_leaves_the_image():
    images, masks = coded(32)
    _, labels = both(images, masks, config(crop_scale=0.5), seed=1)
    assert not (labels == IGNORE_ID).any()


def test_ignored_pixels_stay_ignored():
    images, masks = coded()
    _, labels = both(images, torch.full_like(masks, IGNORE_ID), AugmentationConfig(), seed=4)
    assert (labels == IGNORE_ID).all()


def test_a_rotation_of_a_wide_image_keeps_areas():
    masks = torch.zeros(32, 60, 120, dtype=torch.uint8)
    masks[:, 20:40, 50:70] = 1
    images = torch.zeros(32, 60, 120, 3, dtype=torch.uint8)
    _, labels = both(images, masks, config(rotate=180.0, probability=1.0), seed=0)
    areas = (labels == 1).sum((1, 2)).float()
    assert torch.allclose(areas, torch.full_like(areas, 400), rtol=0.08)


def test_zoom_changes_areas_within_its_limits():
    masks = torch.zeros(64, 96, 96, dtype=torch.uint8)
    masks[:, 38:58, 38:58] = 1
    images = torch.zeros(64, 96, 96, 3, dtype=torch.uint8)
    _, labels = both(images, masks, config(scale=0.2, probability=1.0), seed=0)
    zoom = ((labels == 1).sum((1, 2)).float() / 400).sqrt()
    assert zoom.min() > 0.75
    assert zoom.max() < 1.25
    assert zoom.min() < 0.9
    assert zoom.max() > 1.1


@pytest.mark.parametrize("change", [{"stain": 0.05}, {"brightness": 0.3}])
def test_colour_changes_leave_masks_alone_and_stay_small(change):
    images = torch.full((8, 16, 16, 3), 0, dtype=torch.uint8)
    images[..., 0], images[..., 1], images[..., 2] = 190, 120, 170
    masks = torch.randint(0, 4, (8, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed, labels = both(images, masks, config(**change), seed=2)
    assert torch.equal(labels, masks)
    difference = (changed.int() - images.int()).abs()
    assert (difference.amax((1, 2, 3)) > 0).float().mean() > 0.8
    assert difference.max() < 110


def test_stain_and_brightness_survive_black_and_white():
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    images[1] = 255
    masks = torch.zeros(2, 8, 8, dtype=torch.uint8)
    changed, _ = both(images, masks, config(stain=1.0, brightness=0.5), seed=0)
    assert changed.dtype == torch.uint8
    assert changed[0].float().mean() < changed[1].float().mean()


def test_the_amount_of_each_stain_is_scaled_and_shifted_by_itself():
    images = np.random.default_rng(0).integers(90, 200, (4, 24, 24, 3), np.uint8)
    masks = torch.zeros(4, 24, 24, dtype=torch.uint8)
    changed, _ = both(torch.from_numpy(images), masks, config(stain=0.05), seed=3)
    rows = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    to_amounts = np.linalg.inv(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    before, after = (-np.log((item.astype(float) + 1) / 256) @ to_amounts for item in (images, changed.numpy()))
    for image in range(4):
        for stain in range(3):
            x, y = before[image, ..., stain].ravel(), after[image, ..., stain].ravel()
            gain, offset = np.polyfit(x, y, 1)
            assert 0.5 < gain < 1.5
            assert np.abs(y - gain * x - offset).max() < 0.03, "of rounding to 8 bits"
    assert np.abs(after - before).mean() > 0.01


def test_regions_change_as_masks_do_and_labels_not_at_all():
    images, masks = coded()
    labels = torch.arange(24).reshape(6, 4).to(torch.uint8)
    batch = {"image": images, "regions": masks, "labels": labels, "maps": torch.rand(6, 2, 8, 8).half()}
    copies = {name: tensor.clone() for name, tensor in batch.items()}
    changed = augment(batch, AugmentationConfig(), seed=7)
    warped, mask = both(images, masks, AugmentationConfig(), seed=7)
    assert changed.keys() == batch.keys()
    assert torch.equal(changed["image"], warped)
    assert torch.equal(changed["regions"], mask)
    assert torch.equal(changed["labels"], labels)
    assert all(torch.equal(batch[name], copies[name]) for name in batch)


def waves(height, width):
    """(H, W, 2): half a wave along y and along x, 0..255; mirrored at the borders they go on smoothly."""
    y, x = ((1 - torch.cos(torch.pi * (torch.arange(side) + 0.5) / side)) * 127.5 for side in (height, width))
    return torch.stack(torch.broadcast_tensors(y[:, None], x[None]), -1)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (72, 120)])
def test_maps_stay_registered_with_the_image(height, width):
    n, cell = 24, 6
    image = torch.cat([waves(height, width), torch.zeros(height, width, 1)], -1).round().to(torch.uint8)
    maps = waves(height // cell, width // cell).permute(2, 0, 1).half()
    batch = {"image": image.repeat(n, 1, 1, 1), "maps": maps.repeat(n, 1, 1, 1)}
    changed = augment(batch, config(**STRONG), seed=5)
    assert changed["maps"].shape == batch["maps"].shape
    assert changed["maps"].dtype == torch.float32
    pixels = changed["image"][..., :2].permute(0, 3, 1, 2).float()
    cells = torch.nn.functional.avg_pool2d(pixels, cell)
    difference = (changed["maps"] - cells).abs()  # half a cell is 3 px, up to 12 grey values
    assert difference.max() < 5
    assert difference.mean() < 1
    assert (batch["maps"].float() - cells).abs().mean() > 20


def test_maps_are_flipped_and_turned_exactly():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(1, 3, 5, 5, generator=generator)
    images, masks = coded(1, 40, 40)
    n = 64
    batch = {"image": images, "mask": masks, "maps": maps}
    changed = augment(
        {name: item.repeat(n, *[1] * (item.ndim - 1)) for name, item in batch.items()}, config(flip=True), 0
    )
    ways = [(turns, flip) for turns in range(4) for flip in (False, True)]
    seen = set()
    for mask, warped in zip(changed["mask"], changed["maps"], strict=True):
        turns, flip = next(
            way for way in ways if torch.equal(mask, torch.rot90(masks[0].flip(1) if way[1] else masks[0], way[0]))
        )
        expected = torch.rot90(maps[0].flip(2) if flip else maps[0], turns, (1, 2))
        assert torch.allclose(warped, expected, atol=1e-5)
        seen.add((turns, flip))
    assert len(seen) == 8
