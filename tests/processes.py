"""Processes that tests start, watch and kill."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

STUCK_S = 1200
"""What takes as long hangs: nothing here does, also not beside the other tests on two cores in a slow hour."""


def kill_when(command: list[str], folder: Path, moment: Callable[[], bool]) -> None:
    """Kill a command, and nothing but it, as soon as `moment()` holds; its workers have to end by themselves."""
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: moment() or process.poll() is not None)
        assert process.poll() is None, f"ended before it could be killed:\n{(folder / 'log.txt').read_text()[-3000:]}"
        family = descendants(process.pid)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not any(works(pid) for pid in family))


class Killer:
    """Kills, while its block runs, the first worker process of a name that it sees once a moment has come."""

    def __init__(self, name: bytes, moment: Callable[[], bool]) -> None:
        self.name, self.moment, self.killed = name, moment, 0
        self._done, self._thread = threading.Event(), threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self.killed and not self._done.wait(0.02):
            if self.moment():
                self._kill_one()

    def _kill_one(self) -> None:
        for pid in descendants(os.getpid()):
            if self.name in command_line(pid):
                with suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(pid, signal.SIGKILL)
                    self.killed = pid
                    return


def wait_for(condition: Callable[[], bool], seconds: float = STUCK_S) -> None:
    """Ask until it holds; `TimeoutError` where it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    """Process ids of all children, their children, and so on."""
    children = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += [int(child) for child in tasks.read_text().split()]
        except OSError:  # it has ended since
            continue
    return children + [item for child in children for item in descendants(child)]


def command_line(pid: int) -> bytes:
    """Its arguments, each with a NUL behind it; nothing where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def works(pid: int) -> bool:
    """Whether a process still runs; Ray's two agents, which hold no work, take another minute to notice."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z" and not command_line(pid).startswith((b"ray::DashboardAgent", b"ray::RuntimeEnvAgent"))
