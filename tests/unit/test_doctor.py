import contextlib
import errno
import json
import shutil
import sqlite3
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from pistoseg import doctor, object_store, storage
from pistoseg.artifacts import Workspace
from pistoseg.cli import main
from pistoseg.config import load_config
from pistoseg.doctor import Finding
from pistoseg.errors import PistoSegError
from pistoseg.tracking import connect


def statuses(findings):
    return {found.what: found.status for found in findings}


def test_a_workspace_that_works_is_left_as_it_was(tmp_path):
    storage.write_bytes(str(tmp_path / "kept.txt"), b"x")
    found = list(doctor._workspace(str(tmp_path)))
    assert statuses(found) == {"workspace": "ok", "conditional put": "ok"}
    assert "MB/s" in found[0].detail
    assert [item.name for item in tmp_path.iterdir()] == ["kept.txt"]
    list(doctor._workspace(str(tmp_path / "new" / "a" / "b")))
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    list(doctor._workspace(str(tmp_path / "empty")))
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_storage_that_ignores_conditions_is_found_out(tmp_path, monkeypatch):
    def careless(uri, data):
        storage.write_bytes(uri, data)
        return True

    monkeypatch.setattr(storage, "create_bytes", careless)
    found = list(doctor._workspace(str(tmp_path)))
    assert statuses(found)["conditional put"] == "failed"
    assert "If-None-Match" in found[1].remedy


def test_wrong_and_missing_packages_are_named(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def version(name):
        if name == "gone":
            raise PackageNotFoundError(name)
        return {"old": "1.0", "fine": "2.5"}[name]

    wanted = ["old>=2", "fine>=2,<3", "gone", 'extra==1; extra == "dev"']
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    monkeypatch.setattr(doctor, "version", version)
    (found,) = doctor._packages()
    assert (found.status, found.detail) == ("failed", "old 1.0 is not >=2; gone is missing")


@pytest.mark.parametrize(("free", "status"), [(1e9, "failed"), (5e9, "warning"), (5e11, "ok")])
def test_a_full_disk_is_said(free, status):
    facts = {"disk": free, "folder": "/tmp", "shm": 64 << 20}
    disk, shm = doctor._disk("node a", facts)
    assert disk.status == status
    assert bool(disk.remedy) == (status != "ok")
    assert "--shm-size" in shm.remedy  # Docker's default


def test_data_that_is_not_there_or_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.png").write_bytes(b"x")
    config = load_config("demo", overrides=[f"data.uri={tmp_path / 'empty'}", f"data.validation={tmp_path / 'no'}"])
    assert statuses(doctor._data(config)) == {"data.uri": "failed", "data.validation": "failed"}
    config = load_config("demo", overrides=[f"data.uri={tmp_path / 'full'}"])
    assert statuses(doctor._data(config)) == {"data.uri": "ok"}


def test_weights_that_can_not_be_had_fail_for_their_stage(monkeypatch):
    def create(encoder, weights, *, output_stride):
        if weights == "imagenet":
            raise PistoSegError("the hub can't be reached", field="weights", remedy="use a file")

    monkeypatch.setattr("pistoseg.models.encoders.create", create)
    monkeypatch.setattr("pistoseg.stages.trained.check_buildable", lambda *_: None)  # takes seconds, see below
    config = load_config("demo", overrides=["precise.weights=null", "precise.encoder=resnet18"])
    found = list(doctor._weights(config))
    assert {(item.status, item.remedy) for item in found} == {("failed", "use a file"), ("ok", "")}


@pytest.mark.parametrize(
    "chosen", [[], ["--profile", "cpu"], ["--preset", "demo"], ["--profile=cpu", "--set", "precise.weights=null"]]
)
def test_weights_are_those_of_a_chosen_preset_or_of_none(monkeypatch, capsys, tmp_path, chosen):
    for name in ("_ray", "_mlflow", "_packages", "_disk", "_workspace", "_openslide"):
        monkeypatch.setattr(doctor, name, lambda *_: iter([]))
    monkeypatch.setattr(doctor, "_encoder", lambda *_: iter([Finding("weights", "failed", "gone")]))
    assert main(["doctor", "--workspace", str(tmp_path), "--json", *chosen]) == (1 if chosen else 0)
    details = [item["detail"] for item in json.loads(capsys.readouterr().out) if item["what"].startswith("weights")]
    assert (details[0] == "gone") if chosen else ("none is named (add --preset" in details[0])


def test_a_workspace_that_can_not_be_made_says_what_to_do(monkeypatch, tmp_path):
    def refused(uri, data):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", uri)  # as below /proc

    monkeypatch.setattr(storage, "write_bytes", refused)
    (found,) = doctor._guarded("workspace", lambda: doctor._workspace(str(tmp_path)))
    assert found.detail == f"{tmp_path}: can't be written or read (No such file or directory)"
    assert "give --workspace a folder" in found.remedy


def test_a_network_that_a_run_refuses_fails_though_its_encoder_can_be_built():
    none = [f"{name}.weights=null" for name in ("preliminary", "precise")]
    given = ["precise.masks=pseudo", "precise.initial=imagenet", "precise.architecture=pan"]
    config = load_config("demo", overrides=[*none, *given, "precise.encoder=densenet121"])
    found = list(doctor._weights(config))
    assert [(item.what, item.status) for item in found] == [("network of precise", "failed"), ("weights", "ok")]
    assert found[0].detail.startswith("precise.encoder: encoder 'densenet121' can't be built")


def test_a_tracking_server_that_is_away_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "1")
    config = load_config("demo", overrides=["tracking.uri=http://me:hunter2@127.0.0.1:9"])
    (found,) = doctor._mlflow(config, str(tmp_path))
    assert found.status == "warning"
    assert "hunter2" not in found.detail + found.remedy
    assert statuses(doctor._mlflow(load_config("demo"), str(tmp_path))) == {"mlflow": "ok"}


