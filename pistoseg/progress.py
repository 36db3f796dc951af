"""What a run says: the stage, how far it is, how long it still takes.

On a terminal that is a bar. In a log it is a line per event with the stage and its fingerprint, the epoch or the slide;
with `--log-format json` each line is an object with `time`, `level`, `event` and the event's fields.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from math import isfinite
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from pistoseg.errors import INTERRUPTED, PistoSegError
from pistoseg.redaction import redact, redacted

LINE_EVERY_S = 30.0
"""Without a terminal (logs of jobs) a line is written this often instead of a bar."""
LOG_FORMAT = "PISTOSEG_LOG_FORMAT"
"""Variable with the format, `text` or `json`: processes that a run starts write like it."""


def logs_json() -> bool:
    """Whether events are written as JSON."""
    return os.environ.get(LOG_FORMAT) == "json"


def json_line(stream: TextIO, event: str, *, level: str = "info", **fields: Any) -> None:
    """Write one event as a line of JSON, which has no word for a number that is not finite: it is null."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    known = {key: value for key, value in fields.items() if value not in (None, "")}
    finite = {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in known.items()}
    line = json.dumps({"time": now, "level": level, "event": event, **redacted(finite)}, ensure_ascii=False)
    print(line, file=stream, flush=True)


class JsonLines(io.TextIOBase):
    """A stream that writes every line it gets as an `output` event, so that a log of JSON holds nothing else.

    A line that is an object already, such as those of a job whose log is followed, goes on as it is.
    """

    def __init__(self, file: TextIO) -> None:
        self._file, self._rest = file, ""

    def write(self, text: str) -> int:
        """Take some text; whole lines go on."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if _is_object(line):
                print(redact(line), file=self._file, flush=True)
            elif line.strip():
                json_line(self._file, "output", text=line.rstrip())
        return len(text)

    def close(self) -> None:
        """Write what has no end of line yet."""
        if self._rest:
            self.write("\n")


def _is_object(line: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return line.startswith("{") and isinstance(json.loads(line, parse_constant=refuse), dict)
    except (ValueError, RecursionError):
        return False


class _JsonLog(logging.Handler):
    """Writes what modules log, such as a storage that does not answer, as `log` events."""

    def emit(self, record: logging.LogRecord) -> None:
        json_line(sys.stderr, "log", level=record.levelname.lower(), text=record.getMessage())


def run_with_json_log(run: Callable[[], int]) -> int:
    """Run a verb whose events, output and error are all lines of JSON; returns its exit code."""
    before, logger, handler = os.environ.get(LOG_FORMAT), logging.getLogger("pistoseg"), _JsonLog()
    os.environ[LOG_FORMAT] = "json"
    logger.addHandler(handler)
    try:
        stdout = sys.stdout or io.StringIO()  # which somebody may have closed before the start
        with redirect_stdout(JsonLines(stdout)) as lines, closing(lines):
            return run()
    except PistoSegError as error:
        json_line(sys.stderr, "error", level="error", **error.fields())
        return 2
    except KeyboardInterrupt:
        json_line(sys.stderr, "interrupted", level="error", text=INTERRUPTED)
        return 130
    finally:
        logger.removeHandler(handler)
        os.environ.pop(LOG_FORMAT)
        if before is not None:
            os.environ[LOG_FORMAT] = before


class Progress:
    """Progress of one run; thread-safe."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.json = logs_json()
        self._lock = threading.Lock()
        self._bar: RichProgress | None = None
        self._title, self._done, self._total, self._started, self._said = "", 0.0, 0.0, 0.0, 0.0
        self._note = ""
        self._fields: dict[str, str] = {}

    @contextmanager
    def stage(self, title: str, reused: bool = False, *, stage: str = "", fingerprint: str = "") -> Iterator[None]:
        """Show one stage while the block runs.

        Args:
            title: for people.
            reused: whether there is nothing to do.
            stage: its name.
            fingerprint: of its artifact.
        """
        self._title, self._note = title, ""
        self._done = self._total = 0.0
        self._started = self._said = time.monotonic()
        self._fields = {"stage": stage, "fingerprint": fingerprint, "title": title}
        where = f" ({stage}/{fingerprint})" if fingerprint else ""
        if reused:
            self._line("stage_reused", f"{title}: up to date, reused{where}")
            yield
            return
        try:
            with self._shown(f"{title} ...{where}"):
                yield
        except BaseException as error:
            if self.json:
                json_line(self._file, "stage_failed", level="error", **self._fields, error=type(error).__name__)
            raise
        seconds = time.monotonic() - self._started
        text = f"{title}: done in {_duration(seconds)} {self._note}".rstrip()
        self._line("stage_done", text + where, seconds=round(seconds, 1))

    @contextmanager
    def _shown(self, first: str) -> Iterator[None]:
        """A bar on a terminal, else a first line."""
        if self.json or not self.console.is_terminal:
            self._line("stage_started", first)
            yield
            return
        title, note = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}"))
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with RichProgress(title, *columns, note, console=self.console) as bar:
            bar.add_task(self._title, total=None, note="")
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None

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
                self._line("progress", text.rstrip(), done=round(done, 2), total=total, left_s=round(left))

    def event(self, event: str, text: str, **fields: Any) -> None:
        """Something that happened in the current stage: a line in a log; a terminal has its bar.

        Args:
            event: its kind, e.g. `epoch` or `slide`.
            text: for people.
            fields: for programs.
        """
        if self.json or not self.console.is_terminal:
            self._line(event, text, **fields)

    def say(self, text: str) -> None:
        """A line of its own, e.g. a warning."""
        self._line("message", text)
        self._file.flush()

    @property
    def _file(self) -> TextIO:
        return self.console.file  # type: ignore[return-value]

    def _line(self, event: str, text: str, **fields: Any) -> None:
        if not self.json:
            self.console.print(redact(text), highlight=False, markup=False, soft_wrap=not self.console.is_terminal)
            return
        level = "warning" if text.startswith("warning:") else "info"
        json_line(self._file, event, level=level, **self._fields, text=text, **fields)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
