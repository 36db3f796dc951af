"""The cache: whole slides, one fetch for all, a limit that holds, and nothing left of what failed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from processes import STUCK_S

from pistoseg import storage
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.slides.cache import SlideCache
from pistoseg.stages.slide_images import node_cache
from pistoseg.stages.slide_worker import DAY_S

KB = 1000


def filled() -> str:
    """A bucket of this process's memory with four slides of 10 KB."""
    fsspec.filesystem("memory").store.clear()
    for name in "abcd":
        storage.write_bytes(f"memory:///b/{name}.svs", name.encode() * 10 * KB)
    return "memory:///b"


@pytest.fixture
def bucket() -> str:
    return filled()


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are fetched, as they are."""
    names: list[str] = []
    original = MemoryFileSystem.get_file

    def get_file(self: MemoryFileSystem, path: str, target: str, **options: Any) -> None:
        names.append(storage.name(path))
        time.sleep(0.05)
        original(self, path, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    return names


def bytes_in(folder: Path) -> int:
    return sum(item.stat().st_size for item in folder.rglob("*.svs"))


def left_in(folder: Path) -> list[str]:
    return [item.name for item in folder.rglob("*") if item.name not in (".locks", "all")]


def test_local_slides_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"x")
    with SlideCache(tmp_path / "cache", 1).get(str(tmp_path / "a.svs")) as path:
        assert path == tmp_path / "a.svs"
    assert not (tmp_path / "cache").exists()


def test_a_slide_is_fetched_once_until_it_changes(tmp_path: Path, bucket: str, fetched: list[str]) -> None:
    cache = SlideCache(tmp_path, 100 * KB)
    for _ in range(2):
        with cache.get(f"{bucket}/a.svs") as path:
            assert path.name == "a.svs"
            assert path.read_bytes() == b"a" * 10 * KB
    assert fetched == ["a.svs"]
    storage.write_bytes(f"{bucket}/a.svs", b"new")
    with cache.get(f"{bucket}/a.svs") as path:
        assert path.read_bytes() == b"new"


def test_many_who_want_the_same_slide_wait_for_one_fetch(tmp_path: Path, bucket: str, fetched: list[str]) -> None:
    def use(_: int) -> bytes:
        with SlideCache(tmp_path, 100 * KB).get(f"{bucket}/a.svs") as path:
            return path.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(use, range(16))) == {b"a" * 10 * KB}
    assert fetched == ["a.svs"]


def test_the_slide_used_longest_ago_goes_first(tmp_path: Path, bucket: str, fetched: list[str]) -> None:
    cache = SlideCache(tmp_path, 25 * KB)
    for name in "abacab":
        with cache.get(f"{bucket}/{name}.svs"):
            assert bytes_in(tmp_path) <= 25 * KB
        time.sleep(0.01)
    assert fetched == ["a.svs", "b.svs", "c.svs", "b.svs"]


def test_slides_in_use_are_not_evicted(tmp_path: Path, bucket: str) -> None:
    cache = SlideCache(tmp_path, 25 * KB, wait_s=0.3)
    with cache.get(f"{bucket}/a.svs") as a, cache.get(f"{bucket}/b.svs") as b:
        with pytest.raises(PistoSegError, match="found no room"), cache.get(f"{bucket}/c.svs"):
            pass
        assert a.exists()
        assert b.exists()
    with cache.get(f"{bucket}/c.svs") as c:
        assert c.exists()
        assert not a.exists()


def test_a_waiting_fetch_goes_on_when_there_is_room(tmp_path: Path, bucket: str) -> None:
    cache = SlideCache(tmp_path, 15 * KB, wait_s=20)

    def use(name: str) -> bytes:
        with cache.get(f"{bucket}/{name}.svs") as path:
            time.sleep(0.1)
            return path.read_bytes()[:1]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(use, "abcd")) == [b"a", b"b", b"c", b"d"]
    assert bytes_in(tmp_path) <= 15 * KB


def test_a_slide_that_is_wanted_early_waits_for_the_hours_that_the_one_before_it_takes(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, hours = SlideCache(tmp_path, 15 * KB, DAY_S), []
    with ExitStack() as before:
        before.enter_context(cache.get(f"{bucket}/a.svs"))

        def sleep(_: float) -> None:
            hours.append(1)
            if len(hours) == 10:
                before.close()

        clock = SimpleNamespace(sleep=sleep, monotonic=lambda: 3600.0 * len(hours))
        monkeypatch.setattr("pistoseg.slides.cache.time", clock)
        with cache.get(f"{bucket}/b.svs") as path:
            assert path.exists()
    assert len(hours) == 10


def test_a_failed_fetch_leaves_nothing(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(self: MemoryFileSystem, path: str, target: str, **_: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("connection lost")

    def cut(self: MemoryFileSystem, path: str, target: str, **_: Any) -> None:
        Path(target).write_bytes(b"half")

    for failing, reason in ((break_off, "connection lost"), (cut, "4 of 10000 bytes of a.svs came")):
        monkeypatch.setattr(MemoryFileSystem, "get_file", failing)
        cache = SlideCache(tmp_path, 100 * KB)
        with pytest.raises(PistoSegError, match=reason) as caught, cache.get(f"{bucket}/a.svs"):
            pass
        assert caught.value.file == f"{bucket}/a.svs"
        assert left_in(tmp_path) == []
    with pytest.raises(PistoSegError, match="does not exist"), cache.get(f"{bucket}/none.svs"):
        pass


def test_an_error_of_the_user_passes_and_frees_the_slide(tmp_path: Path, bucket: str) -> None:
    cache = SlideCache(tmp_path, 15 * KB, wait_s=0.3)
    with pytest.raises(FileNotFoundError, match="mine"), cache.get(f"{bucket}/a.svs"):
        raise FileNotFoundError("mine")
    with cache.get(f"{bucket}/b.svs") as path:
        assert path.exists()


def test_a_slide_beyond_the_limit_is_refused(tmp_path: Path, bucket: str) -> None:
    with (
        pytest.raises(PistoSegError, match=r"has 10,000 bytes, and the cache may have 9,000"),
        SlideCache(tmp_path, 9 * KB).get(f"{bucket}/a.svs"),
    ):
        pass
    assert left_in(tmp_path) == []


def test_half_of_the_disk_stays_half_of_it_as_the_cache_fills(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    disk = 45 * KB

    def usage(_: str) -> Any:
        return SimpleNamespace(free=disk - sum(i.stat().st_size for i in tmp_path.rglob("*") if i.is_file()))

    monkeypatch.setattr("shutil.disk_usage", usage)
    for name in "abc":
        with node_cache(f"{bucket}/{name}.svs").get(f"{bucket}/{name}.svs"):
            pass
    assert sorted(path.name for path in tmp_path.rglob("*.svs")) == ["b.svs", "c.svs"]  # 2 of 10 kB in 22 kB


def test_a_node_that_may_have_less_than_the_free_disk_caches_half_of_that(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("PISTOSEG_DISK_GB", f"{30 * KB / 1e9:f}")
    for name in "ab":
        with node_cache(f"{bucket}/{name}.svs").get(f"{bucket}/{name}.svs"):
            pass
    assert [path.name for path in tmp_path.rglob("*.svs")] == ["b.svs"]
    monkeypatch.setenv("PISTOSEG_DISK_GB", "1e9")  # more than there is
    assert node_cache(bucket)._limit < 1e18 / 2
    for wrong in ("none", "0", "nan"):
        monkeypatch.setenv("PISTOSEG_DISK_GB", wrong)
        with pytest.raises(PistoSegError, match=f"PISTOSEG_DISK_GB: '{wrong}' is not a number above 0"):
            node_cache(bucket)


def test_the_slides_of_a_node_are_for_their_user_alone(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    me, uri = os.getuid(), f"{bucket}/a.svs"
    folder = tmp_path / f"pistoseg-slides-{me}"
    folder.mkdir(mode=0o755)  # as an earlier version made it
    for _ in range(2):
        with node_cache(uri).get(uri):
            assert folder.stat().st_mode & 0o777 == 0o700
        shutil.rmtree(folder)
    monkeypatch.setattr("os.getuid", lambda: me + 1)
    monkeypatch.setattr("pistoseg.slides.scratch._owner_of_new_ones", lambda: me + 1)
    (tmp_path / f"pistoseg-slides-{me + 1}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnavailableError, match=rf"-slides-{me + 1}: belongs to another user. Remedy: set TMPDIR"):
        node_cache(uri)
    assert not (tmp_path / "elsewhere").exists()
    node_cache(str(tmp_path / "a.svs"))  # which is where it is


def test_a_mount_that_gives_all_files_to_one_user_and_keeps_its_rights_holds_slides(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chmod(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    me = os.getuid()
    monkeypatch.setattr("os.getuid", lambda: me + 1)  # all that is made here is me's
    monkeypatch.setattr(os, "chmod", chmod)
    (tmp_path / f"pistoseg-slides-{me + 1}").mkdir(mode=0o755)
    for _ in range(2):
        with node_cache(f"{bucket}/a.svs").get(f"{bucket}/a.svs") as path:
            assert path.is_relative_to(tmp_path / f"pistoseg-slides-{me + 1}")
    assert len(os.listdir(tmp_path)) == 1


def test_slides_of_several_files_come_whole(tmp_path: Path, bucket: str) -> None:
    files = {"m.mrxs": b"1", "m/Slidedat.ini": b"22", "m/Data [0].dat": b"333", "other/x.dat": b"no"}
    for name, data in files.items():
        storage.write_bytes(f"{bucket}/{name}", data)
    with SlideCache(tmp_path, 100 * KB).get(f"{bucket}/m.mrxs") as path:
        assert path.read_bytes() == b"1"
        assert {item.name: item.read_bytes() for item in (path.parent / "m").iterdir()} == {
            "Slidedat.ini": b"22",
            "Data [0].dat": b"333",
        }
        assert not (path.parent / "other").exists()


def killed_while_fetching(folder: str) -> None:
    def die(self: MemoryFileSystem, path: str, target: str, **_: Any) -> None:
        Path(target).write_bytes(b"half")
        os._exit(9)

    MemoryFileSystem.get_file = die
    with SlideCache(folder, 100 * KB).get(f"{filled()}/a.svs"):
        pass


def killed_while_using(folder: str) -> None:
    with SlideCache(folder, 100 * KB).get(f"{filled()}/b.svs"):
        os._exit(9)


def test_what_killed_processes_held_or_left_is_free_again(tmp_path: Path, bucket: str) -> None:
    context = multiprocessing.get_context("spawn")  # a fork may inherit a lock that another thread holds
    for target in (killed_while_using, killed_while_fetching):
        process = context.Process(target=target, args=(str(tmp_path),), daemon=True)
        process.start()
        process.join(STUCK_S)
        assert process.exitcode == 9
    assert list(tmp_path.glob(".*.part"))
    with SlideCache(tmp_path, 15 * KB, wait_s=0.3).get(f"{bucket}/c.svs") as path:
        assert path.exists()
        assert not list(tmp_path.glob(".*.part"))
        assert bytes_in(tmp_path) == 10 * KB
    with SlideCache(tmp_path, 15 * KB, wait_s=0.3).get(f"{bucket}/a.svs") as path:
        assert path.read_bytes() == b"a" * 10 * KB
