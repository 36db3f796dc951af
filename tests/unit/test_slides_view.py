"""A view is the slide resampled exactly, whichever level it reads and however the reads are cut."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from slide_files import box_mean, halved, texture, write_ome, write_tiff

from pistoseg.slides import view as view_module
from pistoseg.slides.reader import open_slide
from pistoseg.slides.view import SlideView

IMAGE = texture(600, 720)


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ome(tmp_path_factory.mktemp("view") / "a.ome.tif", IMAGE, levels=3)


def worst(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b).max())


@pytest.mark.parametrize("mpp", [0.5, 0.59, 0.75, 0.93])
def test_a_coarser_view_is_the_mean_over_each_pixels_area(slide_path: Path, mpp: float) -> None:
    with open_slide(slide_path, mpp=0.5) as slide:
        view = SlideView(slide, mpp)
        assert view.level == 0
        assert (view.width, view.height) == (round(720 * 0.5 / mpp), round(600 * 0.5 / mpp))
        exact = box_mean(IMAGE, mpp / 0.5, mpp / 0.5, view.width, view.height)
        assert worst(view.thumbnail(), exact) <= 0.51


def test_a_view_at_a_whole_ratio_equals_the_resized_image(slide_path: Path) -> None:
    with open_slide(slide_path, mpp=0.5) as slide:
        coarse, fine = SlideView(slide, 1.5), SlideView(slide, 0.25)
        expected = cv2.resize(halved(IMAGE), (240, 200), interpolation=cv2.INTER_AREA)
        assert coarse.level == 1
        assert worst(coarse.thumbnail(), expected) <= 1
        assert (fine.width, fine.height) == (1440, 1200)
        assert worst(fine.thumbnail(), cv2.resize(IMAGE, (1440, 1200), interpolation=cv2.INTER_LINEAR)) <= 1


def test_the_nearest_finer_level_is_read(slide_path: Path) -> None:
    with open_slide(slide_path, mpp=0.5) as slide:
        levels = {mpp: SlideView(slide, mpp).level for mpp in (0.2, 0.5, 0.9, 0.99, 1.0, 1.9, 2.0, 8.0)}
    assert levels == {0.2: 0, 0.5: 0, 0.9: 0, 0.99: 1, 1.0: 1, 1.9: 1, 2.0: 2, 8.0: 2}


@pytest.mark.parametrize("mpp", [None, 0.37, 0.5, 0.59, 0.99, 1.0, 1.31, 2.0, 5.3])
def test_adjacent_reads_fit_together(slide_path: Path, mpp: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(slide_path, mpp=0.5) as slide:
        view = SlideView(slide, mpp)
        whole = view.thumbnail()
        monkeypatch.setattr(view_module, "_SOURCE_SIDE", 101)
        assert worst(view.thumbnail(), whole) <= 1
        rows, columns = (0, view.height // 3, view.height), (0, view.width // 5, view.width - 3, view.width)
        for y0, y1 in pairwise(rows):
            for x0, x1 in pairwise(columns):
                part = view.read(x0, y0, x1 - x0, y1 - y0)
                assert worst(part, whole[y0:y1, x0:x1]) <= 1


def test_reads_beyond_the_slide_are_white(slide_path: Path) -> None:
    with open_slide(slide_path, mpp=0.5) as slide:
        view = SlideView(slide, 0.59)
        part = view.read(-5, view.height - 7, 30, 20)
        assert np.array_equal(part[:7, 5:], view.read(0, view.height - 7, 25, 7))
        assert (part[7:] == 255).all()
        assert (part[:, :5] == 255).all()
        assert (view.read(view.width, 0, 9, 9) == 255).all()


def test_the_last_pixels_are_not_mixed_with_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((101, 203, 3), 40, np.uint8)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", mpp=0.5) as slide:
        for mpp in (0.4, 0.7, 1.0, 1.33, 60.0):
            assert (SlideView(slide, mpp).thumbnail() == 40).all()


def test_anisotropic_pixels_become_square(tmp_path: Path) -> None:
    with open_slide(write_tiff(tmp_path / "a.tif", IMAGE, mpp=(0.25, 0.5))) as slide:
        assert (slide.mpp_x, slide.mpp_y) == pytest.approx((0.25, 0.5))
        view = SlideView(slide, 0.6)
        assert (view.width, view.height) == (300, 500)
        assert worst(view.thumbnail(), box_mean(IMAGE, 2.4, 1.2, 300, 500)) <= 0.51
        assert view.to_level0(10.0, 10.0) == pytest.approx((24, 12))


def test_points_map_to_where_their_pixels_come_from(slide_path: Path) -> None:
    image = np.full_like(IMAGE, 255)
    image[300:310, 500:510] = 0
    with open_slide(slide_path, mpp=0.5) as slide:
        slide.read_region = lambda x, y, w, h, level: image[y : y + h, x : x + w]  # type: ignore[method-assign]
        view = SlideView(slide, 0.7)
        ys, xs = np.nonzero(view.thumbnail()[..., 0] < 128)
        x, y = view.to_level0(np.array([xs.min(), xs.max() + 1.0]), np.array([ys.min(), ys.max() + 1.0]))
    assert np.abs(x - [500, 510]).max() <= 0.7
    assert np.abs(y - [300, 310]).max() <= 0.7


def test_a_view_without_a_resolution_is_level_0(slide_path: Path) -> None:
    with open_slide(slide_path, mpp=0.5) as slide:
        view = SlideView(slide, None)
        assert (view.scale_x, view.scale_y, view.mpp_x) == (1, 1, 0.5)
        assert np.array_equal(view.read(100, 50, 64, 64), IMAGE[50:114, 100:164])


def test_memory_does_not_grow_with_the_level_that_is_read(slide_path: Path) -> None:
    asked = []
    with open_slide(slide_path, mpp=0.001 * 11) as slide:
        slide.levels = [slide.levels[0]._replace(width=60_000, height=60_000)]
        slide.width = slide.height = 60_000
        slide.read_region = lambda x, y, w, h, level: asked.append((w, h)) or np.zeros((h, w, 3), np.uint8)  # type: ignore
        view = SlideView(slide, 0.011 * 1000)
        view.read(0, 0, 5, 5)
    assert max(max(size) for size in asked) <= 2048


def test_a_lower_level_of_odd_size_shows_the_same_place(tmp_path: Path) -> None:
    image = texture(1101, 1303)
    with open_slide(write_tiff(tmp_path / "a.tif", image, levels=3)) as slide:
        view = SlideView(slide, 2.2)
        assert view.level == 2
        expected = box_mean(halved(halved(image)), 1.1, 1.1, view.width, view.height)
        assert worst(view.thumbnail()[:-1, :-1], expected[:-1, :-1]) <= 0.51


def test_real_slides_are_read_exactly_and_without_seams(real_data: Path) -> None:
    with open_slide(real_data / "slides" / "cmu-1-small-region.svs") as slide:
        pixels = slide.read_region(0, 0, 700, 600)
        view = SlideView(slide, 0.75)
        scale = 0.75 / 0.499
        part = view.read(0, 0, 400, 300)
        assert worst(part, box_mean(pixels, scale, scale, 400, 300)) <= 0.51
        assert worst(view.read(111, 77, 200, 150), part[77:227, 111:311]) <= 1
    with open_slide(real_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs", mpp=0.25) as slide:
        view = SlideView(slide, 0.57)
        assert view.level == 1
        whole = view.read(300, 300, 500, 500)
        assert worst(view.read(411, 377, 200, 150), whole[77:227, 111:311]) <= 1
