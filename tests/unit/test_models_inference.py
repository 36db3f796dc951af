import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pistoseg.models.inference import Predictor, resolve_precision, window_weights
from pistoseg.models.segmentation import Normalization
from pistoseg.pixels import resize_image, tile_starts

PLAIN = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Pointwise(nn.Module):
    """Logits that depend on their own pixel alone: red, green and blue."""

    def forward(self, images):
        return images * 6


class Lopsided(nn.Module):
    """Logits of a filter without symmetry."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.filter = nn.Parameter(torch.randn(3, 3, 3, 3, generator=generator))

    def forward(self, images):
        return F.conv2d(images, self.filter, padding=1)


class TileMean(nn.Module):
    """Logits that depend on what tile a pixel is seen in."""

    def forward(self, images):
        return images.mean((2, 3), keepdim=True).expand_as(images) * 20


class Beside(nn.Module):
    """Logits that are the companions, plus twice the red, green and blue beside them."""

    def forward(self, images, companions):
        assert companions.shape == images.shape
        return companions + 2 * images


def image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def predictor(model, **settings):
    return Predictor(model, PLAIN, **({"tile": 64, "stride": 32, "device": "cpu", "precision": "fp32"} | settings))


def planes(pixels):
    return pixels.transpose(2, 0, 1).astype(np.float64) / 255


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(0)


@pytest.mark.parametrize("window", ["gaussian", "mean"])
@pytest.mark.parametrize("size", [(150, 333), (64, 64), (20, 200), (31, 33), (1, 1), (2, 100), (65, 64)])
def test_tiles_of_a_pointwise_model_make_up_the_whole(size, window):
    pixels = image(*size)
    maps = predictor(Pointwise(), window=window).probabilities(pixels)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, softmax(planes(pixels) * 6), atol=1e-5)


def test_overlapping_tiles_are_averaged_with_the_window():
    pixels = image(64, 128)
    pixels[:, :40] //= 4
    offset = (np.arange(64) - 31.5) / 8
    bell = np.exp(-0.5 * offset**2)
    weights = np.outer(bell, bell) / bell.max() ** 2
    total, weight = np.zeros((3, 64, 128)), np.zeros((64, 128))
    for x in (0, 32, 64):
        tile = planes(pixels)[:, :, x : x + 64].mean((1, 2)) * 20
        total[:, :, x : x + 64] += tile[:, None, None] * weights
        weight[:, x : x + 64] += weights
    np.testing.assert_allclose(predictor(TileMean()).logits(pixels), total / weight, rtol=1e-4)


@pytest.mark.parametrize("size", [(48, 64), (64, 64)])
@pytest.mark.parametrize("symmetries", [2, 8])
def test_symmetries_are_averaged(size, symmetries):
    pixels = image(*size)
    single = predictor(Lopsided())
    expected = []
    for turn in range(symmetries // 2):
        for flip in (False, True):
            turned = np.rot90(pixels, turn)
            maps = single.logits(np.ascontiguousarray(turned[:, ::-1] if flip else turned))
            expected.append(np.rot90(maps[:, :, ::-1] if flip else maps, -turn, (1, 2)))
    maps = predictor(Lopsided(), symmetries=symmetries, average="logits").logits(pixels)
    inner = np.s_[:, 2:40, 2:60]  # beyond, zero padding of the filter meets the mirrored edge of the tile
    np.testing.assert_allclose(maps[inner], np.mean(expected, 0)[inner], atol=1e-4)


def test_an_equivariant_model_gains_nothing_from_symmetries():
    pixels = image(90, 70)
    one, eight = (predictor(Pointwise(), symmetries=n).probabilities(pixels) for n in (1, 8))
    np.testing.assert_allclose(one, eight, atol=1e-6)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_scales_are_averaged_at_the_size_of_the_image(average):
    pixels = image(50, 40)
    maps = predictor(Pointwise(), scales=(1.0, 1.5, 2.0), average=average).probabilities(pixels)
    expected = []
    for height, width in ((50, 40), (75, 60), (100, 80)):
        at_scale = torch.from_numpy(softmax(planes(resize_image(pixels, height, width)) * 6))[None]
        back = F.interpolate(at_scale, size=(50, 40), mode="bilinear", antialias=True, align_corners=False)
        expected.append(back[0].numpy())
    np.testing.assert_allclose(maps, np.mean(expected, 0), atol=1e-5)
    np.testing.assert_allclose(maps.sum(0), 1, atol=1e-5)


def test_several_images_give_what_each_gives_alone():
    images = [image(30 + 7 * k, 200 - 13 * k, k) for k in range(12)] + [image(40, 40, k) for k in range(20)]
    shared = predictor(TileMean(), batch_size=5)
    for one, many in zip([shared.predict(item) for item in images], shared.predict_many(images), strict=True):
        np.testing.assert_array_equal(one, many)
    assert shared.predict_many([]) == []


def test_each_of_several_images_is_finished_with_its_last_tile_and_its_maps_are_let_go():
    images = [image(64, 64 + 32 * (number % 2), seed=number) for number in range(4)]
    shared = predictor(Pointwise(), batch_size=1)
    tiles, finished = [], []
    shared.model.register_forward_hook(lambda *_: tiles.append(None))

    def finish(index, maps):
        assert all(reference() is None for reference in finished)
        finished.append(weakref.ref(maps))
        return index, len(tiles), float(maps.sum())

    expected = [float(maps.sum()) for maps in predictor(Pointwise(), batch_size=1).logits_many(images)]
    assert shared.logits_each(images, finish) == list(zip(range(4), (1, 3, 4, 6), expected, strict=True))


def test_small_images_share_forward_passes():
    sizes = []

    class Counting(Pointwise):
        def forward(self, images):
            sizes.append(tuple(images.shape))
            return super().forward(images)

    predictor(Counting(), batch_size=8).predict_many([image(40, 40, k) for k in range(20)])
    assert sizes == [(8, 3, 64, 64), (8, 3, 64, 64), (4, 3, 64, 64)]


@pytest.mark.parametrize("factor", [0.5, 1.75, 2.0])
def test_a_factor_changes_the_pixel_size_but_not_the_size_of_the_mask(factor):
    pixels = np.zeros((120, 90, 3), np.uint8)
    pixels[:60, :, 0] = pixels[60:, :, 2] = 255
    shapes = []

    class Watching(Pointwise):
        def forward(self, images):
            shapes.append(images.shape[2:])
            return super().forward(images)

    mask = predictor(Watching(), tile=256, stride=128).predict(pixels, factor)
    rounded = [-(-round(side * factor) // 32) * 32 for side in (120, 90)]
    assert [tuple(shape) for shape in shapes] == [tuple(rounded)]
    assert mask.shape == (120, 90)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask[:58], 0)
    np.testing.assert_array_equal(mask[62:], 2)


def companion(height, width, seed=0):
    return np.random.default_rng(seed).random((3, height, width)).astype(np.float32)


@pytest.mark.parametrize("symmetries", [1, 2, 8])
@pytest.mark.parametrize("size", [(64, 64), (150, 203), (20, 90), (1, 1)])
def test_companions_stay_beside_their_pixels(size, symmetries):
    pixels, maps = image(*size), companion(*size)
    found = predictor(Beside(), symmetries=symmetries).logits_many([pixels], companions=[maps])
    np.testing.assert_allclose(found[0], maps + 2 * planes(pixels), atol=1e-5)


def test_padding_mirrors_companions_as_it_does_pixels():
    seen = []

    class Watching(Beside):
        def forward(self, images, companions):
            seen.append((images, companions))
            return super().forward(images, companions)

    pixels = image(40, 50)
    predictor(Watching()).logits_many([pixels], companions=[planes(pixels).astype(np.float32)])
    assert seen[0][0].shape == (1, 3, 64, 64)
    torch.testing.assert_close(*seen[0])


def test_companions_are_resized_to_the_image_at_every_scale():
    pixels, maps = np.zeros((60, 40, 3), np.uint8), companion(15, 20)
    (found,) = predictor(Beside(), scales=(0.5, 1.0, 1.5)).logits_many([pixels], 1.0, [maps])
    expected = []
    for size in ((30, 20), (60, 40), (90, 60)):
        value = torch.from_numpy(maps)[None]
        for target in (size, (60, 40)):
            value = F.interpolate(value, size=target, mode="bilinear", antialias=True, align_corners=False)
        expected.append(value[0].numpy())
    np.testing.assert_allclose(found, np.mean(expected, 0), atol=1e-5)


def test_each_of_several_images_keeps_its_own_companions():
    images = [image(30 + 7 * k, 120 - 13 * k, k) for k in range(5)]
    maps = [companion(9, 11, k) for k in range(5)]
    shared = predictor(Beside(), batch_size=4)
    found = shared.logits_many(images, 0.75, maps)
    for k in range(5):
        np.testing.assert_allclose(found[k], shared.logits_many([images[k]], 0.75, [maps[k]])[0], atol=1e-6)


def test_companions_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="zip"):
        predictor(Beside()).logits_many([image(8, 8)], companions=[])
    with pytest.raises(ValueError, match="float32"):
        predictor(Beside()).logits_many([image(8, 8)], companions=[np.zeros((3, 8, 8))])


def test_inference_gives_the_training_mode_back():
    model = nn.Sequential(nn.BatchNorm2d(3), Pointwise()).train()
    before = model[0].running_mean.clone()
    predictor(model).predict(image(40, 40))
    assert model.training
    assert model[0].training
    assert torch.equal(model[0].running_mean, before)


def test_the_grid_covers_a_side_and_ends_at_its_border():
    assert tile_starts(100, 224, 112) == [0]
    assert tile_starts(224, 224, 112) == [0]
    assert tile_starts(225, 224, 112) == [0, 1]
    assert tile_starts(448, 224, 112) == [0, 112, 224]
    assert tile_starts(500, 224, 112) == [0, 112, 224, 276]


def test_window_weights_are_positive_and_peak_in_the_middle():
    weights = window_weights(224, 128, "gaussian")
    assert weights.shape == (224, 128)
    assert float(weights.min()) > 0
    assert float(weights[112, 64]) == pytest.approx(1)
    assert float(weights[0, 64]) == pytest.approx(np.exp(-0.5 * (111.5 / 28) ** 2 + 0.5 * (0.5 / 28) ** 2), rel=1e-3)


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({}, "fp32"),
    ],
)
def test_a_cpu_computes_in_bf16_only_where_it_has_instructions_for_it(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", torch.device("cpu")) == precision
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"


@pytest.mark.parametrize(
    "settings",
    [{"symmetries": 4}, {"stride": 0}, {"stride": 65}, {"scales": ()}, {"average": "votes"}, {"window": "hann"}],
)
def test_settings_without_a_meaning_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        predictor(Pointwise(), **settings)


def test_arrays_that_are_no_images_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        predictor(Pointwise()).predict(np.zeros((10, 10, 3), np.float32))
