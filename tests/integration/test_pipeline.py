"""The whole pipeline as a user runs it: one command, its files, its MLflow runs, and what a second run does."""

import json
import shutil

import numpy as np
import pytest
from conftest import SIZE, TRAIN_STAGES, committed, contents
from PIL import Image

import pistoseg
from pistoseg import parquet
from pistoseg.cli import main
from pistoseg.patches.background import BackgroundRule
from pistoseg.patches.decode import decode_ids, decode_png
from pistoseg.tracking import default_server

EVERY_STAGE = ("precise.masks=refined_cnn", "cams.method=sc_cam", "cams.subcategories=2")

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, cohort, tiny, local_ray):
    folder = tmp_path_factory.mktemp("work space")
    assert train(folder, cohort, tiny) == 0
    return folder


def train(workspace, cohort, tiny, *settings):
    arguments = ["train", "--config", str(tiny), "--data", str(cohort), "--workspace", str(workspace)]
    for setting in (*EVERY_STAGE, *settings):
        arguments += ["--set", setting]
    return main(arguments)


@pytest.fixture(scope="module")
def artifacts(workspace):
    return committed(workspace)


def client_of(workspace):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{workspace / 'mlflow.db'}")


@pytest.fixture(scope="module")
def client(workspace):
    return client_of(workspace)


def runs(client):
    experiment = client.get_experiment_by_name("pistoseg")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])


def summary(folder):
    return json.loads((folder / "manifest.json").read_text())["summary"]


def test_every_stage_leaves_one_finished_artifact(artifacts):
    assert set(artifacts) == set(TRAIN_STAGES)
    assert summary(artifacts["patches"])["images"] == 40
    assert summary(artifacts["patches"])["rejected"] == 0
    assert summary(artifacts["validation"])["images"] == 4


def test_the_model_is_used_in_three_lines(artifacts, cohort):
    image = sorted((cohort / "2.validation" / "img").iterdir())[0]
    model = pistoseg.load(str(artifacts["precise"] / "bundle"))
    mask = model.predict(str(image))
    assert (mask.shape, mask.dtype) == ((96, 96), np.uint8)
    glass = BackgroundRule(215, 50)(np.asarray(Image.open(image)))
    assert glass.any()
    assert np.array_equal(mask == model.classes.background_id, glass)
    assert mask[~glass].max() < 5
    assert model.classes.names == ["tumor", "stroma", "lymphocytes", "necrosis", "alveoli"]
    assert model.info["scale"]["mpp"] == 0.5
    assert model.background == BackgroundRule(215, 50)


def test_training_leaves_its_curve_and_no_checkpoints(artifacts):
    for stage, epochs in (("preliminary", 1), ("precise", 2)):
        rows = json.loads((artifacts[stage] / "epochs.json").read_text())
        assert [row["epoch"] for row in rows] == list(range(epochs))
        assert all(np.isfinite(row["loss"]) and 0 <= row["validation_miou"] <= 1 for row in rows)
        assert sorted(item.name for item in artifacts[stage].iterdir()) == ["bundle", "epochs.json", "manifest.json"]
    lrs = [row["lr"] for row in json.loads((artifacts["precise"] / "epochs.json").read_text())]
    assert lrs == pytest.approx([1e-3, 0.7e-3])


def test_pseudo_masks_keep_to_the_image_level_labels(artifacts):
    table = parquet.read(str(artifacts["pseudo_masks"] / "masks"))
    assert table.num_rows == 40
    for name, png, logits in zip(*(table[key].to_pylist() for key in ("name", "png", "scores")), strict=True):
        flags = json.loads(name[name.rindex("[") : name.rindex("]") + 1])
        mask = decode_ids(png)
        assert mask.shape == (SIZE, SIZE)
        assert set(np.unique(mask)) <= {number for number, flag in enumerate(flags) if flag} | {5}
        assert len(logits) == 5 * 16 * 16 * 2


def test_refined_masks_keep_to_the_image_level_labels(artifacts):
    table = parquet.read(str(artifacts["refined_masks"] / "masks"))
    assert table.num_rows == 40
    for row in table.to_pylist():
        flags = json.loads(row["name"][row["name"].rindex("[") : row["name"].rindex("]") + 1])
        allowed = {number for number, flag in enumerate(flags) if flag}
        for kind in ("pseudo", "cam", "cnn"):
            scores = np.frombuffer(row[f"scores_{kind}"], np.float16).reshape(5, 16, 16)
            assert np.isfinite(scores).all()
            assert set(np.unique(decode_ids(row[f"png_{kind}"]))) <= allowed | {5}
            if len(allowed) == 1:
                assert set(row[f"confidence_{kind}"]) == {255}


