"""Whether the process that began something still works, so that what a killed one left can be told from work."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

SILENT_S = 600.0
"""A process of another machine without a sign of life for that long is over."""


def process() -> str:
    """This process, told apart from later ones with its number on the same machine."""
    return f"{machine()}/{os.getpid()}/{started(os.getpid())}"


def is_alive(name: str, last_sign: float = 0.0) -> bool:
    """Whether a process, as `process` names it, still works.

    Args:
        name: of the process.
        last_sign: when a process of another machine was last heard of (seconds since 1970).
    """
    there, _, rest = name.partition("/")
    pid, _, since = rest.partition("/")
    if there and there == machine():
        return pid.isdigit() and started(int(pid)) == since != ""
    return time.time() - last_sign < SILENT_S


def machine() -> str:
    """A name that two processes share only if they see each other's process ids; empty where that can't be told.

    Containers may have the name of their host, and one another's.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def started(pid: int) -> str:
    """When a process of this machine started, in ticks since that did; empty where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
