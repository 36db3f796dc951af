"""MLflow's server away and back: nothing is lost, nothing is said twice, and runs of killed processes are ended."""

import contextlib
import errno
import json
import subprocess
import sys
import threading
import time

import boto3.exceptions
import botocore.exceptions
import pytest
import requests
from processes import STUCK_S, wait_for

from pistoseg import storage
from pistoseg.artifacts import Artifact, Workspace
from pistoseg.config import TrackingConfig, load_config
from pistoseg.errors import RefusedError, UnavailableError
from pistoseg.liveness import is_alive, process
from pistoseg.tracking import Tracker, connect, delivery, leftovers, messages, outbox, turn
from pistoseg.tracking.delivery import Delivery
from pistoseg.tracking.outbox import Outbox


class Line:
    """A client whose server can be taken away."""

    def __init__(self, uri):
        from mlflow.tracking import MlflowClient

        self.client, self.cut = MlflowClient(uri), False

    def __getattr__(self, name):
        value = getattr(self.client, name)
        if not callable(value):
            return value

        def call(*arguments, **named):
            if self.cut:
                raise requests.ConnectionError("no route")
            return value(*arguments, **named)

        return call


@pytest.fixture(autouse=True)
def _no_outbox_goes_on(monkeypatch):
    """One whose process is said to be dead is never closed; it would speak in the middle of later tests."""
    made, begin = [], Outbox.__init__

    def begins(box, *arguments):
        begin(box, *arguments)
        made.append(box)

    monkeypatch.setattr(Outbox, "__init__", begins)
    yield
    for box in made:
        box._stop.set()


@pytest.fixture
def line(tmp_path, put_database, monkeypatch):
    monkeypatch.chdir(tmp_path)  # there MLflow puts the files of experiments that name no place for them
    put_database(tmp_path)
    return Line(f"sqlite:///{tmp_path / 'mlflow.db'}")


@pytest.fixture
def workspace(tmp_path):
    return str(tmp_path / "it's [1]")


def tell(box, tmp_path):
    """A run with one of everything, and a child."""
    experiment = box.experiment("pistoseg", tmp_path.as_uri())
    parent = box.create_run(experiment, run_name="pipeline").info.run_id
    child = box.create_run(experiment, tags={"mlflow.parentRunId": parent}, run_name="stage").info.run_id
    box.log_params(child, {f"p{number}": str(number) for number in range(150)})
    box.log_metric(child, "loss", 0.5, step=3)
    box.set_tag(parent, "colour", "blue")
    (tmp_path / "a.txt").write_text("text")
    box.log_artifact(child, str(tmp_path / "a.txt"))
    box.set_terminated(child, "FINISHED")
    box.set_terminated(parent, "FAILED")


