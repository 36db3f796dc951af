"""The ids of slides, each of which names a folder of results."""

from __future__ import annotations

import re

MAX_BYTES = 230
"""UTF-8 bytes of an id. File systems take names of 255; the working folder of `results.published` adds 15, and an id
that is taken gets a hash of 9."""
_MAX_CHARACTERS = 120
_FORBIDDEN = '/\\:*?"<>|'


def wrong_id(slide_id: str) -> tuple[str, str] | None:
    """What is wrong with an id that a user gives, and what to do; None where it can name a folder."""
    if any(c in _FORBIDDEN or ord(c) < 32 for c in slide_id) or not slide_id or slide_id.strip(" .") != slide_id:
        return (
            f"{slide_id!r} cannot name a folder",
            f"use neither {' '.join(_FORBIDDEN)} nor a dot or blank at either end",
        )
    size = len(slide_id.encode(errors="surrogatepass"))
    return (f"has {size} bytes in UTF-8", f"use at most {MAX_BYTES}") if size > MAX_BYTES else None


def safe_id(name: str) -> str:
    """A name that every file system and object storage takes as a folder, brackets left out as they are globs."""
    safe = re.sub(r"[^\w.\- ]", "_", name)[:_MAX_CHARACTERS].encode()[:MAX_BYTES].decode(errors="ignore").strip(" .")
    return safe or "slide"
