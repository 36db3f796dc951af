"""What a run's settings, scores and end are in MLflow, whatever its classes are called and whatever is refused."""

import json
import shutil

import pytest
import requests
from mlflow.tracking import MlflowClient

from pistoseg import storage
from pistoseg.artifacts import Artifact, Workspace
from pistoseg.config import TrackingConfig, load_config
from pistoseg.tracking import Tracker, batch_run


@pytest.fixture
def place(tmp_path, put_database, monkeypatch):
    """Gives the workspace of a name."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def make(name):
        (tmp_path / name).mkdir()
        put_database(tmp_path / name)
        return Workspace(str(tmp_path / name))

    return make


@pytest.fixture
def workspace(place):
    return place("w")


def runs_of(workspace, experiment="pistoseg"):
    """The runs of an experiment in the workspace's database, by name."""
    client = MlflowClient(f"sqlite:///{workspace.root}/mlflow.db")
    found = client.get_experiment_by_name(experiment)
    return {run.info.run_name: run for run in client.search_runs([found.experiment_id])}


def test_a_pipelines_run_has_the_scores_of_its_models_by_masks_and_by_labels(workspace):
    scores = {"preliminary_evaluation": {"miou": 0.25}, "evaluation": {"miou": 0.5}}
    scores["label_scores"] = {"label_iou": 0.75}
    artifacts = {
        stage: Artifact(stage, "0" * 16, f"{workspace.root}/{stage}", {"summary": {"metrics": metrics}})
        for stage, metrics in scores.items()
    }
    with Tracker.start(load_config("demo"), workspace, name="whole") as tracker:
        tracker.finish(artifacts)
    found = runs_of(workspace)["whole"].data.metrics
    assert found == {"preliminary_miou": 0.25, "miou": 0.5, "label_iou": 0.75}


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


def test_a_score_has_the_same_name_whichever_other_classes_have_one(workspace):
    report = {"iou": {"CD3+": None, "CD3&": 0.5}}
    summary = {"metrics": {"miou": 0.5, "iou/CD3&": 0.5}, "report": report}
    made = workspace.commit("evaluation", "eeee", version=1, settings={}, inputs={}, summary=summary, seconds=1)
    with Tracker.start(load_config("demo"), workspace, name="whole") as tracker:
        with tracker.stage("evaluation", "e" * 16, {}, {}) as stage:
            stage.finish(made)
        tracker.finish({"evaluation": made})
    runs = runs_of(workspace)
    assert runs["whole"].data.metrics == {"miou": 0.5, "iou/CD3__2": 0.5} == runs["evaluation"].data.metrics


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


def with_file(workspace, name):
    """A run with a file."""
    with batch_run(TrackingConfig(), workspace, name, {}) as run:
        run.file("a.txt", b"text")
        run.metrics({"miou": 0.5})


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_workspace_that_was_moved_or_copied_keeps_its_files_where_it_is(place, tmp_path, capsys, how):
    with_file(place("old"), "before")
    before = sorted((tmp_path / "old" / "mlflow").rglob("*"))
    (shutil.move if how == "moved" else shutil.copytree)(tmp_path / "old", tmp_path / "new")
    for name in ("after", "later"):
        with_file(Workspace(str(tmp_path / "new")), name)
    assert (sorted((tmp_path / "old" / "mlflow").rglob("*")) if how == "copied" else before) == before
    assert (tmp_path / "old").exists() == (how == "copied")
    new = f"pistoseg in {tmp_path / 'new'}"
    runs = runs_of(Workspace(str(tmp_path / "new")), new)
    assert {name: run.info.status for name, run in runs.items()} == {"after": "FINISHED", "later": "FINISHED"}
    files = [tmp_path / "new" / "mlflow" / run.info.run_id / "artifacts" / "a.txt" for run in runs.values()]
    assert [file.exists() for file in files] == [True, True]
    said = f"the workspace was moved or copied: its runs are in the experiment {new!r} of MLflow from now on\n"
    assert capsys.readouterr().out == said


