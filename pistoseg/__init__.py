"""PistoSeg: from labels that cost seconds to tissue maps of whole cohorts.

`pistoseg.load(uri).predict(image)` segments an image with a model bundle; the command line does the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pistoseg.models.bundle import Segmenter

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(uri: str, device: str | None = None) -> Segmenter:
    """Load a model bundle from a folder or URI; see `pistoseg.models.bundle.load`."""
    from pistoseg.models.bundle import load as load_bundle

    return load_bundle(uri, device)
