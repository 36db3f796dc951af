"""What `evaluate` leaves in its folder; what the scores are is in tests/integration."""

import io
import json
import os
import shutil
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pistoseg import claims, storage
from pistoseg.classes import TissueClass, TissueClasses
from pistoseg.cli import main
from pistoseg.config import EvaluationConfig, load_config
from pistoseg.errors import PistoSegError, RefusedError
from pistoseg.graph import StageContext
from pistoseg.models import bundle, segmentation
from pistoseg.outputs.pictures import CELL, MARGIN
from pistoseg.patches.background import BackgroundRule
from pistoseg.progress import Progress
from pistoseg.stages import cluster, evaluation, placement, sharding
from pistoseg.stages.evaluation import WORK, evaluate_folder, other_protocol, run
from pistoseg.stages.validation import collect
from pistoseg.tracking import StageRun

CLASSES = TissueClasses((TissueClass("tumor", (0, 64, 128)), TissueClass("stroma", (64, 128, 0))), 2)
RESULTS = ["metrics.json", "per_image.csv", "predictions.png"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    network = segmentation.build("unet", "tu-mobilenetv3_small_050", 2, None, None).eval()
    uri = str(tmp_path_factory.mktemp("bundles") / "model")
    protocol = {
        "protocol": "single-scale",
        "tile": 64,
        "stride": 64,
        "scales": (1.0,),
        "symmetries": 1,
        "window": "gaussian",
    }
    bundle.save(uri, network, classes=CLASSES, patch_size=64, scale={}, evaluation=protocol, lineage={}, metrics={})
    return uri


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """Files that were in the folder of the report before, and Ray's work done in this process."""

    def here(worker, arguments, shards, folder, **_):
        for number, shard in enumerate(shards):
            part = storage.join(folder, sharding.part_name(number))
            if not storage.exists(part):
                worker(**arguments)(number, shard, part)

    monkeypatch.setattr(sharding, "run_shards", here)
    monkeypatch.setattr(sharding, "run_networks", here)
    files = [tmp_path / "out" / name for name in ("images/a.png", "parts/part-00000.parquet", "img/b.png")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"the user's")
    return files


def data_set(root, value=1):
    for kind, pixels in (("img", (32, 32, 3)), ("mask", (32, 32))):
        (root / kind).mkdir(parents=True)
        for name in ("one.png", "two.png"):
            Image.fromarray(np.full(pixels, value, np.uint8)).save(root / kind / name)
    return str(root)


def evaluate(model, data, out, said=None, max_pixels=10**6, **settings):
    config = EvaluationConfig.model_validate({"patch_size": 64, "bootstrap": 0} | settings)
    progress = Progress(Console(file=said))
    return evaluate_folder(
        model, data, str(out), config, classes=None, device="cpu", max_pixels=max_pixels, progress=progress
    )


def test_the_true_mask_alone_says_which_pixels_are_scored_and_shown(model, own_files, tmp_path):
    data = data_set(tmp_path / "data", 250)  # as bright as glass
    for mask in Path(data, "mask").iterdir():
        ids = np.full((32, 32), 2, np.uint8)
        ids[:, :8] = 1
        Image.fromarray(ids).save(mask)
    loaded = bundle.load(model, "cpu")
    rule = BackgroundRule(200, 50)
    uri = str(tmp_path / "model")
    bundle.save(
        uri, loaded.model, classes=CLASSES, patch_size=64, background=rule, evaluation=loaded.info["evaluation"]
    )
    evaluate(uri, data, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert np.array(found["confusion"]).sum() == 2 * 32 * 8
    picture = np.asarray(Image.open(tmp_path / "out" / "predictions.png").convert("RGB"))
    bare = (picture == 250).all(-1)
    _, truth, prediction = (
        bare[:, start : start + CELL] for start in range(MARGIN, 3 * (CELL + MARGIN), CELL + MARGIN)
    )
    assert truth.sum() == prediction.sum() > 0.7 * CELL**2


def test_a_report_goes_beside_the_users_files_and_leaves_no_other_folder(model, own_files, tmp_path):
    out, data = tmp_path / "out", data_set(tmp_path / "data")
    leftover = out / WORK / "another" / "images" / "part-00000.parquet"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"of a run that was killed")
    report = evaluate(model, data, out)
    assert report["images"] == 2
    assert json.loads((out / "metrics.json").read_text())["iou"] == report["iou"]
    assert [file.read_bytes() for file in own_files] == [b"the user's"] * 3
    assert sorted(item.name for item in out.iterdir()) == sorted([*RESULTS, "images", "img", "parts"])


def test_work_of_other_settings_that_can_not_be_deleted_ends_no_evaluation(model, own_files, tmp_path, monkeypatch):
    def refuse(uri):
        raise RefusedError("refuses access", file=uri)

    leftover = tmp_path / "out" / WORK / "another" / "images" / "part-00000.parquet"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"of a run that was killed")
    monkeypatch.setattr(storage, "remove_tree", refuse)
    assert evaluate(model, data_set(tmp_path / "data"), tmp_path / "out")["images"] == 2


