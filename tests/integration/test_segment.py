"""`pistoseg segment`: what comes out of slides of all kinds, and what is done again, by a tiny network."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import pytest
import shapely
import tifffile
import torch
from conftest import contents
from PIL import Image
from slide_files import write_scn
from torch import nn

import pistoseg
from pistoseg import cli, storage
from pistoseg.artifacts import Workspace
from pistoseg.config import TrackingConfig
from pistoseg.errors import PistoSegError
from pistoseg.models import bundle, segmentation
from pistoseg.phantom import PHANTOM_CLASSES, write_slide
from pistoseg.slides.network import MIN_AREAS_UM2
from pistoseg.slides.reader import open_slide
from pistoseg.slides.view import SlideView
from pistoseg.tracking.registry import bundle_uri

MPP = 2.0
SIDE = 1536
"""Of the slides, px of 1 um."""
RESULTS = {"mask.tif", "regions.geojson", "overview.png", "areas.json", "slide.json"}


@pytest.fixture(autouse=True)
def _no_server(monkeypatch):
    """MLflow keeps the server of an earlier run of this process in the environment."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A network of a few weights whose maps are those of blurred colours."""
    torch.manual_seed(3)
    network = segmentation.build("unet", "tu-mobilenetv3_small_050", len(PHANTOM_CLASSES), None, None)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    network.train()(torch.randn(2, 3, 64, 64))
    uri = str(tmp_path_factory.mktemp("model [1]") / "bundle")
    evaluation = {"tile": 128, "stride": 96, "scales": (1.0,), "symmetries": 1, "batch_size": 8}
    scale = {"mpp": MPP, "source_mpp": MPP}
    bundle.save(uri, network, classes=PHANTOM_CLASSES, patch_size=64, scale=scale, evaluation=evaluation)
    return uri


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    file = tmp_path_factory.mktemp("slides") / "phantom.tif"
    write_slide(str(file), str(file.with_name("mask.tif")), seed=1, size=(SIDE, SIDE), mpp=1.0)
    file.with_name("mask.tif").unlink()
    return file


def without_mpp(slide, target):
    """The slide as a pyramid that says nothing of its pixel size."""
    image = tifffile.imread(slide, key=0)
    tifffile.imwrite(target, image, tile=(256, 256), photometric="rgb", compression="jpeg", metadata=None)
    return image


def segment(model, slides, out, *options):
    workspace = Path(out).parent / "runs"
    command = ["segment", "--model", model, "--slides", str(slides), "--out", str(out), "--workspace", str(workspace)]
    workers = [] if "--workers" in options else ["--workers", "1"]  # each starts a process that imports PyTorch
    return cli.main([*command, "--device", "cpu", *workers, *options])


def rows(out):
    return {row["slide_id"]: row for row in csv.DictReader((Path(out) / "summary.csv").open(encoding="utf-8-sig"))}


def polygons(folder):
    found = json.loads((folder / "regions.geojson").read_text())["features"]
    return [(item["properties"]["classification"]["name"], shapely.geometry.shape(item["geometry"])) for item in found]


def check_results(folder, width, height, mpp, level0_mpp):
    """Everything opens, and says the same."""
    assert {item.name for item in folder.iterdir()} >= RESULTS
    mask = tifffile.imread(folder / "mask.tif", key=0)
    with openslide.OpenSlide(folder / "mask.tif") as opened:
        assert opened.dimensions == mask.shape[::-1] == (width, height)
        assert float(opened.properties["tiff.XResolution"]) == pytest.approx(1e4 / mpp, rel=1e-3)
    areas = json.loads((folder / "areas.json").read_text())
    found = polygons(folder)
    assert all(shape.is_valid for _, shape in found)
    report = json.loads((folder / "regions.geojson").read_text())["pistoseg"]
    dropped = report["dropped_um2"]  # gaps that are closed, and with the last area, whatever it comes to
    given_away = sum(dropped.values()) if report["min_area_um2"] == MIN_AREAS_UM2[-1] else dropped["no tissue"]
    for position, name in enumerate(PHANTOM_CLASSES.names):
        um2 = (mask == position).sum() * mpp**2
        assert areas["classes"][name]["um2"] == pytest.approx(um2, abs=0.01)
        outlined = sum(shape.area for other, shape in found if other == name) * level0_mpp**2
        assert outlined == pytest.approx(um2, rel=0.011, abs=0.00015 * areas["tissue_um2"] + given_away)
    with Image.open(folder / "overview.png") as picture:
        assert min(picture.size) > 300
    return mask


