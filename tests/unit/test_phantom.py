"""The phantom: exact, repeatable, seamless, and labelled as it is drawn."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from pistoseg.errors import PistoSegError
from pistoseg.phantom import PHANTOM_CLASSES, draw_image, draw_mask, write_cohort, write_slide
from pistoseg.phantom.geometry import ALVEOLI, BACKGROUND, LYMPHOCYTES, STROMA, TUMOR
from pistoseg.phantom.slides import SLIDE_DOMAIN
from pistoseg.slides.source import list_slides

SLIDE_SIZE = (1100, 1300)  # no multiple of a tile or of a drawn piece


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("cohort [1]")
    return out, write_cohort(str(out), seed=3, training=30, validation=5, slides=0, patch_size=96, validation_size=128)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("slide")
    image, mask = folder / "a.tiff", folder / "a-mask.tiff"
    return image, mask, write_slide(str(image), str(mask), seed=4, size=SLIDE_SIZE, mpp=0.4)


def uniform(tissue: int, size: int = 160) -> np.ndarray:
    return np.full((size, size), tissue, np.uint8)


def haematoxylin(image: np.ndarray) -> float:
    """Mean haematoxylin by Ruifrok's vectors."""
    density = -np.log10((image.reshape(-1, 3).astype(float) + 1) / 246)
    vectors = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    return float((density @ np.linalg.pinv(vectors))[:, 0].mean())


def test_a_seed_gives_the_same_image_and_another_seed_another() -> None:
    mask = draw_mask(1, 96, 112)
    assert np.array_equal(mask, draw_mask(1, 96, 112))
    image = draw_image(mask, 1)
    assert image.shape == (96, 112, 3)
    assert image.dtype == np.uint8
    assert np.array_equal(image, draw_image(mask, 1))
    assert np.abs(image.astype(int) - draw_image(mask, 2)).mean() > 5


