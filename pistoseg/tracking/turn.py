"""Turns: of several processes, on whatever machines, that would send one folder, one does and the others go on.

A turn is the file `<folder>/sending-<number>.json`, made by conditional creation; the highest number has the folder.
In contrast to `pistoseg.claims` nobody waits. A turn is given back by saying so in its file, and the files before it
are deleted by the next one, so that the highest is never missing while somebody looks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pistoseg import storage
from pistoseg.errors import PistoSegError
from pistoseg.liveness import is_alive, process

BEAT_S = 60.0
"""Between two signs of life of a turn."""
PREFIX = "sending-"


@contextmanager
def turn(folder: str) -> Iterator[Callable[[], None] | None]:
    """Try to have a folder for oneself during the block.

    Args:
        folder: URI.
    Yields:
        What is to be called now and then, so that processes of other machines know that this one lives; None when
        another process has the folder.
    """
    before = _turns(folder)
    number = int(storage.name(before[-1]).removeprefix(PREFIX).removesuffix(".json")) + 1 if before else 1
    uri = storage.join(folder, f"{PREFIX}{number:09d}.json")
    if (before and _is_held(before[-1])) or not storage.create_bytes(uri, _body(process())):
        yield None
        return
    said = time.monotonic()

    def go_on() -> None:
        nonlocal said
        if time.monotonic() - said >= BEAT_S:
            said = time.monotonic()
            storage.write_bytes(uri, _body(process()))

    try:
        now = _turns(folder)
        if storage.name(now[-1]) == storage.name(uri):
            for old in now[:-1]:
                _remove(old)
            yield go_on
        else:  # this one looked so long ago that others had their turns since
            yield None
    finally:
        with suppress(OSError, PistoSegError):  # it ends with this process
            if storage.exists(uri):  # else the folder is done
                storage.write_bytes(uri, _body(""))


def _turns(folder: str) -> list[str]:
    return [item for item in storage.list_dir(folder) if storage.name(item).startswith(PREFIX)]


def _is_held(uri: str) -> bool:
    try:
        body = json.loads(storage.read_bytes(uri))
        return is_alive(body["process"], body["alive"])
    except FileNotFoundError:  # just done, or the next one's
        return True
    except PistoSegError:  # a ValueError, but says nothing of the turn
        raise
    except (KeyError, TypeError, ValueError):  # its machine broke down in the middle
        return False


def _body(name: str) -> bytes:
    return json.dumps({"process": name, "alive": int(time.time()) if name else 0}).encode()


def _remove(uri: str) -> None:
    with suppress(OSError, PistoSegError):
        storage.remove_file(uri)
