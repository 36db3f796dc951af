"""The composed, partial Mosaic against a plain implementation of the paper's text on whole images."""

from __future__ import annotations

import random

import cv2
import mosaic_oracle as oracle
import numpy as np
import pytest

from pistoseg.config import SynthesisConfig
from pistoseg.synthesis import Synthesizer, TissueBank
from pistoseg.synthesis.crops import CropSource
from pistoseg.synthesis.mosaic import Mosaic, rotation_and_scale
from pistoseg.synthesis.sampling import Addresses, ImageSampler, Numbers

BACKGROUND_ID = 2
NAMES = ["gland", "stroma"]


def tissues(n: int = 8, size: int = 40) -> list[oracle.Tissue]:
    """Noise, so that a wrong pixel shows, with background on one side of some images."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(n):
        shape = (size + 3 * i, size + 20 - 2 * i)
        image = rng.integers(0, 250, (*shape, 3), np.uint8)
        mask = np.full(shape, int(i > 1), np.uint8)
        mask[:, : 6 * (i % 4)] = BACKGROUND_ID
        image[mask == BACKGROUND_ID] = 255
        made.append(oracle.Tissue(image, mask, int(i > 1)))
    return made


def bank_of(made: list[oracle.Tissue]) -> TissueBank:
    return TissueBank.from_images(
        [(tissue.image, tissue.label) for tissue in made], 2, lambda image: (image == 255).all(axis=-1)
    )


def mosaic_of(bank: TissueBank, config: SynthesisConfig) -> Mosaic:
    sampler = ImageSampler(bank.labels, NAMES, config.class_sampling)
    source = CropSource(
        bank, sampler, config.crop_height, config.crop_width, config.background_threshold, config.max_redraws
    )
    return Mosaic(source, config)


def numbers(n: int, seed: int = 0, epoch: int = 0) -> Numbers:
    return Numbers(Addresses(seed), epoch, range(n))


SETTINGS = {
    "many small crops": {"crop_height": 16, "crop_width": 16, "n_h": 7, "n_w": 7},
    "few crops, not square": {"crop_height": 32, "crop_width": 24, "n_h": 2, "n_w": 3},
    "no transform": {"crop_height": 16, "crop_width": 20, "n_h": 4, "n_w": 3, "transform_probability": 0.0},
    "far out of the border": {"crop_height": 16, "crop_width": 16, "n_h": 5, "n_w": 2, "scale": 0.9, "rotate": 180.0},
    "thin quadrants": {"crop_height": 16, "crop_width": 16, "n_h": 6, "n_w": 6, "alpha": 0.01, "beta": 0.99},
    "one crop": {"crop_height": 31, "crop_width": 33, "n_h": 1, "n_w": 1, "shift": 0.5},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_pixels_equal_whole_image_operations_on_the_same_draws(settings):
    config = SynthesisConfig(**settings)
    made = tissues()
    bank = bank_of(made)
    mosaic = mosaic_of(bank, config)
    noise = np.random.default_rng(1)
    synth = Synthesizer(bank, config, NAMES, BACKGROUND_ID, seed=3)
    for index, expected in enumerate(oracle.compose(made, config, *mosaic.plan(numbers(60, seed=3)), bank, noise)):
        expected_image, expected_mask = expected
        image, mask = synth.sample(0, index)
        assert (mask == expected_mask).all()
        assert np.abs(image.astype(int) - expected_image).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(224, 224), (96, 160)])
def test_rotation_and_scale_are_opencvs(height, width):
    rng = random.Random(0)
    side = np.array((height, width))
    for _ in range(50):
        angle, scale = rng.uniform(-180, 180), rng.uniform(0.5, 1.5)
        shift_y, shift_x = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)
        forward = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, scale)
        forward[:, 2] += (shift_x * width, shift_y * height)
        expected = cv2.invertAffineTransform(forward)
        warp = rotation_and_scale(side, np.array(angle), np.array(scale), np.array((shift_y, shift_x)))
        assert np.abs(warp - expected).max() < 1 / 4096


def edges(mask: np.ndarray) -> float:
    """Share of neighbouring pixels of different class."""
    return float(((mask[:, 1:] != mask[:, :-1]).mean() + (mask[1:] != mask[:-1]).mean()) / 2)


def statistics(mask: np.ndarray) -> list[float]:
    height, width = mask.shape
    centre = mask[height // 4 : height - height // 4, width // 4 : width - width // 4]
    return [(mask == 0).mean(), (mask == 1).mean(), (mask == BACKGROUND_ID).mean(), (centre == 0).mean(), edges(mask)]


def assert_same_mean(first: np.ndarray, second: np.ndarray) -> None:
    """The means of two samples (n, k) differ by less than 4 standard errors in each of the k columns."""
    error = np.sqrt(first.var(axis=0) / len(first) + second.var(axis=0) / len(second))
    assert (np.abs(first.mean(axis=0) - second.mean(axis=0)) < 4 * error).all()


@pytest.mark.parametrize("sampling", ["natural", "balanced"])
def test_distributions_equal_those_of_the_papers_text(sampling):
    config = SynthesisConfig(
        crop_height=16, crop_width=16, n_h=4, n_w=4, class_sampling=sampling, background_threshold=0.267, max_redraws=3
    )
    made = tissues()
    bank = bank_of(made)
    mosaic = mosaic_of(bank, config)
    quadrants, crops = mosaic.plan(numbers(600))
    ours = [statistics(np.where(mask == 255, BACKGROUND_ID, mask)) for _, mask in mosaic.compose(quadrants, crops)]
    top, left = np.divmod(crops.starts - bank.offsets[crops.images], bank.shapes[crops.images, 1])
    ours_by_crop = np.stack([crops.images, top, left], axis=1)
    rng = random.Random(0)
    theirs, their_anchors, their_crops = [], [], []
    for _ in range(400):
        _, mask, facts = oracle.draw(made, config, BACKGROUND_ID, rng)
        theirs.append(statistics(mask))
        their_anchors.append(facts.anchor)
        their_crops.append(np.array(facts.crops))
    assert_same_mean(np.array(ours), np.array(theirs))
    assert_same_mean(moments(quadrants.size[:, 0]), moments(their_anchors))
    theirs_by_crop = np.concatenate(their_crops)
    assert_same_mean(moments(ours_by_crop[:, 1:]), moments(theirs_by_crop[:, 1:]))
    one_hot = np.eye(len(made))
    assert_same_mean(one_hot[ours_by_crop[:, 0]], one_hot[theirs_by_crop[:, 0]])


def moments(values: object) -> np.ndarray:
    """Each column with its square, so that comparing means compares spread as well."""
    columns = np.asarray(values, float)
    return np.concatenate([columns, columns**2], axis=1)


def test_anchors_and_crop_corners_take_every_value_evenly():
    config = SynthesisConfig(crop_height=10, crop_width=10, n_h=3, n_w=4, alpha=0.2, beta=0.8)
    mosaic = mosaic_of(bank_of(tissues()), config)
    quadrants, _ = mosaic.plan(numbers(3000, epoch=1))
    for drawn, low, high in zip(quadrants.size[:, 0].T, (6, 8), (24, 32), strict=True):
        assert (drawn.min(), drawn.max()) == (low, high)
        assert_uniform(drawn - low, high - low + 1)
    for i, axis in np.ndindex(4, 2):
        assert_spread(quadrants.crop[:, i, axis], (30, 40)[axis] - quadrants.size[:, i, axis] + 1)


def assert_spread(place: np.ndarray, room: np.ndarray) -> None:
    """Each place is uniform in 0..room-1, whatever its room."""
    assert ((place >= 0) & (place < room)).all()
    assert ((place + 0.5) / room).mean() == pytest.approx(0.5, abs=0.02)
    assert ((place == 0) * room).mean() == pytest.approx(1, abs=0.25)
    assert ((place == room - 1) * room).mean() == pytest.approx(1, abs=0.25)


def assert_uniform(drawn: np.ndarray, values: int) -> None:
    expected = len(drawn) / values
    counts = np.bincount(drawn, minlength=values)
    assert ((counts - expected) ** 2 / expected).sum() < values + 5 * np.sqrt(2 * values)  # chi-square


def test_transforms_are_applied_with_their_probabilities():
    config = SynthesisConfig(crop_height=8, crop_width=8, n_h=4, n_w=4, flip=0.3, transform_probability=0.6)
    mosaic = mosaic_of(bank_of(tissues()), config)
    quadrants, _ = mosaic.plan(numbers(500))
    assert quadrants.flipped.mean((0, 1)) == pytest.approx([0.3, 0.3], abs=0.04)
    assert quadrants.warped.mean() == pytest.approx(0.6, abs=0.04)
    assert (quadrants.warp[~quadrants.warped] == np.eye(2, 3)).all()
    moved = quadrants.warp[quadrants.warped]
    scales = 1 / np.hypot(moved[:, 0, 0], moved[:, 1, 0])
    angles = np.degrees(np.arctan2(moved[:, 1, 0], moved[:, 0, 0]))
    assert (scales.min(), scales.max()) == pytest.approx((0.8, 1.2), abs=0.01)
    assert (angles.min(), angles.max()) == pytest.approx((-45, 45), abs=1)
