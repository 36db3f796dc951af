import json

import pytest

from pistoseg.artifacts import Workspace
from pistoseg.errors import PistoSegError
from pistoseg.redaction import MAX_LINE, first_line, has_secret, redact, redacted

SIGNED = "https://host/b/x.svs?versionId=3&X-Amz-Signature=abc%2F123&X-Amz-Credential=AKIA%2Fus"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:s3cr3t@bucket/a [1].png is gone", "s3://***@bucket/a [1].png is gone"),
        ("postgresql://u:p%40w@db/mlflow", "postgresql://***@db/mlflow"),
        ("postgresql://u:p@ss@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("s3://AKIA:wJalr/K7+MD/bPx@bucket/a [1].png", "s3://***@bucket/a [1].png"),
        ("s3://AKIA:/wJalr@bucket/x", "s3://***@bucket/x"),
        ("postgresql://me@lab.org:p@s/s@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ('{"uri": "http://u:123456/7@db/x?y@z", "by": "u@v"}', '{"uri": "http://***@db/x?y@z", "by": "u@v"}'),
        ("http://me@lab.org:pw@mlflow:5000", "http://***@mlflow:5000"),
        ("https://:token@host", "https://***@host"),
        ("https://ghp_token@host/x@y", "https://***@host/x@y"),
        ("HTTP://token@host", "HTTP://***@host"),
        (SIGNED, "https://host/b/x.svs?versionId=3&X-Amz-Signature=***&X-Amz-Credential=***"),
        ("https://h/x?sv=1&sig=a%3D", "https://h/x?sv=1&sig=***"),
    ],
)
def test_what_opens_doors_is_hidden(text, shown):
    assert redact(text) == shown
    assert has_secret(text)
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "uri",
    [
        "abfs://container@account.dfs.core.windows.net/runs/precise/x/bundle",
        "abfs://container@account:443/x",
        "sftp://me@host:22/x@y",
        "hdfs://user@namenode/x",
        "http://host:8080/a@b",
        "http://[::1]:8265/a@b",
        "s3://arn:aws:s3:eu-north-1:123456789012:accesspoint/name/a@b",
        "zip://a.csv::s3://bucket/a@b.zip",
        "models:/tissue@champion",
        "s3://bucket/a:b@c",
    ],
)
def test_a_user_or_a_container_alone_is_no_password(uri):
    assert redact(uri) == uri
    assert not has_secret(uri)


@pytest.mark.parametrize(
    "text", ["s3://bucket/a@b/c.png", "x-[1, 0].png", "mail me@host", "/data/key=1/x?y", "a://b c@d", "s3://b/x?key"]
)
def test_other_texts_stay_as_they_are(text):
    assert redact(text) == text


def test_values_of_secret_variables_are_hidden_wherever_they_turn_up(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "short")
    assert redact("server said: wJalrXUtnFEMI/K7, short") == "server said: ***, short"


def test_of_a_long_error_its_beginning_and_its_reason_are_shown():
    line = first_line(OSError(f"API request to http://host failed: {'x' * 400} (Caused by: Connection refused).\nmore"))
    assert line.startswith("API request to http://host failed: x")
    assert line.endswith("x (Caused by: Connection refused)")
    assert len(line) <= MAX_LINE
    assert first_line(OSError("x" * MAX_LINE)) == "x" * MAX_LINE


def test_errors_and_manifests_hold_no_secret(tmp_path):
    error = PistoSegError(f"{SIGNED} fails", file="s3://k:secret@b/x", remedy="see s3://k:secret@b")
    assert "secret" not in str(error)
    assert "secret" not in error.file
    assert "abc%2F123" not in error.reason
    made = Workspace(str(tmp_path)).commit(
        "patches", "0" * 16, version=1, settings={"uri": ["s3://k:secret@b"]}, inputs={}, summary={"x": 1}, seconds=0
    )
    text = (tmp_path / "patches" / ("0" * 16) / "manifest.json").read_text()
    assert "secret" not in text
    assert json.loads(text)["settings"] == made.manifest["settings"] == {"uri": ["s3://***@b"]}


def test_values_keep_their_shape():
    assert redacted({"a": [1, None, {"b": "s3://u:p@x"}], "c": 2.5}) == {"a": [1, None, {"b": "s3://***@x"}], "c": 2.5}
