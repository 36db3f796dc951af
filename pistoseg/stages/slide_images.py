"""Opening slides for the stages that read them: from where they are, or through a cache on the node."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pistoseg import storage
from pistoseg.errors import UnavailableError
from pistoseg.slides.cache import HOUR_S, SlideCache, bytes_in
from pistoseg.slides.reader import open_slide
from pistoseg.slides.scratch import private_folder
from pistoseg.slides.view import SlideView

DISK_GB = "PISTOSEG_DISK_GB"
"""Environment variable of a node: gigabytes of its disk that are ours, for containers that share it with others."""


@dataclass(frozen=True)
class SlideOpener:
    """Opens slides at the networks' pixel size, for `pistoseg.patches.crops`; travels to Ray's workers.

    Args:
        mpp: micrometres per network px.
    """

    mpp: float

    @contextmanager
    def __call__(self, uri: str, mpp: float | None) -> Iterator[SlideView]:
        """A slide while the context is open; those in object storage are fetched to this machine once.

        Args:
            uri: of the slide.
            mpp: micrometres per level-0 px as the user gave it, or None.
        Raises:
            PistoSegError: the slide cannot be fetched or opened, or nothing says its mpp.
        """
        with node_cache(uri).get(uri) as path, open_slide(path, mpp, name=uri) as reader:
            yield SlideView(reader, self.mpp)


def node_cache(uri: str, gigabytes: float | None = None, wait_s: float = HOUR_S) -> SlideCache:
    """The cache that all processes of a user share on this machine.

    Args:
        uri: of a slide that it is for; a local one needs no folder.
        gigabytes: of all slides in it; None: half of what the disk has left beside them, or of `DISK_GB` where that
            is less.
        wait_s: for room, as of `SlideCache`.
    Raises:
        UnavailableError: `DISK_GB` is not a number above 0, or the cache's folder is another user's.
    """
    name = f"pistoseg-slides-{os.getuid()}"
    folder = Path(tempfile.gettempdir()) / name if storage.is_local(uri) else private_folder(name)
    if gigabytes is not None:
        return SlideCache(folder, int(gigabytes * 1e9), wait_s)
    free = shutil.disk_usage(tempfile.gettempdir()).free + bytes_in(folder)  # or the limit would fall as it fills
    return SlideCache(folder, int(min(free, _allowed_bytes())) // 2, wait_s)


def _allowed_bytes() -> float:
    """What `DISK_GB` says; infinity where it is not set."""
    text = os.environ.get(DISK_GB, "").strip() or "inf"
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = 0
    if not gigabytes > 0:
        problem, remedy = f"{text!r} is not a number above 0", f"set {DISK_GB} to the node's gigabytes"
        raise UnavailableError(problem, field=DISK_GB, remedy=remedy)  # no slide's fault
    return gigabytes * 1e9
