"""Slides from object storage on a local disk: shared by all processes of a machine, and never larger than a limit.

Every slide has a folder `<key>` that appears complete, by renaming; the key is a hash of URI and etag. Whoever uses or
writes it holds a lock on `.locks/<key>`, which the operating system frees when a process dies, however that happens.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import posixpath
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pistoseg import object_store, storage
from pistoseg.errors import PistoSegError, UnavailableError, explained
from pistoseg.slides.files import etag, slide_files

_POLL_S = 0.2
HOUR_S = 3600.0
_SIZE = ".size"
_RAISE = "raise the limit of the cache (--cache-gb of `segment`; else half of the free disk, or of PISTOSEG_DISK_GB)"


class SlideCache:
    """Slides from object storage as local files.

    Args:
        folder: on a local disk; several processes may share it.
        limit_bytes: of all slides in it; the one that was used longest ago goes first, one in use never.
        wait_s: how long to wait for slides in use to be released when there is no room.
    """

    def __init__(self, folder: str | Path, limit_bytes: int, wait_s: float = HOUR_S) -> None:
        self._folder, self._limit, self._wait_s = Path(folder), limit_bytes, wait_s
        self._locks = self._folder / ".locks"

    @contextmanager
    def get(self, uri: str) -> Iterator[Path]:
        """The local path of a slide, which stays while the context is open. Local slides are where they are.

        A slide that is not there yet is fetched whole, with the files that belong to it; whoever else wants it waits.

        Raises:
            UnavailableError: it cannot be fetched, is larger than the limit, or there was no room in time.
            PistoSegError: it does not exist, or its storage refuses it.
        """
        path = storage.local_path(uri)
        if path is not None:
            yield path
            return
        key = hashlib.sha256(f"{uri} {etag(uri)}".encode()).hexdigest()[:24]
        entry = self._folder / key
        self._locks.mkdir(parents=True, exist_ok=True)
        while True:
            with self._locked(key, fcntl.LOCK_SH):
                if entry.is_dir():
                    os.utime(entry)
                    yield entry / storage.name(uri)
                    return
            with self._locked(key, fcntl.LOCK_EX, forget=True):
                if not entry.is_dir():
                    self._fetch(uri, entry)

    def _fetch(self, uri: str, entry: Path) -> None:
        """Copy a slide's files; its key is locked."""
        sources = slide_files(uri)
        sizes = [storage.file_size(item) for item in sources]
        for orphan in self._folder.glob(f".{entry.name}.*.part"):
            shutil.rmtree(orphan)
        part = self._folder / f".{entry.name}.{uuid.uuid4().hex[:8]}.part"
        try:
            self._reserve(uri, part, sum(sizes))
            for source, size in zip(sources, sizes, strict=True):
                target = part / posixpath.relpath(source, posixpath.dirname(uri))
                target.parent.mkdir(parents=True, exist_ok=True)
                backend, path = storage.filesystem(source)
                backend.get_file(path, str(target))
                if target.stat().st_size != size:
                    raise OSError(f"{target.stat().st_size} of {size} bytes of {storage.name(source)} came")
            part.rename(entry)
        except PistoSegError:
            raise
        except Exception as error:  # every storage has errors of its own
            known = explained(error, str(self._folder)) or object_store.explain(error, uri)
            kind = PistoSegError if isinstance(error, FileNotFoundError) else UnavailableError
            raise known or kind(
                f"cannot be fetched into {self._folder} ({error})",
                file=uri,
                remedy="check the connection, the credentials and the room on the disk",
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _reserve(self, uri: str, part: Path, size: int) -> None:
        """Make room for a slide and a folder that claims it.

        Raises:
            UnavailableError: the limit is too low for it, or everything stayed in use.
        """
        if size > self._limit:
            raise UnavailableError(
                f"has {size:,} bytes, and the cache may have {self._limit:,}",
                file=uri,
                field="cache limit",
                remedy=_RAISE,
            )
        deadline = time.monotonic() + self._wait_s
        while True:
            with self._locked("all", fcntl.LOCK_EX):
                self._remove_orphans()
                if self._make_room(size):
                    part.mkdir()
                    (part / _SIZE).write_text(str(size))
                    return
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"found no room in {self._folder} in {self._wait_s:.0f} s: all slides in it are in use",
                    file=uri,
                    field="cache limit",
                    remedy=f"{_RAISE}, or use fewer workers on a machine",
                )
            time.sleep(_POLL_S)

    def _make_room(self, size: int) -> bool:
        """Evict what was used longest ago until `size` bytes fit; all is locked."""
        entries = [item for item in self._folder.iterdir() if item.is_dir() and item != self._locks]
        sizes = {item: _claimed(item) for item in entries}
        used = sum(sizes.values())
        by_age = sorted((item for item in entries if not item.name.startswith(".")), key=lambda i: i.stat().st_mtime)
        for entry in by_age:
            if used + size <= self._limit:
                break
            if self._evict(entry):
                used -= sizes[entry]
        return used + size <= self._limit

    def _evict(self, entry: Path) -> bool:
        """Remove a slide unless it is in use."""
        try:
            with self._locked(entry.name, fcntl.LOCK_EX | fcntl.LOCK_NB, forget=True):
                doomed = self._folder / f".{entry.name}.gone.part"
                entry.rename(doomed)  # so that a half-deleted folder is never taken for a slide
                shutil.rmtree(doomed)
        except BlockingIOError:
            return False
        return True

    def _remove_orphans(self) -> None:
        """Delete what killed processes left; all is locked.

        A fetching process holds the lock of its key, so a part whose key is free has no one any more.
        """
        for part in self._folder.glob(".*.part"):
            with (
                suppress(BlockingIOError),
                self._locked(part.name.split(".")[1], fcntl.LOCK_EX | fcntl.LOCK_NB, forget=True),
            ):
                shutil.rmtree(part, ignore_errors=True)

    @contextmanager
    def _locked(self, key: str, how: int, forget: bool = False) -> Iterator[None]:
        """Hold a lock; `forget` deletes its file at the end.

        Raises:
            BlockingIOError: it is taken, and `how` says not to wait.
        """
        path = self._locks / key
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, how)
                if not _is_open_file(path, handle):
                    continue  # it was deleted while we waited
                try:
                    yield
                finally:
                    if forget:
                        path.unlink()
                return
            finally:
                os.close(handle)


def bytes_in(folder: Path) -> int:
    """Bytes on the disk of all that is in a cache's folder, while others add to it and remove from it."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


def _is_open_file(path: Path, handle: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def _claimed(entry: Path) -> int:
    """Bytes that a slide has or, while it is fetched, will have."""
    try:
        return int((entry / _SIZE).read_text())
    except (OSError, ValueError):
        return sum(item.stat().st_size for item in entry.rglob("*") if item.is_file())