def test_the_size_of_the_largest_image_that_is_scored_is_an_option(model, own_files, tmp_path, monkeypatch):
    data = data_set(tmp_path / "data")
    with pytest.raises(PistoSegError, match=r"more than the 1,000 px allowed.*--max-pixels"):
        evaluate(model, data, tmp_path / "out", max_pixels=1000)
    monkeypatch.setattr(cluster, "connected", lambda config: nullcontext())
    command = ["evaluate", "--model", model, "--data", data, "--out", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--protocol", "single-scale", "--max-pixels"]
    assert (main([*command, "1023"]), main([*command, "1024"])) == (2, 0)


@pytest.mark.parametrize(("value", "warned"), [(2, True), (255, True), (1, False)])
def test_masks_without_any_class_are_warned_of_and_leave_a_report_that_is_json(
    model, own_files, tmp_path, value, warned
):
    out, data, said = tmp_path / "out", data_set(tmp_path / "data", value), io.StringIO()
    evaluate(model, data, out, bootstrap=10, said=said)
    assert (f"no mask in {data} has a pixel of any class" in said.getvalue()) == warned

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    report = json.loads((out / "metrics.json").read_text(), parse_constant=refuse)
    assert (report["miou"] is None, report["confidence_interval_95"]["miou"] == [None, None]) == (warned, warned)


def test_a_class_that_no_mask_shows_is_said(model, own_files, tmp_path):
    said = io.StringIO()
    evaluate(model, data_set(tmp_path / "data", 1), tmp_path / "out", said=said)
    assert "no pixel of 'tumor' (id 0) in the masks, only of 'stroma' (id 1)" in said.getvalue()


def test_scores_are_titled_by_their_images_and_by_the_model_as_it_was_named(
    model, own_files, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cluster, "connected", lambda config: nullcontext())
    monkeypatch.chdir(Path(model).parent)
    data_set(tmp_path / "cohort [b]" / "2.validation")
    command = ["evaluate", "--model", "./model", "--data", str(tmp_path / "cohort [b]"), "--out", str(tmp_path / "out")]
    assert main([*command, "--device", "cpu", "--protocol", "single-scale"]) == 0
    printed, said = capsys.readouterr()
    assert "IoU on cohort [b] (2 images)" in " ".join(printed.split())  # a title is folded
    assert "./model" in printed
    assert f"the images of {tmp_path}/cohort [b]/2.validation are scored, the validation split of" in said


def test_a_run_that_was_taken_over_leaves_the_report_of_the_other_one_alone(model, own_files, tmp_path):
    def check():
        raise PistoSegError("another run took this over")

    classes = "classes.classes=[{name: tumor, color: [0, 64, 128]}, {name: stroma, color: [64, 128, 0]}]"
    scoring = "evaluation={protocol: single-scale, patch_size: 64, bootstrap: 0}"
    config = load_config("demo", overrides=["data.uri=/data", classes, "classes.background_id=2", scoring])
    out, images, progress = tmp_path / "report", str(tmp_path / "validation"), Progress(Console(file=io.StringIO()))
    out.mkdir()
    collect(data_set(tmp_path / "data"), images, CLASSES, max_pixels=10**6, actors=1, progress=progress)
    inputs = {
        "model": SimpleNamespace(path=lambda name: model),
        "validation": SimpleNamespace(uri=images, summary={"images": 2, "missing_images": []}),
    }
    results = [out / name for name in RESULTS]
    for file in results:
        file.write_bytes(b"the other run's")
    with pytest.raises(PistoSegError, match="another run took this over"):
        run(StageContext(config, str(out), inputs, progress, StageRun(), check=check))
    assert [file.read_bytes() for file in results] == [b"the other run's"] * 3


def test_a_report_names_its_model_without_a_secret(model, own_files, tmp_path, monkeypatch):
    secret = storage.name(model.removesuffix("/model"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    evaluate(model, data_set(tmp_path / "data"), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["model"] == model.replace(secret, "***")


@pytest.mark.parametrize("make", [str, data_set])
def test_an_evaluation_that_fails_deletes_nothing_and_keeps_the_earlier_report(model, own_files, tmp_path, make):
    out, data = tmp_path / "out", make(tmp_path / "data")
    earlier = [out / name for name in RESULTS]
    for file in earlier:
        file.write_bytes(b"the earlier report")
    for mask in Path(data).glob("mask/one.png"):
        mask.write_bytes(b"no picture")
    with pytest.raises(PistoSegError, match="data"):
        evaluate(model, data, out)
    assert [file.read_bytes() for file in own_files + earlier] == [b"the user's"] * 3 + [b"the earlier report"] * 3


def test_a_scoring_that_was_taken_over_leaves_report_and_work_of_the_other_one_alone(
    model, own_files, tmp_path, monkeypatch
):
    out, other = tmp_path / "out", tmp_path / "out" / WORK / "another" / "x"
    score = evaluation._Score.__call__

    def taken_over(self, number, shard, part):
        score(self, number, shard, part)
        other.parent.mkdir(parents=True)
        other.write_bytes(b"the other run's")
        monkeypatch.setattr(claims.Claim, "_holds", lambda claim: False)

    monkeypatch.setattr(evaluation._Score, "__call__", taken_over)
    with pytest.raises(PistoSegError, match="another run took this over"):
        evaluate(model, data_set(tmp_path / "data"), out)
    assert other.exists()
    assert not any((out / name).exists() for name in RESULTS)


@pytest.mark.parametrize(
    ("change", "again"),
    [("nothing", [1]), ("intervals", [1]), ("beside", [1]), ("model", [0, 1]), ("masks", [0, 1]), ("protocol", [0, 1])],
)
def test_an_interrupted_scoring_goes_on_unless_it_is_another(model, own_files, tmp_path, monkeypatch, change, again):
    data_set(tmp_path / "data" / "val")
    out, data = tmp_path / "out", str(tmp_path / "data")
    score, scored, interrupts = evaluation._Score.__call__, [], [KeyboardInterrupt]

    def interrupted(self, number, shard, part):
        if number == 1 and interrupts:
            raise interrupts.pop()
        scored.append(number)
        score(self, number, shard, part)

    monkeypatch.setattr(evaluation, "SHARD_IMAGES", 1)
    monkeypatch.setattr(evaluation._Score, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, data, out, symmetries=1)
    assert scored == [0]
    changes = {"protocol": {"protocol": "bcss-wsss"}, "intervals": {"bootstrap": 10}}
    settings = {"symmetries": 1} | changes.get(change, {})
    if change == "model":
        model = shutil.copytree(model, tmp_path / "other")
        (model / "model.json").write_text((model / "model.json").read_text() + "\n")
    if change == "masks":
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "data" / "val" / "mask" / "one.png")
    if change == "beside":
        (tmp_path / "data" / "training").mkdir()
        (tmp_path / "data" / "training" / "new[1,0].png").write_bytes(b"")
    scored.clear()
    report = evaluate(str(model), data, out, **settings)
    assert scored == again
    assert report == evaluate(str(model), data, tmp_path / "anew", **settings)
    assert not list(out.glob(".*"))


def test_of_two_runs_into_one_folder_the_second_waits(model, own_files, tmp_path, monkeypatch):
    out, data, said = tmp_path / "out", data_set(tmp_path / "data"), io.StringIO()
    with ExitStack() as first:
        first.enter_context(claims.claimed(str(out)))
        monkeypatch.setattr(claims.time, "sleep", lambda seconds: first.close())
        evaluate(model, data, out, said=said)
    assert f"waiting: process {os.getpid()} on" in said.getvalue()
    assert (out / "metrics.json").exists()
    assert not list(out.glob(".*"))


def test_scores_of_a_part_of_the_images_make_no_report(model, own_files, tmp_path, monkeypatch):
    out, data, run = tmp_path / "out", data_set(tmp_path / "data"), sharding.run_networks

    def deleted(worker, arguments, shards, folder, **_):
        run(worker, arguments, shards[:1], folder)

    monkeypatch.setattr(evaluation, "SHARD_IMAGES", 1)
    monkeypatch.setattr(sharding, "run_networks", deleted)
    with pytest.raises(PistoSegError, match="holds the scores of 1 images, and 2 are to be scored"):
        evaluate(model, data, out)
    assert not (out / "metrics.json").exists()


def test_folders_that_not_all_nodes_see_are_refused_before_anything_is_read(model, own_files, tmp_path, monkeypatch):
    out, data, asked = str(tmp_path / "scores"), data_set(tmp_path / "data"), []

    def refuse(written, read):
        asked.append((written, read))
        raise PistoSegError("node b does not see it", file=written)

    monkeypatch.setattr(cluster, "connected", lambda config: nullcontext())
    monkeypatch.setattr(placement, "check_shared", refuse)
    assert main(["evaluate", "--model", model, "--data", data, "--out", out]) == 2
    assert asked == [(out, {"--data": data, "--model": model})]
    assert not Path(out).exists()


def test_a_protocol_that_is_not_the_bundles_is_said(model, own_files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "connected", lambda config: nullcontext())
    command = ["evaluate", "--model", model, "--data", data_set(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main([*command, "--device", "cpu", "--protocol", "bcss-wsss"]) == 0
    said = capsys.readouterr().err
    assert "predicts by the evaluation section of the run that trained it (" in said
    assert "window gaussian, here mean" in said


def test_a_bundle_that_predicts_otherwise_than_it_is_scored_is_said_so_and_left_alone(model):
    config = EvaluationConfig.model_validate(
        {"protocol": "single-scale", "patch_size": 64, "stride": 64, "symmetries": 1}
    )
    assert other_protocol(model, config.model_copy(update={"bootstrap": 7})) is None
    before = bundle.fingerprint(model)
    said = other_protocol(model, config.model_copy(update={"symmetries": 8}))
    assert said.endswith("run that trained it (symmetries 1, here 8)")
    assert bundle.fingerprint(model) == before