def test_a_run_that_goes_on_in_a_workspace_that_was_moved_is_made_anew_where_its_files_are(place, tmp_path, capsys):
    config, (old, new) = load_config("demo"), (tmp_path / name for name in ("old", "new"))
    with Tracker.start(config, place("old"), "search") as tracker:
        tracker.run().file("a.txt", b"text")
        runs = [tracker.run_id]
    shutil.move(old, new)
    for _ in range(2):
        with Tracker.start(config, Workspace(str(new)), "search", run_id=runs[-1]) as tracker:
            tracker.run().file("b.txt", b"text")
            runs.append(tracker.run_id)
    assert not old.exists()
    assert [file.relative_to(new).parts[1] for file in new.rglob("b.txt")] == [runs[1]] == [runs[2]]
    assert tracker.client.get_run(runs[1]).info.experiment_id == tracker.experiment_id
    said = f"run {runs[0]} is in another experiment of MLflow, a new one takes its place\n"
    assert capsys.readouterr().out.count(said) == 1


@pytest.mark.parametrize("was_moved", [False, True])
def test_of_two_processes_that_begin_at_once_both_find_the_workspaces_experiment(
    place, tmp_path, monkeypatch, capsys, was_moved
):
    workspace, create, name = place("old"), MlflowClient.create_experiment, "pistoseg"
    if was_moved:
        with_file(workspace, "before")
        shutil.move(tmp_path / "old", tmp_path / "new")
        workspace, name = Workspace(str(tmp_path / "new")), f"pistoseg in {tmp_path / 'new'}"

    def second(client, *arguments, **named):
        create(client, *arguments, **named)
        return create(client, *arguments, **named)

    monkeypatch.setattr(MlflowClient, "create_experiment", second)
    with_file(workspace, "after")
    run = runs_of(workspace, name)["after"]
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"miou": 0.5})
    assert capsys.readouterr().out == ""


def test_a_workspace_by_another_name_is_not_taken_for_one_that_was_moved(place, tmp_path):
    with_file(place("old"), "before")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    with_file(Workspace(str(tmp_path / "link")), "after")
    assert set(runs_of(Workspace(str(tmp_path / "old")))) == {"before", "after"}


def test_workspaces_that_share_a_database_of_the_users_share_its_experiment(place, monkeypatch):
    one, two, users = place("one"), place("two"), place("users")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{users.root}/mlflow.db")
    for workspace in (one, two):
        with_file(workspace, workspace.root)
    assert set(runs_of(users)) == {one.root, two.root}


def model_in(workspace):
    """A precise model, as far as MLflow looks at it."""
    made = workspace.commit("precise", "dddd", version=1, settings={}, inputs={}, summary={}, seconds=1)
    for name in ("model.json", "model.safetensors"):
        storage.write_bytes(made.path("bundle", name), b"{}")
    return made


def test_of_two_workspaces_at_a_time_each_registers_its_own_model(place):
    one, two = place("one"), place("two")
    start, config = Tracker.start, load_config("demo")
    with start(config, one) as first, start(config, two) as second:
        assert (first.register(model_in(one)), second.register(model_in(two))) == ("1", "1")
    for workspace in (one, two):
        (version,) = MlflowClient(f"sqlite:///{workspace.root}/mlflow.db").search_model_versions()
        assert version.tags["pistoseg.bundle"].startswith(workspace.root)


def test_files_that_their_folder_does_not_take_are_left_out_and_nothing_else(workspace, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    client = MlflowClient(f"sqlite:///{workspace.root}/mlflow.db")
    client.create_experiment("elsewhere", artifact_location=(tmp_path / "file" / "files").as_uri())
    config = TrackingConfig(experiment="elsewhere", uri=f"sqlite:///{workspace.root}/mlflow.db")
    with batch_run(config, workspace, "run", {}) as run:
        for name in ("a.txt", "b.txt"):
            run.file(name, b"text")
        run.metrics({"miou": 0.5})
    run = runs_of(workspace, "elsewhere")["run"]
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"miou": 0.5})
    printed = capsys.readouterr().out
    assert printed.count("MLflow's files can't be written and are left out for good: [Errno 20]") == 1
    assert "reached" not in printed


