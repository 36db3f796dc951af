"""Nothing that opens a door is shown: passwords in URIs, signatures in query strings, values of secret variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "RAY_AUTH_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
SHORTEST_SECRET = 8
"""Shorter values are not looked for: they would be found in ordinary words."""
MAX_LINE = 300
"""Longest text of an error, in characters, within a sentence of ours."""
_PASSWORD = re.compile(
    r"(?i)(?:(?<=://)(?!arn:)[^/\s\"'?\[:]*:(?!:|\d{1,5}/)[^\s\"'?]*"
    r"|(?<=://)[^/\s\"']*:[^/\s\"']*|(?<=https://)[^/\s\"']+|(?<=http://)[^/\s\"']+)@"
)
"""User and password up to the last @ of a URI: half of AWS's keys have a slash. What is no password: a port and what
follows it, the name of a resource (`arn:`), the inner file of `zip://file::uri`. A user alone is no secret, nor is a
container of Azure's; but what is alone in a web address may be a token."""
_SIGNATURE = re.compile(
    r"(?i)([?&](?:x-amz-[a-z-]+|x-goog-[a-z-]+|awsaccesskeyid|signature|sig|token|access_token|password|secret|key)=)"
    r"[^&\s\"']+"
)


def redact(text: str) -> str:
    """A text without passwords of URIs (`user:password@`), signed query strings and values of secret variables."""
    text = _SIGNATURE.sub(rf"\1{HIDDEN}", _PASSWORD.sub(f"{HIDDEN}@", text))
    for name in SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    return text


def redacted(value: Any) -> Any:
    """A JSON value with all its texts redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    return value


def first_line(error: BaseException) -> str:
    """What an error says first, redacted and without its full stop; its class where it says nothing.

    Of a long line the middle is left out: of a server that is away, urllib3 says why at the end.
    """
    text = str(error).strip() or type(error).__name__
    line = redact(text.splitlines()[0]).rstrip(".")
    half = (MAX_LINE - 5) // 2
    return line if len(line) <= MAX_LINE else f"{line[:half]} ... {line[-half:]}"


def has_secret(text: str) -> bool:
    """Whether there is something to hide in a text."""
    return redact(text) != text