def test_the_cam_network_says_what_it_thinks_of_every_labelled_window(artifacts):
    table = parquet.read(str(artifacts["classifier"] / "windows"))
    assert table["window"].to_pylist() == list(range(40))
    probabilities = np.array(table["probabilities"].to_pylist())
    assert probabilities.shape == (40, 5)
    assert ((probabilities > 0) & (probabilities < 1)).all()
    header = (artifacts["classifier"] / "contradictions.csv").read_text().splitlines()[0]
    assert header.replace('"', "") == "name,x,y,width,height,class,label,probability"
    rows = json.loads((artifacts["classifier"] / "epochs.json").read_text())
    assert {"validation_map", "validation_f1"} <= set(rows[-1])


def test_the_masks_of_every_stage_are_scored_where_their_truth_is_known(workspace, artifacts, cohort, tmp_path, capsys):
    arguments = ["evaluate", "--stage", "all", "--workspace", str(workspace), "--data", str(cohort / "training-masks")]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "mIoU" in capsys.readouterr().out
    report = json.loads((tmp_path / "mask_scores.json").read_text())
    refined = f"refined_masks/{artifacts['refined_masks'].name}"
    expected = {f"{stage}/{artifacts[stage].name}" for stage in ("pseudo_masks", "cams")}
    assert set(report) == expected | {f"{refined}/{kind}" for kind in ("pseudo", "cam", "cnn")}
    for scores in report.values():
        assert scores["images"] == 40
        assert scores["miou"] > 0.3  # the labels alone get that far: most images show one tissue


def test_the_scores_are_complete(artifacts):
    report = json.loads((artifacts["evaluation"] / "metrics.json").read_text())
    assert (report["images"], report["complete"], report["protocol"]) == (4, True, "single-scale")
    assert set(report["iou"]) == {"tumor", "stroma", "lymphocytes", "necrosis", "alveoli"}
    known = [value for value in report["iou"].values() if value is not None]
    assert report["miou"] == pytest.approx(np.mean(known))
    low, high = report["confidence_interval_95"]["miou"]
    assert 0 <= low <= high <= 1
    rows = (artifacts["evaluation"] / "per_image.csv").read_text().splitlines()
    assert len(rows) == 1 + 4


def test_pictures_can_be_looked_at(artifacts):
    for name in (
        "synthesis/preview.png",
        "pseudo_masks/masks.png",
        "cams/masks.png",
        "refined_masks/masks.png",
        "preliminary_evaluation/predictions.png",
        "evaluation/predictions.png",
    ):
        stage, file = name.split("/")
        with Image.open(artifacts[stage] / file) as picture:
            assert min(picture.size) > 100, name
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50, name


def test_a_run_with_a_child_for_every_stage_is_tracked(client, artifacts):
    parents = [run for run in runs(client) if "mlflow.parentRunId" not in run.data.tags]
    first = parents[0]
    children = [run for run in runs(client) if run.data.tags.get("mlflow.parentRunId") == first.info.run_id]
    assert [run.data.tags["pistoseg.stage"] for run in children] == TRAIN_STAGES
    assert {run.info.status for run in (first, *children)} == {"FINISHED"}
    report = json.loads((artifacts["evaluation"] / "metrics.json").read_text())
    assert first.data.metrics["miou"] == pytest.approx(report["miou"])
    assert "preliminary_miou" in first.data.metrics
    assert first.data.params["precise.encoder"] == "tu-mobilenetv3_small_050"
    precise = next(run for run in children if run.data.tags["pistoseg.stage"] == "precise")
    assert precise.data.tags["pistoseg.input.masks"] == f"refined_masks/{artifacts['refined_masks'].name}"
    history = client.get_metric_history(precise.info.run_id, "loss")
    rows = json.loads((artifacts["precise"] / "epochs.json").read_text())
    by_step = {item.step: item.value for item in history}
    assert {step: by_step[step] for step in (0, 1)} == pytest.approx({row["epoch"]: row["loss"] for row in rows})
    pictures = next(run for run in children if run.data.tags["pistoseg.stage"] == "pseudo_masks")
    names = {item.path for item in client.list_artifacts(pictures.info.run_id)}
    assert names == {"manifest.json", "masks.png"}


def test_the_precise_model_is_a_registered_version_with_a_signature(workspace, client, artifacts, cohort):
    import mlflow

    version = client.search_model_versions("name='pistoseg'")[-1]
    assert version.tags["pistoseg.fingerprint"] == artifacts["precise"].name
    assert version.tags["pistoseg.bundle"] == str(artifacts["precise"] / "bundle")
    assert version.tags["pistoseg.input.patches"] == f"patches/{artifacts['patches'].name}"
    with default_server(f"sqlite:///{workspace / 'mlflow.db'}"):
        model = mlflow.pyfunc.load_model(f"models:/pistoseg/{version.version}")
    assert "uint8" in str(model.metadata.signature.inputs)
    file = sorted((cohort / "2.validation" / "img").iterdir())[0]
    image = np.asarray(Image.open(file))
    (mask,) = model.predict(image[None])
    assert np.array_equal(mask, pistoseg.load(str(artifacts["precise"] / "bundle")).predict(image))


