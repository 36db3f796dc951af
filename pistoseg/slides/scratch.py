"""Folders for what comes from object storage, and for what goes there; those of killed processes are removed.

Whoever uses a folder holds a lock on a file in it, which the operating system frees when a process dies, however that
happens. Another lock, on the folder above, keeps the others away until a new one has its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pistoseg.errors import UnavailableError
from pistoseg.liveness import machine

_LOCK = ".lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new local folder. It is removed when the block ends; where the process is killed, by whoever makes the next."""
    # Machines that share their temporary folder may not see each other's locks.
    here = hashlib.sha256(machine().encode()).hexdigest()[:8]
    above = private_folder(f"pistoseg-scratch-{os.getuid()}-{here}")
    folder = above / uuid.uuid4().hex
    with ExitStack() as stack:
        with _locked(above):
            _remove_orphans(above)
            folder.mkdir()
            stack.enter_context(_locked(folder))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def private_folder(name: str) -> Path:
    """The folder of a name among the temporary ones, made where it is missing, for this user's eyes only.

    Raises:
        UnavailableError: it is another user's, who could read patients' slides in it, or put others there.
    """
    folder = Path(tempfile.gettempdir()) / name
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    state = folder.lstat()
    if state.st_uid != os.getuid() and state.st_uid != _owner_of_new_ones():
        remedy = "set TMPDIR to a folder of your own, on every node, or have this one removed"
        raise UnavailableError("belongs to another user", file=str(folder), remedy=remedy)
    if state.st_mode & 0o077:  # one of an earlier version was open to all
        with suppress(OSError):  # of a mount that has rights of its own
            folder.chmod(0o700)
    return folder


def _owner_of_new_ones() -> int:
    """Whose new temporary folders are: some mounts (SMB, exFAT, NFS for root) give all that we make to one user."""
    with tempfile.TemporaryDirectory() as folder:
        return os.stat(folder).st_uid


def _remove_orphans(above: Path) -> None:
    """Delete the folders that no process holds; the one above them is locked."""
    for folder in above.iterdir():
        if folder.is_dir():
            with suppress(OSError), _locked(folder, fcntl.LOCK_NB):  # held, or going
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path, how: int = 0) -> Iterator[None]:
    """Hold the lock of a folder.

    Raises:
        BlockingIOError: another one holds it, and `how` says not to wait.
    """
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | how)
        yield
    finally:
        os.close(handle)
