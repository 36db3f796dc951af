import json
import os
from types import SimpleNamespace

import pytest

from pistoseg import artifacts
from pistoseg.artifacts import Workspace, fingerprint
from pistoseg.config import load_config
from pistoseg.errors import PistoSegError
from pistoseg.graph import BY_NAME, needed
from pistoseg.tracking import default_server

BASE = ("precise", 1, {"lr": 0.1, "seed": 0}, {"patches": "aa", "masks": "bb"})


def test_fingerprint_is_stable_and_independent_of_the_order_of_keys():
    assert fingerprint(*BASE) == fingerprint("precise", 1, {"seed": 0, "lr": 0.1}, {"masks": "bb", "patches": "aa"})
    assert len(fingerprint(*BASE)) == 16
    assert int(fingerprint(*BASE), 16) >= 0


@pytest.mark.parametrize(
    "changed",
    [
        ("preliminary", *BASE[1:]),
        ("precise", 2, *BASE[2:]),
        (*BASE[:2], {"lr": 0.2, "seed": 0}, BASE[3]),
        (*BASE[:2], {"lr": 0.1, "seed": 0, "more": None}, BASE[3]),
        (*BASE[:3], {"patches": "aa", "masks": "bc"}),
        (*BASE[:3], {"patches": "bb", "masks": "aa"}),
    ],
)
def test_any_other_setting_input_stage_or_version_is_another_fingerprint(changed):
    assert fingerprint(*changed) != fingerprint(*BASE)


def test_settings_without_a_json_form_are_no_fingerprint():
    with pytest.raises(ValueError, match="JSON"):
        fingerprint("x", 1, {"lr": float("nan")}, {})


def commit(workspace, stage="patches", key="0123456789abcdef", **named):
    given = {"version": 1, "settings": {"a": 1}, "inputs": {}, "summary": {"images": 3}, "seconds": 1.26}
    return workspace.commit(stage, key, **given | named)


@pytest.mark.parametrize("root", ["local", "memory://pistoseg-artifacts"])
def test_an_artifact_is_found_after_its_commit_and_not_before(root, tmp_path):
    workspace = Workspace(str(tmp_path / "work space [1]") if root == "local" else root)
    assert workspace.find("patches", "0123456789abcdef") is None
    made = commit(workspace)
    found = workspace.find("patches", "0123456789abcdef")
    assert found == made
    assert found.summary == {"images": 3}
    assert workspace.find("patches", "0" * 16) is None


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path):
    workspace = Workspace(str(tmp_path))
    folder = tmp_path / "patches" / "0123456789abcdef" / "images"
    folder.mkdir(parents=True)
    (folder / "part-00000.parquet").write_bytes(b"half")
    assert workspace.find("patches", "0123456789abcdef") is None


@pytest.mark.parametrize("content", [b'{"stage": "patches", "fing', b"\xff\xfe\x00"])
def test_a_damaged_manifest_is_named_with_the_way_out(tmp_path, monkeypatch, content):
    monkeypatch.setattr(artifacts, "SETTLE_S", 0.0)
    workspace = Workspace(str(tmp_path))
    made = commit(workspace)
    manifest = tmp_path / "patches" / made.fingerprint / "manifest.json"
    manifest.write_bytes(content)
    with pytest.raises(PistoSegError, match=r"is damaged.*delete that folder and run again") as caught:
        workspace.find("patches", made.fingerprint)
    assert caught.value.file == str(manifest)


def test_a_manifest_that_is_just_being_written_is_not_damaged(tmp_path, monkeypatch):
    workspace = Workspace(str(tmp_path))
    made = commit(workspace)
    manifest = tmp_path / "patches" / made.fingerprint / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:40])
    monkeypatch.setattr(artifacts, "time", SimpleNamespace(sleep=lambda seconds: manifest.write_bytes(whole)))
    assert workspace.find("patches", made.fingerprint) == made


def test_the_manifest_says_what_it_was_made_from(tmp_path):
    workspace = Workspace(str(tmp_path))
    patches = commit(workspace)
    commit(workspace, "synthesis", "f" * 16, inputs={"patches": patches}, settings={"count": 4}, version=3)
    manifest = json.loads((tmp_path / "synthesis" / ("f" * 16) / "manifest.json").read_text())
    assert manifest["inputs"] == {"patches": {"stage": "patches", "fingerprint": "0123456789abcdef"}}
    assert (manifest["settings"], manifest["format"], manifest["stage"]) == ({"count": 4}, 3, "synthesis")
    assert manifest["seconds"] == 1.3


