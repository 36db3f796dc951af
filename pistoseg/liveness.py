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
    return f"{socket.gethostname()}/{os.getpid()}/{_started(os.getpid())}"


def is_alive(name: str, last_sign: float = 0.0) -> bool:
    """Whether a process, as `process` names it, still works.

    Args:
        name: of the process.
        last_sign: when a process of another machine was last heard of (seconds since 1970).
    """
    host, _, rest = name.partition("/")
    pid, _, started = rest.partition("/")
    if host == socket.gethostname():
        return pid.isdigit() and _started(int(pid)) == started != ""
    return time.time() - last_sign < SILENT_S


def _started(pid: int) -> str:
    """When a process started, in ticks since the machine did; empty where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "unknown" if pid == os.getpid() else ""
    return "" if fields[0] == "Z" else fields[19]