def test_a_slide_in_this_process_gives_all_results(model, slide, tmp_path):
    segmenter = pistoseg.load(model, device="cpu")
    result = segmenter.segment_slide(slide, tmp_path / "out", probabilities=True)
    folder = Path(result.folder)
    assert folder == tmp_path / "out" / "slides" / "phantom"
    mask = check_results(folder, SIDE // 2, SIDE // 2, MPP, 1.0)
    assert len(np.unique(mask[mask < 5])) > 1
    record = result.record
    assert record.items() <= json.loads((folder / "slide.json").read_text()).items()
    assert (record["status"], record["mpp"], record["mpp_source"]) == ("completed", 1.0, "tiff-tags")
    assert 0 < record["tiles"] <= record["tiles_of_the_whole_slide"]
    assert not list(tmp_path.rglob(".*.part"))

    import zarr

    maps = zarr.open_group(str(folder / "probabilities.zarr"), mode="r")["0"][:]
    assert maps.shape == (5, SIDE // 2, SIDE // 2)
    certain = np.sort(maps, 0)[-1].astype(int) - np.sort(maps, 0)[-2] > 1
    tissue = (mask < 5) & certain
    np.testing.assert_array_equal(maps.argmax(0)[tissue], mask[tissue])

    with open_slide(slide) as reader:
        halved = SlideView(reader, MPP).thumbnail()
    whole = segmenter.predictor(stride=64).predict(halved)
    assert (whole[tissue] == mask[tissue]).mean() > 0.99


def test_regions_of_a_slide_with_bounds_begin_at_them_as_qupath_opens_it(model, slide, tmp_path):
    image = tifffile.imread(slide, key=0)[:896, :1024]
    write_scn(tmp_path / "a.scn", image, (2048, 1536), (512, 256), mpp=1.0)
    options = {"resolution": (1e4, 1e4), "resolutionunit": "CENTIMETER", "photometric": "rgb", "metadata": None}
    tifffile.imwrite(tmp_path / "b.tif", image, tile=(128, 128), **options)
    segmenter = pistoseg.load(model, device="cpu")
    result = segmenter.segment_slide(tmp_path / "a.scn", tmp_path / "out", min_area_um2=0)
    folder = Path(result.folder)
    mask = check_results(folder, 1024, 768, MPP, 1.0)
    alone = Path(segmenter.segment_slide(tmp_path / "b.tif", tmp_path / "out").folder)
    scanned, inner = mask[128:576, 256:768], (slice(64, -64), slice(64, -64))
    assert (scanned[inner] == tifffile.imread(alone / "mask.tif", key=0)[inner]).mean() > 0.97
    assert (mask[:128] >= PHANTOM_CLASSES.background_id).all()
    assert (mask[:, :256] >= PHANTOM_CLASSES.background_id).all()
    assert result.record["regions"]["origin_level0"] == [512, 256]
    found = polygons(folder)
    assert found
    for name, shape in found:
        inside = shape.buffer(-8).representative_point()
        if not inside.is_empty:
            column, row = int((inside.x + 512) / MPP), int((inside.y + 256) / MPP)
            assert mask[row, column] == PHANTOM_CLASSES.names.index(name)


def test_bad_slides_are_rows_and_the_good_ones_are_done(local_ray, model, slide, tmp_path, capsys):
    folder = tmp_path / "slides [2]"
    folder.mkdir()
    data = slide.read_bytes()
    shutil.copy(slide, folder / "good.tif")
    image = without_mpp(slide, folder / "no mpp.tif")
    (folder / "truncated.tif").write_bytes(data[: len(data) // 2])
    (folder / "empty.svs").write_bytes(b"")
    (folder / "text.svs").write_text("no slide at all")
    scrambled = bytearray(data)
    middle = slice(len(data) // 4, len(data) // 2)
    scrambled[middle] = np.random.default_rng(0).integers(0, 256, len(scrambled[middle]), np.uint8).tobytes()
    (folder / "corrupt.tif").write_bytes(scrambled)
    glass = np.full((600, 700, 3), 243, np.uint8)
    options = {"resolution": (1e4, 1e4), "resolutionunit": "CENTIMETER", "photometric": "rgb", "metadata": None}
    tifffile.imwrite(folder / "glass.tif", glass, tile=(128, 128), **options)
    out = tmp_path / "out"
    assert segment(model, folder, out) == 3
    printed = capsys.readouterr().out
    found = rows(out)
    bad = {"no mpp", "truncated", "empty", "text", "corrupt"}
    assert {name for name, row in found.items() if row["status"] == "failed"} == bad
    assert {name for name, row in found.items() if row["status"] == "completed"} == {"good", "glass"}
    assert "no tissue" in found["glass"]["reason"]
    assert "manifest" in found["no mpp"]["reason"]
    assert "0 bytes" in found["empty"]["reason"]
    for name in bad:
        assert f"failed: {name}:" in printed
        record = json.loads((out / "slides" / name / "slide.json").read_text())
        assert record["status"] == "failed"
        assert record["reason"] == found[name]["reason"]
        assert "Traceback" in record["traceback"]
        assert [item.name for item in (out / "slides" / name).iterdir()] == ["slide.json"]
    assert (tifffile.imread(out / "slides" / "glass" / "mask.tif", key=0) == 255).all()
    assert polygons(out / "slides" / "glass") == []
    assert not list(out.rglob(".*"))
    record = json.loads((out / "run.json").read_text())
    assert record["slides"] == {"completed": 2, "failed": 5, "skipped": 0}
    assert len(pd.read_parquet(out / "summary.parquet")) == 7

    # Run again: what is done stays as it is, what failed is tried again and one is repaired by a manifest.
    before = contents(out / "slides" / "good")
    shutil.copy(slide, folder / "truncated.tif")
    assert segment(model, folder, out, "--only-failed", "--limit", "5") == 3
    assert contents(out / "slides" / "good") == before
    found = rows(out)
    assert (found["good"]["status"], found["truncated"]["status"]) == ("skipped", "completed")
    assert (found["text"]["attempts"], found["truncated"]["attempts"]) == ("2", "1")
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(f"slide,slide_id,mpp\n{folder / 'no mpp.tif'},no mpp,1.0\n{folder / 'good.tif'},good,\n")
    assert segment(model, manifest, out) == 0
    assert rows(out)["no mpp"]["mpp_source"] == "given"
    check_results(out / "slides" / "no mpp", SIDE // 2, SIDE // 2, MPP, 1.0)
    assert contents(out / "slides" / "good") == before
    assert image.shape == (SIDE, SIDE, 3)


def test_one_worker_two_and_a_shared_slide_write_the_same_files(local_ray, model, tmp_path):
    for number in range(2):  # of two bands each
        place = tmp_path / f"{number}.tif"
        write_slide(str(place), str(tmp_path / "mask"), seed=number, size=(4600, 300), mpp=1.0)
    outs = {}
    for name, source, workers in (("one", "?.tif", "1"), ("two", "?.tif", "2"), ("shared", "0.tif", "2")):
        assert segment(model, tmp_path / source, tmp_path / name, "--workers", workers) == 0
        outs[name] = contents(tmp_path / name / "slides")
    same = ("mask.tif", "regions.geojson", "overview.png", "areas.json")
    for name, slide in (("two", "0"), ("two", "1"), ("shared", "0")):
        one, other = (tifffile.imread(tmp_path / run / "slides" / slide / "mask.tif") for run in ("one", name))
        # On some processors a network's rounding depends on its threads, and a pixel at a tie turns with it.
        assert (one != other).mean() < 1e-3
        if (one == other).all():
            assert [outs[name][f"{slide}/{file}"][1] for file in same] == [
                outs["one"][f"{slide}/{file}"][1] for file in same
            ]
    record = json.loads((tmp_path / "shared" / "slides" / "0" / "slide.json").read_text())
    assert record["workers"] == 2
    assert not list((tmp_path / "shared").rglob(".*"))


def test_a_shared_slide_that_can_not_be_read_fails_once(local_ray, model, slide, tmp_path):
    (tmp_path / "a.tif").write_bytes(slide.read_bytes()[:5000])
    assert segment(model, tmp_path / "a.tif", tmp_path / "out", "--workers", "2") == 3
    assert list(rows(tmp_path / "out")) == ["a"]
    record = json.loads((tmp_path / "out" / "slides" / "a" / "slide.json").read_text())
    assert (record["status"], record["attempts"]) == ("failed", 1)
    assert record["reason"].startswith(str(tmp_path / "a.tif"))
    assert "in _share" in record["traceback"]
    assert not list((tmp_path / "out").rglob(".*"))


def test_only_what_was_made_from_the_same_is_kept(local_ray, model, slide, tmp_path, capsys):
    for number in range(2):
        shutil.copy(slide, tmp_path / f"{number}.tif")
    out = tmp_path / "out"
    source = tmp_path / "?.tif"
    assert segment(model, source, out, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "2 slides to do" in printed
    assert "tiles a second" in printed
    assert not out.exists()
    assert segment(model, source, out) == 0
    before = contents(out / "slides")
    (out / "slides" / ".0.deadbeef.part").mkdir()  # as a killed worker leaves it
    changed = tifffile.imread(slide, key=0)[:, ::-1]
    options = {"resolution": (1e4, 1e4), "resolutionunit": "CENTIMETER", "photometric": "rgb", "metadata": None}
    tifffile.imwrite(tmp_path / "0.tif", changed, tile=(256, 256), **options)
    assert segment(model, source, out) == 0
    assert [row["status"] for row in rows(out).values()] == ["completed", "skipped"]
    after = contents(out / "slides")
    assert {name for name in before if before[name][1] != after[name][1]} >= {"0/mask.tif", "0/slide.json"}
    assert {name: item for name, item in before.items() if name[0] == "1"} == {
        name: item for name, item in after.items() if name[0] == "1"
    }
    assert not list(out.rglob(".*"))
    assert segment(model, source, out, "--stride", "48", "--dry-run") == 0
    assert "2 slides to do, 0 up to date" in capsys.readouterr().out


def test_pictures_and_ome_tiffs_are_slides_by_a_registered_model_and_mlflow_gets_the_run(
    local_ray, model, slide, tmp_path
):
    from mlflow.tracking import MlflowClient

    image = tifffile.imread(slide, key=0)[:900, :1000]
    Image.fromarray(image).save(tmp_path / "picture.png")
    with tifffile.TiffWriter(tmp_path / "image.ome.tif", ome=True) as writer:
        metadata = {"axes": "YXS", "PhysicalSizeX": 1.0, "PhysicalSizeY": 1.0}
        writer.write(image, tile=(256, 256), photometric="rgb", metadata=metadata)
    (tmp_path / "manifest.csv").write_text("slide,mpp\npicture.png,1.0\nimage.ome.tif,\n")
    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    (tmp_path / "runs").mkdir()
    client = MlflowClient(uri)
    client.create_registered_model("tissue")
    client.create_model_version("tissue", source=model, tags={"pistoseg.bundle": model})
    client.set_registered_model_alias("tissue", "champion", "1")
    out = tmp_path / "out"
    assert segment("models:/tissue@champion", tmp_path / "manifest.csv", out) == 0
    masks = [check_results(out / "slides" / name, 500, 450, MPP, 1.0) for name in ("picture", "image")]
    np.testing.assert_array_equal(*masks)
    (experiment,) = [item for item in client.search_experiments() if item.name == "pistoseg"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["slides_completed"] == 2
    assert run.data.metrics["tissue_mm2"] > 0
    assert run.data.params["stride"] == "64"
    assert {"overviews.png", "summary.md"} <= {item.path for item in client.list_artifacts(run.info.run_id)}
    with pytest.raises(PistoSegError, match="not in the registry"):
        bundle_uri("models:/tissue@nobody", TrackingConfig(), Workspace(str(tmp_path / "runs")))


def test_results_in_object_storage_end_with_slide_json_and_leave_nothing_when_they_fail(model, slide, tmp_path):
    storage.write_bytes("memory://bucket/in/a.tif", slide.read_bytes())
    storage.write_bytes("memory://bucket/out/slides/a/probabilities.zarr/old", b"")
    segmenter = pistoseg.load(model, device="cpu")
    result = segmenter.segment_slide("memory://bucket/in/a.tif", "memory://bucket/out")
    assert result.folder == "memory://bucket/out/slides/a"
    assert {storage.name(item) for item in storage.list_files(result.folder)} == RESULTS
    storage.write_bytes("memory://bucket/in/b.tif", slide.read_bytes()[:5000])
    with pytest.raises(PistoSegError, match=r"b\.tif"):
        segmenter.segment_slide("memory://bucket/in/b.tif", "memory://bucket/out")
    assert not storage.exists("memory://bucket/out/slides/b")
    (tmp_path / "b.tif").write_bytes(b"")
    with pytest.raises(PistoSegError, match=r"b\.tif"):
        segmenter.segment_slide(tmp_path / "b.tif", tmp_path / "out")
    assert not (tmp_path / "out").exists()