def check(line):
    """What MLflow has is what `tell` said, once."""
    (experiment,) = [item for item in line.client.search_experiments() if item.name == "pistoseg"]
    runs = {run.info.run_name: run for run in line.client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"pipeline", "stage"}
    assert len(line.client.search_runs([experiment.experiment_id])) == 2
    parent, child = runs["pipeline"], runs["stage"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params == {f"p{number}": str(number) for number in range(150)}
    (metric,) = line.client.get_metric_history(child.info.run_id, "loss")
    assert (metric.value, metric.step) == (0.5, 3)
    assert parent.data.tags["colour"] == "blue"
    assert [item.path for item in line.client.list_artifacts(child.info.run_id)] == ["a.txt"]
    assert (child.info.status, parent.info.status) == ("FINISHED", "FAILED")
    return child, metric


def test_a_server_that_is_there_is_told_at_once(line, workspace, tmp_path):
    box = Outbox(line, workspace)
    tell(box, tmp_path)
    check(line)
    box.close()
    assert not storage.exists(workspace)


def test_a_server_that_comes_back_gets_what_it_missed_with_its_times(line, workspace, tmp_path, monkeypatch, capsys):
    box = Outbox(line, workspace)
    line.cut = True
    monkeypatch.setattr(outbox, "_now", lambda: 1_000_000_000_000)
    tell(box, tmp_path)
    assert "the run goes on" in capsys.readouterr().out
    assert storage.list_files(storage.join(workspace, messages.FOLDER))
    line.cut = False
    monkeypatch.setattr(outbox, "_now", lambda: 2_000_000_000_000)
    box.close()
    assert "MLflow is back" in capsys.readouterr().out
    child, metric = check(line)
    assert {metric.timestamp, child.info.start_time, child.info.end_time} == {1_000_000_000_000}
    assert storage.list_files(storage.join(workspace, messages.FOLDER)) == []


def test_what_a_run_could_not_send_the_next_one_sends_and_an_interrupted_sending_goes_on(
    line, workspace, tmp_path, monkeypatch, capsys
):
    box = Outbox(line, workspace)
    line.cut = True
    tell(box, tmp_path)
    other = Outbox(line, workspace)
    line.cut = False
    other.send_left()
    assert not line.search_experiments(filter_string="name = 'pistoseg'"), "its process lives: nobody else sends for it"
    line.cut = True
    box.close()
    assert "still away" in capsys.readouterr().out
    line.cut = False
    sent = []

    def twice(call, *arguments, **named):
        if len(sent) == 4:
            raise requests.ConnectionError("again")
        sent.append(call)
        return Delivery.deliver(other._delivery, call, *arguments, **named)

    other._delivery.deliver = twice
    other.send_left()
    assert len(sent) == 4
    Outbox(line, workspace).send_left()
    check(line)
    assert storage.list_files(storage.join(workspace, messages.FOLDER)) == []
    assert "earlier run" in capsys.readouterr().out


def part_of(box, parent, name):
    """A run below another one, with a metric; told and over."""
    experiment, tags = box.experiment("pistoseg", None), {"mlflow.parentRunId": parent}
    run_id = box.create_run(experiment, tags=tags, run_name=name).info.run_id
    box.log_metric(run_id, "miou", 0.7)
    box.set_terminated(run_id, "FINISHED")


def check_part(line, workspace, name):
    """MLflow has a part and what it is a part of, once, and nothing waits any more."""
    runs = {run.info.run_name: run for run in line.search_runs([line.get_experiment_by_name("pistoseg").experiment_id])}
    assert set(runs) == {"whole", name}
    assert runs[name].data.tags["mlflow.parentRunId"] == runs["whole"].info.run_id
    assert (runs[name].data.metrics, runs[name].info.status) == ({"miou": 0.7}, "FINISHED")
    assert storage.list_dir(storage.join(workspace, messages.FOLDER)) == []


@pytest.mark.parametrize("begins_while_away", [True, False])
def test_a_part_waits_for_the_run_that_another_outbox_has_still_to_send(line, workspace, capsys, begins_while_away):
    line.cut = True
    whole = Outbox(line, workspace)
    run_id = whole.create_run(whole.experiment("pistoseg", None), run_name="whole").info.run_id
    line.cut = begins_while_away
    part = Outbox(line, workspace)
    part_of(part, run_id, "row")
    line.cut = False
    part.close()
    assert "sent by another run" in capsys.readouterr().out
    whole.close()
    check_part(line, workspace, "row")
    assert "refuses" not in capsys.readouterr().out


def test_a_run_that_goes_on_sends_what_it_said_before_it_was_killed_first(line, workspace, monkeypatch, capsys):
    line.cut = True
    monkeypatch.setattr(outbox, "process", dead_process)
    killed = Outbox(line, workspace)
    run_id = killed.create_run(killed.experiment("pistoseg", None), run_name="whole").info.run_id
    monkeypatch.setattr(outbox, "process", process)
    resumed = Outbox(line, workspace)
    resumed.send_left()
    resumed.update_run(run_id, status="RUNNING")
    part_of(resumed, run_id, "trial")
    line.cut = False
    resumed.close()
    check_part(line, workspace, "trial")
    assert "refuses" not in capsys.readouterr().out


def into(name, box):
    """An outbox whose folder has a name, and so a place among others."""
    box._folder = box._leftovers.own = storage.join(box._workspace, messages.FOLDER, name)
    return box


def test_what_several_runs_left_is_sent_parents_first(line, workspace, monkeypatch):
    line.cut = True
    monkeypatch.setattr(outbox, "process", dead_process)
    whole, part = into("b", Outbox(line, workspace)), into("a", Outbox(line, workspace))
    part_of(part, whole.create_run(whole.experiment("pistoseg", None), run_name="whole").info.run_id, "row")
    monkeypatch.setattr(outbox, "process", process)
    line.cut = False
    Outbox(line, workspace).send_left()
    check_part(line, workspace, "row")


@pytest.mark.parametrize("server_is_back", [True, False])
def test_a_kept_message_that_always_fails_keeps_no_other_from_being_sent(
    line, workspace, monkeypatch, capsys, server_is_back
):
    def register(client, **arguments):
        raise PermissionError(13, "Permission denied", arguments["uri"])

    line.cut = True
    monkeypatch.setattr(outbox, "process", dead_process)
    failing, healthy = into("a", Outbox(line, workspace, register)), into("b", Outbox(line, workspace))
    for box, name in ((failing, "failing"), (healthy, "healthy")):
        run_id = box.create_run(box.experiment("pistoseg", None), run_name=name).info.run_id
        if box is failing:
            box.register(run_id=run_id, name="tissue", uri="precise/x/bundle", fingerprint="x")
        box.set_terminated(run_id, "FINISHED")
    monkeypatch.setattr(outbox, "process", process)
    line.cut = False
    later = Outbox(line, workspace, register)
    later.send_left()
    assert not later.away
    line.cut = not server_is_back
    run_id = later.create_run(later.experiment("pistoseg", None), run_name="later").info.run_id
    line.cut = False
    later.set_terminated(run_id, "FINISHED")
    later.close()
    runs = line.search_runs([line.get_experiment_by_name("pistoseg").experiment_id])
    states = {run.info.run_name: run.info.status for run in runs}
    assert states == {"failing": "FINISHED", "healthy": "FINISHED", "later": "FINISHED"}
    printed = capsys.readouterr().out
    assert printed.count("can't be sent to MLflow now: [Errno 13] Permission denied") == 1
    folder = storage.join(workspace, messages.FOLDER)
    assert [storage.name(item) for item in storage.list_dir(folder)] == ["a"]


def test_a_model_whose_bundle_was_deleted_is_left_out(line, workspace, monkeypatch, capsys):
    def register(client, **arguments):
        raise FileNotFoundError(2, "No such file", arguments["uri"])

    line.cut = True
    monkeypatch.setattr(outbox, "process", dead_process)
    earlier = Outbox(line, workspace, register)
    run_id = earlier.create_run(earlier.experiment("pistoseg", None), run_name="earlier").info.run_id
    earlier.register(run_id=run_id, name="tissue", uri="precise/x/bundle", fingerprint="x")
    earlier.set_terminated(run_id, "FINISHED")
    monkeypatch.setattr(outbox, "process", process)
    line.cut = False
    Outbox(line, workspace, register).send_left()
    (run,) = line.search_runs([line.get_experiment_by_name("pistoseg").experiment_id])
    assert (run.info.run_name, run.info.status) == ("earlier", "FINISHED")
    assert "MLflow refuses register, which is left out" in capsys.readouterr().out
    assert not storage.list_dir(storage.join(workspace, messages.FOLDER))


def left(line, workspace):
    """The folder of an outbox that was closed while the server was away."""
    line.cut = True
    box = Outbox(line, workspace)
    part_of(box, box.create_run(box.experiment("pistoseg", None), run_name="whole").info.run_id, "row")
    box.close()
    line.cut = False
    return box._folder


def test_of_two_processes_one_sends_what_is_left(line, workspace, monkeypatch):
    left(line, workspace)
    monkeypatch.setattr(leftovers, "_sending", contextlib.nullcontext())  # which two processes don't share
    looked, find = [], Delivery.find

    def slow(*arguments):
        found = find(*arguments)
        looked.append(found)
        if len(looked) == 1:  # between this one's look and its message the other one comes
            Outbox(line, workspace).send_left()
        return found

    monkeypatch.setattr(Delivery, "find", slow)
    Outbox(line, workspace).send_left()
    assert looked
    assert len(line.search_runs([line.get_experiment_by_name("pistoseg").experiment_id])) == 2
    check_part(line, workspace, "row")


@pytest.mark.parametrize(
    ("who", "silent_s", "is_at_it"),
    [("this", 9_000, True), ("dead", 0, False), ("elsewhere/1/5", 60, True), ("elsewhere/1/5", 9_000, False)],
)
@pytest.mark.parametrize("file", ["owner.json", "sending-000000007.json"])
def test_what_a_living_process_sends_nobody_else_does(line, workspace, file, who, silent_s, is_at_it):
    folder = left(line, workspace)
    name = {"this": process, "dead": dead_process}.get(who, lambda: who)()
    body = {"process": name, "alive": time.time() - silent_s, "server": messages.digest(line.tracking_uri)}
    storage.write_bytes(storage.join(folder, file), json.dumps(body).encode())
    before = storage.list_files(folder)
    Outbox(line, workspace).send_left()
    if is_at_it:
        assert storage.list_files(folder) == before
    else:
        check_part(line, workspace, "row")


def test_a_folder_that_is_tried_again_and_again_does_not_fill_up(line, workspace, monkeypatch):
    folder = left(line, workspace)
    for _ in range(3):
        box = Outbox(line, workspace)
        monkeypatch.setattr(box._delivery, "deliver", lambda *_, **__: 1 / 0)
        box.send_left()
    assert [item for item in storage.list_dir(folder) if "sending" in item] == [
        storage.join(folder, "sending-000000003.json")
    ]
    Outbox(line, workspace).send_left()
    check_part(line, workspace, "row")


def test_one_that_looked_long_ago_leaves_a_folder_to_whoever_has_it_now(tmp_path, monkeypatch):
    folder, is_held = str(tmp_path), turn._is_held
    with turn.turn(folder):
        pass
    with contextlib.ExitStack() as another:

        def slow(uri):
            found = is_held(uri)
            monkeypatch.setattr(turn, "_is_held", is_held)
            with turn.turn(folder) as theirs:
                assert theirs
            assert another.enter_context(turn.turn(folder))
            return found

        monkeypatch.setattr(turn, "_is_held", slow)
        with turn.turn(folder) as mine:
            assert mine is None
    with turn.turn(folder) as mine:
        assert mine
        assert [storage.name(item) for item in storage.list_dir(folder)] == ["sending-000000004.json"]


@pytest.mark.parametrize("goes_on", [False, True])
def test_an_outbox_says_that_it_lives_while_the_server_is_away(line, workspace, monkeypatch, goes_on):
    monkeypatch.setattr(outbox, "RETRY_S", 0.05)
    line.cut = True
    box = Outbox(line, workspace)
    if goes_on:
        box.update_run("0123", status="RUNNING")
    else:
        box.create_run(box.experiment("pistoseg", None))
    owner = storage.join(box._folder, "owner.json")
    body = json.loads(storage.read_bytes(owner))
    storage.write_bytes(owner, json.dumps(body | {"alive": 0}).encode())
    wait_for(lambda: json.loads(storage.read_bytes(owner))["alive"] >= body["alive"])
    box.close()
    assert json.loads(storage.read_bytes(owner))["process"] == ""


@pytest.mark.parametrize("file", ["b/000001.json", "b/000003.data", "a/000001.json"])
def test_what_a_storage_that_is_away_for_a_moment_does_not_show_is_sent_later(
    line, workspace, tmp_path, monkeypatch, capsys, file
):
    line.cut = True
    monkeypatch.setattr(outbox, "process", dead_process)
    parent, part = into("b", Outbox(line, workspace)), into("a", Outbox(line, workspace))
    whole = parent.create_run(parent.experiment("pistoseg", None), run_name="whole").info.run_id
    parent.set_tag(whole, "colour", "blue")
    (tmp_path / "a.txt").write_text("text")
    parent.log_artifact(whole, str(tmp_path / "a.txt"))
    part_of(part, whole, "row")
    monkeypatch.setattr(outbox, "process", process)
    delivery.unsent.clear()  # of that process
    line.cut = False
    hidden = storage.join(workspace, messages.FOLDER, file)
    read = storage.read_bytes

    def away(uri):
        if uri == hidden:
            raise UnavailableError("does not answer", file=uri)
        return read(uri)

    with monkeypatch.context() as now:
        now.setattr(storage, "read_bytes", away)
        Outbox(line, workspace).send_left()
    assert storage.exists(hidden)
    assert "left out" not in capsys.readouterr().out
    Outbox(line, workspace).send_left()
    check_part(line, workspace, "row")
    (run,) = line.search_runs([line.get_experiment_by_name("pistoseg").experiment_id], "tags.colour = 'blue'")
    assert [item.path for item in line.list_artifacts(run.info.run_id)] == ["a.txt"]


def test_a_turn_that_cannot_be_looked_at_is_not_taken(tmp_path, monkeypatch):
    with turn.turn(str(tmp_path)) as mine:
        assert mine
        monkeypatch.setattr(storage, "read_bytes", lambda uri: (_ for _ in ()).throw(UnavailableError("away")))
        with pytest.raises(UnavailableError), turn.turn(str(tmp_path)):
            pass


def test_a_run_that_was_deleted_keeps_no_other_from_saying_that_it_lives(line, workspace):
    box = Outbox(line, workspace)
    runs = [box.create_run(box.experiment("pistoseg", None)).info.run_id for _ in range(6)]
    for run_id in runs[::2]:
        line.delete_run(run_id)
    for run_id in runs[1::2]:
        line.set_tag(run_id, outbox.LIFE_TAG, "0")
    box._say_alive()
    assert "0" not in [line.get_run(run_id).data.tags[outbox.LIFE_TAG] for run_id in runs[1::2]]


def gone_experiment(line):
    """Name of an experiment that was deleted: the server refuses its runs."""
    line.delete_experiment(line.create_experiment("gone"))
    return "gone"


@pytest.mark.parametrize("by", ["itself", "another process", "another process, one part each"])
def test_what_belongs_to_a_run_that_the_server_refuses_is_left_out_and_the_rest_sent(
    line, workspace, monkeypatch, capsys, by
):
    gone = gone_experiment(line)
    line.cut = True
    if by != "itself":
        monkeypatch.setattr(outbox, "process", dead_process)
    box = Outbox(line, workspace)
    refused = box.create_run(box.experiment(gone, None), run_name="refused").info.run_id
    box.log_metric(refused, "miou", 0.1)
    part_of(Outbox(line, workspace) if by.endswith("each") else box, refused, "part")
    whole = box.create_run(box.experiment("pistoseg", None), run_name="whole").info.run_id
    part_of(box, whole, "row")
    monkeypatch.setattr(outbox, "process", process)
    line.cut = False
    if by == "itself":
        box.close()
        with pytest.raises(LookupError):
            box.log_metric(refused, "miou", 0.2)
    else:
        delivery.unsent.clear()  # of that process
        Outbox(line, workspace).send_left()
    check_part(line, workspace, "row")
    assert capsys.readouterr().out.count("MLflow refuses create_run, which is left out") == 1


def test_a_part_waits_for_a_run_that_is_kept_for_a_server_that_is_elsewhere(line, workspace, monkeypatch):
    line.cut = True
    monkeypatch.setattr(outbox, "process", dead_process)
    elsewhere = Line(line.tracking_uri)
    elsewhere.cut, elsewhere.tracking_uri = True, "elsewhere"
    whole, part = Outbox(elsewhere, workspace), Outbox(line, workspace)
    part_of(part, whole.create_run(whole.experiment("pistoseg", None), run_name="whole").info.run_id, "row")
    monkeypatch.setattr(outbox, "process", process)
    delivery.unsent.clear()
    line.cut = False
    before = storage.list_files(storage.join(workspace, messages.FOLDER))
    Outbox(line, workspace).send_left()
    assert [item for item in before if not storage.exists(item)] == []


def test_a_part_waits_for_a_run_of_this_process_that_could_not_be_kept(line, workspace, monkeypatch, capsys):
    line.cut = True
    with monkeypatch.context() as full:
        full.setattr(messages, "write", lambda *_: 1 / 0)
        whole = Outbox(line, workspace)
        run_id = whole.create_run(whole.experiment("pistoseg", None), run_name="whole").info.run_id
    part = Outbox(line, workspace)
    part_of(part, run_id, "row")
    part.close()
    line.cut = False
    Outbox(line, workspace).send_left()
    whole.close()
    check_part(line, workspace, "row")
    assert "left out" not in capsys.readouterr().out


def test_a_run_that_goes_on_with_one_that_mlflow_never_heard_of_keeps_its_messages_for_the_next_run(
    tmp_path, put_database, monkeypatch, capsys
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    put_database(tmp_path)
    config, workspace = load_config("demo"), Workspace(str(tmp_path))
    with Tracker.start(config, workspace, run_id="unsent-0123") as tracker:
        tracker.run().metrics({"miou": 0.5})
    assert "unsent-0123 is still to be sent" in capsys.readouterr().out
    left = storage.list_files(storage.join(workspace.root, messages.FOLDER))
    calls = [json.loads(storage.read_bytes(item))["call"] for item in left if item[-6].isdigit()]
    assert calls == ["update_run", "set_tag", "log_metric", "set_terminated"]
    with Tracker.start(config, workspace, name="next"):
        pass
    assert "unsent-0123 is gone" in capsys.readouterr().out
    assert storage.list_files(storage.join(workspace.root, messages.FOLDER)) == []


def test_an_answer_that_mlflow_cannot_read_does_not_end_a_run(tmp_path, put_database, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    put_database(tmp_path)

    def proxy(*_, **__):
        raise KeyError("run")

    monkeypatch.setattr(Outbox, "create_run", proxy)
    with Tracker.start(load_config("demo"), Workspace(str(tmp_path))) as tracker:
        tracker.run().metrics({"miou": 0.5})
    assert "goes on without it: 'run'" in capsys.readouterr().out


def test_an_outage_in_the_middle_keeps_the_order(line, workspace, tmp_path):
    box = Outbox(line, workspace)
    run_id = box.create_run(box.experiment("pistoseg", None)).info.run_id
    box.log_metric(run_id, "loss", 1.0, step=0)
    line.cut = True
    box.log_metric(run_id, "loss", 2.0, step=1)
    line.cut = False
    box.log_metric(run_id, "loss", 3.0, step=2)
    box.set_terminated(run_id, "FINISHED")
    assert line.get_run(run_id).info.status == "RUNNING"
    box.close()
    assert [item.value for item in line.get_metric_history(run_id, "loss")] == [1.0, 2.0, 3.0]
    assert line.get_run(run_id).info.status == "FINISHED"


def test_a_run_that_goes_on_while_the_server_is_away_runs_for_it_later(line, workspace):
    box = Outbox(line, workspace)
    run_id = box.create_run(box.experiment("pistoseg", None)).info.run_id
    box.set_terminated(run_id, "KILLED")
    line.cut = True
    box.update_run(run_id, status="RUNNING")
    assert line.client.get_run(run_id).info.status == "KILLED"
    line.cut = False
    box.close()
    assert line.get_run(run_id).info.status == "RUNNING"


def test_what_the_server_refuses_is_left_out_and_the_rest_sent(line, workspace, tmp_path, capsys):
    box = Outbox(line, workspace)
    line.cut = True
    run_id = box.create_run(box.experiment("pistoseg", None)).info.run_id
    box.log_param(run_id, "a", "1")
    box.log_param(run_id, "a", "2")
    box.set_terminated(run_id, "FINISHED")
    line.cut = False
    box.close()
    assert "MLflow refuses log_param" in capsys.readouterr().out
    (run,) = line.search_runs([line.get_experiment_by_name("pistoseg").experiment_id])
    assert (run.data.params, run.info.status) == ({"a": "1"}, "FINISHED")


def answered(status):
    """What MLflow raises of a server's answer to an upload."""
    response = requests.Response()
    response.status_code, response.reason, response.url = status, "why", "http://mlflow/masks.png"
    return requests.HTTPError(f"{status} Client Error: why for url: {response.url}", response=response)


def uploaded_by_boto3(code):
    """What boto3 raises of S3's answer to an upload."""
    error = boto3.exceptions.S3UploadFailedError(f"Failed to upload masks.png: ({code})")
    error.__context__ = botocore.exceptions.ClientError({"Error": {"Code": code, "Message": "m"}}, "PutObject")
    return error


def with_files(line, workspace, tmp_path, error):
    """A run whose server does not take its files; the run as MLflow has it in the end."""

    def refuse(run_id, file):
        raise error

    line.log_artifact = refuse
    box = Outbox(line, workspace)
    run_id = box.create_run(box.experiment("pistoseg", None)).info.run_id
    for name in ("masks.png", "cams.png"):
        (tmp_path / name).write_bytes(b"picture")
        box.log_artifact(run_id, str(tmp_path / name))
    box.log_metric(run_id, "miou", 0.5)
    box.set_terminated(run_id, "FINISHED")
    box.close()
    return line.get_run(run_id)


@pytest.mark.parametrize(
    "error",
    [
        answered(413),
        answered(405),
        botocore.exceptions.NoCredentialsError(),
        uploaded_by_boto3("AccessDenied"),
        uploaded_by_boto3("NoSuchBucket"),
        ModuleNotFoundError("No module named 'google.cloud'"),
    ],
)
def test_files_that_are_refused_for_good_keep_nothing_else_from_being_sent(line, workspace, tmp_path, capsys, error):
    run = with_files(line, workspace, tmp_path, error)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"miou": 0.5})
    assert capsys.readouterr().out.count("files can't be written and are left out for good") == 1
    assert not storage.exists(storage.join(workspace, messages.FOLDER))


@pytest.mark.parametrize(
    "error",
    [
        *(answered(status) for status in (401, 403, 429, 500, 503)),
        uploaded_by_boto3("SlowDown"),
        uploaded_by_boto3("ExpiredToken"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_files_that_a_later_try_may_get_sent_are_kept_and_keep_nothing_else(line, workspace, tmp_path, capsys, error):
    run = with_files(line, workspace, tmp_path, error)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"miou": 0.5})
    assert "does not take a file: what is kept in" in capsys.readouterr().out
    later = Outbox(line, workspace)
    later.send_left()
    later.close()
    assert capsys.readouterr().out.count("can't be sent to MLflow now") == 1
    del line.log_artifact
    Outbox(line, workspace).send_left()
    assert [item.path for item in line.list_artifacts(run.info.run_id)] == ["cams.png", "masks.png"]
    assert not storage.list_dir(storage.join(workspace, messages.FOLDER))


class Files:
    """A server's place of files that does not take some of them, by name, for now."""

    def __init__(self, line, *refused):
        self.tried, self.refused, self._take = [], set(refused), line.log_artifact
        line.log_artifact = self

    def __call__(self, run_id, file):
        name = storage.name(file)
        self.tried.append(name)
        if name in self.refused:
            raise answered(503)
        self._take(run_id, file)

    def tries(self, send):
        """Names of the files that are tried meanwhile."""
        self.tried.clear()
        send()
        return list(self.tried)


def put_files(box, run_id, folder, *names):
    for name in names:
        (folder / name).write_bytes(b"picture")
        box.log_artifact(run_id, str(folder / name))


def test_of_uploads_that_fail_one_is_tried_in_a_pass_and_another_one_in_the_next(line, workspace, tmp_path, capsys):
    box = Outbox(line, workspace)
    line.cut = True
    run_id = box.create_run(box.experiment("pistoseg", None)).info.run_id
    put_files(box, run_id, tmp_path, "a", "b", "c", "d")
    box.log_metric(run_id, "miou", 0.5)
    line.cut = False
    files = Files(line, "a", "c")
    assert files.tries(box._send_kept) == ["a"]
    (run,) = line.search_runs([line.get_experiment_by_name("pistoseg").experiment_id])
    assert run.data.metrics == {"miou": 0.5}
    assert "MLflow is back: 2 messages sent" in capsys.readouterr().out
    assert files.tries(box._send_kept) == ["b", "c"]
    assert files.tries(box._send_kept) == ["d", "a"]
    files.refused.clear()
    assert files.tries(box.close) == ["c", "a"]
    assert storage.list_dir(storage.join(workspace, messages.FOLDER)) == []


def test_of_uploads_that_earlier_runs_left_one_that_fails_is_tried_in_a_pass_and_none_keeps_others_back_for_ever(
    line, workspace, tmp_path
):
    line.cut = True
    for name in "ab":
        box = Outbox(line, workspace)
        run_id = box.create_run(box.experiment("pistoseg", None), run_name=name).info.run_id
        put_files(box, run_id, tmp_path, f"{name}1", f"{name}2", f"{name}3")
        box.set_terminated(run_id, "FINISHED")
        box.close()
    line.cut = False
    files = Files(line, "a1", "b1")
    later = Outbox(line, workspace)
    for _ in range(100):  # by chance, each file has one in four each time
        tried = files.tries(later.send_left)
        assert len(files.refused.intersection(tried)) == 1
    runs = line.search_runs([line.get_experiment_by_name("pistoseg").experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    has = {run.info.run_name: [item.path for item in line.list_artifacts(run.info.run_id)] for run in runs}
    assert has == {"a": ["a2", "a3"], "b": ["b2", "b3"]}


def test_an_upload_that_fails_while_the_server_answers_keeps_only_uploads_back(line, workspace, tmp_path, capsys):
    files = Files(line, "a")
    box = Outbox(line, workspace)
    run_id = box.create_run(box.experiment("pistoseg", None)).info.run_id
    put_files(box, run_id, tmp_path, "a", "b")
    assert files.tried == ["a"], "the second one might take minutes to fail, too"
    box.log_metric(run_id, "miou", 0.5)
    assert box.logged(run_id) == {("miou", 0)}
    printed = capsys.readouterr().out
    assert "MLflow does not take a now, the run goes on" in printed
    assert "can't be reached" not in printed
    files.refused.clear()
    box.close()
    assert "MLflow takes files again: 2 messages sent" in capsys.readouterr().out
    assert [item.path for item in line.list_artifacts(run_id)] == ["a", "b"]


def test_what_was_sent_of_an_earlier_run_and_can_not_be_deleted_is_not_said_to_be_stuck(
    line, workspace, monkeypatch, capsys
):
    folder = left(line, workspace)

    def refuse(uri):
        raise RefusedError("refuses access", file=uri)

    with monkeypatch.context() as now:
        now.setattr(storage, "remove_tree", refuse)
        Outbox(line, workspace).send_left()
    printed = capsys.readouterr().out
    assert "messages that an earlier run could not send" in printed
    assert "can't be sent" not in printed
    assert not list(messages.uris(folder))


def test_a_turn_whose_end_can_not_be_written_ends(tmp_path, monkeypatch):
    def refuse(uri, data):
        raise RefusedError("refuses access", file=uri)

    with turn.turn(str(tmp_path)) as mine:
        assert mine
        monkeypatch.setattr(storage, "write_bytes", refuse)


@pytest.mark.parametrize("error", [UnavailableError("does not answer"), RefusedError("refuses access")])
def test_an_outbox_that_can_not_be_cleared_ends_no_run(line, workspace, tmp_path, monkeypatch, capsys, error):
    box = Outbox(line, workspace)
    line.cut = True
    tell(box, tmp_path)
    line.cut = False

    def refuse(uri):
        raise error

    monkeypatch.setattr(storage, "remove_tree", refuse)
    monkeypatch.setattr(storage, "remove_file", refuse)
    box.close()
    assert "MLflow is back" in capsys.readouterr().out
    check(line)


def test_what_is_kept_while_an_outbox_is_cleared_stays(line, workspace, monkeypatch):
    box = Outbox(line, workspace)
    run_id = box.create_run(box.experiment("pistoseg", None)).info.run_id
    line.cut = True
    box.set_tag(run_id, "colour", "blue")
    line.cut = False
    remove, said, waited = storage.remove_tree, threading.Event(), []

    def tag():
        box.set_tag(run_id, "shape", "round")
        said.set()

    def slow(uri):
        line.cut = True  # again, just now
        threading.Thread(target=tag).start()
        waited.append(not said.wait(STUCK_S))
        remove(uri)

    monkeypatch.setattr(storage, "remove_tree", slow)
    box._send_kept()
    assert waited == [False], "nothing waits for a storage that takes long to delete a folder"
    assert [storage.name(item) for item in messages.uris(box._folder)] == ["000002.json"]


def test_an_outbox_for_another_server_stays_and_one_with_other_calls_is_not_obeyed(line, workspace, tmp_path):
    folder = storage.join(workspace, messages.FOLDER, "left")
    message = {"call": "delete_experiment", "arguments": {"experiment_id": "0"}, "data": False}
    for server in ("another", messages.digest(line.tracking_uri)):
        owner = {"process": "host/0/gone", "server": server}
        storage.write_bytes(storage.join(folder, "owner.json"), json.dumps(owner).encode())
        storage.write_bytes(storage.join(folder, "000001.json"), json.dumps(message).encode())
        if server == "another":
            Outbox(line, workspace).send_left()
            assert storage.exists(storage.join(folder, "000001.json"))
    storage.write_bytes(storage.join(folder, "owner.json"), json.dumps(owner | {"process": dead_process()}).encode())
    Outbox(line, workspace).send_left()
    assert not storage.exists(folder)
    assert line.get_experiment("0").lifecycle_stage == "active"


def dead_process():
    code = "from pistoseg.liveness import process; print(process())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_a_process_is_alive_until_it_ends_and_one_of_another_machine_until_it_is_silent(monkeypatch):
    assert is_alive(process())
    assert not is_alive(process() + "1"), "another process with that number"
    assert not is_alive(dead_process())
    monkeypatch.setattr("pistoseg.liveness.time.time", lambda: 10_000.0)
    assert is_alive("elsewhere/1/5", 9_900.0)
    assert not is_alive("elsewhere/1/5", 9_000.0)
    # A container may have this machine's name, and sees none of its processes.
    here, pid, since = process().split("/")
    assert is_alive(f"{here.split()[0]} {here.split()[1]} 1/{pid}/{since}1", 9_900.0)


@pytest.mark.parametrize("own", ["w", "o'neill's"])
def test_the_next_run_in_a_workspace_ends_those_of_killed_processes_and_no_others(
    tmp_path, put_database, monkeypatch, own
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    put_database(tmp_path / own)
    config, workspace = load_config("demo"), Workspace(str(tmp_path / own))
    with Tracker.start(config, workspace, name="live") as live:
        client = live.client
        monkeypatch.setattr(outbox, "process", dead_process)
        for place in (own, "elsewhere"):
            box = Outbox(client._client, str(tmp_path / place))
            box.create_run(live.experiment_id, run_name=f"killed in {place}")
        monkeypatch.setattr(outbox, "process", process)
        with Tracker.start(config, workspace, name="next"):
            runs = client.search_runs([live.experiment_id])
            states = {run.info.run_name: run.info.status for run in runs}
    wanted = {"live": "RUNNING", "next": "RUNNING", f"killed in {own}": "KILLED", "killed in elsewhere": "RUNNING"}
    assert states == wanted


def test_an_interrupt_ends_the_runs_of_the_pipeline_and_of_its_stage_as_killed(tmp_path, put_database, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    put_database(tmp_path)
    trackers = []

    def interrupted():
        with Tracker.start(load_config("demo"), Workspace(str(tmp_path))) as tracker:
            trackers.append(tracker)
            with tracker.stage("patches", "0" * 16, {}, {}):
                pass
            with tracker.stage("precise", "1" * 16, {}, {}):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    runs = trackers[0].client.search_runs([trackers[0].experiment_id])
    assert sorted(run.info.status for run in runs) == ["FINISHED", "KILLED", "KILLED"]


def test_a_registered_model_is_called_as_other_commands_take_it(tmp_path, put_database, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    put_database(tmp_path)
    monkeypatch.setattr("pistoseg.tracking.server._register", lambda client, **_: "3")
    with Tracker.start(load_config("demo"), Workspace(str(tmp_path))) as tracker:
        tracker.finish({"precise": Artifact("precise", "f" * 16, str(tmp_path), {"summary": {}, "inputs": {}})})
    assert "models:/pistoseg/3" in capsys.readouterr().out


def test_a_pipeline_whose_tracking_server_refuses_connections_is_told_later(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:hidden@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    workspace = Workspace(str(tmp_path))
    with Tracker.start(load_config("demo"), workspace) as tracker:
        with tracker.stage("patches", "0" * 16, {"a": 1}, {}) as run:
            run.metrics({"images": 3.0})
        manifest = {"summary": {}, "inputs": {}}
        tracker.finish({"precise": Artifact("precise", "f" * 16, str(tmp_path / "precise"), manifest)})
    printed = capsys.readouterr().out
    assert printed.count("can't be reached") == 1
    assert "hidden" not in printed
    kept = [json.loads(storage.read_bytes(item)) for item in storage.list_files(str(tmp_path)) if item[-6].isdigit()]
    calls = [item["call"] for item in kept]
    assert calls[:5] == ["create_run", "log_batch", "create_run", "log_batch", "log_metric"]
    assert calls[5:] == ["set_terminated", "register", "set_terminated"]
    assert not [item for item in storage.list_files(str(tmp_path)) if b"hidden" in storage.read_bytes(item)]


def test_a_remote_workspace_without_a_server_says_where_its_runs_are(tmp_path, put_database, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    for expected in (1, 0):  # once: then the folder is there
        connect(TrackingConfig(), Workspace("memory://pistoseg-outbox/runs")).close()
        assert capsys.readouterr().out.count("set MLFLOW_TRACKING_URI") == expected
    put_database(tmp_path / "local")
    connect(TrackingConfig(), Workspace(str(tmp_path / "local"))).close()
    assert "MLFLOW_TRACKING_URI" not in capsys.readouterr().out
