"""How a command ends: with what it says and which exit code, whoever ends it."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pistoseg.errors import INTERRUPTED, PistoSegError

TWICE_S = 5.0
"""Some send a signal twice; the second one would cut off the tidying up."""
_interrupted = -TWICE_S
"""When SIGTERM came last."""


def exit_code(command: Callable[[], int]) -> int:
    """Run a command and say why it ended; its own exit code, or 2, 130 or 141 as `cli.main` lists them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # not every terminal has the letters of every class and file
    try:
        code = _told(command)
        if sys.stdout:  # there is none where it was closed before the start
            sys.stdout.flush()
        return code
    except SystemExit as end:  # that of rich, which meets the closed pipe before us
        if isinstance(end.__context__, BrokenPipeError):
            return 141
        raise
    except BrokenPipeError:  # or that of a connection, which is a defect
        if not _is_unread():
            raise
        return 141


def _told(command: Callable[[], int]) -> int:
    try:
        with _terminable():
            return command()
    except PistoSegError as error:
        print(f"pistoseg: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pistoseg: {INTERRUPTED}", file=sys.stderr)
        return 130


@contextmanager
def _terminable() -> Iterator[None]:
    """Make an interrupt of SIGTERM, by which SLURM, Kubernetes and `timeout` end a job."""
    # Who has a handler in place, or runs this in a thread of theirs, ends their process themselves.
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(*_: object) -> None:
    global _interrupted
    before, _interrupted = _interrupted, time.monotonic()
    if _interrupted - before > TWICE_S:
        raise KeyboardInterrupt


def _is_unread() -> bool:
    """Whether what is printed goes into a closed pipe; from then on it goes nowhere, or Python's end would fail."""
    unread = False
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # none of the system's
            pipe = select.poll()
            pipe.register(stream.fileno(), 0)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in pipe.poll(0)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                unread = True
    return unread
