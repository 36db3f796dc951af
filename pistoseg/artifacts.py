"""Artifacts: folders named by what they were made from, committed by a manifest that is written last.

`<workspace>/<stage>/<fingerprint>/manifest.json` marks a finished artifact; a folder without one is unfinished work,
which the stage picks up where it stopped. Who writes a folder holds its claim (`pistoseg.claims`), and the manifest is
created, never replaced: of two runs that want the same artifact one makes it and the other uses it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pistoseg
from pistoseg import storage
from pistoseg.errors import PistoSegError
from pistoseg.redaction import redacted

MANIFEST = "manifest.json"
CHECKPOINTS = "ray_train"
"""Folder in an artifact, of a training that is not finished."""
SETTLE_S = 1.0
"""How long a manifest that can't be read may still be in the making."""
_NO_JSON = (json.JSONDecodeError, UnicodeDecodeError)
"""Not all ValueErrors: those of a storage that is away are some, too."""


def fingerprint(stage: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hash of everything a stage's result depends on.

    Args:
        stage: the stage's name.
        version: format version of the stage; raised when its results change.
        settings: the part of the config that the stage reads, JSON-serialisable.
        inputs: fingerprints of the input artifacts by role.
    Returns:
        16 hexadecimal digits.
    """
    text = json.dumps([stage, version, settings, inputs], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Artifact:
    """A committed artifact."""

    stage: str
    fingerprint: str
    uri: str
    manifest: dict[str, Any]

    @property
    def summary(self) -> dict[str, Any]:
        """What the stage said about its result."""
        value: dict[str, Any] = self.manifest["summary"]
        return value

    def path(self, *parts: str) -> str:
        """URI of a file in it."""
        return storage.join(self.uri, *parts)


@dataclass(frozen=True)
class Workspace:
    """A folder on any file system that holds artifacts."""

    root: str

    def folder(self, stage: str, key: str) -> str:
        """URI of an artifact's folder, whether it is there or not."""
        return storage.join(self.root, stage, key)

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact if it is committed.

        Raises:
            PistoSegError: its manifest is damaged.
        """
        uri = self.folder(stage, key)
        file = storage.join(uri, MANIFEST)
        try:
            try:
                manifest = json.loads(storage.read_bytes(file))
            except _NO_JSON:  # another run may just be writing it: not every file system shows files whole
                time.sleep(SETTLE_S)
                manifest = json.loads(storage.read_bytes(file))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except _NO_JSON as error:
            raise PistoSegError(f"is damaged: {error}", file=file, remedy="delete that folder and run again") from None
        return Artifact(stage, key, uri, manifest)

    def commit(
        self,
        stage: str,
        key: str,
        *,
        version: int,
        settings: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        summary: Mapping[str, Any],
        seconds: float,
    ) -> Artifact:
        """Create the manifest, which makes the folder an artifact; one that is there already stays."""
        manifest = {
            "stage": stage,
            "fingerprint": key,
            "format": version,
            "pistoseg": pistoseg.__version__,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 1),
            "settings": redacted(settings),
            "inputs": {role: {"stage": item.stage, "fingerprint": item.fingerprint} for role, item in inputs.items()},
            "summary": redacted(summary),
        }
        uri = self.folder(stage, key)
        if storage.create_bytes(storage.join(uri, MANIFEST), json.dumps(manifest, indent=2).encode()):
            return Artifact(stage, key, uri, json.loads(json.dumps(manifest)))
        found = self.find(stage, key)
        assert found is not None, "it was there a moment ago"
        return found