@pytest.mark.parametrize("wrong", ["damaged", "another version"])
def test_a_database_that_a_run_could_not_open_fails(tmp_path, monkeypatch, wrong):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, file = load_config("demo"), tmp_path / "mlflow.db"
    if wrong == "damaged":
        file.write_bytes(b"no database")
    else:
        before = tmp_path / "before"
        connect(config.tracking, Workspace(str(before))).close()
        assert statuses(doctor._mlflow(config, str(before))) == {"mlflow": "ok"}
        shutil.copy(before / "mlflow.db", file)
        with contextlib.closing(sqlite3.connect(file)) as database, database:
            database.execute("UPDATE alembic_version SET version_num = 'bd07f7e963c5'")
    (found,) = doctor._guarded("mlflow", lambda: doctor._mlflow(config, str(tmp_path)))
    assert found.status == "failed"
    assert f"{file}: MLflow can't open it" in found.detail
    assert ("mlflow db upgrade" in found.remedy) == (wrong == "another version")


def test_a_slide_opens():
    assert [found.status for found in doctor._openslide()] == ["ok"]


def test_whatever_goes_wrong_is_a_finding_and_the_rest_is_looked_at(monkeypatch, tmp_path):
    def broken():
        raise OSError("s3://me:hunter2@b is odd")
        yield

    for name in ("_python", "_packages", "_openslide"):
        monkeypatch.setattr(doctor, name, broken)
    for name in ("_ray", "_mlflow", "_workspace", "_weights"):
        monkeypatch.setattr(doctor, name, lambda *_: iter([Finding("x", "ok", "")]))
    before = object_store.RETRIES
    found = list(doctor.examine(load_config("demo"), str(tmp_path)))
    assert [item.status for item in found].count("failed") == 3
    assert [item.what for item in found].count("x") == 4
    assert not any("hunter2" in item.detail for item in found)
    assert before == object_store.RETRIES


