"""Local files however their accents are written: in names of Macs' files they may be letters of their own."""

from __future__ import annotations

import posixpath

from pistoseg import storage
from pistoseg.classes import composed
from pistoseg.errors import PistoSegError


class AccentFinder:
    """From a path as it was typed to that of the file; each folder is listed once, and object storage is not asked."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, str]] = {}

    def __call__(self, uri: str) -> str:
        """The path of what differs from this one in the writing of accents alone, if only that is there."""
        if uri.isascii() or not storage.is_local(uri) or storage.exists(uri):
            return uri
        folder, name = self(posixpath.dirname(uri)), storage.name(uri)
        if folder not in self._folders:
            self._folders[folder] = _names(folder)
        return storage.join(folder, self._folders[folder].get(composed(name), name))


def _names(folder: str) -> dict[str, str]:
    """What is in a folder, by its composed name."""
    try:
        return {composed(storage.name(item)): storage.name(item) for item in storage.list_dir(folder)}
    except (OSError, ValueError, PistoSegError):  # whoever opens a file there says it
        return {}
