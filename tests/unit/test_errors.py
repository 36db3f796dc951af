import errno
import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from pistoseg import object_store, storage
from pistoseg.config import ComputeConfig, load_config
from pistoseg.errors import PistoSegError, UnavailableError, explained
from pistoseg.models.files import read_info
from pistoseg.patches.annotations import read_annotations
from pistoseg.patches.layouts import scan_training
from pistoseg.patches.source import Rejection
from pistoseg.patches.store import ingest
from pistoseg.phantom import PHANTOM_CLASSES, write_cohort
from pistoseg.search.trial import UNAVAILABLE, explain, run_trial
from pistoseg.stages import cluster
from pistoseg.training.trainer import CHECKPOINTS, SNAPSHOT, remove_unreadable_checkpoints

FULL = OSError(errno.ENOSPC, "No space left on device")


class WrappedError(Exception):
    """As Ray's errors keep what they came from."""

    def __init__(self, **below):
        super().__init__("wrapped")
        self.__dict__.update(below)


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        WrappedError(cause=FULL),
        WrappedError(worker_failures={0: WrappedError(cause=FULL)}),
        WrappedError(controller_failure=WrappedError(cause=FULL)),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
)
def test_a_full_disk_is_found_below_what_was_wrapped_around_it(error):
    found = explained(error, "/data/runs")
    assert isinstance(found, UnavailableError)
    assert str(found).startswith("/data/runs: no space is left on the disk. Remedy: make room")


@pytest.mark.parametrize(
    ("reason", "remedy", "says"),
    [
        ("is bad", None, "is bad."),
        ("is bad.", "mend it.", "is bad. Remedy: mend it."),
        ("is bad; did you mean good?", "mend it", "is bad; did you mean good? Remedy: mend it."),
    ],
)
def test_an_error_has_one_full_stop_whatever_it_quotes(reason, remedy, says):
    error = PistoSegError(reason, file="x.png", remedy=remedy)
    assert str(error) == f"x.png: {says}"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, type("Other", (torch.OutOfMemoryError,), {})])
def test_a_gpu_that_is_out_of_memory_is_a_setting_that_does_not_fit_not_an_outage(kind):
    error = kind("CUDA out of memory. Tried to allocate 2.00 GiB")
    task = ray.exceptions.RayTaskError("train", "Traceback ...", error).as_instanceof_cause()
    for wrapped in (error, task, WrappedError(worker_failures={0: task})):
        found = explained(wrapped, "/runs/precise/1")
        assert type(found) is PistoSegError
        assert str(found).startswith("/runs/precise/1: a GPU is out of memory. Remedy: set a smaller batch_size")
    assert explain(task).startswith("a GPU is out of memory")


OF_MEMORY = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory")
DIED = "a worker process died, or its node. Remedy: if it was killed for memory"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OF_MEMORY, "a node is out of memory. Remedy: take smaller batches"),
        (ray.exceptions.WorkerCrashedError(), DIED),
        (ray.exceptions.ActorDiedError(), DIED),
        (ray.exceptions.NodeDiedError("is gone"), DIED),
    ],
)
def test_processes_that_died_are_told_without_the_traceback_of_ray(error, says):
    of_worker = WorkerHealthCheckFailedError("A worker health check failed.", error)
    for wrapped in (error, of_worker, WrappedError(worker_failures={0: of_worker})):
        found = explained(wrapped, "/runs/precise/1")
        assert type(found) is PistoSegError
        assert str(found).startswith(f"/runs/precise/1: {says}")


def test_an_actor_whose_constructor_raised_keeps_its_traceback():
    raised = ray.exceptions.RayTaskError("__init__", "Traceback ...", KeyError("a bug"))
    assert explained(ray.exceptions.ActorDiedError(raised)) is None


def test_the_file_that_the_system_names_is_told():
    assert explained(OSError(errno.ENOSPC, "No space left on device", "/tmp/x")).file == "/tmp/x"


def test_what_is_no_fault_of_the_disk_keeps_its_traceback():
    for error in (None, OSError(errno.EIO, "Input/output error"), ValueError("a bug"), WrappedError(cause="a text")):
        assert explained(error) is None


