"""Synthesized images: what they show, that masks follow, and that a sample depends on its address alone."""

from __future__ import annotations

import io
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from rich.console import Console

from pistoseg.config import SynthesisConfig, load_config
from pistoseg.errors import PistoSegError
from pistoseg.graph import StageContext
from pistoseg.progress import Progress
from pistoseg.stages import synthesis
from pistoseg.synthesis import Synthesizer, TissueBank, address_rng
from pistoseg.synthesis.crops import CropSource
from pistoseg.synthesis.sampling import Addresses, ImageSampler, Numbers
from pistoseg.tracking import StageRun

NAMES = ["tumor", "stroma", "normal"]
COLORS = np.array([(200, 10, 30), (20, 180, 60), (40, 50, 220), (255, 255, 255)], np.uint8)
BACKGROUND_ID = 3


def white(image):
    return (image == 255).all(axis=-1)


def colored(label: int, height: int, width: int, hole: int = 0):
    """A single-tissue image in its class's colour with a white square."""
    image = np.full((height, width, 3), COLORS[label])
    image[5 : 5 + hole, 7 : 7 + hole] = 255
    return image, label


def colored_bank(crop=(1, 1)):
    images = [colored(i % 3, 40 + 3 * i, 64 - 2 * i, hole=4 * (i % 5)) for i in range(9)]
    return TissueBank.from_images(images, 3, white, crop=crop)


def numbered_bank(labels=(0, 1, 2), size=(60, 50)):
    """Red is the image's number, green the row, blue the column."""
    images = []
    for i, label in enumerate(labels):
        image = np.empty((*size, 3), np.uint8)
        image[..., 0], image[..., 1], image[..., 2] = i, np.arange(size[0])[:, None], np.arange(size[1])
        images.append((image, label))
    return TissueBank.from_images(images, 3)


def config(**changes) -> SynthesisConfig:
    return SynthesisConfig(**{"crop_height": 16, "crop_width": 12, "n_h": 4, "n_w": 5, **changes})


def synthesizer(bank, seed=0, **changes) -> Synthesizer:
    return Synthesizer(bank, config(**changes), NAMES, BACKGROUND_ID, seed)


def same(first, second) -> bool:
    return all((a == b).all() for a, b in zip(first, second, strict=True))


STRATEGIES = ["mosaic", "one_label", "cutmix", "gridding"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_gives_image_and_mask_of_the_set_size(strategy):
    image, mask = synthesizer(colored_bank(), strategy=strategy).sample(0, 0)
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((64, 60, 3), np.uint8, (64, 60), np.uint8)
    assert image.flags.c_contiguous
    assert mask.flags.c_contiguous


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mask_follows_the_image_and_its_background(strategy):
    synth = synthesizer(colored_bank(), strategy=strategy, rotate=90)
    seen = np.zeros(256, int)
    wrong = total = 0
    for index in range(60):
        image, mask = synth.sample(0, index)
        seen += np.bincount(mask.ravel(), minlength=256)
        plain = cv2.erode(mask, np.ones((5, 5))) == cv2.dilate(mask, np.ones((5, 5)))
        wrong += (image[plain] != COLORS[mask[plain]]).any(axis=-1).sum()
        total += plain.sum()
    assert wrong < 0.004 * total  # slivers under a pixel, and blends with what a quadrant's border cuts off
    assert (seen[:4] > 0).all()
    assert seen[4:].sum() == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mask_and_image_are_not_a_fraction_of_a_pixel_apart(strategy):
    dark = np.zeros((50, 44, 3), np.uint8)
    dark[10:31, 8:29] = 255
    bank = TissueBank.from_images([(dark, 0)], 1, white)
    synth = Synthesizer(bank, config(strategy=strategy), NAMES[:1], 1, 0)
    aligned = shifted = 0
    for index in range(60):
        image, mask = synth.sample(0, index)
        tissue = image[..., 0] > 127
        aligned += (tissue != mask).sum()
        shifted += (tissue[1:] != mask[:-1]).sum()
    assert aligned < 0.05 * shifted


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sample_depends_on_seed_epoch_and_index_alone(strategy):
    bank = colored_bank()
    bank.pixels.setflags(write=False)  # nor may it change what the next one is made from
    synth = synthesizer(bank, strategy=strategy)
    forward = [synth.sample(1, k) for k in range(6)]
    other = synthesizer(bank, strategy=strategy)
    backward = [other.sample(1, k) for k in reversed(range(6))][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))
    # A single-coloured picture may come twice by chance: look at several.
    changed = (
        [synth.sample(2, k) for k in range(6)],
        [synth.sample(1, k + 6) for k in range(6)],
        [synthesizer(bank, seed=1, strategy=strategy).sample(1, k) for k in range(6)],
    )
    for others in changed:
        assert not all(same(a, b) for a, b in zip(forward, others, strict=True))


