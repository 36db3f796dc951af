import os
import threading

import pytest
from processes import wait_for

from pistoseg import claims, storage
from pistoseg.artifacts import Workspace
from pistoseg.config import load_config
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.graph import Stage, plan
from pistoseg.hooks import Hooks
from pistoseg.models import encoders
from pistoseg.pipeline import run_pipeline
from pistoseg.progress import Progress
from pistoseg.tracking import StageRun


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "POLL_S", 0.02)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x-[1, 0, 0, 0, 0].png").write_bytes(b"x")
    return load_config("demo", overrides=[f"data.uri={tmp_path / 'data'}", "tracking.enabled=false"])


class Said(Progress):
    def __init__(self):
        super().__init__()
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def test_of_runs_that_want_one_artifact_one_makes_it_and_the_others_use_it(config, tmp_path, monkeypatch):
    made, found, said = [], [], [Said() for _ in range(4)]

    def told(what):
        return sum(what in line for progress in said for line in progress.lines)

    def run(stage, context):
        made.append(threading.get_ident())
        wait_for(lambda: told("waiting: process") == 3)
        return {"images": 1, "by": made[-1]}

    monkeypatch.setattr(Stage, "run", run)

    def work(progress):
        found.append(run_pipeline(config, Workspace(str(tmp_path / "w")), ("patches",), progress=progress)["patches"])

    threads = [threading.Thread(target=work, args=(progress,)) for progress in said]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert [artifact.summary["by"] for artifact in found] == made * 4
    assert len({artifact.uri for artifact in found}) == 1
    assert told("waiting: process") == told("another run has finished it, reused") == 3
    assert [item.name for item in (tmp_path / "w" / "patches" / found[0].fingerprint).iterdir()] == ["manifest.json"]


def test_images_that_are_there_are_held_against_a_smaller_limit_of_bad_ones(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Stage, "run", lambda stage, context: {"images": 95, "windows": 95, "rejected": 5})

    def run(limit):
        changed = config.model_copy(update={"data": config.data.model_copy(update={"max_rejected": limit})})
        return run_pipeline(changed, Workspace(str(tmp_path / "w")), ("patches",))["patches"].uri

    made = run(0.1)
    with pytest.raises(PistoSegError, match=r"5 of 100 images or windows are bad, more than .*\(4%\) allows"):
        run(0.04)
    assert run(0.05) == made


def test_images_of_many_windows_that_are_there_are_held_against_the_limit_as_images(config, tmp_path, monkeypatch):
    summary = {"images": 95, "windows": 9500, "rejected": 5, "found": 100, "unread": 5}
    monkeypatch.setattr(Stage, "run", lambda stage, context: summary)

    def run(limit):
        changed = config.model_copy(update={"data": config.data.model_copy(update={"max_rejected": limit})})
        return run_pipeline(changed, Workspace(str(tmp_path / "w")), ("patches",))["patches"].uri

    made = run(0.05)
    with pytest.raises(PistoSegError, match=r"5 of 100 images or slides can't be read, more than .*\(4%\) allows"):
        run(0.04)
    assert run(0.1) == made


@pytest.mark.parametrize("tracking", [True, False])
def test_a_workspace_that_is_a_file_is_said_to_be_one(config, tmp_path, tracking):
    (tmp_path / "w").touch()
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": tracking})})
    with pytest.raises(PistoSegError, match=r"can't be written \(.*folder that you may write to"):
        run_pipeline(config, Workspace(str(tmp_path / "w")), ("patches",))


def test_what_only_an_unfinished_artifact_needs_is_removed_once_it_is_finished(config, tmp_path, monkeypatch):
    finished = []

    def run(stage, context):
        manifest = tmp_path / "w" / "patches" / context.folder.rsplit("/", 1)[1] / "manifest.json"
        context.afterwards.append(lambda: finished.append(manifest.exists()))
        return {"images": 1}

    monkeypatch.setattr(Stage, "run", run)
    run_pipeline(config, Workspace(str(tmp_path / "w")), ("patches",))
    assert finished == [True]


def test_what_can_not_be_removed_does_not_end_a_run_whose_stage_is_finished(config, tmp_path, monkeypatch):
    finished = []

    def away():
        raise UnavailableError("does not answer")

    def run(stage, context):
        context.afterwards.append(away)
        return {"images": 1}

    monkeypatch.setattr(Stage, "run", run)
    monkeypatch.setattr(StageRun, "finish", lambda run, artifact: finished.append(artifact.stage))
    assert "patches" in run_pipeline(config, Workspace(str(tmp_path / "w")), ("patches",))
    assert finished == ["patches"]


