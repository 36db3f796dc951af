"""A call to MLflow that waits, as a file in the folder of an outbox: `<number>.json`, and `<number>.data` of a file."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pistoseg import storage
from pistoseg.errors import PistoSegError
from pistoseg.liveness import is_alive

FOLDER = "mlflow-unsent"
"""Of a workspace; holds one folder per outbox."""
OWNER = "owner.json"
CALLS = (
    *("create_run", "update_run", "log_batch", "log_metric", "log_param", "set_tag", "log_artifact"),
    *("set_terminated", "register"),
)
"""What is read from an outbox is nothing but arguments of these."""
UPLOADS = ("log_artifact", "register")
"""Calls that nothing else has to wait for where the server answers and only its place of files does not."""
RUN_TAG = "pistoseg.run"
"""Of a run, with what stands for its id until the server knows it."""


@dataclass
class Message:
    """A call that is kept; `data` are the bytes of a file to log."""

    number: int
    call: str
    arguments: dict[str, Any]
    data: bytes | None = None
    written: bool = False

    @property
    def makes(self) -> str | None:
        """What stands for the id of the run that it makes; None: it makes none."""
        return self.arguments.get("tags", {}).get(RUN_TAG) if self.call == "create_run" else None


def write(folder: str, message: Message) -> None:
    """Keep a message in an outbox's folder; its data first, so that what has a `.json` is whole."""
    if message.data is not None:
        storage.write_bytes(storage.join(folder, f"{message.number:06d}.data"), message.data)
    kept = {"call": message.call, "arguments": message.arguments, "data": message.data is not None}
    storage.write_bytes(storage.join(folder, f"{message.number:06d}.json"), json.dumps(kept).encode())
    message.written = True


def read(folder: str, uri: str, whole: bool = True) -> Message | None:
    """A message that was kept.

    Args:
        folder: URI of the outbox's.
        uri: of the message.
        whole: with its data.
    Returns:
        None where it was just sent, or is nothing that can be.
    Raises:
        PistoSegError: the storage is away; the message is still there.
    """
    number = int(storage.name(uri).removesuffix(".json"))
    try:
        kept = json.loads(storage.read_bytes(uri))
        has_data = whole and kept["data"]
        data = storage.read_bytes(storage.join(folder, f"{number:06d}.data")) if has_data else None
        message = Message(number, kept["call"], dict(kept["arguments"]), data, written=True)
    except PistoSegError:  # a ValueError, but says nothing of the message
        raise
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None
    return message if message.call in CALLS else None


def remove(folder: str, number: int) -> None:
    """Forget a message that was sent."""
    for ending in ("json", "data"):
        # Never written, or the workspace is away: a message that is sent twice does no harm.
        with suppress(OSError, PistoSegError):
            storage.remove_file(storage.join(folder, f"{number:06d}.{ending}"))


def uris(folder: str) -> Iterator[str]:
    """Messages of an outbox's folder, in their order."""
    for item in sorted(storage.list_dir(folder)):
        name = storage.name(item)
        if name.endswith(".json") and name.removesuffix(".json").isdigit():
            yield item


def write_owner(folder: str, process: str, server: str) -> None:
    """Say which process sends the messages, and to which server, while it lives; with an empty name any may."""
    owner = {"process": process, "server": digest(server), "alive": int(time.time()) if process else 0}
    storage.write_bytes(storage.join(folder, OWNER), json.dumps(owner).encode())


def may_send(folder: str, server: str) -> bool:
    """Whether an outbox was for this server, and its process is no more."""
    try:
        owner = json.loads(storage.read_bytes(storage.join(folder, OWNER)))
    except (OSError, ValueError):
        return False
    same = owner.get("server") == digest(server)
    return same and not is_alive(owner.get("process", ""), float(owner.get("alive", 0)))


def digest(server: str) -> str:
    """Tells servers apart without their address, which may hold a password."""
    return hashlib.sha256(server.encode()).hexdigest()[:16]
