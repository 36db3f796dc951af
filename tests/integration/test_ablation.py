"""A small ablation as a user runs it: its files, what its rows share, its MLflow runs, and a row that fails."""

import json

import pytest

from pistoseg.cli import main
from pistoseg.search.tables import TABLES, Row, Table

pytestmark = pytest.mark.usefixtures("local_ray")
LABELS = ("rough", "exact", "huge crops")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("ablation space")


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """Where the second run writes its table."""
    return tmp_path_factory.mktemp("again")


@pytest.fixture(scope="module")
def outcome(workspace, again, cohort, tiny):
    """Exit codes of two runs of three rows, of which one has crops that no training image is large enough for."""
    huge = {"synthesis.crop_height": 512, "synthesis.crop_width": 512, "synthesis.n_h": 1, "synthesis.n_w": 1}
    settings = ({"evaluation.bootstrap": 20}, {"evaluation.bootstrap": 40}, huge)
    rows = tuple(Row(label, overrides) for label, overrides in zip(LABELS, settings, strict=True))
    arguments = ["--config", str(tiny), "--data", str(cohort), "--workspace", str(workspace)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TABLES, "own", Table("own", "Own rows", rows))
        command = ["ablate", "own", *arguments, "--set", "precise.epochs=1", "--set", "precise.masks=synthesized"]
        return [main(command), main([*command, "--out", str(again)])]


@pytest.fixture(scope="module")
def values(outcome, workspace):
    return json.loads((workspace / "ablations" / "own" / "ablation.json").read_text())


@pytest.fixture(scope="module")
def runs(outcome, workspace):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{workspace / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("pistoseg")
    return client, client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])


def test_a_failed_row_sets_the_exit_code_and_has_its_reason_in_the_table(outcome, values, workspace):
    assert outcome == [2, 2]
    problems = [row["runs"][0]["problem"] for row in values["rows"]]
    assert problems[:2] == [None, None]
    assert "no single-tissue image of at least half of 512x512 px" in problems[2]
    assert "| huge crops (failed) |" in (workspace / "ablations" / "own" / "ablation.md").read_text()


def test_rows_share_their_upstream_artifacts(outcome, values, workspace):
    counts = {stage: len(list((workspace / stage).glob("*/manifest.json"))) for stage in ("patches", "synthesis")}
    assert counts == {"patches": 1, "synthesis": 1}
    rough, exact, _ = (row["runs"][0] for row in values["rows"])
    assert set(rough["computed"]) == {"synthesis", "precise", "evaluation"}
    assert set(exact["computed"]) == {"evaluation"}
    assert exact["artifacts"]["precise"] == rough["artifacts"]["precise"]
    assert exact["artifacts"]["evaluation"] != rough["artifacts"]["evaluation"]


def test_scores_are_those_of_the_evaluations(values, workspace):
    for row in values["rows"][:2]:
        file = workspace / "evaluation" / row["runs"][0]["artifacts"]["evaluation"] / "metrics.json"
        metrics = json.loads(file.read_text())
        assert row["mean"]["miou"] == metrics["miou"]
        assert row["mean"]["iou/tumor"] == metrics["iou"]["tumor"]


def test_the_rows_are_children_of_the_ablations_run_which_has_the_table(values, runs):
    client, found = runs
    (parent, second) = [run for run in found if run.info.run_name == "ablation own"]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    status = {run.info.run_name: run.info.status for run in children}
    names = [f"{label}, seed 0" for label in LABELS]
    assert status == dict(zip(["images", *names], ["FINISHED"] * 3 + ["FAILED"], strict=True))
    mean = values["rows"][0]["mean"]["miou"]
    assert parent.data.metrics["rough/miou"] == pytest.approx(mean)
    assert second.data.metrics["rough/miou"] == pytest.approx(mean)
    files = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert files == {"ablation.json", "ablation.csv", "ablation.md"}
    stages = {run.info.run_name for run in found if run.data.tags.get("mlflow.parentRunId") == children[1].info.run_id}
    assert stages == {"synthesis", "precise", "evaluation"}


def test_models_that_are_only_compared_are_not_registered(runs):
    client, _ = runs
    assert client.search_model_versions("name='pistoseg'") == []


def test_the_same_command_again_computes_nothing(outcome, values, again):
    second = json.loads((again / "ablation.json").read_text())
    assert [row["runs"][0]["computed"] for row in second["rows"]] == [{}, {}, {}]
    assert [row["mean"] for row in second["rows"]] == [row["mean"] for row in values["rows"]]