def test_a_sample_that_failed_can_be_asked_for_again(monkeypatch):
    synth = synthesizer(colored_bank(), strategy="mosaic")
    expected = [synth.sample(0, k) for k in range(3)]
    synth.sample(0, 0)
    with monkeypatch.context() as patch:
        patch.setattr(CropSource, "splice", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            synth.sample(0, 1)
    assert all(same(synth.sample(0, k), expected[k]) for k in (1, 2))


def _samples(arrays, indices):
    return [synthesizer(TissueBank.from_arrays(arrays), seed=7, background_threshold=0.2).sample(3, k) for k in indices]


def test_processes_make_the_same_samples_from_shared_arrays():
    bank = colored_bank().with_rejection(16, 12, 0.2)
    arrays = bank.arrays()
    for array in arrays.values():
        array.setflags(write=False)  # as an object store hands them out
    here = _samples(arrays, range(8))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        halves = list(pool.map(_samples, [arrays, arrays], [range(4), range(4, 8)]))
    assert all(same(a, b) for a, b in zip(here, halves[0] + halves[1], strict=True))


def test_address_rng_has_its_own_numbers_for_every_address():
    addresses = [(s, e, k) for s in (0, 1, -1, 2**63) for e in (0, 1) for k in (0, 1, 2**40)]
    drawn = {tuple(address_rng(*address).random(4)) for address in addresses}
    assert len(drawn) == len(addresses)
    assert (address_rng(5, 6, 7).random(100) == address_rng(5, 6, 7).random(100)).all()


def test_one_generator_for_many_samples_draws_what_theirs_would():
    for seed in (5, -1, 2**63):
        addresses = Addresses(seed)
        for epoch, index in [(0, 0), (3, 7), (0, 2**40), (3, 7)]:
            rng = addresses.rng(epoch, index)
            other = address_rng(seed, epoch, index)
            assert (rng.random(101) == other.random(101)).all()
            assert (rng.integers(0, 9, 3, np.int32) == other.integers(0, 9, 3, np.int32)).all()


def test_numbers_of_many_samples_are_those_of_each_alone():
    addresses, indices = Addresses(3), range(5, 9)
    numbers = Numbers(addresses, 2, indices)
    taken: list[list[float]] = [[] for _ in indices]
    for counts in (2, np.array([3, 0, 1, 7]), 1, np.array([0, 400, 0, 2])):  # more than are drawn at first
        flat = numbers.take(counts)
        ends = np.cumsum(np.broadcast_to(counts, len(indices)))
        for mine, part in zip(taken, np.split(flat, ends[:-1]), strict=True):
            mine += part.tolist()
    for index, mine in zip(indices, taken, strict=True):
        assert mine == address_rng(3, 2, index).random(len(mine)).tolist()


@pytest.mark.parametrize("width", [12, 80])  # few wide crops are copied otherwise than many narrow ones
def test_a_part_of_a_splice_is_that_part_of_the_whole(width):
    bank = numbered_bank(size=(60, 100))
    source = CropSource(bank, ImageSampler(bank.labels, NAMES, "natural"), 20, width)
    rng = np.random.default_rng(0)
    drawn = source.draw(Numbers(Addresses(0), 0, range(50)), np.full(50, 6))
    for i in range(50):
        crops = drawn.grid(6 * i, 2, 3)
        whole = source.splice(crops)
        cells = whole.reshape(2, 20, 3, width, 4).swapaxes(1, 2)
        for cell in np.ndindex(2, 3):
            y, x = divmod(int(crops.starts[cell] - bank.offsets[crops.images[cell]]), 100)
            expected = bank.packed(int(crops.images[cell]))[y : y + 20, x : x + width]
            assert (cells[cell] == expected).all()
        (top, bottom), (left, right) = (np.sort(rng.choice(side + 1, 2, replace=False)) for side in (40, 3 * width))
        top, left = min(top, 19), min(left, width - 1)  # a part begins in the first cell and ends in the last
        bottom, right = max(bottom, 21), max(right, 2 * width + 1)
        part = source.splice(crops, (int(top), int(left), int(bottom - top), int(right - left)))
        assert (part == whole[top:bottom, left:right]).all()


def test_gridding_splices_whole_crops_at_uniform_places():
    synth = synthesizer(numbered_bank(), strategy="gridding", class_sampling="natural")
    corners = []
    for index in range(120):
        image, mask = synth.sample(0, index)
        cells = image.reshape(4, 16, 5, 12, 3).swapaxes(1, 2).reshape(20, 16, 12, 3)
        assert (cells[..., 0] == mask.reshape(4, 16, 5, 12).swapaxes(1, 2).reshape(20, 16, 12)).all()
        assert (np.diff(cells[..., 1].astype(int), axis=1) == 1).all()
        assert (np.diff(cells[..., 2].astype(int), axis=2) == 1).all()
        corners.append(cells[:, 0, 0, 1:])
    for drawn, places in zip(np.concatenate(corners).T, (60 - 16 + 1, 50 - 12 + 1), strict=True):
        counts = np.bincount(drawn, minlength=places)
        expected = len(drawn) / places
        assert len(counts) == places
        assert ((counts - expected) ** 2 / expected).sum() < places + 5 * np.sqrt(2 * places)  # chi-square


def shares(synth, n=150):
    """Share of each class in cells of a gridding."""
    cells = np.concatenate([synth.sample(0, k)[1][::16, ::12].ravel() for k in range(n)])
    return np.bincount(cells, minlength=4)[:4] / len(cells)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ("natural", (0.7, 0.2, 0.1, 0)),
        ("balanced", (1 / 3, 1 / 3, 1 / 3, 0)),
        ({"Tumor": 1, "stroma": 3, "normal": 0}, (0.25, 0.75, 0, 0)),
    ],
)
def test_classes_have_the_shares_that_were_asked_for(sampling, expected):
    bank = numbered_bank(labels=(0,) * 7 + (1,) * 2 + (2,))
    drawn = shares(synthesizer(bank, strategy="gridding", class_sampling=sampling))
    assert drawn == pytest.approx(expected, abs=0.04)