def test_checkpoints_that_a_kill_left_in_a_finished_training_are_removed_by_the_next_run(config, tmp_path, monkeypatch):
    workspace, target = Workspace(str(tmp_path / "w")), ("preliminary",)
    for step in plan(config, target):
        made = workspace.commit(
            step.stage.name, step.fingerprint, version=1, settings={}, inputs={}, summary={}, seconds=1
        )
        storage.write_bytes(made.path("ray_train", "checkpoint", "state.pt"), b"x")
        storage.write_bytes(made.path("model", "model.json"), b"x")
    with monkeypatch.context() as refused:
        refused.setattr(storage, "remove_tree", lambda uri: os.remove(tmp_path / "nothing"))
        found = run_pipeline(config, workspace, target)["preliminary"]
    assert storage.exists(found.path("ray_train"))
    run_pipeline(config, workspace, target)
    assert [storage.name(item) for item in storage.list_dir(found.uri)] == ["manifest.json", "model"]


@pytest.mark.parametrize("asks", [False, True])
def test_a_run_that_was_taken_over_commits_nothing_and_its_stage_can_ask(asks, config, tmp_path, monkeypatch):
    def run(stage, context):
        folder = tmp_path / "w" / "patches" / context.folder.rsplit("/", 1)[1] / claims.FOLDER
        (folder / "000002.json").write_text("{}")  # another run thought that this one was dead
        if asks:
            context.check()
            pytest.fail("it would write over the other's results")
        return {"images": 1}

    monkeypatch.setattr(Stage, "run", run)
    with pytest.raises(PistoSegError, match="another run took this over"):
        run_pipeline(config, Workspace(str(tmp_path / "w")), ("patches",))
    assert not list((tmp_path / "w").rglob("manifest.json"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["precise.encoder=efficientnet-b33"], "precise.encoder: encoder 'efficientnet-b33' can't be built"),
        (["precise.encoder=tu-vit_none"], "precise.encoder: encoder 'tu-vit_none' can't be built"),
        (["precise.architecture=pan", "precise.encoder=densenet121"], "precise.encoder: encoder 'densenet121' can't"),
        (["classifier.encoder=densenet121"], "classifier.encoder: encoder 'densenet121' can't"),
        (["classifier.weights=/nowhere/b3.pth"], "/nowhere/b3.pth: classifier.weights: is not there"),
        (["precise.architecture=pan", "precise.batch_size=1"], "precise.batch_size: pan is trained on two images"),
        (["precise.weights=/nowhere/b3.txt"], "precise.weights: '/nowhere/b3.txt' is neither"),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused_before_the_first_stage(
    settings, message, config, tmp_path, monkeypatch
):
    def run(stage, context):
        pytest.fail(f"{stage.name} ran")

    monkeypatch.setattr(Stage, "run", run)
    masks = "precise.masks=cam"  # the classifier is needed
    given = load_config("demo", overrides=[f"data.uri={config.data.uri}", "tracking.enabled=false", masks, *settings])
    with pytest.raises(PistoSegError, match=message):
        run_pipeline(given, Workspace(str(tmp_path / "w")))


def test_weights_that_no_hub_gives_are_refused_before_the_first_stage_by_all_their_keys(config, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(encoders, "_answers", lambda endpoint: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(Stage, "run", lambda stage, context: pytest.fail(f"{stage.name} ran"))
    encoders.fetch_imagenet.cache_clear()
    own = ["preliminary.encoder=resnet18", "refiner.encoder=resnet18", "precise.encoder=resnet34"]
    given = [f"data.uri={config.data.uri}", "tracking.enabled=false", "classifier.weights=null", *own]
    with pytest.raises(PistoSegError, match=r"'resnet18': the hub can't be reached.*'resnet34': the hub") as caught:
        run_pipeline(
            load_config("demo", overrides=[*given, "precise.masks=refined_cnn"]), Workspace(str(tmp_path / "w"))
        )
    assert caught.value.field == "preliminary.weights, precise.weights"  # the refiner starts from the preliminary one
    assert caught.value.remedy.startswith("add --profile cpu")


def test_hooks_are_told_of_the_stages_that_begin_and_of_no_other(config, tmp_path, monkeypatch):
    told = []

    class Told(Hooks):
        def begun(self, step):
            told.append(("begun", step.stage.name, step.fingerprint))

        def reused(self, artifact):
            told.append(("reused", artifact.stage, artifact.fingerprint))

    def run(stage, context):
        if stage.name == "synthesis":
            raise RuntimeError("it broke")
        return {"images": 1}

    monkeypatch.setattr(Stage, "run", run)
    workspace, targets = Workspace(str(tmp_path / "w")), ("preliminary",)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="it broke"):
            run_pipeline(config, workspace, targets, hooks=Told())
    keys = {step.stage.name: step.fingerprint for step in plan(config, targets)}
    names = [("begun", "patches"), ("begun", "validation"), ("begun", "synthesis")]
    names += [("reused", "patches"), ("reused", "validation"), ("begun", "synthesis")]
    assert told == [(what, name, keys[name]) for what, name in names]


def test_the_networks_of_stages_that_are_done_are_not_looked_at():
    from pistoseg.stages.trained import check_buildable

    config = load_config("demo", overrides=["data.uri=/data", "precise.weights=/nowhere/b3.pth"])
    check_buildable(config, ["patches", "preliminary", "evaluation"])
    with pytest.raises(PistoSegError, match=r"precise\.weights"):
        check_buildable(config, ["precise"])
