"""Data and workspace in object storage: a real S3 server with keys of its own, on this machine."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from conftest import TINY
from processes import STUCK_S

from pistoseg import claims, doctor, object_store, storage
from pistoseg.artifacts import Workspace
from pistoseg.config import load_config
from pistoseg.errors import PistoSegError
from pistoseg.local_cluster import BUCKET
from pistoseg.pipeline import run_pipeline

pytestmark = pytest.mark.processes


def test_names_with_brackets_spaces_and_unicode_in_a_bucket(s3):
    names = ["x-[1, 0, 0].png", "Größe 3 µm.png", "a*b.png"]
    for name in names:
        storage.write_bytes(storage.join(s3, "names", "1.training", name), name.encode())
    listed = storage.list_files(storage.join(s3, "names"))
    assert sorted(storage.name(item) for item in listed) == sorted(names)
    assert all(storage.read_bytes(item) == storage.name(item).encode() for item in listed)
    assert all(item.startswith("s3://") for item in listed)
    assert storage.is_dir(storage.join(s3, "names"))
    before = storage.list_details(storage.join(s3, "names"))
    storage.write_bytes(listed[0], b"other")
    assert storage.list_details(storage.join(s3, "names")) != before
    storage.remove_file(storage.join(s3, "names", "1.training", names[0]))
    assert not storage.exists(storage.join(s3, "names", "1.training", names[0]))
    storage.remove_tree(storage.join(s3, "names"))
    assert storage.list_files(storage.join(s3, "names")) == []


def test_mosaics_are_made_from_bucket_to_bucket_and_made_again_for_nothing(s3, cohort, tmp_path, capsys):
    """Whole trainings from bucket to bucket are in test_cluster.py."""
    for file in cohort.rglob("*.png"):
        storage.write_bytes(storage.join(s3, "cohort", str(file.relative_to(cohort))), file.read_bytes())
    data, workspace = storage.join(s3, "cohort"), storage.join(s3, "runs", "one")
    (tmp_path / "s3.yaml").write_text(yaml.safe_dump(TINY | {"tracking": {"uri": f"sqlite:///{tmp_path / 'm.db'}"}}))
    command = [sys.executable, "-m", "pistoseg", "synthesize", "--config", str(tmp_path / "s3.yaml")]
    command += ["--data", data, "--workspace", workspace]
    made = subprocess.run(command, capture_output=True, text=True, timeout=STUCK_S, cwd=tmp_path, check=False)
    assert made.returncode == 0, made.stderr[-4000:]
    clear_listings()
    manifests = [item for item in storage.list_files(workspace) if item.endswith("/manifest.json")]
    assert {item.split("/")[-3] for item in manifests} == {"patches", "synthesis"}

    before = storage.list_details(workspace)
    config = load_config(file=str(tmp_path / "s3.yaml"), overrides=[f"data.uri={data}"])
    run_pipeline(config, Workspace(workspace), ("synthesis",))  # where nothing is computed no Ray is needed
    assert capsys.readouterr().err.count("up to date, reused") == 2
    clear_listings()
    assert storage.list_details(workspace) == before


def clear_listings():
    storage.filesystem(f"s3://{BUCKET}")[0].invalidate_cache()


def test_of_many_that_create_one_key_one_succeeds(s3):
    uri = storage.join(s3, "claims", "x [1].json")
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda number: storage.create_bytes(uri, f"{number}".encode()), range(8)))
    assert created.count(True) == 1
    assert storage.read_bytes(uri) == f"{created.index(True)}".encode()


def test_a_folder_in_a_bucket_is_claimed_waited_for_and_taken_over(s3, monkeypatch):
    monkeypatch.setattr(claims, "STALE_S", 1.0)
    monkeypatch.setattr(claims, "POLL_S", 0.1)
    folder, said = storage.join(s3, "stage", "0123"), []
    dead = {"token": "x", "host": "node-7", "machine": "node-7 b 1", "pid": 1, "process": "1", "beat": 0}
    storage.write_bytes(storage.join(folder, claims.FOLDER, "000001.json"), json.dumps(dead).encode())
    with claims.claimed(folder, say=said.append) as claim:
        assert claim.generation == 2
        claim.check()
    assert len(said) == 1
    assert storage.list_dir(storage.join(folder, claims.FOLDER)) == []


def test_a_large_folder_is_listed_page_by_page_and_removed(s3):
    backend, path = storage.filesystem(storage.join(s3, "many"))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: backend.pipe_file(f"{path}/{number:05d} [1].bin", b"x"), range(1001)))
    names = [name for name, _, _ in storage.iter_details(storage.join(s3, "many"))]
    assert names == [f"{number:05d} [1].bin" for number in range(1001)]
    storage.remove_tree(storage.join(s3, "many"))
    assert storage.list_files(storage.join(s3, "many")) == []


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret-of-someone", r"refuses (the access key|access)"),
        ("AWS_ACCESS_KEY_ID", "NOBODY", r"refuses (the access key|access)"),
    ],
)
def test_a_wrong_key_fails_at_once_with_the_remedy(s3, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    storage.filesystem(s3)[0].clear_instance_cache()
    for call in (storage.read_bytes, storage.exists, storage.list_files, storage.list_dir, storage.is_dir):
        with pytest.raises(PistoSegError, match=message) as caught:
            call(storage.join(s3, "x"))
        assert value not in str(caught.value) or variable == "AWS_ACCESS_KEY_ID"
    with pytest.raises(PistoSegError, match=message):
        storage.write_bytes(storage.join(s3, "x"), b"x")


def test_a_missing_bucket_is_named_and_a_missing_key_is_none(s3):
    for call in (storage.read_bytes, storage.list_files, storage.list_dir):
        with pytest.raises(PistoSegError, match=r"no bucket 'not-there-at-all'"):
            call("s3://not-there-at-all/x")
    assert not storage.exists("s3://not-there-at-all/x")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(s3, "not there"))
    assert storage.list_dir(storage.join(s3, "not there")) == []


def test_an_absence_of_the_server_is_waited_out(server, s3, monkeypatch):
    failed, is_transient = threading.Event(), object_store.is_transient

    def noted(error):
        failed.set()
        return is_transient(error)

    monkeypatch.setattr(object_store, "is_transient", noted)
    monkeypatch.setattr(object_store, "RETRIES", 100)  # however long the server takes to start
    uri = storage.join(s3, "absence.bin")
    storage.write_bytes(uri, b"before")
    server.stop()
    with ThreadPoolExecutor(1) as pool:  # the server ends with the thread that starts it, which has to be this one
        written = pool.submit(storage.write_bytes, uri, b"after")
        try:
            assert failed.wait(STUCK_S), "the server was to be missed"
        finally:
            server.start()
        written.result(STUCK_S)
    assert storage.read_bytes(uri) == b"after"


def test_a_server_that_stays_away_is_named(s3, monkeypatch):
    away = "http://127.0.0.1:9"  # nobody listens there
    monkeypatch.setenv("AWS_ENDPOINT_URL", away)
    monkeypatch.setattr(object_store, "RETRIES", 2)
    with pytest.raises(PistoSegError, match=f"{away} does not answer"):
        storage.read_bytes(storage.join(s3, "x"))


def test_doctor_tries_the_bucket(s3, monkeypatch):
    found = list(doctor._workspace(storage.join(s3, "runs")))
    assert [(item.what, item.status) for item in found] == [("workspace", "ok"), ("conditional put", "ok")]
    assert not storage.exists(storage.join(s3, "runs", found[0].detail))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-of-someone")
    storage.filesystem(s3)[0].clear_instance_cache()
    (refused,) = doctor._guarded("workspace", lambda: doctor._workspace(storage.join(s3, "runs")))
    assert refused.status == "failed"
    assert "AWS" in refused.remedy or "access key" in refused.remedy
