"""Training images from slides: annotations to windows, windows to the `patches` artifact."""

import json
import subprocess
import sys
import tempfile

import cv2
import numpy as np
import openslide
import pytest
import tifffile
from processes import STUCK_S

from pistoseg import parquet, storage
from pistoseg.artifacts import Workspace
from pistoseg.config import load_config
from pistoseg.outputs.regions import ToLevel0, write_regions
from pistoseg.patches.manifest import scan_slides
from pistoseg.patches.store import PatchSet
from pistoseg.phantom import PHANTOM_CLASSES, write_slide
from pistoseg.pipeline import run_pipeline
from pistoseg.stages.windows import write_windows

SIDE, WINDOW = 768, 48


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """A folder of three annotated slides: slides/, masks/ and qupath/."""
    folder = tmp_path_factory.mktemp("slides [1]")
    (folder / "qupath").mkdir()
    for number in range(3):
        name = f"case {number}"
        slide, mask = folder / "slides" / f"{name}.tiff", folder / "masks" / f"{name}.tiff"
        write_slide(str(slide), str(mask), seed=number, size=(SIDE, SIDE), mpp=0.5)
        write_regions(
            folder / "qupath" / f"{name}.geojson",
            tifffile.imread(mask),
            PHANTOM_CLASSES,
            to_level0=ToLevel0(1, 1),
            mpp=0.5,
            tolerance=0,
            min_area=0,
        )
    return folder


def settings(uri, **data):
    data = {"min_single_tissue": 1, "window": WINDOW, "max_rejected": 0.9} | data
    overrides = ["scale={mpp: 1.0}", "tracking.enabled=false", f"data.uri={json.dumps(str(uri))}"]
    return load_config("demo", overrides=[*overrides, *(f"data.{key}={value}" for key, value in data.items())])


def patches_of(config, workspace):
    artifact = run_pipeline(config, Workspace(str(workspace)), ("patches",))["patches"]
    return artifact, PatchSet.open(artifact.uri)


def test_annotated_slides_become_training_images_and_a_broken_one_is_rejected(local_ray, slides, tmp_path):
    out = tmp_path / "windows.parquet"
    report = write_windows(str(slides / "slides"), str(slides / "qupath"), str(out), settings(out))
    assert report.rejected == []
    listing = scan_slides(str(out), PHANTOM_CLASSES)
    broken = slides / "slides" / "case 2.tiff"
    whole = broken.read_bytes()
    try:
        broken.write_bytes(whole[:2000])
        artifact, patches = patches_of(settings(out), tmp_path / "runs")
    finally:
        broken.write_bytes(whole)

    names = [slide.image_name(window) for slide in listing.slides for window in slide.windows]
    good = [name for name in names if "case 2" not in name]
    assert len(good) > 20
    assert patches.table["name"].to_pylist() == good
    rejected = parquet.read(artifact.path("rejected.parquet")).to_pylist()
    assert len(rejected) == len(names) - len(good) > 0
    assert all("case 2" in row["name"] and row["reason"] for row in rejected)
    assert artifact.summary["layout"] == "slides"

    position = 0
    for slide in listing.slides[:2]:
        pixels = read_with_openslide(slide.uri)
        truth = tifffile.imread(slide.uri.replace("/slides/", "/masks/"))
        for window in slide.windows:
            rows, columns = slice(window.y, window.y + 2 * WINDOW), slice(window.x, window.x + 2 * WINDOW)
            wanted = cv2.resize(pixels[rows, columns], (WINDOW, WINDOW), interpolation=cv2.INTER_AREA)
            np.testing.assert_array_equal(patches.image(position), wanted)
            shares = np.bincount(truth[rows, columns].ravel(), minlength=6) / (2 * WINDOW) ** 2
            assert shares[5] < 0.02
            assert patches.labels[position].tolist() == (shares[:5] >= 0.02).astype(int).tolist()
            position += 1


def test_windows_cut_within_the_stage_are_those_of_the_manifest(local_ray, slides, tmp_path):
    windows, regions = tmp_path / "windows.csv", tmp_path / "regions.csv"
    write_windows(str(slides / "slides"), str(slides / "qupath"), str(windows), settings(windows))
    rows = [f"{slides}/slides/case {n}.tiff,{slides}/qupath/case {n}.geojson" for n in range(3)]
    regions.write_text("\n".join(["slide,annotations", *rows]))
    _, first = patches_of(settings(windows), tmp_path / "runs")
    _, second = patches_of(settings(regions), tmp_path / "runs")
    columns = ["name", "width", "height", "mpp", "sha256"]
    assert second.table.select(columns).to_pylist() == first.table.select(columns).to_pylist()
    np.testing.assert_array_equal(first.labels, second.labels)


def test_slides_in_object_storage_are_cut_and_read_there(s3, slides, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", tempfile.gettempdir())
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where slides are kept
    for file in [*slides.glob("slides/*.tiff"), *slides.glob("qupath/*.geojson")]:
        storage.write_bytes(storage.join(s3, str(file.relative_to(slides))), file.read_bytes())
    out = storage.join(s3, "lists", "windows.parquet")
    write_windows(storage.join(s3, "slides"), storage.join(s3, "qupath"), out, settings(out))
    listing = scan_slides(out, PHANTOM_CLASSES)
    assert all(slide.uri.startswith("s3://") for slide in listing.slides)

    script = (
        "import sys\n"
        "from pistoseg.artifacts import Workspace\n"
        "from pistoseg.config import Config\n"
        "from pistoseg.pipeline import run_pipeline\n"
        "from pistoseg.stages import cluster\n"
        "config = Config.model_validate_json(sys.argv[1])\n"
        "with cluster.connected(config.compute):\n"
        "    run_pipeline(config, Workspace(sys.argv[2]), ('patches',))\n"
    )
    command = [sys.executable, "-c", script, settings(out).model_dump_json(), str(tmp_path / "runs")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=STUCK_S, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    (folder,) = (tmp_path / "runs" / "patches").iterdir()
    patches = PatchSet.open(str(folder))
    assert len(patches) == sum(len(slide.windows) for slide in listing.slides)
    assert len(list(tmp_path.glob("pistoseg-slides-*/*/*.tiff"))) == 3
    slide = listing.slides[0]
    pixels = read_with_openslide(str(slides / "slides" / storage.name(slide.uri)))
    window = slide.windows[0]
    wanted = pixels[window.y : window.y + 2 * WINDOW, window.x : window.x + 2 * WINDOW]
    wanted = cv2.resize(wanted, (WINDOW, WINDOW), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(patches.image(0), wanted)


def read_with_openslide(path):
    with openslide.OpenSlide(path) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
