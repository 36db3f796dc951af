"""PistoSeg: from labels that cost seconds to tissue maps of whole cohorts.

`pistoseg.load(uri).predict(image)` segments an image with a model bundle; the command line does the rest.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pistoseg.models.bundle import Segmenter

# What Ray ends because a node is short of memory it would begin again for ever; the pauses between these tries grow to
# a minute, in which others may end that took the memory. Ray reads it as it is imported, so nothing later will do.
os.environ.setdefault("RAY_task_oom_retries", "8")

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(uri: str, device: str | None = None) -> Segmenter:
    """Load a model bundle from a folder or URI; see `pistoseg.models.bundle.load`."""
    from pistoseg.models.bundle import load as load_bundle

    return load_bundle(uri, device)
