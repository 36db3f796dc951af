"""Which MLflow server a workspace's runs go to, and a client of it that survives its absence."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pistoseg import storage
from pistoseg.artifacts import Workspace
from pistoseg.config import TrackingConfig
from pistoseg.tracking.outbox import Outbox

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

HTTP_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""MLflow's own limits let a run wait for minutes for each call to a server that is away."""
_defaults: list[str | None] = []
"""What was MLflow's default server, then those that `default_server`'s callers want; the last is the default."""
_defaults_lock = threading.Lock()


def tracking_uri(config: TrackingConfig, workspace: Workspace) -> str:
    """Where runs go: the config's server, MLFLOW_TRACKING_URI, or SQLite in the workspace."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_local_folder(workspace) / 'mlflow.db'}"


def _local_folder(workspace: Workspace) -> Path:
    # SQLite needs a local disk; a workspace in object storage gets its database where the command runs.
    return storage.local_path(storage.absolute(workspace.root)) or Path.cwd() / "pistoseg-mlflow"


@contextmanager
def default_server(uri: str) -> Iterator[None]:
    """Make a server MLflow's default for a while: its model registry knows no other way.

    MLflow keeps the default in the environment, where the next workspace of this process would take it for the user's.
    Threads, such as a search's trials, may overlap in it: the last to leave puts back what was there.
    """
    import mlflow

    with _defaults_lock:
        if not _defaults:
            _defaults.append(os.environ.get("MLFLOW_TRACKING_URI"))
        _defaults.append(uri)
        mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        with _defaults_lock:
            _defaults.reverse()
            _defaults.remove(uri)
            _defaults.reverse()
            mlflow.set_tracking_uri(_defaults[-1])
            if len(_defaults) == 1:
                _defaults.clear()


def connect(config: TrackingConfig, workspace: Workspace) -> Outbox:
    """A client of the config's server, or of the workspace's database, which is made if it is not there."""
    for key, limit in {"GIT_PYTHON_REFRESH": "quiet", **HTTP_LIMITS}.items():
        os.environ.setdefault(key, limit)
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(config, workspace)
    if uri.startswith("sqlite:"):
        folder = _local_folder(workspace)
        if not storage.is_local(workspace.root) and not folder.exists():
            print(
                f"MLflow's runs are kept in {folder} on this machine, which goes with a job's folder: "
                "set MLFLOW_TRACKING_URI, or tracking.uri, to a server to keep them"
            )
        folder.mkdir(parents=True, exist_ok=True)
        _quiet_migrations()
    return Outbox(MlflowClient(uri), workspace.root, _register)


def _register(client: MlflowClient, **arguments: Any) -> str:
    from pistoseg.models.mlflow_flavor import register

    return register(client, **arguments)


def experiment_id(client: Outbox, config: TrackingConfig, workspace: Workspace) -> str:
    """Id of the config's experiment, which is made if it is not there."""
    local = tracking_uri(config, workspace).startswith("sqlite:")
    return client.experiment(config.experiment, (_local_folder(workspace) / "mlflow").as_uri() if local else None)


def _quiet_migrations() -> None:
    import logging

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
