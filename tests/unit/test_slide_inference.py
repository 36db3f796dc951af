"""The network over a slide: what comes out does not depend on how it was cut, and memory not on the slide."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from slide_files import texture, write_tiff
from torch import nn

from pistoseg.errors import PistoSegError
from pistoseg.models.inference import Predictor
from pistoseg.models.segmentation import Normalization
from pistoseg.patches.background import BackgroundRule
from pistoseg.slides.grid import TilePlan
from pistoseg.slides.reader import open_slide
from pistoseg.slides.stitching import MaskFile, Stitcher
from pistoseg.slides.view import SlideView
from pistoseg.stages.slide_worker import share_of_bands

PLAIN = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
BACKGROUND = 3
TILE = 224
SMALL = 96


class Blurred(nn.Module):
    """Logits of three classes that depend on what is within 4 px."""

    def forward(self, images):
        return F.avg_pool2d(F.avg_pool2d(F.pad(images, (4, 4, 4, 4), mode="reflect"), (9, 1), 1), (1, 9), 1) * 60


class TileEdges(nn.Module):
    """Wrong within 24 px of the border of its tile, as a network with a field of view is; right inside."""

    def forward(self, images):
        logits = images * 60
        wrong = torch.zeros_like(logits[:, :1])
        wrong[:, :, 24:-24, 24:-24] = 1
        return logits * wrong + (1 - wrong) * logits.flip(1)


def predictor(model, **settings):
    return Predictor(model, PLAIN, **({"tile": TILE, "stride": 112, "device": "cpu", "precision": "fp32"} | settings))


class Pieces:
    """A sink that keeps all in memory, and the largest part that it was given."""

    def __init__(self, height, width, n_classes=3):
        self.ids = np.full((height, width), 255, np.uint8)
        self.maps = np.zeros((n_classes, height, width), np.uint8)
        self.largest, self.ends = 0, []

    def write(self, y, x, ids, probabilities):
        height, width = ids.shape
        assert (self.ids[y : y + height, x : x + width] == 255).all(), "a pixel is written once"
        self.ids[y : y + height, x : x + width] = ids
        if probabilities is not None:
            self.maps[:, y : y + height, x : x + width] = probabilities
        self.largest = max(self.largest, ids.size)

    def end_band(self, y, bottom):
        self.ends.append((y, bottom))


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    image = texture(450, 550)
    with open_slide(write_tiff(tmp_path_factory.mktemp("slide") / "x.tif", image)) as reader:
        yield image, SlideView(reader, 0.5)


def mapped(
    view,
    model,
    tissue=None,
    super_tile=250,
    bands=None,
    readers=2,
    sink=None,
    probabilities=False,
    background=None,
    **settings,
):
    settings = {"tile": SMALL, "stride": 48} | settings
    tissue = np.ones((9, 11), bool) if tissue is None else tissue
    chosen = predictor(model, **settings)
    plan = TilePlan(view.width, view.height, chosen.tile, chosen.stride, tissue, super_tile)
    sink = sink or Pieces(view.height, view.width)
    stitcher = Stitcher(chosen, 3, BACKGROUND, readers, background)
    stitcher.run(view, plan, tissue, sink, bands=bands, probabilities=probabilities)
    return sink


@pytest.mark.parametrize("stride", [64, 100, 128, 224])
def test_no_seam_at_any_stride(slide, stride):
    image, view = slide
    whole = predictor(Blurred(), tile=4096, stride=4096).probabilities(image)
    sink = mapped(view, Blurred(), tile=TILE, stride=stride, super_tile=300, probabilities=True)
    assert not (sink.ids == 255).any()
    if stride == TILE:  # nothing overlaps: only the 4 px beside a tile's border may differ, and do so by little
        assert (sink.ids != whole.argmax(0)).mean() < 0.02
        return
    differ = np.abs(sink.maps / 255.0 - whole)[:, 16:-16, 16:-16]
    assert differ.max() < 0.05  # where a tile that ends beside the last one still weighs 1 or 2 %
    best, second = np.sort(whole, 0)[[-1, -2]]
    certain = best - second > 0.1
    certain[:16] = certain[-16:] = certain[:, :16] = certain[:, -16:] = False
    assert certain.mean() > 0.6
    np.testing.assert_array_equal(sink.ids[certain], whole.argmax(0)[certain])


@pytest.mark.parametrize("stride", [64, 100, 128])
def test_what_a_network_does_wrong_at_the_border_of_its_tile_is_not_seen(slide, stride):
    image, view = slide
    truth = image.argmax(2)
    inside = (slice(32, -32), slice(32, -32))
    sink = mapped(view, TileEdges(), tile=TILE, stride=stride)
    assert (sink.ids[inside] == truth[inside]).mean() > 0.99
    side_by_side = mapped(view, TileEdges(), tile=TILE, stride=TILE)  # the test can fail
    assert (side_by_side.ids[inside] == truth[inside]).mean() < 0.9


def test_how_reads_are_cut_changes_nothing(slide):
    _, view = slide
    expected = mapped(view, Blurred(), super_tile=4096, readers=1, probabilities=True)
    for super_tile in (96, 150, 300):
        found = mapped(view, Blurred(), super_tile=super_tile, readers=3, probabilities=True)
        np.testing.assert_array_equal(found.ids, expected.ids)
        assert np.abs(found.maps.astype(int) - expected.maps).max() <= 1  # sums in another order


def test_shares_of_a_slide_are_the_same_bits_as_the_whole(slide):
    _, view = slide
    for stride, super_tile in ((48, 150), (32, 96)):
        expected = mapped(view, Blurred(), super_tile=super_tile, stride=stride, probabilities=True)
        plan = TilePlan(view.width, view.height, SMALL, stride, np.ones((9, 11), bool), super_tile)
        together = Pieces(view.height, view.width)
        for part in range(3):
            bands = share_of_bands(plan, part, 3)
            assert bands
            mapped(
                view,
                Blurred(),
                super_tile=super_tile,
                stride=stride,
                bands=bands,
                sink=together,
                probabilities=True,
            )
        np.testing.assert_array_equal(together.ids, expected.ids)
        np.testing.assert_array_equal(together.maps, expected.maps)
        assert together.ends == expected.ends


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 50])
def test_shares_are_all_bands_once_and_about_equal(parts):
    tissue = np.zeros((60, 20), bool)
    tissue[20:] = True
    plan = TilePlan(2000, 6000, TILE, 112, tissue, 500)
    shares = [share_of_bands(plan, part, parts) for part in range(parts)]
    assert [band for share in shares for band in share] == list(range(len(plan.bands)))
    if parts <= 3:
        tiles = [sum(plan.bands[band].n_tiles for band in share) for share in shares]
        assert max(tiles) < 1.5 * plan.n_tiles / parts


def test_tiles_without_tissue_are_not_read_and_tissue_is_cut_out_by_pixels(slide, monkeypatch):
    _, view = slide
    tissue = np.zeros((45, 55), bool)
    tissue[2:15, 30:37] = True
    tissue[35:44, 2:10] = True
    read = []
    original = SlideView.read
    monkeypatch.setattr(SlideView, "read", lambda self, *place: read.append(place) or original(self, *place))
    sink = mapped(view, Blurred(), tissue)
    assert sum(width * height for *_, width, height in read) < 0.6 * view.width * view.height
    full = np.kron(tissue, np.ones((10, 10), bool))
    far = F.max_pool2d(torch.from_numpy(full)[None, None].float(), 21, 1, 10)[0, 0].numpy() == 0
    near = F.max_pool2d(1 - torch.from_numpy(full)[None, None].float(), 21, 1, 10)[0, 0].numpy() == 0
    assert (sink.ids[near] < 3).all()
    assert (sink.ids[far] >= BACKGROUND).all()
    assert {BACKGROUND, 255} <= set(np.unique(sink.ids[far]))
    assert (sink.ids[200:300] == 255).sum() > 0.5 * 100 * 550
    whole = mapped(view, Blurred())
    np.testing.assert_array_equal(sink.ids[near & (sink.ids < 3)], whole.ids[near & (sink.ids < 3)])


def glassy(height, width):
    """Tissue with glass: spots below and above 50 px, snakes of one px width, a hole, and an edge of the slide."""
    image = (texture(height, width) * 0.6).astype(np.uint8)
    for number in range(600):
        y, x, side = (number * 37) % height, (number * 101) % width, 2 + number % 9
        image[y : y + side, x : x + side] = 250
    image[::41, 30:-30] = image[60:63, ::29] = 250
    for start in range(20, width - 70, 90):
        image[150, start : start + 40] = image[400, start : start + 55] = 250
    image[200:330, 120:300] = image[:, :20] = 250
    return image


@pytest.mark.parametrize("min_area", [0, 50, 200])
def test_glass_inside_the_tissue_is_the_same_however_the_slide_is_cut(tmp_path, min_area):
    image, rule = glassy(450, 550), BackgroundRule(200, min_area)
    glass = rule(image)
    with open_slide(write_tiff(tmp_path / "x.tif", image)) as reader:
        view = SlideView(reader, 0.5)
        np.testing.assert_array_equal(view.thumbnail(), image)
        plain = mapped(view, Blurred(), probabilities=True)
        assert not (plain.ids[glass] >= BACKGROUND).any()  # the test can fail
        for super_tile, stride in ((96, 48), (150, 32), (300, 48), (4096, 96)):
            plain = mapped(view, Blurred(), super_tile=super_tile, stride=stride, probabilities=True)
            settings = {"super_tile": super_tile, "stride": stride, "probabilities": True, "background": rule}
            found = mapped(view, Blurred(), **settings)
            np.testing.assert_array_equal(found.ids == BACKGROUND, glass)
            np.testing.assert_array_equal(found.ids[~glass], plain.ids[~glass])
            assert not found.maps[:, glass].any()
            np.testing.assert_array_equal(found.maps[:, ~glass], plain.maps[:, ~glass])
            together = Pieces(view.height, view.width)
            plan = TilePlan(view.width, view.height, SMALL, stride, np.ones((9, 11), bool), super_tile)
            for part in range(2):
                mapped(view, Blurred(), bands=share_of_bands(plan, part, 2), sink=together, **settings)
            np.testing.assert_array_equal(together.ids, found.ids)


def test_glass_does_not_make_seen_what_no_tile_touches(tmp_path):
    image = glassy(450, 550)
    tissue = np.zeros((45, 55), bool)
    tissue[2:15, 30:37] = tissue[35:44, 2:10] = True
    with open_slide(write_tiff(tmp_path / "x.tif", image)) as reader:
        view = SlideView(reader, 0.5)
        plain = mapped(view, Blurred(), tissue).ids
        found = mapped(view, Blurred(), tissue, background=BackgroundRule(200, 50)).ids
    np.testing.assert_array_equal(found == 255, plain == 255)
    glass = BackgroundRule(200, 50)(image)
    np.testing.assert_array_equal(found == BACKGROUND, (plain == BACKGROUND) | (glass & (plain < BACKGROUND)))
    assert (glass & (plain < BACKGROUND)).any()


def test_symmetries_and_scales_are_averaged_and_small_slides_are_padded(slide, tmp_path):
    _, view = slide
    plain = mapped(view, Blurred())
    for settings in ({"symmetries": 8}, {"scales": (1.0, 1.5)}, {"scales": (0.75,)}):
        other = mapped(view, Blurred(), **settings)
        assert (other.ids == plain.ids).mean() > 0.9, settings
    image = texture(60, 90, seed=4)
    with open_slide(write_tiff(tmp_path / "small.tif", image)) as reader:
        small = mapped(SlideView(reader, 0.5), Blurred())
    expected = predictor(Blurred()).predict(image)
    assert (small.ids == expected)[:-16, :-16].mean() > 0.99


def test_sums_are_as_large_for_a_tall_slide_as_for_a_short_one(tmp_path, monkeypatch):
    sizes = {}
    for height in (600, 2400):
        largest = []
        zeros = torch.Tensor.new_zeros

        def counted(self, *shape, largest=largest, zeros=zeros, **options):
            made = zeros(self, *shape, **options)
            largest.append(made.numel())
            return made

        monkeypatch.setattr(torch.Tensor, "new_zeros", counted)
        path = write_tiff(tmp_path / f"{height}.tif", np.full((height, 300, 3), 200, np.uint8))
        with open_slide(path) as reader:
            sink = mapped(SlideView(reader, 0.5), Blurred(), np.ones((height // 100, 3), bool))
        monkeypatch.undo()
        sizes[height] = max(largest)
        assert sink.largest <= 250 * 250
    assert sizes[600] == sizes[2400] <= 4 * 250 * 250


def test_reads_run_ahead_of_the_network_but_not_far(slide, monkeypatch):
    _, view = slide
    started, used, most = [], [], []
    original, lock = SlideView.read, threading.Lock()

    def read(self, *place):
        with lock:
            started.append(place)
            most.append(len(started) - len(used))
        return original(self, *place)

    class Slow(Blurred):
        def forward(self, images):
            used.append(len(images))
            return super().forward(images)

    monkeypatch.setattr(SlideView, "read", read)
    mapped(view, Slow(), super_tile=SMALL, stride=SMALL, readers=2)  # a tile a read
    assert len(started) == 30
    assert 2 <= max(most) <= 5


def test_freed_memory_is_given_back_once_a_minute_over_slides_and_not_with_each_of_them(slide, monkeypatch):
    _, view = slide
    now, given_back = [1000.0], []
    monkeypatch.setattr("pistoseg.slides.stitching.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("pistoseg.slides.stitching.give_back", lambda: given_back.append(now[0]))
    stitcher = Stitcher(predictor(Blurred()), 3, BACKGROUND)
    tissue = np.ones((8, 8), bool)
    plan = TilePlan(view.width, view.height, TILE, 112, tissue)
    for seconds in (0, 50, 50, 50):
        now[0] += seconds
        stitcher.run(view, plan, tissue, Pieces(view.height, view.width))
    assert given_back == [1100.0]


def test_a_part_that_cannot_be_read_is_the_error_of_the_slide(slide, monkeypatch):
    _, view = slide
    original = SlideView.read

    def read(self, x, y, width, height):
        if y > 300:
            raise PistoSegError("cannot be read there", file="x.tif")
        return original(self, x, y, width, height)

    monkeypatch.setattr(SlideView, "read", read)
    with pytest.raises(PistoSegError, match="cannot be read there"):
        mapped(view, Blurred())


def test_a_mask_file_reads_like_an_array(tmp_path):
    rng = np.random.default_rng(0)
    expected = np.full((50, 30), 255, np.uint8)
    mask = MaskFile(tmp_path / "mask", 50, 30)
    for y, x in ((0, 0), (10, 7), (40, 20)):
        piece = rng.integers(0, 5, (10, 10)).astype(np.uint8)
        mask.write(y, x, piece)
        expected[y : y + 10, x : x + 10] = piece
    assert (mask.shape, mask.size, len(mask), mask.dtype) == (expected.shape, 1500, 50, np.uint8)
    for rows in (slice(0, 50), slice(8, 12), slice(45, 80), slice(60, 80)):
        np.testing.assert_array_equal(mask[rows], expected[rows])
    np.testing.assert_array_equal(mask[np.int64(12)], expected[12])
    mask.close()
    again = MaskFile(tmp_path / "mask", 50, 30)
    np.testing.assert_array_equal(again[:], expected)
    again.close()
