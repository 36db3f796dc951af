import json
import os
import subprocess
import sys
import threading
import time
import uuid
from types import SimpleNamespace

import pytest
from processes import STUCK_S

from pistoseg import claims, storage
from pistoseg.claims import claimed
from pistoseg.errors import PistoSegError


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(claims, "POLL_S", 0.02)
    monkeypatch.setattr(claims, "BEAT_S", 0.05)
    monkeypatch.setattr(claims, "STALE_S", 1.0)


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    if request.param == "memory":
        uri = f"memory://claims-{uuid.uuid4().hex}"
        yield uri
        storage.remove_tree(uri)
    else:
        yield str(tmp_path / "stage" / "0123")


def files(folder):
    return [storage.name(item) for item in storage.list_dir(storage.join(folder, claims.FOLDER))]


def foreign(folder, generation=1, **fields):
    """A claim of a process elsewhere, which shows no sign of life."""
    body = {"token": "x", "host": "node-7", "machine": "node-7 b 1", "pid": 1, "process": "1", "beat": 0} | fields
    storage.write_bytes(storage.join(folder, claims.FOLDER, f"{generation:06d}.json"), json.dumps(body).encode())


def test_of_many_that_want_a_folder_one_makes_it_and_the_others_use_it(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "STALE_S", 90.0)
    folder, made, used, inside = str(tmp_path / "artifact"), [], [], []

    def ready():
        return (tmp_path / "artifact" / "manifest.json").exists()

    def work(number):
        with claimed(folder, ready, lambda text: None) as claim:
            if claim is None:
                used.append(number)
                return
            inside.append(number)
            assert len(inside) == 1
            time.sleep(0.2)
            claim.check()
            made.append(number)
            storage.write_bytes(storage.join(folder, "manifest.json"), b"{}")
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(STUCK_S)
    assert len(made) == 1
    assert sorted(made + used) == list(range(8))
    assert files(folder) == []


def test_nothing_is_waited_for_or_written_where_the_work_is_done(folder):
    with claimed(folder, lambda: True) as claim:
        assert claim is None
    assert files(folder) == []


def test_one_that_fails_is_followed_at_once_by_the_next(folder, monkeypatch):
    monkeypatch.setattr(claims, "STALE_S", 1000.0)
    with pytest.raises(RuntimeError, match="broken"), claimed(folder):
        raise RuntimeError("broken")
    with claimed(folder) as claim:
        assert claim.generation == 2
    assert files(folder) == []


@pytest.mark.parametrize("error", [OSError("the storage is away"), KeyboardInterrupt()])
def test_one_that_fails_at_its_last_look_is_followed_at_once_by_the_next(folder, monkeypatch, error):
    monkeypatch.setattr(claims, "STALE_S", 1000.0)
    looks = iter([False])

    def ready():
        for found in looks:
            return found
        raise error

    with pytest.raises(type(error)), claimed(folder, ready):
        pytest.fail("the folder is not to be written")
    with claimed(folder, say=pytest.fail) as claim:
        assert claim.generation == 2
    assert files(folder) == []


def test_a_claim_without_a_sign_of_life_is_taken_over_and_the_wait_is_said(folder):
    foreign(folder, started="2026-01-01T00:00:00Z")
    said = []
    began = time.monotonic()
    with claimed(folder, say=said.append) as claim:
        assert claim.generation == 2
    assert time.monotonic() - began >= 1.0
    assert said == ["waiting: process 1 on node-7 is at it since 2026-01-01T00:00:00Z"]


