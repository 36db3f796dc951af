"""PistoSeg: from labels that cost seconds to tissue maps of whole cohorts.

`pistoseg.load(uri).predict(image)` segments an image with a model bundle; the command line does the rest.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from pistoseg.models.bundle import Segmenter

# What Ray ends because a node is short of memory it would begin again for ever; the pauses between these tries grow to
# a minute, in which others may end that took the memory. Ray reads it as it is imported, so nothing later will do.
os.environ.setdefault("RAY_task_oom_retries", "8")

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(uri: str | Path, device: str | None = None, *, workspace: str = "runs/pistoseg") -> Segmenter:
    """Load a model, as `--model` of the command line names it.

    Args:
        uri: folder or URI of a bundle or of a workspace with one, or a registered model: `models:/NAME@ALIAS`,
            `models:/NAME/VERSION`.
        device: `cpu`, `cuda`, `cuda:1`...; None or `auto` for CUDA where there is one.
        workspace: whose MLflow knows registered models, unless MLFLOW_TRACKING_URI names a server.
    Returns:
        A `Segmenter`: `predict(image)` gives an (H, W) array of class ids, `probabilities(image)` their probabilities,
        `segment_slide(slide, out)` writes what `pistoseg segment` does; `classes` has names and colours.
    Raises:
        PistoSegError: there is no such model, it is damaged or of a newer version, or the workspace has several
            of which none is its champion.
    """
    from pistoseg import storage
    from pistoseg.artifacts import Workspace
    from pistoseg.config import TrackingConfig
    from pistoseg.models import bundle
    from pistoseg.tracking.registry import bundle_uri

    return bundle.load(bundle_uri(str(uri), TrackingConfig(), Workspace(storage.absolute(workspace))), device)