def half_empty_bank():
    """Of each class one image of tissue and one of background."""
    images = [colored(label, 30, 30) for label in range(3)]
    images += [(np.full((30, 30, 3), 255, np.uint8), label) for label in range(3)]
    return TissueBank.from_images(images, 3, white)


@pytest.mark.parametrize(("redraws", "left"), [(0, 0.5), (1, 0.25), (10, 0.0)])
def test_crops_of_background_are_redrawn_at_most_that_often(redraws, left):
    drawn = shares(synthesizer(half_empty_bank(), strategy="gridding", background_threshold=0.5, max_redraws=redraws))
    assert drawn[3] == pytest.approx(left, abs=0.03)


def test_rejection_leaves_set_class_shares_alone():
    images = [colored(0, 30, 30), colored(1, 30, 30), colored(2, 30, 30)]
    images += [(np.full((30, 30, 3), 255, np.uint8), 0)] * 3
    bank = TissueBank.from_images(images, 3, white)
    drawn = shares(synthesizer(bank, strategy="gridding", background_threshold=0.5, class_sampling="balanced"))
    assert drawn[1:3] == pytest.approx([1 / 3, 1 / 3], abs=0.04)
    assert drawn[0] > 0.25


def test_rejection_counts_the_background_of_each_crop():
    limit = 16 / (16 * 12)  # a 4x4 square of background is just allowed
    bank = colored_bank().with_rejection(16, 12, limit)
    for i in range(len(bank)):
        mask = bank.mask(i, BACKGROUND_ID)
        start = bank.offsets[i]
        rejected = bank.rejected[start : start + mask.size].reshape(mask.shape)
        for y in range(0, mask.shape[0] - 15, 5):
            for x in range(0, mask.shape[1] - 11, 3):
                share = (mask[y : y + 16, x : x + 12] == BACKGROUND_ID).mean()
                assert rejected[y, x] == (share > limit)