class Nodes:
    """Stands in for Ray: an answer is a node's name and the share of a GPU that it takes."""

    def __init__(self, monkeypatch, gpu_answers=(), **answers):
        self.answers = {(name, 0): facts for name, facts in answers.items()}
        self.answers |= {(name, 0.01): device for name, device in dict(gpu_answers).items()}
        monkeypatch.setattr("ray.remote", lambda **_: lambda task: self)
        monkeypatch.setattr("ray.get", lambda answer, **_: self.answers[answer])
        monkeypatch.setattr("ray.wait", self.wait)

    def options(self, scheduling_strategy, num_gpus=0):
        return SimpleNamespace(remote=lambda: (scheduling_strategy.node_id[0], num_gpus))

    def wait(self, asked, num_returns, timeout):
        assert (num_returns, timeout) == (len(asked), doctor.NODE_S)
        silent = [answer for answer in asked if self.answers[answer] == SILENT]
        return [answer for answer in asked if answer not in silent], silent

    def look(self):
        nodes = []
        for name in dict.fromkeys(name for name, _ in self.answers):
            resources = {"CPU": 4, "GPU": 2} if (name, 0.01) in self.answers else {"CPU": 4}
            nodes.append({"NodeID": name * 56, "NodeManagerHostname": name, "Resources": resources})
        return [found for found in doctor._nodes(nodes) if found.what.startswith("node")]


SILENT = "silent"


def node_facts(**versions):
    facts = doctor._local_facts() | {"disk": 1e12}
    return facts | {"versions": facts["versions"] | versions}


def test_nodes_may_have_another_build_of_a_version_but_no_other_version(monkeypatch):
    torch = doctor.version("torch").partition("+")[0]
    nodes = Nodes(monkeypatch, a=node_facts(torch=f"{torch}+other"), b=node_facts(torch="2.0.1+other"))
    found = {item.what: item for item in nodes.look()}
    assert {name: item.status for name, item in found.items()} == {"node a": "ok", "node b": "failed"}
    assert "has torch 2.0.1+other, unlike this machine" in found["node b"].detail


def test_all_nodes_are_waited_for_at_once_and_one_whose_gpus_alone_are_silent_is_a_warning(monkeypatch):
    gpus = {"b": SILENT, "c": SILENT, "d": "H200", "e": None}
    facts = {"a": SILENT, "b": SILENT} | dict.fromkeys("cde", node_facts())
    found = Nodes(monkeypatch, gpus, **facts).look()
    assert [item.status for item in found] == ["failed", "failed", "warning", "ok", "failed"]
    assert [item.detail.startswith("no answer within") for item in found] == [True, True, False, False, False]
    assert "2 GPUs, versions as here; no answer of its GPUs" in found[2].detail
    assert found[3].detail.endswith("H200")
    assert "torch sees none" in found[4].detail


def test_a_node_of_another_version_fails_also_while_its_gpus_are_in_use(monkeypatch):
    (found,) = Nodes(monkeypatch, {"a": SILENT}, a=node_facts(torch="2.0.1")).look()
    assert (found.status, "has torch 2.0.1" in found.detail) == ("failed", True)


def test_a_workspace_whose_nodes_were_asked_is_left_as_it_was(monkeypatch, tmp_path):
    def check_shared(workspace, read):
        storage.write_bytes(f"{workspace}/probe", b"")
        (tmp_path / "a" / "new" / "probe").unlink()
        raise PistoSegError("node b does not see it")

    monkeypatch.setattr("ray.nodes", list)
    monkeypatch.setattr(doctor, "_nodes", lambda nodes: iter(()))
    for name, value in (("connected", contextlib.nullcontext()), ("cluster_cpus", 4), ("cluster_gpus", 0)):
        monkeypatch.setattr(f"pistoseg.stages.cluster.{name}", lambda *_, value=value: value)
    monkeypatch.setattr("pistoseg.stages.placement.check_shared", check_shared)
    with pytest.raises(PistoSegError, match="does not see it"):
        list(doctor._ray(load_config("demo"), str(tmp_path / "a" / "new")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("failed", 1)])
def test_the_exit_code_says_whether_something_would_fail(monkeypatch, capsys, status, code):
    finding = Finding("x [1]", status, "is so", "mend [it]")
    monkeypatch.setattr(doctor, "examine", lambda config, workspace, **_: iter([finding]))
    assert main(["doctor", "--preset", "demo"]) == code
    printed = capsys.readouterr().out
    assert "x [1]" in printed
    assert "-> mend [it]" in printed
    assert main(["doctor", "--preset", "demo", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == [asdict(finding)]
