"""What a run says on the terminal: the stage, how far it is, how long it still takes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_EVERY_S = 30.0
"""Without a terminal (logs of jobs) a line is written this often instead of a bar."""


class Progress:
    """Progress of one run; thread-safe."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._lock = threading.Lock()
        self._bar: RichProgress | None = None
        self._title, self._done, self._total, self._started, self._said = "", 0.0, 0.0, 0.0, 0.0
        self._note = ""

    @contextmanager
    def stage(self, title: str, reused: bool = False) -> Iterator[None]:
        """Show one stage while the block runs."""
        self._title, self._note = title, ""
        self._done = self._total = 0.0
        self._started = self._said = time.monotonic()
        if reused:
            self.console.print(f"{title}: up to date, reused", highlight=False)
            yield
            return
        if self.console.is_terminal:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            with RichProgress(
                TextColumn("{task.description}"), *columns, TextColumn("{task.fields[note]}"), console=self.console
            ) as bar:
                bar.add_task(title, total=None, note="")
                self._bar = bar
                try:
                    yield
                finally:
                    self._bar = None
        else:
            self.console.print(f"{title} ...", highlight=False)
            yield
        seconds = time.monotonic() - self._started
        self.console.print(f"{title}: done in {_duration(seconds)} {self._note}".rstrip(), highlight=False)

    def update(self, done: float, total: float, note: str = "") -> None:
        """Say how far the current stage is.

        Args:
            done: finished steps.
            total: steps in all.
            note: a few words, e.g. the epoch and its loss.
        """
        with self._lock:
            self._done, self._total, self._note = done, total, note or self._note
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=done, total=total, note=self._note)
            elif time.monotonic() - self._said >= LINE_EVERY_S and done:
                self._said = time.monotonic()
                left = (self._said - self._started) / done * (total - done)
                text = f"{self._title}: {done:.0f}/{total:.0f}, {_duration(left)} left {self._note}"
                self.console.print(text.rstrip(), highlight=False)

    def say(self, text: str) -> None:
        """A line of its own, e.g. a warning."""
        self.console.print(text, highlight=False)
        sys.stderr.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
