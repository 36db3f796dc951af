"""A small search as a user runs it: killed in a trial, run again, with settings that can't be trained among them."""

import json
import os
import sys

import pytest
import yaml
from conftest import NETWORK, TINY
from processes import Killer, kill_when

from pistoseg.artifacts import Workspace
from pistoseg.cli import main
from pistoseg.config import TrackingConfig, load_config
from pistoseg.graph import plan
from pistoseg.tracking import tracking_uri

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("local_ray")]
RATES = (1e-3, 1e-4)
SPACE = {
    "parameters": {
        "precise.lr": {"values": list(RATES)},
        "crops": {
            "options": [
                {"synthesis.crop_height": 16, "synthesis.n_h": 4},
                {"synthesis.crop_height": 512, "synthesis.n_h": 1},  # no training image is as large
            ]
        },
    }
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("search space")


@pytest.fixture(scope="module")
def command(workspace, cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    own = {"precise": NETWORK | {"epochs": 2, "patch_size": 64, "masks": "synthesized", "lr": RATES[0]}}
    own["synthesis"] = TINY["synthesis"] | {"mode": "streamed"}
    (folder / "own.yaml").write_text(yaml.safe_dump(TINY | own))
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE, sort_keys=False))
    arguments = ["search", "--space", str(folder / "space.yaml"), "--config", str(folder / "own.yaml")]
    data = os.path.relpath(cohort)  # trials run in folders of their own
    arguments += ["--data", data, "--workspace", str(workspace), "--name", "mine"]
    return [*arguments, "--algorithm", "grid", "--pruning", "none", "--confirm-seeds", "0"]


@pytest.fixture(scope="module")
def cut_off(workspace, command, tmp_path_factory):
    """The journal's second trial when the driver was killed in it."""
    file = workspace / "search" / "mine" / "trials" / "00001.json"

    def in_an_epoch():
        return file.exists() and bool(json.loads(file.read_text())["curve"])

    kill_when([sys.executable, "-m", "pistoseg", *command], tmp_path_factory.mktemp("log"), in_an_epoch)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def outcome(cut_off, command, workspace):
    """Exit code of the second run, of whose two trials at a time one loses its process, and what was there before."""
    before = {file: file.stat().st_mtime_ns for file in workspace.glob("*/*/manifest.json")}
    with Killer(b"ray::ImplicitFunc", lambda: True) as killer:
        code = main([*command, "--parallel", "2"])
    assert killer.killed, "a trial's process was to be killed"
    return code, before


@pytest.fixture(scope="module")
def trials(outcome, workspace):
    files = sorted((workspace / "search" / "mine" / "trials").glob("*.json"))
    return [json.loads(file.read_text()) for file in files]


def test_a_killed_search_goes_on_and_ends_by_itself(outcome, cut_off, trials):
    assert outcome[0] == 0
    assert cut_off["state"] == "running"
    assert [trial["number"] for trial in trials] == [0, 1, 2, 3]
    assert {trial["state"] for trial in trials} == {"finished", "failed"}
    assert trials[1]["overrides"] == cut_off["overrides"]


def test_settings_that_cant_be_trained_are_failed_trials_with_the_reason(trials):
    for trial in trials:
        huge = trial["overrides"].get("synthesis.crop_height") == 512
        assert (trial["state"] == "failed") == huge
        assert ("no single-tissue image" in (trial["reason"] or "")) == huge


def test_what_trials_share_is_computed_once_also_over_the_kill(outcome, workspace, trials):
    counts = {stage: len(list((workspace / stage).glob("*/manifest.json"))) for stage in ("patches", "precise")}
    assert counts == {"patches": 1, "precise": 2}
    assert all(file.stat().st_mtime_ns == before for file, before in outcome[1].items())
    finished = [trial for trial in trials if trial["state"] == "finished"]
    assert len({trial["artifacts"]["patches"] for trial in finished}) == 1
    assert all("patches" not in trial["computed"] for trial in finished)


def test_values_and_curves_are_those_of_the_trainings(workspace, trials):
    for trial in trials:
        if trial["state"] == "finished":
            folder = workspace / "evaluation" / trial["artifacts"]["evaluation"]
            assert trial["value"] == json.loads((folder / "metrics.json").read_text())["miou"]
            epochs = json.loads((workspace / "precise" / trial["artifacts"]["precise"] / "epochs.json").read_text())
            rows = {row["epoch"] + 1: row["validation_miou"] for row in epochs}
            assert dict(map(tuple, trial["curve"])) == pytest.approx(rows)


def test_the_best_config_is_one_whose_every_stage_the_search_has_computed(outcome, workspace, trials, cohort):
    folder = workspace / "search" / "mine"
    best = max((trial for trial in trials if trial["state"] == "finished"), key=lambda trial: trial["value"])
    config = load_config(file=str(folder / "best.yaml"), overrides=(f"data.uri={cohort}",))
    found = {step.stage.name: step.find(Workspace(str(workspace))) for step in plan(config, ("evaluation",))}
    assert {name: item and item.fingerprint for name, item in found.items()} == best["artifacts"]
    assert config.precise.lr == best["overrides"].get("precise.lr", RATES[0])
    assert {"report.md", "trials.csv"} <= {file.name for file in folder.iterdir()}
    assert f"Best: trial {best['number']}" in (folder / "report.md").read_text()


def test_mlflow_has_the_search_a_run_per_trial_and_no_open_run(outcome, workspace, trials):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri(TrackingConfig(), Workspace(str(workspace))))
    experiment = client.get_experiment_by_name("pistoseg")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.info.run_name == "search mine"]
    children = {
        run.data.tags["pistoseg.trial"]: run
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id and "pistoseg.trial" in run.data.tags
    }
    assert len(children) == 4
    assert {run.info.status for run in runs} <= {"FINISHED", "FAILED"}
    for trial in trials:
        run = children[str(trial["number"])]
        assert run.data.tags["pistoseg.state"] == trial["state"]
        if trial["state"] == "finished":
            assert run.data.metrics["miou"] == pytest.approx(trial["value"])
            assert run.data.tags["pistoseg.shared.patches"] == trial["artifacts"]["patches"]
            history = client.get_metric_history(run.info.run_id, "objective")
            assert {item.step: item.value for item in history} == pytest.approx(dict(map(tuple, trial["curve"])))
        else:
            assert "no single-tissue image" in run.data.tags["pistoseg.reason"]
    assert {"report.md", "best.yaml", "trials.csv"} <= {f.path for f in client.list_artifacts(parent.info.run_id)}
