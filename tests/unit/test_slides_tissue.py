"""Tissue is found, glass and ink are not, whatever the share of either."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from pistoseg.errors import PistoSegError
from pistoseg.phantom import draw_image, draw_mask
from pistoseg.phantom.geometry import BACKGROUND
from pistoseg.slides.reader import open_slide
from pistoseg.slides.tissue import TISSUE_MPP, read_tissue_mask, tissue_mask
from pistoseg.slides.view import SlideView

GLASS = (240, 238, 242)
PINK, VIOLET, PALE = (205, 130, 170), (85, 70, 150), (205, 180, 198)


def glass(tint: tuple[int, int, int] = GLASS, side: int = 200, noise: float = 2.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.clip(rng.normal(tint, noise, (side, side, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("color", [PINK, VIOLET, PALE])
def test_tissue_of_any_stain_is_found(color: tuple[int, int, int]) -> None:
    image = glass()
    image[50:150, 40:120] = color
    truth = np.zeros((200, 200), bool)
    truth[50:150, 40:120] = True
    found = tissue_mask(image, TISSUE_MPP)
    assert (found & truth).sum() / (found | truth).sum() > 0.95


@pytest.mark.parametrize("tint", [GLASS, (255, 255, 255), (235, 222, 215), (200, 200, 200)])
def test_a_slide_of_glass_has_no_tissue(tint: tuple[int, int, int]) -> None:
    assert not tissue_mask(glass(tint), TISSUE_MPP).any()


@pytest.mark.parametrize("color", [PINK, VIOLET])
def test_a_slide_full_of_tissue_is_all_tissue(color: tuple[int, int, int]) -> None:
    assert tissue_mask(glass(color, noise=12), TISSUE_MPP).all()


def test_dust_is_no_tissue_and_a_lumen_is() -> None:
    image = glass()
    image[50:150, 50:150] = PINK
    image[95:105, 95:105] = GLASS
    image[10:16, 10:16] = PINK
    found = tissue_mask(image, TISSUE_MPP)
    assert found[95:105, 95:105].all()
    assert not found[:30, :30].any()
    image[60:140, 60:140] = GLASS
    assert not tissue_mask(image, TISSUE_MPP)[80:120, 80:120].any()


@pytest.mark.parametrize("ink", [(30, 60, 170), (20, 120, 60), (40, 40, 45)])
def test_pen_and_black_borders_are_no_tissue(ink: tuple[int, int, int]) -> None:
    image = glass()
    image[80:160, 60:140] = PINK
    clean = tissue_mask(cv2.GaussianBlur(image, (0, 0), 0.8), TISSUE_MPP)
    cv2.line(image, (20, 30), (180, 40), ink, 8)
    image[:, :9] = 4
    image = cv2.GaussianBlur(image, (0, 0), 0.8)
    found = tissue_mask(image, TISSUE_MPP)
    assert not found[:60].any()
    assert not found[:, :30].any()
    assert (found == clean)[60:, 30:].mean() > 0.99


def test_areas_are_micrometres_not_pixels() -> None:
    image = glass()
    image[100:108, 100:108] = PINK
    assert not tissue_mask(image, 8.0).any()
    assert tissue_mask(image, 32.0)[100:108, 100:108].any()


def test_phantom_tissue_is_found_lung_included() -> None:
    mpp, size = 2.0, 700
    mask = draw_mask(5, size, size, mpp, domain=320.0, extent=(size, size))
    image = draw_image(mask, 5, mpp)
    small = cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    truth = cv2.resize((mask != BACKGROUND).astype(np.float32), small.shape[1::-1], interpolation=cv2.INTER_AREA)
    found = tissue_mask(small, 8.0)
    assert 0.05 < truth.mean() < 0.95
    assert found[truth > 0.5].mean() > 0.98


def test_real_tissue_is_found(real_data: Path) -> None:
    for name, mpp, share in (("cmu-1-small-region", None, 0.40), ("tcga-cr-7395-01a-01-ts1", 0.5, 0.65)):
        with open_slide(real_data / "slides" / f"{name}.svs", mpp=mpp) as slide:
            thumbnail = SlideView(slide, TISSUE_MPP).thumbnail()
        found = tissue_mask(thumbnail, TISSUE_MPP)
        grey = thumbnail.min(-1)
        assert found.mean() == pytest.approx(share, abs=0.03)
        assert found[grey < 150].mean() > 0.95
        assert found[grey > 235].mean() < 0.1


def test_own_masks_of_any_size_and_kind_are_read(tmp_path: Path) -> None:
    truth = np.zeros((40, 60), bool)
    truth[10:20, 30:50] = True
    large = np.kron(truth, np.ones((5, 5), bool))
    palette = Image.fromarray(truth.astype(np.uint8), "P")
    palette.putpalette([255, 255, 255, 0, 0, 0])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(large).save(tmp_path / "bits.png")
    Image.fromarray(np.dstack([large * 255] * 3 + [np.full_like(large, 1) * 255]).astype(np.uint8)).save(
        tmp_path / "color.png"
    )
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as writer:
        writer.write(np.kron(large, np.ones((4, 4), bool)).astype(np.uint16), subifds=1, metadata=None)
        writer.write(large.astype(np.uint16), subfiletype=1, metadata=None)
    for name in ("palette.png", "bits.png", "color.png", "pyramid.tif"):
        assert np.array_equal(read_tissue_mask(str(tmp_path / name), (40, 60)), truth), name
    finer = read_tissue_mask(str(tmp_path / "palette.png"), (80, 120))
    assert finer[20:40, 60:100].all()
    assert finer.sum() == 20 * 40


@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize(("photometric", "colours", "alpha"), [("rgb", 3, 1), ("rgb", 3, 0), ("minisblack", 1, 1)])
def test_alpha_and_planes_of_own_masks_in_tiff_are_told_from_colours(
    tmp_path: Path, planes: str, photometric: str, colours: int, alpha: int
) -> None:
    truth = np.zeros((40, 60), bool)
    truth[10:20, 30:50] = True
    opaque = np.full((40, 60), 255, np.uint8)
    samples = [truth.astype(np.uint8) * 255] * colours + [opaque] * alpha
    image = np.stack(samples, -1 if planes == "contig" else 0)
    options = {"photometric": photometric, "planarconfig": planes, "extrasamples": ["unassalpha"] * alpha}
    tifffile.imwrite(tmp_path / "mask.tif", image, metadata=None, **options)
    assert np.array_equal(read_tissue_mask(str(tmp_path / "mask.tif"), (40, 60)), truth)


def test_own_masks_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    Image.new("L", (60, 40)).save(tmp_path / "a.png")
    Image.new("L", (60, 40)).save(tmp_path / "a.jpg")
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99), np.uint8)).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:3000])
    for name, shape, reason in [
        ("a.png", (40, 50), "60x40 px, and the slide's sides are as 50:40"),
        ("a.jpg", (40, 60), "is no PNG or TIFF"),
        ("cut.png", (99, 99), "cannot be read"),
        ("none.png", (40, 60), "cannot be read"),
    ]:
        with pytest.raises(PistoSegError, match=reason) as caught:
            read_tissue_mask(str(tmp_path / name), shape)
        assert caught.value.file == str(tmp_path / name)