@pytest.mark.parametrize("is_late", [False, True])
def test_a_model_whose_files_their_folder_does_not_take_is_left_out_and_nothing_else(
    workspace, tmp_path, monkeypatch, capsys, is_late
):
    (tmp_path / "file").write_text("no folder")
    client = MlflowClient(f"sqlite:///{workspace.root}/mlflow.db")
    client.create_experiment("elsewhere", artifact_location=(tmp_path / "file" / "files").as_uri())
    config = load_config("demo", overrides=["tracking.experiment=elsewhere"])
    with Tracker.start(config, workspace, "run") as tracker:
        with tracker.stage("precise", "d" * 16, {}, {}):
            pass
        tracker.client.away = is_late  # then it is registered when the run ends
        assert tracker.register(model_in(workspace)) is None
        tracker.run().metrics({"miou": 0.5})
    found = {name: (run.info.status, run.data.metrics) for name, run in runs_of(workspace, "elsewhere").items()}
    assert found == {"run": ("FINISHED", {"miou": 0.5}), "precise": ("FINISHED", {})}
    printed = capsys.readouterr().out
    assert printed.count("MLflow's files can't be written and the model is not registered: [Errno 20]") == 1
    assert "reached" not in printed
    assert not any((tmp_path / "w" / "mlflow-unsent").glob("*"))


def test_a_model_of_which_a_server_refuses_a_file_is_not_registered_and_the_rest_is_sent(
    workspace, monkeypatch, capsys
):
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    response = requests.Response()
    response.status_code = 413

    def refuse(repository, folder, *arguments):
        repository.log_artifact(f"{folder}/MLmodel")  # is small enough
        raise requests.HTTPError("413 Client Error: Request Entity Too Large", response=response)

    monkeypatch.setattr(LocalArtifactRepository, "log_artifacts", refuse)
    with Tracker.start(load_config("demo"), workspace, "run") as tracker:
        assert tracker.register(model_in(workspace)) is None
        tracker.run().metrics({"miou": 0.5})
    run = runs_of(workspace)["run"]
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"miou": 0.5})
    assert not MlflowClient(f"sqlite:///{workspace.root}/mlflow.db").search_model_versions()
    assert capsys.readouterr().out.count("the model is not registered: 413") == 1


def test_a_model_that_a_server_does_not_take_now_keeps_nothing_back_and_is_registered_later(workspace, monkeypatch):
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    def fail(repository, folder, *arguments):
        raise requests.HTTPError("500 Server Error")

    with Tracker.start(load_config("demo"), workspace, "run") as tracker:
        with tracker.stage("precise", "d" * 16, {}, {}):
            pass
        with monkeypatch.context() as broken:
            broken.setattr(LocalArtifactRepository, "log_artifacts", fail)
            assert tracker.register(model_in(workspace)) is None
            tracker.run().metrics({"miou": 0.5})
            assert tracker.client._send_kept()
        before = runs_of(workspace)
        assert before["run"].data.metrics == {"miou": 0.5}
    (version,) = MlflowClient(f"sqlite:///{workspace.root}/mlflow.db").search_model_versions()
    after = runs_of(workspace)
    assert {name: run.info.status for name, run in after.items()} == {"run": "FINISHED", "precise": "FINISHED"}
    assert version.run_id == after["precise"].info.run_id
    assert before["precise"].info.end_time == after["precise"].info.end_time
    assert not storage.list_dir(storage.join(workspace.root, "mlflow-unsent"))


def test_a_batch_whose_database_has_no_place_goes_on_without_it(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "file").touch()
    with batch_run(TrackingConfig(), Workspace(str(tmp_path / "file" / "w")), "segment", {}) as run:
        run.metrics({"miou": 0.5})
    said = f"goes on without MLflow: {tmp_path / 'file' / 'w'} can't be written (Not a directory); give --workspace"
    assert said in capsys.readouterr().out
