"""MLflow: which server, the runs of pipelines and jobs, what it missed while it was away, the registered models."""

from pistoseg.tracking.runs import StageRun, Tracker, batch_run
from pistoseg.tracking.server import connect, default_server, tracking_uri

__all__ = ["StageRun", "Tracker", "batch_run", "connect", "default_server", "tracking_uri"]