def test_the_cohort_is_the_same_when_drawn_again(cohort: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = cohort
    again = tmp_path / "again"
    write_cohort(str(again), seed=3, training=30, validation=5, slides=0, patch_size=96, validation_size=128)

    def digests(root: Path) -> dict[str, str]:
        files = (path for path in root.rglob("*") if path.is_file())
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    assert digests(out) == digests(again)


def test_only_the_classes_asked_for_are_in_a_mask() -> None:
    assert set(np.unique(draw_mask(0, 512, 512))) <= set(range(6))
    assert set(np.unique(draw_mask(0, 256, 256, classes=[STROMA, LYMPHOCYTES]))) <= {STROMA, LYMPHOCYTES, BACKGROUND}


def test_windows_of_a_case_fit_together() -> None:
    whole = draw_mask(8, 300, 300, origin=(-100, -50))
    assert np.array_equal(whole[120:220, 60:200], draw_mask(8, 100, 140, origin=(20, 10)))
    image = draw_image(whole, 8, origin=(-100, -50), margin=40)
    part = draw_image(whole[100:], 8, origin=(0, -50), margin=40)
    assert np.abs(image[100:].astype(int) - part).max() <= 1


def test_glass_is_white_and_tissue_is_not() -> None:
    for seed in range(4):
        assert draw_image(uniform(BACKGROUND, 64), seed).mean(axis=2).min() > 215
        for tissue in range(5):
            assert draw_image(uniform(tissue), seed).mean() < 215


def test_lymphocytes_take_more_haematoxylin_than_stroma() -> None:
    for seed in range(5):
        dense, sparse = (haematoxylin(draw_image(uniform(tissue), seed)) for tissue in (LYMPHOCYTES, STROMA))
        assert dense > 1.5 * sparse


def test_the_stain_varies_between_cases_more_than_within_one() -> None:
    colors = np.array(
        [[draw_image(uniform(TUMOR), seed, origin=(y, 0)).mean((0, 1)) for y in (0, 900)] for seed in range(6)]
    )
    assert colors.mean(axis=1).std(axis=0).mean() > np.abs(colors[:, 0] - colors[:, 1]).mean()


def test_nuclei_keep_their_size_in_micrometres() -> None:
    fine, coarse = draw_image(uniform(TUMOR, 400), 5, mpp=0.25), draw_image(uniform(TUMOR, 200), 5, mpp=0.5)
    averaged = fine.reshape(200, 2, 200, 2, 3).mean(axis=(1, 3))
    assert np.corrcoef(averaged[..., 0].ravel(), coarse[..., 0].ravel())[0, 1] > 0.6


def test_labels_in_file_names_are_what_the_mask_shows(cohort: tuple[Path, dict[str, Any]]) -> None:
    from pistoseg.phantom.cohort import case_seed

    out, summary = cohort
    files = sorted((out / "1.training").iterdir())
    assert len(files) == 30
    labels = []
    for path in files:
        case, x, y, flags = path.stem.split("-", 3)
        labels.append(ast.literal_eval(flags))
        mask = draw_mask(case_seed(3, int(case)), 96, 96, origin=(int(y), int(x)))
        shares = np.bincount(mask.ravel(), minlength=6)[:5] / mask.size
        assert [int(share >= 0.02) for share in shares] == labels[-1]
        assert np.array_equal(
            np.asarray(Image.open(path)), draw_image(mask, case_seed(3, int(case)), origin=(int(y), int(x)))
        )
    assert 0.5 < np.mean([sum(label) == 1 for label in labels]) < 0.65
    assert np.all(np.sum([label for label in labels if sum(label) == 1], axis=0) >= 2)
    assert sum(summary["labels"].values()) == 30


def test_validation_shows_other_cases_with_masks_that_fit(cohort: tuple[Path, dict[str, Any]]) -> None:
    out, summary = cohort
    images = sorted((out / "2.validation" / "img").iterdir())
    masks = sorted((out / "2.validation" / "mask").iterdir())
    assert [path.name for path in images] == [path.name for path in masks]
    assert len(images) == 5
    training = {path.name.split("-")[0] for path in (out / "1.training").iterdir()}
    assert training.isdisjoint(path.name.split("-")[0] for path in images)
    assert not set(summary["training_cases"]) & set(summary["validation_cases"])
    for image_path, mask_path in zip(images, masks, strict=True):
        mask_image = Image.open(mask_path)
        assert mask_image.mode == "P"
        mask = np.asarray(mask_image)
        assert mask.shape == (128, 128)
        assert set(np.unique(mask)) <= set(range(6))
        assert len(set(np.unique(mask)) - {BACKGROUND}) >= 2
        assert mask_image.convert("RGB").getpixel((0, 0)) == tuple(PHANTOM_CLASSES.palette()[mask[0, 0]])
        grey = np.asarray(Image.open(image_path).convert("L")).astype(float)
        if 100 < (mask == BACKGROUND).sum() < mask.size - 100:
            assert grey[mask == BACKGROUND].mean() > grey[mask != BACKGROUND].mean() + 20


def test_the_cohort_says_that_it_is_synthetic(cohort: tuple[Path, dict[str, Any]]) -> None:
    out, summary = cohort
    written = json.loads((out / "phantom.json").read_text())
    assert written == summary
    assert written["synthetic"] is True
    assert written["settings"]["seed"] == 3
    assert "Synthetic" in (out / "README.txt").read_text()


def test_the_slides_of_a_cohort_lie_apart_from_their_masks(tmp_path: Path) -> None:
    settings = {"training": 2, "validation": 0, "slides": 1, "patch_size": 64, "slide_size": (300, 260)}
    (slide,) = write_cohort(str(tmp_path), **settings)["slides"]
    assert [entry.slide_id for entry in list_slides(str(tmp_path / "slides"))] == [slide]
    assert [path.name for path in (tmp_path / "slide-masks").iterdir()] == [f"{slide}.tiff"]


def test_a_second_cohort_is_not_mixed_into_a_folder_but_the_same_one_is_drawn_again(tmp_path: Path) -> None:
    settings = {"training": 2, "validation": 0, "patch_size": 64}
    first = write_cohort(str(tmp_path), **settings)
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(PistoSegError, match="holds another cohort"):
        write_cohort(str(tmp_path), **settings | {"training": 3})
    assert write_cohort(str(tmp_path), **settings) == first
    assert sorted(tmp_path.rglob("*")) == files
    for damaged in ("{", "[]"):
        (tmp_path / "phantom.json").write_text(damaged)
        with pytest.raises(PistoSegError, match="holds another cohort"):
            write_cohort(str(tmp_path), **settings)


def test_a_cohort_is_not_mixed_into_a_folder_of_other_data(tmp_path: Path) -> None:
    settings = {"training": 1, "validation": 0, "patch_size": 64}
    (tmp_path / "1.training").mkdir()
    (tmp_path / ".cut-off.part").touch()
    with pytest.raises(PistoSegError, match="is not empty, and holds no cohort"):
        write_cohort(str(tmp_path), **settings)
    assert {item.name for item in tmp_path.iterdir()} == {"1.training", ".cut-off.part"}
    (tmp_path / "1.training").rmdir()
    write_cohort(str(tmp_path), **settings)


def test_a_cohort_that_was_cut_off_is_not_mixed_with_another_one(tmp_path: Path, monkeypatch) -> None:
    settings = {"training": 2, "validation": 1, "patch_size": 64, "validation_size": 64, "slide_size": (512, 512)}
    monkeypatch.setattr("pistoseg.phantom.cohort._slide", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_cohort(str(tmp_path), **settings, slides=1)
    monkeypatch.undo()
    with pytest.raises(PistoSegError, match="holds a part of another cohort"):
        write_cohort(str(tmp_path), **settings, slides=0)
    write_cohort(str(tmp_path), **settings, slides=1)
    assert not (tmp_path / ".phantom.json").exists()


def test_a_cohort_can_be_written_to_a_uri() -> None:
    import fsspec

    write_cohort("memory://phantom", training=2, validation=1, patch_size=64, validation_size=64)
    files = fsspec.filesystem("memory").find("/phantom")
    assert sum("/1.training/" in file for file in files) == 2
    assert any(file.endswith("/phantom.json") for file in files)


def test_openslide_reads_every_level_and_the_pixel_size(slide: tuple[Path, Path, dict[str, Any]]) -> None:
    path, _, summary = slide
    with openslide.OpenSlide(str(path)) as opened:
        assert opened.level_dimensions == ((1300, 1100), (325, 275))
        assert float(opened.properties["openslide.mpp-x"]) == pytest.approx(0.4, rel=1e-3)
        assert float(opened.properties["openslide.mpp-y"]) == pytest.approx(0.4, rel=1e-3)
        large = np.asarray(opened.read_region((0, 0), 0, (1300, 1100)).convert("RGB").reduce(4)).astype(float)
        small = np.asarray(opened.read_region((0, 0), 1, (325, 275)).convert("RGB")).astype(float)
    assert summary["levels"] == 2
    assert np.abs(large - small).mean() < 4


def test_a_slide_has_no_seams_and_its_mask_is_exact(slide: tuple[Path, Path, dict[str, Any]]) -> None:
    path, mask_path, summary = slide
    image, mask = tifffile.imread(path), tifffile.imread(mask_path)
    assert mask.shape == SLIDE_SIZE
    assert np.array_equal(mask, draw_mask(4, *SLIDE_SIZE, 0.4, domain=SLIDE_DOMAIN, extent=SLIDE_SIZE))
    assert summary["shares"]["background"] == pytest.approx((mask == BACKGROUND).mean(), abs=1e-3)
    margin = 48
    top, left, size = 412, 412, 200  # over a border of bands (512) and of pieces (512)
    around = mask[top - margin : top + size + margin, left - margin : left + size + margin]
    once = draw_image(around, 4, 0.4, origin=(top - margin, left - margin), margin=margin).astype(float)
    difference = np.abs(image[top : top + size, left : left + size] - once)
    assert difference.mean() < 4  # JPEG
    at_border = difference[96:104].mean(), difference[:, 96:104].mean()
    assert max(at_border) < 1.3 * difference.mean()
    with tifffile.TiffFile(mask_path) as file:
        assert np.array_equal(file.pages[1].asarray(), mask[::4, ::4])


def test_alveoli_are_thin_walls_around_air() -> None:
    mask = draw_mask(2, 400, 400, classes=[ALVEOLI])
    assert 0.1 < (mask == ALVEOLI).mean() < 0.6


@pytest.mark.parametrize(
    ("setting", "value"), [("training", -1), ("patch_size", 8), ("mpp", 0.0), ("validation_size", 0)]
)
def test_impossible_settings_are_refused(setting: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(PistoSegError, match=setting):
        write_cohort(str(tmp_path), **{setting: value})
    assert not list(tmp_path.iterdir())