def settings(stage, *overrides):
    return BY_NAME[stage].settings(load_config("wsss4luad", overrides=list(overrides)))


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("synthesis", "synthesis.alpha=0.3"),
        ("synthesis", "seed=1"),
        ("synthesis", "data.background_grey=210"),
        ("preliminary", "preliminary.lr=0.01"),
        ("preliminary", "compute.train_workers=2"),
        ("pseudo_masks", "pseudo_masks.constrain=false"),
        ("precise", "precise.augmentation.stain=0"),
        ("evaluation", "evaluation.scales=[1]"),
    ],
)
def test_a_stage_depends_on_the_settings_that_it_reads(stage, override):
    assert settings(stage) != settings(stage, override)


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("synthesis", "precise.lr=0.01"),
        ("preliminary", "precise.lr=0.01"),
        ("preliminary", "compute.workers=3"),
        ("precise", "preliminary.lr=0.01"),  # comes in through the masks, if at all
        ("pseudo_masks", "evaluation.bootstrap=0"),
        ("evaluation", "tracking.experiment=other"),
    ],
)
def test_a_stage_does_not_depend_on_other_settings(stage, override):
    assert settings(stage) == settings(stage, override)


@pytest.mark.parametrize("stage", ["preliminary", "classifier", "refiner", "precise"])
def test_a_stage_depends_on_the_file_of_its_weights(stage, tmp_path):
    file = tmp_path / "encoder.pth"
    override = f"{stage}.weights={file}"
    assert settings(stage, override) == settings(stage, override), "who builds the encoder says that it is missing"
    found = []
    for content in (b"first", b"second"):
        file.write_bytes(content)
        found.append(settings(stage, override))
    assert found[0] != found[1]
    file.write_bytes(b"third.")  # of the same size
    os.utime(file, ns=(1, 1))
    assert settings(stage, override) != found[1]
    for name in ("imagenet", "none", "null"):
        assert "weights_file" not in settings(stage, f"{stage}.weights={name}")


def test_streamed_mosaics_have_no_count_to_depend_on():
    streamed = "synthesis.mode=streamed"
    assert settings("synthesis", streamed) == settings("synthesis", streamed, "synthesis.count=7")
    assert settings("synthesis") != settings("synthesis", "synthesis.count=7")


def names(*targets, **sections):
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in sections.items()]
    return [stage.name for stage in needed(load_config("glas", overrides=overrides), targets)]


def test_only_the_stages_that_lead_to_the_targets_run():
    assert names("patches") == ["patches"]
    assert names("synthesis") == ["patches", "synthesis"]
    everything = names("evaluation", "preliminary_evaluation", precise__masks="refined_cnn", cams__method="sc_cam")
    assert everything == [name for name in BY_NAME if name != "label_scores"], "which is for images that are held out"
    plain = names("evaluation", "preliminary_evaluation", precise__masks="refined_cam", cams__method="cam")
    assert plain == [name for name in everything if name != "subcategories"]
    unrefined = names("evaluation", precise__masks="cam")
    assert unrefined == ["patches", "validation", "classifier", "cams", "precise", "evaluation"]
    mosaics_only = names("evaluation", precise__masks="synthesized")
    assert mosaics_only == ["patches", "validation", "synthesis", "precise", "evaluation"]


def test_two_workspaces_in_one_process_keep_their_runs_apart(tmp_path, put_database, monkeypatch):
    from mlflow.tracking import MlflowClient

    from pistoseg.tracking import Tracker

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("first", "second"):
        put_database(tmp_path / name)
        with Tracker.start(load_config("demo"), Workspace(str(tmp_path / name)), name=name):
            pass
        assert "MLFLOW_TRACKING_URI" not in os.environ
        client = MlflowClient(f"sqlite:///{tmp_path / name / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("pistoseg")
        assert [run.info.run_name for run in client.search_runs([experiment.experiment_id])] == [name]


def test_pipelines_that_overlap_leave_mlflows_default_as_it_was(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first, second = (default_server(f"sqlite:///{name}.db") for name in "ab")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert os.environ["MLFLOW_TRACKING_URI"] == "sqlite:///b.db"
    second.__exit__(None, None, None)
    assert "MLFLOW_TRACKING_URI" not in os.environ
