"""Which MLflow server a workspace's runs go to, and a client of it that survives its absence."""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pistoseg import storage
from pistoseg.artifacts import Workspace
from pistoseg.config import TrackingConfig
from pistoseg.errors import PistoSegError
from pistoseg.redaction import first_line
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
    with _defaults_lock:  # what another workspace's run has put into the environment is not the user's
        users = _defaults[0] if _defaults else os.environ.get("MLFLOW_TRACKING_URI")
    return config.uri or users or _own_database(workspace)


def database_uri(file: Path) -> str:
    """The URI of a SQLite database.

    MLflow makes the folder that the URI's text names, before SQLAlchemy reads `%xx` and `?` in it: only what these
    would change is quoted.
    """
    return "sqlite:///" + re.sub(r"%(?=[0-9A-Fa-f]{2})", "%25", str(file)).replace("?", "%3F")


def database_file(uri: str) -> Path | None:
    """The file of a SQLite database; None for another server, and for one in memory."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        name = make_url(uri).database if uri.startswith("sqlite:") else None
    except ArgumentError as error:
        raise PistoSegError("is no URI of a SQLite database", file=uri, remedy="write sqlite:///FILE") from error
    return None if not name or name == ":memory:" or name.startswith("file:") else Path(name)


def _own_database(workspace: Workspace) -> str:
    return database_uri(_local_folder(workspace) / "mlflow.db")


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
    """A client of the config's server, or of the workspace's database, which is made if it is not there.

    Raises:
        PistoSegError: the database can't be opened, or is that of another version of MLflow.
    """
    for key, limit in {"GIT_PYTHON_REFRESH": "quiet", **HTTP_LIMITS}.items():
        os.environ.setdefault(key, limit)
    uri = tracking_uri(config, workspace)
    if uri.startswith("sqlite:"):
        folder = _local_folder(workspace)
        if not storage.is_local(workspace.root) and not folder.exists():
            print(
                f"MLflow's runs are kept in {folder} on this machine, which goes with a job's folder: "
                "set MLFLOW_TRACKING_URI, or tracking.uri, to a server to keep them"
            )
        storage.make_folder(folder)
        _quiet_migrations()
    return Outbox(open_client(uri), workspace.root, _register)


def open_client(uri: str) -> MlflowClient:
    """A client of a server.

    Raises:
        PistoSegError: its database can't be opened, or is that of another version of MLflow.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with _alone(uri):
            return MlflowClient(uri)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        remedy = "see that it is a database, in a folder that can be written, or set MLFLOW_TRACKING_URI to a server"
        if "out-of-date database schema" in str(error):
            remedy = f"keep a copy of it, then run `mlflow db upgrade {uri}`"
        raise PistoSegError(f"MLflow can't open it ({first_line(error)})", file=uri, remedy=remedy) from error


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Let one process at a time open a SQLite database: MLflow makes the tables of a new one without a lock."""
    with ExitStack() as held:
        if database := database_file(uri):
            try:
                database.parent.mkdir(parents=True, exist_ok=True)  # as MLflow does
                lock = held.enter_context(database.with_name(f".{database.name}.lock").open("a"))
            except OSError:
                if not database.exists():  # nor can MLflow make it, which it would try for minutes
                    raise
            else:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _register(client: MlflowClient, **arguments: Any) -> str:
    from pistoseg.models.mlflow_flavor import register

    return register(client, **arguments)


def experiment_id(client: Outbox, config: TrackingConfig, workspace: Workspace) -> str:
    """Id of the config's experiment, which is made if it is not there."""
    uri = tracking_uri(config, workspace)
    place = files_place(workspace) if uri.startswith("sqlite:") else None
    return client.experiment(config.experiment, place, own=is_own(uri, workspace))


def files_place(workspace: Workspace) -> str:
    """URI of the folder of a workspace's files in MLflow, where no server keeps them."""
    return (_local_folder(workspace) / "mlflow").as_uri()


def is_own(uri: str, workspace: Workspace) -> bool:
    """Whether a server is the workspace's own database."""
    return uri == _own_database(workspace)


def _quiet_migrations() -> None:
    import logging

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