def test_an_error_for_users_is_found_as_it_is():
    known = PistoSegError("is wrong")
    assert explained(WrappedError(worker_failures={1: WrappedError(cause=known)})) is known


def test_what_a_task_of_ray_raised_is_told_without_its_traceback():
    error = PistoSegError("is bad", file="a.svs")
    wrapped = ray.exceptions.RayTaskError("segment", "Traceback ...", error).as_instanceof_cause()
    assert isinstance(wrapped, PistoSegError)
    assert explained(wrapped) is error


def test_an_error_keeps_its_kind_and_fields_on_its_way_between_processes():
    error = UnavailableError("is away", file="s3://b", field="f", remedy="wait")
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), back.fields()) == (UnavailableError, error.fields())


def test_a_run_whose_disk_is_full_says_so(monkeypatch):
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "_started", lambda config: nullcontext())
    with pytest.raises(UnavailableError, match="no space"), cluster.connected(ComputeConfig()):
        raise WrappedError(cause=FULL)
    with pytest.raises(WrappedError), cluster.connected(ComputeConfig()):
        raise WrappedError(cause=ValueError("a bug"))


def test_a_full_disk_names_the_file_that_was_to_be_written(tmp_path, monkeypatch):
    def write(*_):
        raise FULL

    monkeypatch.setattr(storage, "_part", write)
    with pytest.raises(UnavailableError, match=r"x\.bin: no space"):
        storage.write_bytes(str(tmp_path / "x.bin"), b"x")


def test_images_of_a_storage_that_is_away_are_not_rejected(tmp_path, monkeypatch):
    """Otherwise a run during an outage would train on fewer images, and keep that for ever."""
    config = load_config("demo")
    write_cohort(str(tmp_path), training=5, validation=0, patch_size=64)
    source = scan_training(str(tmp_path / "1.training"), config.classes.tissue(), config.data).images[0]

    def away(*_, **__):
        raise object_store.explain(type("EndpointConnectionError", (Exception,), {})("away"), "s3://b/x.png")

    assert ingest(source, config.data, config.scale)[0]
    monkeypatch.setattr(storage, "read_bytes", away)
    with pytest.raises(UnavailableError, match="does not answer"):
        ingest(source, config.data, config.scale)
    assert Rejection.of(PistoSegError("is no image"), "x").reason == "is no image"


def test_a_trial_that_a_full_disk_ends_is_no_failed_trial(monkeypatch):
    reports = []
    monkeypatch.setattr("pistoseg.search.trial.tune.report", reports.append)
    for error in (WrappedError(cause=FULL), ValueError("a bug")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr("pistoseg.search.trial._run", fail)
        run_trial({"overrides": "{}", "number": 0}, SimpleNamespace(config=None))
    assert [list(report) for report in reports] == [[UNAVAILABLE], ["problem"]]


def test_a_trial_that_loses_its_workers_is_left_to_be_started_again(monkeypatch):
    lost = WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.RayActorError())
    lost = WrappedError(worker_failures={0: lost})

    def fail(*_):
        raise explained(lost) from lost

    reports = []
    monkeypatch.setattr("pistoseg.search.trial.tune.report", reports.append)
    monkeypatch.setattr("pistoseg.search.trial._run", fail)
    with pytest.raises(PistoSegError, match="died"):
        run_trial({"overrides": "{}", "number": 0}, SimpleNamespace())
    assert reports == []


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.geojson", lambda folder: read_annotations(f"{folder}/a.geojson", PHANTOM_CLASSES)),
        ("model.json", lambda folder: read_info(str(folder), "pistoseg")),
        (f"{CHECKPOINTS}/{SNAPSHOT}", lambda folder: remove_unreadable_checkpoints(str(folder))),
        ("phantom.json", lambda folder: write_cohort(str(folder), training=1, validation=0)),
    ],
)
def test_json_on_a_storage_that_goes_away_is_not_taken_for_damaged(name, read, tmp_path, monkeypatch):
    storage.write_bytes(str(tmp_path / name), b"{}")

    def away(uri):
        raise UnavailableError("does not answer", file=uri)

    monkeypatch.setattr(storage, "read_bytes", away)
    with pytest.raises(UnavailableError, match="does not answer"):
        read(tmp_path)
    assert (tmp_path / name).exists()