def test_one_label_keeps_the_pixel_size_of_large_images_and_enlarges_small_ones():
    bank = numbered_bank(size=(100, 90))
    image, mask = synthesizer(bank, strategy="one_label").sample(0, 0)
    assert len(np.unique(mask)) == 1
    assert (np.diff(image[..., 1].astype(int), axis=0) == 1).all()
    assert (np.diff(image[..., 2].astype(int), axis=1) == 1).all()
    small, mask = synthesizer(numbered_bank(size=(32, 60)), strategy="one_label").sample(0, 0)
    assert mask.shape == (64, 60)
    assert small[..., 1].min() == 0
    assert small[..., 1].max() == 31
    assert np.ptp(small[..., 2]) == pytest.approx(30, abs=1)  # the same factor across


def test_cutmix_puts_one_rectangle_of_another_image_into_an_image():
    synth = synthesizer(numbered_bank(size=(100, 90)), strategy="cutmix")
    areas = []
    for index in range(200):
        mask = synth.sample(0, index)[1]
        values = np.unique(mask)
        assert len(values) <= 2
        if len(values) == 2:
            rectangles = [np.argwhere(mask == value) for value in values]
            full = [len(p) == np.prod(np.ptp(p, axis=0) + 1) for p in rectangles]
            assert any(full)
            areas.append(min(len(p) for p, is_full in zip(rectangles, full, strict=True) if is_full) / mask.size)
    assert min(areas) < 0.1
    assert max(areas) > 0.4


def test_small_images_are_padded_and_tiny_ones_left_out():
    images = [colored(0, 20, 30), colored(1, 40, 40), colored(2, 40, 40), colored(1, 7, 40)]
    bank = TissueBank.from_images(images, 3, white, crop=(30, 40))
    assert (len(bank), bank.padded, bank.left_out) == (3, 1, (0, 1, 0))
    assert bank.shapes.tolist() == [[30, 40], [40, 40], [40, 40]]
    again = TissueBank.from_arrays(bank.arrays())
    assert (again.padded, again.left_out, again.crop) == (1, (0, 1, 0), (30, 40))
    image, mask = bank.image(0), bank.mask(0, BACKGROUND_ID)
    assert (image == COLORS[0]).all()
    assert (mask == 0).all()


def test_a_class_whose_images_are_all_too_small_for_a_crop_is_told_so():
    images = [colored(0, 30, 40), *[colored(1, 7, 40)] * 5, colored(2, 40, 40), colored(2, 7, 40)]
    bank = TissueBank.from_images(images, 3, crop=(30, 40))
    message = r"image of stroma \(5 are smaller than half a crop\), .*Remedy: make synthesis\.crop_height"
    with pytest.raises(PistoSegError, match=message):
        synthesizer(TissueBank.from_arrays(bank.arrays()))


