"""That the benchmarks run, and that what they compare makes the same things; no times."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from benchmarks import __main__ as all_benchmarks
from benchmarks import (
    full_size,
    growth,
    harness,
    inference,
    known_masks,
    large_slides,
    material,
    mosaics,
    slides,
    training,
)
from benchmarks.plain_mosaics import FilePerCrop, PaperText
from pistoseg.config import DataConfig
from pistoseg.models import bundle
from pistoseg.patches.layouts import scan_training
from pistoseg.phantom import PHANTOM_CLASSES, write_cohort
from pistoseg.slides.network import SlideNetwork, SlideSettings
from pistoseg.training.samples import fresh_mosaics


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    return harness.Options(None, tmp_path_factory.mktemp("benchmarks"), tiny=True)


def measured(module, options):
    report = module.benchmark(options)
    assert report.figures
    assert all(np.isfinite(value) for value in report.figures.values())
    return report.figures


@pytest.mark.parametrize("module", [training, inference, growth])
def test_a_benchmark_runs_at_a_tiny_size(module, options):
    measured(module, options)


def test_slides_are_measured_and_compared_with_tiatoolbox_where_a_python_has_it(options, tmp_path, monkeypatch):
    python = tmp_path / "python"
    answer = '{"tiles": 9, "device": "cuda:0", "seconds": [2.0, 4.0]}'
    python.write_text(f"#!/bin/sh\necho \"$2\" > {tmp_path}/asked\necho '{answer}'\n")
    python.chmod(0o755)
    monkeypatch.setenv(slides.TOOLBOX, str(python))
    report = slides.benchmark(options)
    figures = report.figures
    assert f"on {json.loads((tmp_path / 'asked').read_text())['device']}, " in " ".join(report.notes)
    assert "TIAToolbox on cuda:0, fp32" in report.notes
    assert all(np.isfinite(value) for value in figures.values())
    assert figures["tiatoolbox_0_workers_s"] == 3.0
    assert figures["segment_slide_times_tiatoolbox"] == pytest.approx(3.0 / figures["segment_slide_s"], rel=0.01)


def test_a_tiatoolbox_that_fails_is_told_and_costs_no_other_figure(options, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setenv(slides.TOOLBOX, str(python))
    report = harness.Report("slides")
    sizes = {"architecture": "unet", "encoder": "tu-mobilenetv3_small_050", "patch_size": 64}
    model = material.save_bundle(tmp_path, options, **sizes)
    network = SlideNetwork(bundle.load(model), SlideSettings(mpp=0.5, symmetries=1))
    with material.slide(options) as path:
        slides._tiatoolbox(network, model, path, tmp_path, report)
    assert report.notes == [f"not compared with TIAToolbox: {python} ended with 3, see above"]
    assert report.figures == {}


@pytest.mark.parametrize("name", training.CASES)
def test_every_trained_network_takes_a_plain_step_and_ours(name, options):
    case = training.CASES[name](options, 2, 64)
    before = {key: value.clone() for key, value in case.network.state_dict().items()}
    for make in (training.plain_step, training.step):
        make(case, torch.device("cpu"))()
    # Both train copies: variants must start from the same network.
    assert all(torch.equal(value, before[key]) for key, value in case.network.state_dict().items())


def test_steps_are_timed_with_the_memory_of_their_process(options):
    timing, idle, peak = full_size.measure("refiner", options)
    assert timing.per_s(2) > 0
    assert 0 < idle <= peak


def test_a_large_slide_is_measured_from_its_file_to_its_results(options, tmp_path):
    path = large_slides._drawn(tmp_path, 512)
    sizes = {"architecture": "unet", "encoder": "tu-mobilenetv3_small_050", "patch_size": 64}
    record, peak = large_slides.measure(path, material.save_bundle(tmp_path, options, **sizes), tmp_path / "out")
    assert record["tiles"] == 49
    assert 0 < record["seconds_of"]["write"] < record["seconds"]
    assert peak > 0


def test_mosaics_are_measured_without_ray(options):
    report = harness.Report("mosaics")
    for item in material.mosaics(options):
        mosaics._one_process(item, options, report)
    mosaics._storing(material.mosaics(options)[0], options, report)
    for name in ("mosaic_7x32", "mosaic_2x112"):
        assert {f"{name}_per_s", f"{name}_text_per_s", f"{name}_file_per_crop_per_s"} <= set(report.figures)


def test_the_plain_implementations_show_what_ours_shows(options, tmp_path):
    item = material.mosaics(options)[0]
    ours = fresh_mosaics(mosaics.source_of(item))
    shares = []
    text, per_crop = PaperText(item), FilePerCrop(item, tmp_path)
    for samples in (
        [ours.sample(0, index) for index in range(60)],
        [text.sample() for _ in range(40)],
        [per_crop.sample() for _ in range(4)],
    ):
        assert {(image.shape, mask.shape) for image, mask in samples} == {((224, 224, 3), (224, 224))}
        shares.append(np.bincount(np.concatenate([mask.ravel() for _, mask in samples]), minlength=6)[:6])
    first, second, _ = (counts / counts.sum() for counts in shares)
    assert np.abs(first - second).max() < 0.06
    assert (shares[2] > 0).sum() >= 4


def test_variants_are_timed_in_turn_and_as_often():
    calls: list[str] = []
    timings = harness.interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 3)
    assert calls == list("ab" + "ab" + "ba" + "ab")
    assert all(len(timing.wall) == len(timing.cpu) == 3 for timing in timings.values())


def test_the_largest_memory_of_a_process_is_not_its_parents():
    command = [sys.executable, "-c", "from benchmarks import harness; print(harness.peak_mib())"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], check=True, stdout=subprocess.PIPE, text=True)
    assert 1 < float(done.stdout) < harness.peak_mib() / 2, "this process has imported PyTorch"


def test_what_surrounds_a_turn_is_not_timed(monkeypatch):
    clock = [0.0]

    def advance(seconds: float) -> None:
        clock[0] += seconds

    @contextmanager
    def around(name: str) -> Iterator[None]:
        advance(100)
        yield
        advance(100)

    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    assert harness.interleaved({"a": lambda: advance(1)}, 2, around)["a"].wall == [1.0, 1.0]
    assert clock == [403.0]


def test_comparison_is_by_pairs_and_targets_are_judged():
    report = harness.Report("x")
    ours, other = harness.Timing([1.0, 2.0, 1.0], [1.0] * 3), harness.Timing([4.0, 4.0, 5.0], [3.0] * 3)
    report.compare("times", ours, other, least=4, counts=1)
    report.compare("per_tile", ours, other, least=9, counts=2)
    report.add("share", 0.3, most=0.2)
    assert report.figures == {"times": 4.0, "times_cpu": 3.0, "per_tile": 8.0, "per_tile_cpu": 6.0, "share": 0.3}
    assert report.missed() == ["per_tile", "share"]
    assert report.table().count("MISSED") == 2


def test_results_say_the_machine_and_several_are_put_together(options):
    reports = [harness.Report(name, {"some_per_s": 1.0}) for name in ("first", "second")]
    for report in reports:
        harness.write([report], options)
    all_benchmarks.merge(options.out, ["first", "second"])
    content = json.loads((options.out / "all.json").read_text())
    assert set(content["benchmarks"]) == {"first", "second"}
    assert content["machine"]["processor"]
    assert content["machine"]["versions"]["torch"]
    assert content["tiny"]


@pytest.mark.parametrize("layout", ["names", "table"])
def test_validation_images_become_training_images_with_known_masks(layout, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    write_cohort(str(data), training=4, validation=3, patch_size=64, validation_size=96)
    before = len(scan_training(str(data / "1.training"), PHANTOM_CLASSES, DataConfig()).images)
    if layout == "table":
        (data / "1.training" / "images").mkdir()
        for file in (data / "1.training").glob("*.png"):
            file.rename(data / "1.training" / "images" / f"{file.stem}.png")
        names = [file.name for file in (data / "1.training" / "images").iterdir()]
        head = ",".join(["image,x,y,width,height", *PHANTOM_CLASSES.names])
        rows = [f'"images/{name}",0,0,64,64,1,0,0,0,0' for name in names]
        (data / "1.training" / "patches.csv").write_text("\n".join([head, *rows]) + "\n")

    added = known_masks.write_known_masks(data, out, len(PHANTOM_CLASSES), 64)
    listing = scan_training(str(out / "1.training"), PHANTOM_CLASSES, DataConfig())
    known = [image for image in listing.images if "known_" in image.name]
    assert len(listing.images) == before + len(known)
    assert added == sum(len(image.windows) for image in known)
    assert added >= 3
    for image in known:
        mask = cv2.imread(str(out / "masks" / f"{Path(image.name).stem}.png"), cv2.IMREAD_UNCHANGED)
        for window in image.windows:
            inside = mask if layout == "names" else mask[window.y :, window.x :][: window.height, : window.width]
            present = [(inside == tissue).mean() >= known_masks.LEAST_SHARE for tissue in range(len(PHANTOM_CLASSES))]
            assert list(window.labels) == present


def test_the_commands_that_the_documents_name_are_taken(monkeypatch):
    root = Path(__file__).parents[2]
    texts = [file.read_text() for file in sorted([*root.glob("*.md"), *root.glob("*/*.md")])]
    found = [match for text in texts for match in re.findall(r"python -m benchmarks(\.\w+)?([^`\n]*)", text)]
    assert {
        module for module, _ in found if module and not (root / "benchmarks" / f"{module[1:]}.py").exists()
    } == set()
    given = [shlex.split(arguments) for module, arguments in found if not module]
    assert ["--only", "inference"] in given
    monkeypatch.setattr(all_benchmarks, "merge", lambda out, names: None)
    monkeypatch.setattr(all_benchmarks.subprocess, "run", lambda command: SimpleNamespace(returncode=0))
    for arguments in given:
        monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
        assert all_benchmarks.main() == 0
