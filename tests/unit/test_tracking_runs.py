"""What a run's settings, scores and end are in MLflow, whatever its classes are called and whatever is refused."""

import json
import shutil

import pytest
from mlflow.tracking import MlflowClient

from pistoseg.artifacts import Workspace
from pistoseg.config import TrackingConfig, load_config
from pistoseg.tracking import Tracker, batch_run


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """An empty database, whose making takes a second."""
    file = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def place(tmp_path, database, monkeypatch):
    """Gives the workspace of a name."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def make(name):
        (tmp_path / name).mkdir()
        shutil.copy(database, tmp_path / name)
        return Workspace(str(tmp_path / name))

    return make


@pytest.fixture
def workspace(place):
    return place("w")


def runs_of(workspace):
    """The workspace's MLflow runs by name."""
    client = MlflowClient(f"sqlite:///{workspace.root}/mlflow.db")
    experiment = client.get_experiment_by_name("pistoseg")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_a_class_may_have_any_name_where_settings_name_it(workspace, capsys):
    names = {"tumor (invasive)": 0.5, "CD3+": 0.25, "CD3&": 0.75}
    classes = [{"name": name, "color": [number, 0, 0]} for number, name in enumerate(names)]
    overrides = [f"classes.classes={json.dumps(classes)}", f"synthesis.class_sampling={json.dumps(names)}"]
    config = load_config("demo", overrides=overrides)
    with Tracker.start(config, workspace, name="whole") as tracker:
        with tracker.stage("synthesis", "0" * 16, {"class_sampling": names}, {}) as stage:
            stage.params({"synthesis.class_sampling": {"CD3+": 1}})
        tracker.run().metrics({"miou": 0.5})
    runs = runs_of(workspace)
    kept = {"class_sampling.tumor _invasive_": "0.5", "class_sampling.CD3_": "0.25", "class_sampling.CD3__2": "0.75"}
    assert runs["synthesis"].data.params == {**kept, "synthesis.class_sampling.CD3_": "1"}
    assert {f"synthesis.{key}": value for key, value in kept.items()}.items() <= runs["whole"].data.params.items()
    assert runs["whole"].data.metrics == {"miou": 0.5}
    assert "goes on without it" not in capsys.readouterr().out


def test_every_class_has_its_score_whatever_it_is_called(workspace, capsys):
    names = ["a", "x//y", "a/", "../a", "./b", "a+b", "a&b", "Tumör²", "腫瘍"]
    with batch_run(TrackingConfig(), workspace, "scores", {}) as run:
        run.metrics({f"iou/{name}": number for number, name in enumerate(names)})
    kept = ["a", "x/_/y", "a/_", "_/a", "_/b", "a_b", "a_b_2", "Tumör²", "腫瘍"]
    assert runs_of(workspace)["scores"].data.metrics == {f"iou/{name}": number for number, name in enumerate(kept)}
    assert capsys.readouterr().out == ""


def test_a_run_of_which_something_is_refused_is_ended(workspace, capsys):
    config, start = load_config("demo"), Tracker.start
    with start(config, workspace, name="whole") as tracker, tracker.stage("patches", "0" * 16, {"a": 1}, {}) as stage:
        stage.params({"a": 2})
    with batch_run(TrackingConfig(), workspace, "batch", {}) as run:
        run.metrics({"m" * 300: 1.0})
    with batch_run(TrackingConfig(), workspace, "params", {"p" * 300: 1}):
        pass
    with start(config, workspace, name="other") as tracker, tracker.stage("cams", "0" * 16, {"p" * 300: 1}, {}):
        pass
    names = ("whole", "patches", "batch", "params", "other", "cams")
    assert {name: run.info.status for name, run in runs_of(workspace).items()} == dict.fromkeys(names, "FINISHED")
    assert capsys.readouterr().out.count("goes on without it") == 4


def test_a_machine_without_git_keeps_a_runs_scores(workspace, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with batch_run(TrackingConfig(), workspace, "scores", {}) as run:
        run.metrics({"miou": 0.5})
    assert runs_of(workspace)["scores"].data.metrics == {"miou": 0.5}


def test_two_workspaces_at_a_time_in_one_process_keep_their_runs_apart(place):
    one, two = place("one"), place("two")
    with batch_run(TrackingConfig(), one, "one", {}), batch_run(TrackingConfig(), two, "two", {}):
        pass
    assert (list(runs_of(one)), list(runs_of(two))) == (["one"], ["two"])


def test_the_users_server_stays_that_of_all_workspaces(place, monkeypatch):
    one, two, users = place("one"), place("two"), place("users")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{users.root}/mlflow.db")
    with batch_run(TrackingConfig(), one, "one", {}), batch_run(TrackingConfig(), two, "two", {}):
        pass
    assert set(runs_of(users)) == {"one", "two"}