def test_a_claim_that_beats_is_waited_for_as_long_as_it_takes(folder, monkeypatch):
    foreign(folder)
    clock = [0.0]

    def sleep(seconds):
        clock[0] += 5 * seconds
        if clock[0] < 3 * claims.STALE_S:
            foreign(folder, beat=clock[0])
        else:
            storage.write_bytes(storage.join(folder, "manifest.json"), b"{}")

    monkeypatch.setattr(claims, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    with claimed(folder, lambda: storage.exists(storage.join(folder, "manifest.json")), lambda text: None) as claim:
        assert claim is None
    assert clock[0] >= 3 * claims.STALE_S


def test_the_claim_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "STALE_S", 1000.0)
    code = (
        "import sys, os, signal\n"
        "from pistoseg.claims import claimed\n"
        "with claimed(sys.argv[1]):\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    call = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=STUCK_S, check=False)
    assert call.returncode == -9
    assert files(str(tmp_path)) == ["000001.json"]
    with claimed(str(tmp_path), say=lambda text: None) as claim:
        assert claim.generation == 2


def test_a_process_whose_number_is_used_again_is_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "STALE_S", 1000.0)
    foreign(str(tmp_path), machine=claims.machine(), pid=os.getpid(), process="1")
    with claimed(str(tmp_path), say=lambda text: None) as claim:
        assert claim.generation == 2


def test_a_run_that_was_taken_over_must_not_commit(folder):
    with claimed(folder) as claim:
        claim.check()
        foreign(folder, generation=2)
        with pytest.raises(PistoSegError, match=r"another run took this over.*run the same command again"):
            claim.check()
        claim.release(done=False)
    assert files(folder) == ["000001.json", "000002.json"]  # the other one's is left alone


def test_a_storage_that_was_away_is_no_reason_to_take_over():
    watch = claims._Watch()
    body = {"token": "x", "beat": 3, "machine": "elsewhere"}
    assert not watch.is_over(1, body)
    watch._looked -= 3600  # the next answer came an hour later
    assert not watch.is_over(1, body)


def test_a_half_written_claim_goes_stale(tmp_path):
    (tmp_path / claims.FOLDER).mkdir()
    (tmp_path / claims.FOLDER / "000004.json").write_text('{"tok')
    with claimed(str(tmp_path), say=lambda text: None) as claim:
        assert claim.generation == 5


def test_one_that_was_taken_over_leaves_the_claim_of_the_other_when_it_ends(folder):
    with claimed(folder) as claim:
        foreign(folder, generation=2)  # it thought that this process was dead
    assert claim.generation == 1
    assert "000002.json" in files(folder)


@pytest.mark.parametrize("again", [False, True])
def test_one_that_was_taken_over_sees_it_also_when_the_other_has_finished(folder, monkeypatch, again):
    monkeypatch.setattr(claims, "BEAT_S", 1000.0)
    with claimed(folder) as sleeper:
        monkeypatch.setattr(claims, "_is_dead", lambda body: True)
        with claimed(folder, say=lambda text: None) as other:
            assert other.generation == 2
        assert files(folder) == []
        if again:  # a third one is at it, with the number of the first
            foreign(folder)
        with pytest.raises(PistoSegError, match="another run took this over"):
            sleeper.check()
    assert files(folder) == (["000001.json"] if again else [])


def test_whoever_waits_for_a_folder_that_is_written_again_keeps_the_claim_that_it_makes_meanwhile(folder, monkeypatch):
    remove_file = storage.remove_file

    def remove(uri):
        remove_file(uri)
        if not files(folder):
            foreign(folder)

    monkeypatch.setattr(storage, "remove_file", remove)
    foreign(folder, beat=claims.RELEASED)
    with claimed(folder) as claim:
        assert claim.generation == 2
    assert files(folder) == ["000001.json"]


def test_one_that_was_taken_over_gives_no_sign_of_life_any_more(folder, monkeypatch):
    monkeypatch.setattr(claims, "BEAT_S", 1000.0)  # until the claim is gone
    with claimed(folder) as sleeper:
        storage.remove_tree(storage.join(folder, claims.FOLDER))  # as whoever took it over and finished it does
        monkeypatch.setattr(claims, "BEAT_S", 0.01)
        beats = threading.Thread(target=sleeper._beat, daemon=True)
        beats.start()
        beats.join(STUCK_S)
        assert not beats.is_alive()
    assert files(folder) == []