def test_the_stage_says_which_images_are_smaller_than_a_crop(tmp_path, monkeypatch):
    images = [*[colored(0, 30, 30)] * 3, *[colored(1, 15, 40)] * 2, *[colored(1, 40, 40)] * 2]
    opened = SimpleNamespace(single_tissue=lambda: iter(images))
    monkeypatch.setattr(synthesis.PatchSet, "open", lambda uri: opened)
    classes = "classes.classes=[{name: tumor, color: [1, 0, 0]}, {name: stroma, color: [2, 0, 0]}]"

    def run(crop):
        sizes = [f"synthesis.crop_height={crop}", f"synthesis.crop_width={crop}", "classes.background_id=2"]
        settings = load_config("demo", overrides=["data.uri=/data", classes, *sizes])
        file = io.StringIO()
        context = StageContext(
            settings,
            str(tmp_path),
            {"patches": SimpleNamespace(uri="")},
            Progress(Console(file=file, width=500)),
            StageRun(),
        )
        return synthesis.run(context), file.getvalue()

    summary, said = run(32)
    assert (summary["left_out"], summary["padded"]) == ({"stroma": 2}, 3)
    assert "smaller than half of a crop of 32x32 px (synthesis.crop_height, synthesis.crop_width)" in said
    assert "are left out: 2 of 4 of stroma" in said
    assert "3 single-tissue images smaller than a crop of 32x32 px" in said
    summary, said = run(8)
    assert not {"left_out", "padded"} & set(summary)
    assert "smaller" not in said


def test_bank_keeps_images_and_masks():
    images = [colored(i % 3, 40 + 3 * i, 64 - 2 * i, hole=4 * (i % 5)) for i in range(9)]
    bank = TissueBank.from_images(iter(images), 3, white)
    for i, (image, label) in enumerate(images):
        assert (bank.image(i) == image).all()
        assert (bank.mask(i, 9) == np.where(white(image), 9, label)).all()
    plain = TissueBank.from_images(images, 3)
    assert (plain.mask(4, 9) == 1).all()


def test_a_class_without_single_tissue_images_is_named():
    bank = numbered_bank(labels=(0, 0, 2))
    with pytest.raises(PistoSegError, match=r"no single-tissue image of stroma.*Remedy: .*one flag set"):
        synthesizer(bank)
    synthesizer(bank, class_sampling={"tumor": 1, "stroma": 0, "normal": 1}).sample(0, 0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"tumor": 1, "stroma": 1}, "the classes are tumor, stroma, normal"),
        ({"tumor": 1, "stroma": 1, "necrosis": 1}, "the classes are tumor, stroma, normal"),
        ({"tumor": 0, "stroma": 0, "normal": 0}, "not all 0"),
    ],
)
def test_weights_that_do_not_fit_the_classes_are_refused(weights, message):
    with pytest.raises(PistoSegError, match=message):
        synthesizer(numbered_bank(), class_sampling=weights)


def test_images_smaller_than_the_crop_are_refused_with_their_number():
    with pytest.raises(PistoSegError, match="3 of 3 single-tissue images are smaller than a crop of 16x12 px"):
        synthesizer(numbered_bank(size=(15, 40)))


def test_an_empty_bank_is_refused():
    with pytest.raises(PistoSegError, match="no single-tissue image"):
        TissueBank.from_images([], 3)


def test_anchors_between_which_no_pixel_lies_are_refused_for_mosaics_alone():
    settings = {"n_h": 1, "n_w": 1, "crop_height": 5, "crop_width": 5}
    with pytest.raises(ValueError, match=r"no anchor.* between alpha \(0.41\) and beta \(0.59\) of 5 px"):
        config(**settings, alpha=0.41, beta=0.59)
    config(**settings, alpha=0.41, beta=0.59, strategy="gridding")
    assert config(**settings, alpha=0.2, beta=0.6).anchors() == ((1, 3), (1, 3))
