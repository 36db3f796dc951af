"""The actor that segments slides: which of its threads does what."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image
from slide_files import texture, write_tiff

from pistoseg import commands, storage
from pistoseg.classes import TissueClasses
from pistoseg.cli import main
from pistoseg.errors import PistoSegError, RefusedError, UnavailableError
from pistoseg.models import bundle, segmentation
from pistoseg.outputs.summary import write_summary
from pistoseg.patches.background import BackgroundRule
from pistoseg.printing import estimate_lines
from pistoseg.slides import results
from pistoseg.slides.cache import SlideCache
from pistoseg.slides.network import SlideNetwork, SlideSettings
from pistoseg.slides.source import SlideEntry
from pistoseg.slides.stitching import MaskFile, Work
from pistoseg.stages import slide_worker, slides
from pistoseg.stages.slide_images import node_cache
from pistoseg.stages.slide_worker import SlideTask, SlideWorker, write_failure
from pistoseg.stages.slides import SlideRun


@pytest.fixture
def model(tmp_path):
    classes = TissueClasses.from_json({"classes": [{"name": "tumor", "color": [255, 0, 0]}]})
    network = segmentation.build("fpn", "tu-mobilenetv3_small_050", 1, None)
    bundle.save(str(tmp_path / "bundle"), network, classes=classes, patch_size=64)
    return str(tmp_path / "bundle")


@pytest.fixture
def start(model, tmp_path):
    arguments = model, SlideSettings(mpp=1.0), str(tmp_path / "out"), "cpu"

    def started() -> SlideWorker:
        worker = SlideWorker(*arguments, torch.get_num_threads(), 1, None)
        worker.load()
        return worker

    return started


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has threads that give way")
@pytest.mark.parametrize("before", [0, 15])
def test_on_a_cpu_results_are_written_by_a_thread_that_gives_way_to_the_network(start, before):
    def priority():
        thread = threading.get_native_id()
        return os.getpriority(os.PRIO_PROCESS, thread), os.sched_getscheduler(thread)

    def nice():
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), before)  # of this thread, and of those it starts
        return start().network.writer.submit(priority).result(), priority()

    if priority()[0] > before:
        pytest.skip("these tests are nicer than that themselves")
    with ThreadPoolExecutor(1) as thread:
        writer, network = thread.submit(nice).result()
    assert network == (before, os.SCHED_OTHER)
    assert writer == ((10, os.SCHED_OTHER) if before == 0 else (15, os.SCHED_IDLE))


def test_one_thread_runs_all_that_the_network_does_whichever_asks_for_it(start, tmp_path):
    write_tiff(tmp_path / "a.tif", texture(200, 200), mpp=(1.0, 1.0))
    ran: set[int] = set()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: ran.add(threading.get_ident()))
    try:
        network = start().network
        cache = SlideCache(str(tmp_path / "cache"), 1 << 20)
        with network.prepared(SlideEntry("a", str(tmp_path / "a.tif")), cache) as slide, ThreadPoolExecutor(2) as pool:
            masks = [MaskFile(tmp_path / f"{number}", slide.view.height, slide.view.width) for number in range(2)]
            assert all(work.tiles for work in pool.map(lambda mask: network.map(slide, mask), masks))
    finally:
        hook.remove()
    assert len(ran) == 1
    assert threading.get_ident() not in ran


def test_a_gpu_that_ray_counts_and_torch_does_not_see_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    worker = SlideWorker(model, SlideSettings(mpp=1.0), str(tmp_path / "out"), "cuda", 1, 1, None)
    with pytest.raises(PistoSegError, match=r"device: Ray counts GPUs on .*, torch sees none.*the device cpu"):
        worker.load()


@pytest.mark.parametrize("mpp", [250.0, -1.0, float("nan"), 0.0, 1e-9])
def test_a_pixel_size_that_no_microscope_has_is_refused_before_any_slide(model, mpp):
    with pytest.raises(PistoSegError, match=r"mpp: .* is no pixel size.*give --mpp.*0\.01 to 100") as caught:
        SlideNetwork(bundle.load(model, "cpu"), SlideSettings(mpp=mpp))
    assert (caught.value.file, caught.value.field) == (None, "mpp")
    with pytest.raises(PistoSegError, match="does not say the pixel size"):
        SlideNetwork(bundle.load(model, "cpu"), SlideSettings())


def test_a_model_that_works_at_another_pixel_size_than_it_was_trained_at_is_remarked_on(tmp_path, capsys):
    classes = TissueClasses.from_json({"classes": [{"name": "tumor", "color": [255, 0, 0]}]})
    network = segmentation.build("fpn", "tu-mobilenetv3_small_050", 1, None)
    uri, slide = str(tmp_path / "bundle"), str(write_tiff(tmp_path / "a.tif", texture(100, 100), mpp=(1.0, 1.0)))
    bundle.save(uri, network, classes=classes, patch_size=64, scale={"mpp": 2.0})
    told = "segmented at 1 um per px, and the model was trained at 2"
    for mpp, warned in ((1.0, True), (2.0, False), (None, False)):
        commands._plan(SlideRun(uri, slide, str(tmp_path / "out"), SlideSettings(mpp=mpp)))
        assert (f"warning: slides are {told}: --mpp is" in capsys.readouterr().err) == warned
    assert bundle.load(uri, "cpu").segment_slide(slide, tmp_path / "out", mpp=1.0).record["reason"] == told


@pytest.mark.parametrize(
    "settings",
    [{"tolerance_um": -1.0}, {"tolerance_um": float("nan")}, {"min_area_um2": float("inf")}, {"batch_size": 0}],
)
def test_settings_that_no_slide_can_be_segmented_with_are_refused_by_name(model, settings):
    with pytest.raises(PistoSegError, match="is out of range") as caught:
        SlideNetwork(bundle.load(model, "cpu"), SlideSettings(mpp=1.0, **settings))
    assert [caught.value.field] == list(settings)
    SlideNetwork(bundle.load(model, "cpu"), SlideSettings(mpp=1.0, tolerance_um=0, min_area_um2=0, batch_size=1))


def test_glass_inside_the_tissue_has_no_class_where_the_models_training_left_it_out(tmp_path):
    classes = TissueClasses.from_json({"classes": [{"name": "tumor", "color": [255, 0, 0]}]})
    network = segmentation.build("fpn", "tu-mobilenetv3_small_050", 1, None)
    image = np.full((300, 300, 3), (150, 60, 120), np.uint8)
    image[100:130, 100:130] = 250
    slide, areas = str(write_tiff(tmp_path / "a.tif", image, mpp=(1.0, 1.0))), {}
    for name, rule in (("bright", BackgroundRule(200, 50)), ("no rule", None)):
        uri = str(tmp_path / name)
        bundle.save(uri, network, classes=classes, patch_size=64, background=rule)
        for background in ("model", "none"):
            given = {} if background == "model" else {"background": background}
            result = bundle.load(uri, "cpu").segment_slide(slide, tmp_path / "out", mpp=1.0, **given)
            areas[name, background] = result.areas["tissue_um2"]
            said = {"grey": 200, "min_area": 50} if (name, background) == ("bright", "model") else None
            assert result.record["settings"]["background"] == said
    assert len({areas["bright", "none"], areas["no rule", "model"], areas["no rule", "none"]}) == 1
    assert areas["bright", "none"] - areas["bright", "model"] == 900
    image[:] = (250, 200, 235)  # tissue by its saturation
    slide = str(write_tiff(tmp_path / "b.tif", image, mpp=(1.0, 1.0)))
    pale = bundle.load(str(tmp_path / "bright"), "cpu").segment_slide(slide, tmp_path / "out", mpp=1.0).record
    assert pale["reason"].startswith("all its tissue is lighter than what the model's training took for glass")
    with pytest.raises(PistoSegError, match=r"background: 'white' is not known\. Remedy: give model or none"):
        bundle.load(uri, "cpu").segment_slide(slide, tmp_path / "out", mpp=1.0, background="white")


def test_a_slides_pixel_size_of_0_is_refused_and_not_taken_for_none(model, tmp_path):
    write_tiff(tmp_path / "a.tif", texture(100, 100), mpp=(1.0, 1.0))
    with pytest.raises(PistoSegError, match=r"slide_mpp: 0 um/px is no pixel size.*as slide_mpp"):
        bundle.load(model, "cpu").segment_slide(tmp_path / "a.tif", tmp_path / "out", slide_mpp=0.0, mpp=1.0)


def test_python_is_told_of_its_argument_where_a_slide_says_no_pixel_size_and_nothing_is_written(model, tmp_path):
    write_tiff(tmp_path / "a.tif", texture(100, 100), mpp=None)
    with pytest.raises(PistoSegError, match="neither a believable pixel size") as caught:
        bundle.load(model, "cpu").segment_slide(tmp_path / "a.tif", tmp_path / "out", mpp=1.0)
    assert (caught.value.file, caught.value.field) == (str(tmp_path / "a.tif"), "slide_mpp")
    assert caught.value.remedy == "give um per level-0 px, 0.01 to 100, as slide_mpp"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("slide_id", ["case/1", ".", "..", "../../data", "a\\b", "x" * 231, "a "])
def test_an_id_that_is_no_folder_of_its_own_is_refused_before_anything_is_replaced(model, tmp_path, slide_id):
    write_tiff(tmp_path / "a.tif", texture(100, 100), mpp=(1.0, 1.0))
    other = tmp_path / "out" / "slides" / "case" / "1" / "slide.json"
    storage.write_bytes(str(other), b"")
    with pytest.raises(PistoSegError, match=r"cannot name a folder|at most 230") as caught:
        bundle.load(model, "cpu").segment_slide(tmp_path / "a.tif", tmp_path / "out", slide_id=slide_id, mpp=1.0)
    assert caught.value.field == "slide_id"
    assert [item for item in (tmp_path / "out").rglob("*") if item.is_file()] == [other]


def test_python_replaces_no_results_of_another_slide_either(model, tmp_path):
    for name, size in (("x", 100), ("y", 120)):
        (tmp_path / name).mkdir()
        write_tiff(tmp_path / name / "a.tif", texture(size, size), mpp=(1.0, 1.0))
    segmenter = bundle.load(model, "cpu")
    segmenter.segment_slide(tmp_path / "x" / "a.tif", tmp_path / "out", mpp=1.0)
    with pytest.raises(PistoSegError, match="results of another slide"):
        segmenter.segment_slide(tmp_path / "y" / "a.tif", tmp_path / "out", mpp=1.0)
    segmenter.segment_slide(tmp_path / "y" / "a.tif", tmp_path / "out", slide_id="b", mpp=1.0)


def complete(folder):
    """The folder, with complete results in it."""
    with results.published(str(folder)) as (target, _):
        for name in ("mask.tif", "overview.png", "regions.geojson", "areas.json"):
            (target / name).write_text("{}")
        results.write_record(target, {"status": "completed"})
    return folder


def test_results_stay_where_a_slide_that_is_not_there_would_replace_them(failed, tmp_path):
    folder = complete(tmp_path / "out" / "slides" / "a")
    told, written = failed(PistoSegError("does not exist"))
    assert told["status"] == "failed"
    assert written["status"] == "completed"
    assert json.loads((folder / "failure.json").read_text())["status"] == "failed"


@pytest.fixture
def failed(model, tmp_path):
    """What becomes of a slide `a` at an error: what the run is told, and what slide.json says."""
    network = SlideNetwork(bundle.load(model, "cpu"), SlideSettings(mpp=1.0))

    def fail(error: Exception) -> tuple[dict, dict]:
        task = SlideTask(SlideEntry("a", str(tmp_path / "a.tif")))
        record = write_failure(network, str(tmp_path / "out"), task, error)
        return record, json.loads((tmp_path / "out" / "slides" / "a" / "slide.json").read_text())

    return fail


def test_the_reason_of_a_failed_slide_holds_no_secret_in_the_summary_either(failed, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hunter2hunter2")
    record, written = failed(RuntimeError("https://me:pass@host refused hunter2hunter2"))
    assert record["reason"] == written["reason"] == "RuntimeError: https://***@host refused ***"

    def published(target):
        raise OSError("hunter2hunter2 is unknown")

    monkeypatch.setattr(results, "published", published)
    assert failed(RuntimeError("x"))[0]["reason"] == "RuntimeError: x (and slide.json can't be written: *** is unknown)"


def of_a_share(error):
    """An error as Ray gives it of a task."""
    text = "\x1b[36mray::SlideWorker.segment()\x1b[39m (pid=7)\n  File ..."
    return ray.exceptions.RayTaskError("segment", text, error).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left on the disk"),
        (torch.OutOfMemoryError("CUDA out of memory"), "a GPU is out of memory"),
        (RefusedError("AWS refuses access", file="SLIDE"), "AWS refuses access"),
        (UnavailableError("the worker process died 2 times at it", file="SLIDE"), "the worker process died 2 times"),
        (of_a_share(OSError(errno.EIO, "Input/output error")), "OSError: [Errno 5] Input/output error"),
        (ValueError("a defect"), "ValueError: a defect"),
    ],
)
def test_what_is_not_said_to_be_the_slides_fault_leaves_an_earlier_result_and_a_bad_slide_does_not(
    failed, tmp_path, error, reason
):
    folder = tmp_path / "out" / "slides" / "a"
    (tmp_path / "a.tif").touch()
    if isinstance(error, PistoSegError):
        error = type(error)(error.reason, file=str(tmp_path / "a.tif"))
    record, written = failed(error)
    assert record["status"] == written["status"] == "failed"  # there was nothing
    complete(folder)
    record, written = failed(error)
    assert (record["status"], written["status"]) == ("failed", "completed")
    assert reason in record["reason"]
    assert json.loads((folder / "failure.json").read_text())["reason"] == record["reason"]
    assert (folder / "mask.tif").exists()
    damaged = PistoSegError("is damaged", file=str(tmp_path / "a.tif"))
    assert failed(of_a_share(damaged))[1]["status"] == "failed"
    assert not (folder / "mask.tif").exists()


@pytest.mark.parametrize("lacks", ["areas.json", "mask.tif", "whole areas.json"])
def test_results_that_are_not_whole_are_not_left_as_completed(failed, tmp_path, lacks):
    folder = complete(tmp_path / "out" / "slides" / "a")
    (folder / lacks).unlink(missing_ok=True)
    if lacks == "whole areas.json":
        (folder / "areas.json").write_text('{"tissue')
    assert failed(OSError(errno.EIO, "Input/output error"))[1]["status"] == "failed"
    assert os.listdir(folder) == ["slide.json"]


@pytest.mark.parametrize("fault", ["none", "files", "memory"])
def test_a_fault_of_the_machine_while_a_slide_is_opened_leaves_an_earlier_result(start, tmp_path, monkeypatch, fault):
    slide = write_tiff(tmp_path / "a.tif", texture(100, 100), mpp=(1.0, 1.0))
    worker, folder = start(), complete(tmp_path / "out" / "slides" / "a")

    def refuse(*_):
        raise MemoryError if fault == "memory" else OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(slide))

    if fault == "none":
        slide.write_bytes(slide.read_bytes()[:20])
    else:
        monkeypatch.setattr("tifffile.TiffFile", refuse)
    says = {"none": "truncated or damaged", "files": "(Too many open files)", "memory": "memory is full"}[fault]
    record = worker.segment(SlideTask(SlideEntry("a", str(slide))))
    assert record["status"] == "failed"
    assert record["reason"].startswith(f"{slide}: ")
    assert says in record["reason"]
    assert (folder / "mask.tif").exists() == (fault != "none")


def test_a_worker_waits_longer_for_room_than_those_with_nothing_to_do_meanwhile(start, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(SlideCache, "__init__", lambda self, folder, limit, wait_s: waits.append(wait_s))
    start()._cache(SlideEntry("a", str(tmp_path / "a.tif")))
    node_cache(str(tmp_path / "a.tif"))
    assert waits[0] > waits[1]


def test_the_reason_of_a_share_that_failed_is_the_error_and_not_rays_traceback(failed):
    assert failed(of_a_share(RuntimeError("no kernel")))[0]["reason"] == "RuntimeError: no kernel"


def test_a_slide_whose_name_is_not_utf8_fails_and_the_summary_has_it(start, tmp_path):
    write_tiff(tmp_path / "b.tif", texture(100, 100), mpp=(1.0, 1.0))
    slide = tmp_path / os.fsdecode(b"M\xfcller.tif")
    slide.write_bytes((tmp_path / "b.tif").read_bytes())
    gone = tmp_path / os.fsdecode(b"G\xfcnther.tif")
    worker, out = start(), str(tmp_path / "out")
    rows = []
    for slide_id, path in (("M_ller", slide), ("G_nther", gone)):
        entry = SlideEntry(slide_id, str(path))
        record = worker.segment(SlideTask(entry))
        assert results.read_record(out, slide_id)["slide"] == str(path)  # as a later run finds it
        rows.append(slides._row(entry, record, record["status"]))
    write_summary(out, rows, worker.network.classes, {})
    table = {row["slide_id"]: row for row in pq.read_table(tmp_path / "out" / "summary.parquet").to_pylist()}
    assert table["M_ller"]["slide"] == f"{tmp_path}/M\\xfcller.tif"
    assert table["M_ller"]["reason"].startswith(f"{tmp_path}/M\\xfcller.tif: name: is not UTF-8. Remedy: rename it")
    assert table["G_nther"]["reason"].startswith(f"{tmp_path}/G\\xfcnther.tif: does not exist")


def test_a_share_of_a_slide_works_in_a_folder_that_is_removed_when_its_process_is_killed(start, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write_tiff(tmp_path / "a.tif", texture(200, 200), mpp=(1.0, 1.0))
    stored = []
    monkeypatch.setattr(slide_worker, "_store", lambda path, uri: stored.append(path))
    worker = start()
    shares = [
        worker.segment(SlideTask(SlideEntry("a", str(tmp_path / "a.tif")), part=part, parts=2)) for part in (0, 1)
    ]
    assert sum(share.work.tiles for share in shares) > 0
    assert {path.parent.parent for path in stored} == set(tmp_path.glob(f"pistoseg-scratch-{os.getuid()}-*"))
    assert not any(path.parent.exists() for path in stored)


@pytest.mark.parametrize("replaced_after", [None, 1, 2])
def test_shares_of_a_slide_that_was_replaced_meanwhile_are_not_put_together(start, tmp_path, replaced_after):
    slide = write_tiff(tmp_path / "a.tif", texture(200, 200), mpp=(1.0, 1.0))
    worker, task, shares = start(), SlideTask(SlideEntry("a", str(slide)), parts=2), []
    for part in (0, 1):
        shares.append(worker.segment(replace(task, part=part)))
        if len(shares) == replaced_after:
            write_tiff(slide, texture(200, 200, seed=1), mpp=(1.0, 1.0))
            os.utime(slide, ns=(1, 1))
    join = replace(task, shares=tuple(shares))
    if replaced_after is None:
        assert worker.segment(join)["status"] == "completed"
        return
    with pytest.raises(PistoSegError, match=r"a\.tif: was replaced while it was segmented"):
        worker.segment(join)
    assert not (tmp_path / "out" / "slides" / "a").exists()


@pytest.mark.parametrize(("given", "left_out", "outlined"), [(None, 25.0, 0), (100.0, 100.0, 0), (9.0, 9.0, 25)])
def test_a_slide_of_specks_has_few_outlines_and_says_so_unless_their_area_is_given(
    model, tmp_path, monkeypatch, given, left_out, outlined
):
    slide = str(write_tiff(tmp_path / "a.tif", texture(100, 100), mpp=(1.0, 1.0)))

    def specks(self, slide, mask, **_):
        ids = np.ones(mask.shape, np.uint8)
        for y in range(5, 100, 20):
            for x in range(5, 100, 20):
                ids[y : y + 3, x : x + 3] = 0
        mask.write(0, 0, ids)
        return Work(1, 1.0, 0.0)

    monkeypatch.setattr(SlideNetwork, "map", specks)
    result = bundle.load(model, "cpu").segment_slide(slide, tmp_path / "out", mpp=1.0, min_area_um2=given)
    assert (result.record["regions"]["min_area_um2"], result.record["regions"]["polygons"]) == (left_out, outlined)
    assert result.areas["tissue_um2"] == 225
    said = "leave out regions below 25 um2, not below 100; 100.0 % of its tissue"
    assert (said in result.record["reason"]) == (given is None)
    assert result.record["settings"]["min_area_um2"] == given


@pytest.fixture
def cohort(model, tmp_path):
    """Two slides, and what segments those that a run has to do, told which of them go through the network."""
    for name in "ab":
        image = texture(150, 150, seed=ord(name))
        image[20:130, 20:130] = (image[20:130, 20:130] * 0.3).astype(np.uint8) + np.array([120, 20, 90], np.uint8)
        write_tiff(tmp_path / f"{name}.tif", image, mpp=(1.0, 1.0))
    mapped = []

    def segment(out=str(tmp_path / "out"), **settings):
        chosen = SlideSettings(mpp=1.0, **settings)
        run = SlideRun(model, str(tmp_path / "*.tif"), out, chosen, device="cpu")
        plan = slides.plan(run)
        worker = SlideWorker(model, chosen, out, "cpu", torch.get_num_threads(), 1, None)
        worker.load()
        original, mapped[:] = worker.network.map, []
        worker.network.map = lambda slide, *rest, **more: (
            mapped.append(slide.entry.slide_id) or original(slide, *rest, **more)
        )
        records = [worker.segment(task) for task in slides._tasks(plan, 1, share=True)]
        assert all(record["status"] == "completed" for record in records)
        assert [record["mask"]["kept"] for record in records] == [
            record["slide_id"] not in mapped for record in records
        ]
        return [record["slide_id"] for record in records], list(mapped), plan

    return segment


def content(folder):
    return {
        item.relative_to(folder).as_posix(): item.read_bytes()
        for item in sorted(folder.rglob("*"))
        if item.is_file() and item.name != "slide.json"
    }


def test_other_outlines_are_drawn_on_the_masks_that_are_there(cohort, tmp_path):
    assert cohort()[:2] == (["a", "b"], ["a", "b"])
    assert cohort()[:2] == ([], [])
    first = content(tmp_path / "out")
    assert cohort(min_area_um2=0, tolerance_um=0)[:2] == (["a", "b"], [])
    other = content(tmp_path / "out")
    assert {name for name in first if first[name] != other[name]} == {f"slides/{name}/regions.geojson" for name in "ab"}
    cohort(str(tmp_path / "anew"), min_area_um2=0, tolerance_um=0)
    assert content(tmp_path / "anew") == other
    (tmp_path / "out" / "slides" / "a" / "mask.tif").write_bytes(b"II*")
    (tmp_path / "out" / "slides" / "b" / "areas.json").unlink()
    done, mapped, plan = cohort()
    assert (done, mapped, plan.kept) == (["a", "b"], ["a", "b"], {"a"})  # found to be damaged where it is read
    assert content(tmp_path / "out") == first
    assert cohort(symmetries=2)[:2] == (["a", "b"], ["a", "b"])
    write_tiff(tmp_path / "a.tif", texture(160, 150), mpp=(1.0, 1.0))
    assert cohort(symmetries=2, tolerance_um=1)[:2] == (["a", "b"], ["a"])


def test_masks_in_object_storage_are_kept_too(cohort):
    out = "memory://kept/out"
    assert cohort(out)[:2] == (["a", "b"], ["a", "b"])
    before = storage.read_bytes(f"{out}/slides/a/mask.tif")
    assert cohort(out, min_area_um2=0)[:2] == (["a", "b"], [])
    assert storage.read_bytes(f"{out}/slides/a/mask.tif") == before
    storage.remove_tree("memory://kept")


def test_probabilities_that_are_not_wanted_any_more_make_no_work_and_wanted_ones_do(cohort, tmp_path):
    cohort()
    assert cohort(probabilities=True)[:2] == (["a", "b"], ["a", "b"])
    assert cohort()[:2] == ([], [])
    before = content(tmp_path / "out")
    assert sum("probabilities.zarr" in name for name in before) > 4


@pytest.mark.parametrize("place", ["disk", "disk without links", "object storage"])
def test_probabilities_stay_beside_other_outlines(cohort, tmp_path, monkeypatch, place):
    out = "memory://kept/probabilities" if place == "object storage" else str(tmp_path / "out")
    if place == "disk without links":

        def refuse(*_):
            raise OSError(errno.EPERM, "no links")

        monkeypatch.setattr(results, "os", SimpleNamespace(link=refuse))

    def maps():
        backend, root = storage.filesystem(out)
        files = [file for file in backend.find(root) if "/a/probabilities.zarr/" in file]
        return {file: backend.cat_file(file) for file in files}

    cohort(out, probabilities=True)
    before = maps()
    assert len(before) > 4
    assert cohort(out, min_area_um2=0)[:2] == (["a", "b"], [])
    assert maps() == before
    record = results.read_record(out, "a")
    assert record["settings"]["probabilities"]
    assert cohort(out, min_area_um2=0, tolerance_um=0, probabilities=True)[:2] == (["a", "b"], [])
    assert maps() == before
    if place == "object storage":
        storage.remove_tree("memory://kept")
        return
    storage.remove_tree(f"{out}/slides/a/probabilities.zarr")
    assert cohort(out, tolerance_um=1)[:2] == (["a", "b"], [])  # nor wanted
    assert not results.read_record(out, "a")["settings"]["probabilities"]
    assert cohort(out, tolerance_um=2, probabilities=True)[:2] == (["a", "b"], ["a"])


def test_a_kept_mask_says_what_made_it_and_a_storage_that_is_away_does_not_make_another(cohort, tmp_path, monkeypatch):
    cohort()
    file = tmp_path / "out" / "slides" / "a" / "slide.json"
    made = {"device": "cuda", "precision": "bf16", "versions": {"torch": "1"}, "tiles_per_s": 7.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | made))
    assert cohort(tolerance_um=1)[1] == []
    assert made.items() <= json.loads(file.read_text()).items()

    def away(*_):
        raise OSError(errno.EIO, "Input/output error")

    before = content(tmp_path / "out")
    monkeypatch.setattr("pistoseg.slides.job.read_mask", away)
    with pytest.raises(AssertionError):
        cohort(tolerance_um=0)
    assert {name for name in content(tmp_path / "out") if name not in before} == {
        f"slides/{name}/failure.json" for name in "ab"
    }
    assert before.items() <= content(tmp_path / "out").items()


def test_a_dry_run_of_outlines_alone_has_no_tiles_and_measures_no_network(cohort, model, tmp_path, monkeypatch, capsys):
    cohort()
    monkeypatch.setattr(slides, "_speed", None)
    run = SlideRun(model, str(tmp_path / "*.tif"), str(tmp_path / "out"), SlideSettings(mpp=1.0, tolerance_um=1))
    found = commands._plan(run)
    assert "2 slides to do (2 of them only get other outlines), 0 up to date" in capsys.readouterr().out
    lines = estimate_lines(slides.estimate(run, found), 1)
    assert lines == ["about 0 tiles, from 0 slides that were opened"]


def test_a_slide_whose_mask_stays_is_not_shared():
    entries = [SlideEntry(name, f"{name}.svs") for name in "ab"]
    plan = slides.Plan(None, [(entry, 1) for entry in entries], [], 0, frozenset("b"))
    tasks = slides._tasks(plan, 3, share=True)
    assert [(task.entry.slide_id, task.part, task.parts, task.keep_mask) for task in tasks] == [
        ("a", 0, 3, False),
        ("a", 1, 3, False),
        ("a", 2, 3, False),
        ("b", 0, 1, True),
    ]


def test_slides_without_a_pixel_size_are_one_line_of_a_dry_run_and_an_option_gives_it(model, tmp_path, capsys):
    folder = tmp_path / "slides"
    folder.mkdir()
    for name in "abcde":
        Image.fromarray(texture(100, 100)).save(folder / f"{name}.png")
    arguments = ["segment", "--model", model, "--mpp", "1", "--slides", str(folder), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--dry-run"]) == 3
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "fail" in line)
    assert line.startswith("would fail: 5 slides, a, b, c and 2 more: mpp: has neither a believable pixel size")
    assert "--slide-mpp" in line
    assert main([*arguments, "--dry-run", "--slide-mpp", "1"]) == 0
    assert "fail" not in capsys.readouterr().out
    assert main([*arguments, "--dry-run", "--slide-mpp", "200"]) == 2
    assert "--slide-mpp: mpp: 200 um/px is no pixel size" in capsys.readouterr().err


def test_a_pixel_size_of_all_slides_counts_as_one_of_the_manifest_which_goes_before_it(model, tmp_path):
    for name in "ab":
        write_tiff(tmp_path / f"{name}.tif", texture(100, 100), mpp=(1.0, 1.0))
    run = SlideRun(model, str(tmp_path / "m.csv"), str(tmp_path / "out"), SlideSettings(mpp=1.0), slide_mpp=2.0)

    def planned(manifest, run):
        (tmp_path / "m.csv").write_text(manifest)
        found = slides.plan(run)
        return [(entry.mpp, found.network.made_from(entry)["settings"]) for entry, _ in found.todo]

    both = planned("slide,mpp\na.tif,2.0\nb.tif,0.5\n", replace(run, slide_mpp=None))
    assert planned("slide,mpp\na.tif,\nb.tif,0.5\n", run) == both
    assert [mpp for mpp, _ in both] == [2.0, 0.5]
    assert planned("slide\na.tif\n", replace(run, slide_mpp=None))[0][1] != both[0][1]


def test_a_given_pixel_size_that_a_slide_contradicts_is_remarked_on(model, tmp_path):
    slide = write_tiff(tmp_path / "a.tif", texture(100, 100), mpp=(1.0, 1.0))
    segment = bundle.load(model, "cpu").segment_slide
    assert segment(slide, tmp_path / "a", mpp=1.0, slide_mpp=0.5).record["reason"] == (
        "its pixels are taken to be 0.5 um, and it says 1"
    )
    assert segment(slide, tmp_path / "b", mpp=1.0, slide_mpp=1.01).record["reason"] == ""
