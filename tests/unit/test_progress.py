import io
import json
import logging
import re

import pytest
from rich.console import Console

from pistoseg import progress
from pistoseg.cli import main
from pistoseg.errors import PistoSegError
from pistoseg.progress import JsonLines, Progress


def run(file, terminal=False):
    console = Console(file=file, force_terminal=terminal, width=60)
    said = Progress(console)
    with said.stage("[1/2] Reading", True, stage="patches", fingerprint="ab12"):
        pass
    with said.stage("[2/2] Training [1]", stage="precise", fingerprint="cd34"):
        said.event("epoch", "epoch 3: loss 0.250", epoch=3, loss=0.25)
        said.say("warning: s3://me:hunter2@bucket/x is odd, and this line is longer than the console is wide")
        said.update(5, 10, "epoch 4")
    return file.getvalue()


def test_a_log_has_a_line_per_event_with_stage_and_fingerprint(monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    lines = run(io.StringIO()).splitlines()
    assert lines[0] == "[1/2] Reading: up to date, reused (patches/ab12)"
    assert lines[1] == "[2/2] Training [1] ... (precise/cd34)"
    assert lines[2] == "epoch 3: loss 0.250"
    assert lines[3].startswith("warning: s3://***@bucket/x is odd")
    assert lines[3].endswith("is wide")  # lines of a log are not folded
    assert re.match(r"\[2/2\] Training \[1\]: 5/10, \d+:\d\d left epoch 4", lines[4])
    assert re.fullmatch(r"\[2/2\] Training \[1\]: done in \d+:\d\d epoch 4 \(precise/cd34\)", lines[5])
    assert len(lines) == 6


def test_a_terminal_has_a_bar_instead_of_a_line_per_epoch():
    shown = run(io.StringIO(), terminal=True)
    assert "loss 0.250" not in shown
    assert "5/10" in shown


@pytest.mark.parametrize(
    ("line", "written"),
    [
        ('{"event": "x", "uri": "s3://me:hunter2@b/x"}', {"event": "x", "uri": "s3://***@b/x"}),
        ('{"a": NaN}', {"event": "output", "text": '{"a": NaN}'}),
        ('{"a":' * 5000, {"event": "output", "text": '{"a":' * 5000}),
    ],
)
def test_lines_that_are_objects_go_on_without_secrets_and_only_as_json(line, written):
    stream = io.StringIO()
    JsonLines(stream).write(f"{line}\n")
    found = json.loads(stream.getvalue())
    assert {key: found[key] for key in written} == written


def test_json_has_the_same_events_as_objects(monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    monkeypatch.setenv(progress.LOG_FORMAT, "json")
    text = run(io.StringIO(), terminal=True)
    assert "hunter2" not in text
    events = [json.loads(line) for line in text.splitlines()]
    assert [event["event"] for event in events] == [
        "stage_reused",
        "stage_started",
        "epoch",
        "message",
        "progress",
        "stage_done",
    ]
    epoch = events[2]
    assert (epoch["stage"], epoch["fingerprint"], epoch["epoch"], epoch["loss"]) == ("precise", "cd34", 3, 0.25)
    assert (events[3]["level"], epoch["level"]) == ("warning", "info")
    assert (events[4]["done"], events[4]["total"]) == (5, 10)
    assert all(event["time"].endswith("Z") for event in events)


def test_a_number_that_is_not_finite_is_null_as_json_has_no_word_for_it(monkeypatch):
    monkeypatch.setenv(progress.LOG_FORMAT, "json")
    file = io.StringIO()
    Progress(Console(file=file)).event("epoch", "epoch 1", loss=float("nan"), norm=float("inf"), lr=0.5)
    assert "NaN" not in file.getvalue()
    event = json.loads(file.getvalue())
    assert (event["loss"], event["norm"], event["lr"]) == (None, None, 0.5)


def test_a_stage_that_fails_is_an_event_of_its_own(monkeypatch):
    monkeypatch.setenv(progress.LOG_FORMAT, "json")
    file = io.StringIO()
    with pytest.raises(RuntimeError), Progress(Console(file=file)).stage("x", stage="precise", fingerprint="cd34"):
        raise RuntimeError
    last = json.loads(file.getvalue().splitlines()[-1])
    assert (last["event"], last["level"], last["stage"], last["error"]) == (
        "stage_failed",
        "error",
        "precise",
        "RuntimeError",
    )


def test_results_and_errors_are_lines_of_json_too(monkeypatch, capsys):
    def train(config, workspace):
        print("one\ntwo", end="")
        logging.getLogger("pistoseg.storage").warning("%s is slow", "s3://me:hunter2@b")

    monkeypatch.setattr("pistoseg.commands.train", train)
    assert main(["train", "--preset", "demo", "--log-format", "json"]) == 0
    written = capsys.readouterr()
    events = [json.loads(line) for line in written.out.splitlines()]
    assert [(event["event"], event["text"]) for event in events] == [("output", "one"), ("output", "two")]
    (event,) = [json.loads(line) for line in written.err.splitlines()]
    assert (event["event"], event["level"], event["text"]) == ("log", "warning", "s3://***@b is slow")

    def refuse(config, workspace):
        raise PistoSegError("is bad", file="s3://me:hunter2@b/x", field="y", remedy="mend it")

    def interrupt(config, workspace):
        raise KeyboardInterrupt

    monkeypatch.setattr("pistoseg.commands.train", interrupt)
    assert main(["train", "--preset", "demo", "--log-format", "json"]) == 130
    (event,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (event["event"], "run the same command again" in event["text"]) == ("interrupted", True)
    monkeypatch.setattr("pistoseg.commands.train", refuse)
    assert main(["train", "--preset", "demo", "--log-format", "json"]) == 2
    (event,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    shown = {key: event[key] for key in ("event", "level", "reason", "file", "field", "remedy")}
    assert shown == {
        "event": "error",
        "level": "error",
        "reason": "is bad",
        "file": "s3://***@b/x",
        "field": "y",
        "remedy": "mend it",
    }
