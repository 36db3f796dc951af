"""Claims: of several processes, on whatever machines, that want to write one folder, one does and the others wait.

A claim is the file `<folder>/.claims/<generation>.json`, made by conditional creation. Its owner changes it every
`BEAT_S`. One that has not changed for `STALE_S`, or whose process on this machine is gone, is taken over by creating
the next generation, which only one waiter can do; the highest generation owns the folder. Clocks of machines are not
compared, and no claim is deleted before the folder is done; a claim whose file is gone was taken over before that.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pistoseg import storage
from pistoseg.errors import PistoSegError
from pistoseg.liveness import machine, started

FOLDER = ".claims"
BEAT_S = 15.0
STALE_S = 90.0
POLL_S = 1.0
RELEASED = "released"


class Claim:
    """The right to write a folder; see `claimed`."""

    def __init__(self, folder: str, generation: int) -> None:
        self.folder, self.generation = folder, generation
        self._body = {"token": uuid.uuid4().hex, **_identity(), "beat": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    @property
    def uri(self) -> str:
        """URI of its file."""
        return _file(self.folder, self.generation)

    def create(self) -> bool:
        """Try to become the owner."""
        if not storage.create_bytes(self.uri, self._bytes()):
            return False
        self._thread.start()
        return True

    def check(self) -> None:
        """Raise when someone else has taken the folder over, as happens to a process that was stopped for minutes."""
        if not self._holds():
            raise PistoSegError(
                f"another run took this over, as this one gave no sign of life for {STALE_S:.0f} s",
                file=self.folder,
                remedy="run the same command again: it waits for the other run and uses its result",
            )

    def release(self, done: bool) -> None:
        """Give it up, once: of a folder that is done nothing stays, else the next one may go on at once."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        with suppress(OSError, PistoSegError):  # a claim that stays goes stale
            if not self._holds():
                return  # whoever took it over has it, or had it
            if done:
                self._remove()
            else:
                self._body["beat"] = RELEASED
                storage.write_bytes(self.uri, self._bytes())

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._body["beat"] += 1
            with suppress(OSError, PistoSegError):  # the storage is away: for the waiters, too
                if not self._holds():
                    return
                storage.write_bytes(self.uri, self._bytes())

    def _remove(self) -> None:
        """Delete the claims, this one last: then whoever waits may at once make a first one, which stays."""
        folder = storage.join(self.folder, FOLDER)
        for number in range(1, self.generation + 1):
            with suppress(FileNotFoundError):
                storage.remove_file(_file(self.folder, number))
        if local := storage.local_path(folder):
            local.rmdir()

    def _holds(self) -> bool:
        """Whether the folder is still this claim's: whoever took it over and finished it has deleted all claims."""
        if storage.exists(_file(self.folder, self.generation + 1)):
            return False
        try:
            body = json.loads(storage.read_bytes(self.uri))
        except FileNotFoundError:
            return False
        except json.JSONDecodeError:  # it is just being written: not every file system shows files whole
            return True
        return bool(body.get("token") == self._body["token"])

    def _bytes(self) -> bytes:
        return json.dumps(self._body).encode()


@contextmanager
def claimed(
    folder: str, ready: Callable[[], bool] = lambda: False, say: Callable[[str], None] = print
) -> Iterator[Claim | None]:
    """Hold the claim of a folder during the block.

    Args:
        folder: URI.
        ready: asked before waiting, while waiting, and once the claim is held: whether the folder is done already.
        say: told once, before waiting.
    Yields:
        The claim; None when `ready` said yes, so that there is nothing to do.
    """
    claim = _acquire(folder, ready, say)
    done = claim is None
    try:
        yield claim
        done = True
    finally:
        if claim is not None:
            claim.release(done)


def _acquire(folder: str, ready: Callable[[], bool], say: Callable[[str], None]) -> Claim | None:
    watch, told = _Watch(), False
    while not ready():
        generation, body = _latest(folder)
        if body is None or watch.is_over(generation, body):
            claim = Claim(folder, generation + 1)
            if claim.create():
                try:
                    done = ready()
                except BaseException:  # nobody else knows of this claim, whose thread would keep it alive
                    claim.release(done=False)
                    raise
                if not done:
                    return claim
                claim.release(done=True)  # it was finished between the two looks
                return None
            continue
        if not told:
            told = True
            say(f"waiting: process {body.get('pid')} on {body.get('host')} is at it since {body.get('started')}")
        time.sleep(POLL_S)
    return None


class _Watch:
    """How long a claim has shown no sign of life."""

    def __init__(self) -> None:
        self._seen: tuple[int, Any, Any] | None = None
        self._still = 0.0
        self._looked = 0.0

    def is_over(self, generation: int, body: dict[str, Any]) -> bool:
        """Whether the owner has given up or died."""
        now, seen = time.monotonic(), (generation, body.get("token"), body.get("beat"))
        if seen != self._seen:
            self._seen, self._still = seen, 0.0
        else:
            # While the storage was away the owner could not write either: a long gap counts as one look.
            self._still += min(now - self._looked, 5 * POLL_S)
        self._looked = now
        return body.get("beat") == RELEASED or self._still >= STALE_S or _is_dead(body)


def _latest(folder: str) -> tuple[int, dict[str, Any] | None]:
    """The highest generation and what its file says; 0 and None where there is no claim."""
    numbers = [name for name in map(storage.name, storage.list_dir(storage.join(folder, FOLDER))) if name[:1] != "."]
    generation = max((int(name.removesuffix(".json")) for name in numbers), default=0)
    if not generation:
        return 0, None
    try:
        body: dict[str, Any] = json.loads(storage.read_bytes(_file(folder, generation)))
    except FileNotFoundError:  # just released
        return 0, None
    except json.JSONDecodeError:  # its machine broke down in the middle; it goes stale like any other
        body = {}
    return generation, body


def _file(folder: str, generation: int) -> str:
    return storage.join(folder, FOLDER, f"{generation:06d}.json")


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": machine(),
        "pid": os.getpid(),
        "process": started(os.getpid()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _is_dead(body: dict[str, Any]) -> bool:
    """Whether the owner ran on this machine and is gone."""
    there = body.get("machine")
    return bool(there) and there == machine() and started(int(body["pid"])) != body.get("process")