def test_evaluate_repeats_the_scores_of_the_pipeline(artifacts, cohort, tmp_path, capsys):
    out = tmp_path / "report"
    arguments = ["--model", str(artifacts["precise"] / "bundle"), "--data", str(cohort / "2.validation")]
    assert main(["evaluate", *arguments, "--out", str(out), "--device", "cpu"]) == 0
    assert str(out / "metrics.json") in capsys.readouterr().out
    report = json.loads((out / "metrics.json").read_text())
    expected = json.loads((artifacts["evaluation"] / "metrics.json").read_text())
    for key in ("miou", "fwiou", "iou", "images", "protocol", "settings", "complete"):
        assert report[key] == expected[key], key
    assert sorted(item.name for item in out.iterdir()) == ["metrics.json", "per_image.csv", "predictions.png"]


def test_a_mask_without_its_image_makes_a_report_incomplete(artifacts, cohort, tmp_path, capsys):
    data = tmp_path / "data"
    images, masks = (sorted((cohort / "2.validation" / kind).iterdir()) for kind in ("img", "mask"))
    for kind, files in (("img", images[:3]), ("mask", masks)):
        (data / kind).mkdir(parents=True)
        for file in files:
            (data / kind / file.name).write_bytes(file.read_bytes())
    out = tmp_path / "report"
    arguments = ["--model", str(artifacts["precise"] / "bundle"), "--data", str(data), "--out", str(out)]
    assert main(["evaluate", *arguments, "--protocol", "bcss-wsss"]) == 0
    report = json.loads((out / "metrics.json").read_text())
    assert (report["complete"], report["images"], report["protocol"]) == (False, 3, "bcss-wsss")
    assert [name for name in report["missing_images"] if images[3].stem in name]
    captured = capsys.readouterr()
    assert "names 1 images that are not there" in captured.err


def test_a_damaged_mask_ends_an_evaluation_with_its_name(artifacts, cohort, tmp_path, capsys):
    data = tmp_path / "data"
    for kind in ("img", "mask"):
        (data / kind).mkdir(parents=True)
        for file in sorted((cohort / "2.validation" / kind).iterdir())[:2]:
            (data / kind / file.name).write_bytes(file.read_bytes())
    bad = sorted((data / "mask").iterdir())[1]
    bad.write_bytes(bad.read_bytes()[:60])
    arguments = ["--model", str(artifacts["precise"] / "bundle"), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main(["evaluate", *arguments]) == 2
    message = capsys.readouterr().err
    assert bad.name in message
    assert "Traceback" not in message
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_sheet_of_mosaics_is_drawn_without_training(cohort, tiny, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    arguments = ["synthesize", "--config", str(tiny), "--data", str(cohort), "--workspace", str(tmp_path / "w")]
    assert main([*arguments, "--preview", "4", "--out", str(out), "--set", "tracking.enabled=false"]) == 0
    assert min(decode_png(out.read_bytes()).shape[:2]) > 100
    assert set(committed(tmp_path / "w")) == {"patches"}


def test_the_same_command_again_computes_nothing(workspace, artifacts, client, cohort, tiny):
    before = {stage: contents(folder) for stage, folder in artifacts.items()}
    versions = client.search_model_versions("name='pistoseg'")
    assert train(workspace, cohort, tiny) == 0
    assert {stage: contents(folder) for stage, folder in artifacts.items()} == before
    assert committed(workspace) == artifacts
    last = next(run for run in reversed(runs(client)) if "mlflow.parentRunId" not in run.data.tags)
    reused = {stage: last.data.tags.get(f"pistoseg.reused.{stage}") for stage in TRAIN_STAGES}
    assert reused == {stage: folder.name for stage, folder in artifacts.items()}
    assert not [run for run in runs(client) if run.data.tags.get("mlflow.parentRunId") == last.info.run_id]
    assert "miou" in last.data.metrics
    assert len(client.search_model_versions("name='pistoseg'")) == len(versions)


def test_a_changed_learning_rate_retrains_only_the_model_that_it_belongs_to(workspace, cohort, tiny, tmp_path):
    copied = shutil.copytree(workspace, tmp_path / "copied")  # other tests count what the first run left
    artifacts = committed(copied)
    before = {stage: contents(folder) for stage, folder in artifacts.items()}
    assert train(copied, cohort, tiny, "precise.lr=0.002", "precise.epochs=1") == 0
    assert {stage: contents(folder) for stage, folder in artifacts.items()} == before
    folders = {stage: sorted(item.name for item in (copied / stage).iterdir()) for stage in TRAIN_STAGES}
    twice = {stage for stage, keys in folders.items() if len(keys) == 2}
    assert twice == {"precise", "evaluation"}
    assert len(client_of(copied).search_model_versions("name='pistoseg'")) == 2
