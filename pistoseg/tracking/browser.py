"""MLflow's pages over a workspace's runs, for this machine's browsers or for all."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress

from pistoseg import storage
from pistoseg.artifacts import Workspace
from pistoseg.config import TrackingConfig
from pistoseg.errors import PistoSegError
from pistoseg.redaction import redact
from pistoseg.tracking.delivery import own_experiment
from pistoseg.tracking.server import database_file, files_place, is_own, open_client, tracking_uri

_QUIET = {
    "PYTHONWARNINGS": "ignore",  # each of MLflow's processes says which of its libraries are deprecated
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_UVICORN_OPTS": "--log-level=warning",  # without a line a process and a request
}
"""Environment of MLflow's server, unless it says otherwise."""


def browse(workspace: str, host: str, port: int, tracking: TrackingConfig) -> int:
    """Serve MLflow over a workspace's runs, or say where the server is; replaces this process.

    Listening for other machines, it takes requests by this one's names and addresses, or by what MLflow's variables
    MLFLOW_SERVER_ALLOWED_HOSTS and MLFLOW_SERVER_CORS_ALLOWED_ORIGINS say.
    """
    place = Workspace(storage.absolute(workspace))
    uri = tracking_uri(tracking, place)
    database = database_file(uri)
    if uri.startswith("sqlite:") and not (database and database.exists()):
        if not storage.is_local(workspace) and is_own(uri, place):
            raise PistoSegError(
                f"no MLflow database at {database}: where a workspace is no folder, its runs are where the command ran",
                file=workspace,
                remedy="go to that folder, or set MLFLOW_TRACKING_URI to the server that has them",
            )
        raise PistoSegError("has no runs yet", file=workspace, remedy="run `pistoseg train --workspace` with it first")
    if not uri.startswith("sqlite:"):
        print(f"runs are at {redact(uri)}")
        return 0
    _require_free(host, port)
    client, name = open_client(uri), tracking.experiment
    if is_own(uri, place):
        name = own_experiment(client, name, files_place(place))
    # MLflow opens on a page about language models; the runs have an address of their own.
    experiment = client.get_experiment_by_name(name) or client.get_experiment_by_name(tracking.experiment)
    page = f"/#/experiments/{experiment.experiment_id}/runs" if experiment else ""
    names = [_in_url(host)] if _is_loopback(host) else _names(host)
    print(f"http://{names[0]}:{port}{page}  (Ctrl-C ends it)", flush=True)
    admitted = {} if _is_loopback(host) else _admitted(names, port)
    stores = ["--backend-store-uri", uri, "--registry-store-uri", uri]
    command = ["mlflow", "server", *stores, "--host", host, "--port", str(port)]
    environment = {**_QUIET, **admitted, **os.environ}
    if "MLFLOW_GUNICORN_OPTS" in environment:
        environment.pop("MLFLOW_UVICORN_OPTS")  # MLflow refuses the options of two servers
    os.execve(sys.executable, [sys.executable, "-m", *command], environment)


def _require_free(host: str, port: int) -> None:
    """Refuse an address where MLflow can't listen: its URL would be printed, and may be that of another server."""
    try:
        if port < 1:  # 0 stands for any that is free, which nobody would know
            raise OverflowError(port)
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as it does: one that ended is no hindrance
            probe.bind((host, port))
    except OverflowError as error:
        raise PistoSegError(f"{port} is no port", field="--port", remedy="give one from 1024 to 65535") from error
    except OSError as error:
        reason = f"can't be listened on ({error.strerror})"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            remedy = "give another one above 1023; another server may run there already"
            raise PistoSegError(f"port {port} {reason}", field="--port", remedy=remedy) from error
        remedy = "give 127.0.0.1 for browsers on this machine, or 0.0.0.0 for all"
        raise PistoSegError(f"{host!r} {reason}", field="--host", remedy=remedy) from error


def _is_loopback(host: str) -> bool:
    return host.startswith(("localhost", "127.")) or host == "::1"


def _names(host: str) -> list[str]:
    """What browsers elsewhere may call a server that listens on a host, as in a URL; the best name first."""
    names = [] if host in ("0.0.0.0", "::", "") else [host]
    names += [socket.getfqdn(), socket.gethostname()]
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect(("192.0.2.1", 9))  # sends nothing, and finds the address that other machines see
        names.append(route.getsockname()[0])
    # What a machine without a name of its own is called by some systems is its address backwards.
    own = [_in_url(name.lower()) for name in names if not _is_loopback(name) and not name.endswith(".arpa")]
    return list(dict.fromkeys(own)) or ["localhost"]


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _admitted(names: Sequence[str], port: int) -> dict[str, str]:
    """Variables that let MLflow's server take requests by names; its own default takes none by a machine's name."""
    private = ["10.*", "192.168.*", *(f"172.{number}.*" for number in range(16, 32)), "fc00:*", "fd00:*"]
    here = [f"{name}{port}" for name in ("localhost", "127.0.0.1", "0.0.0.0") for port in ("", ":*")]
    here += ["[::1]", "[[]::1]:*"]  # the second one is a pattern, where a bracket stands for a set
    hosts = [*here, *private, *names, *(f"{name}:{port}" for name in names)]
    return {
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(hosts),
        # Its pages look for runs by POST, to which a browser adds where the page is from.
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}:{port}" for name in names),
    }
