"""`--submit ADDRESS`: the same command as a job on a Ray cluster.

The package and the resolved settings travel with the job; data, workspace and results are where both machines reach
them. The job uses the environment of the cluster: no variable and no credential of this machine goes along.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pistoseg
from pistoseg.errors import PistoSegError
from pistoseg.job_package import given, package
from pistoseg.redaction import first_line, redact

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

IN_JOB = "PISTOSEG_IN_JOB"
"""Variable of a job, whose folder nobody will look into when it has ended."""
POLL_S = 1.0
ADDRESS_REMEDY = "give the address of its dashboard, e.g. http://HOST:8265, and see that it runs"
RECONNECT_S = 120.0
"""How long a dashboard may be away, or not yet ready."""


def submit(arguments: Sequence[str], options: argparse.Namespace) -> int:
    """Run a command as a job and follow its log.

    Args:
        arguments: of the command line, `--submit` among them.
        options: what they were parsed to.
    Returns:
        The job's exit code; 130 when following it was interrupted, the job goes on.
    Raises:
        PistoSegError: something that the job needs is on this machine only, or the cluster can't be reached.
    """
    from pistoseg.tracking.registry import DEFAULT_WORKSPACE, workspace_of

    address = options.submit.strip()
    if not address:
        raise PistoSegError("is empty", field="--submit", remedy=ADDRESS_REMEDY)
    with tempfile.TemporaryDirectory(prefix="pistoseg-job-") as folder, _only_address(address):
        here = is_this_machine(address)
        command = package(list(arguments), options, Path(folder), here)
        client = _client(address)
        verb = command[0]
        # Elsewhere it is the image's; here it may be that of an environment that is not activated.
        python = sys.executable if here else "python"
        job = _submitted(
            client,
            address,
            entrypoint=shlex.join([python, "-m", "pistoseg", *command]),
            submission_id=f"pistoseg-{verb}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}",
            runtime_env={"working_dir": folder, "env_vars": {"PYTHONUNBUFFERED": "1", IN_JOB: "1"}},
            metadata={"pistoseg": pistoseg.__version__, "verb": verb},
        )
    _say("submitted", f"submitted {job} to {redact(address)}", job=job)
    if verb == "segment" and not given(command, "--workspace") and workspace_of(options.model) == DEFAULT_WORKSPACE:
        text = "MLflow gets this run where the cluster's nodes have MLFLOW_TRACKING_URI; else name a --workspace"
        _say("message", text, job=job)
    try:
        return _follow(client, job)
    except KeyboardInterrupt:
        where = f"--address {redact(address)} {job}"
        _say("interrupted", f"pistoseg: the job goes on; ray job logs --follow {where}; ray job stop {where}", job=job)
        return 130


def _say(event: str, text: str, **fields: Any) -> None:
    from pistoseg.progress import json_line, logs_json

    if logs_json():
        json_line(sys.stderr, event, text=text, **fields)
    else:
        print(text, file=sys.stderr, flush=True)


def is_this_machine(address: str) -> bool:
    """Whether a cluster's head is on this machine.

    The loopback address of a dashboard may be the end of a tunnel, so the cluster is asked.

    Raises:
        PistoSegError: it does not answer, or this is no address.
    """
    try:
        host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    except ValueError as error:
        raise PistoSegError("is no address", file=address, field="--submit", remedy=ADDRESS_REMEDY) from error
    if not (address in ("auto", "local") or host in ("localhost", "::1") or host.startswith("127.")):
        return False
    return "://" not in address or _is_own(_head_ip(address))


def _head_ip(address: str) -> str:
    """Where the head of the cluster of a dashboard is, in the cluster's own network."""
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    _client(address)  # which says what is wrong where nobody answers
    try:
        # A filter by state would fail beside any dead node: Ray takes what it leaves out for missing.
        heads = list_nodes(address, filters=[("is_head_node", "=", True)])
        (head,) = (node for node in heads if node.state == "ALIVE")
    except (RayStateApiException, OSError, RuntimeError, ValueError) as error:
        raise PistoSegError(
            f"does not say where its head is ({first_line(error)})",
            file=address,
            field="--submit",
            remedy="see that the cluster's head and its dashboard run",
        ) from error
    return str(head.node_ip)


def _is_own(ip: str) -> bool:
    """Whether an IP address is one of this machine's: only those can be listened on."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as probe:
            probe.bind((ip, 0))
    except OSError:
        return False
    return True


@contextmanager
def _only_address(address: str) -> Iterator[None]:
    """Keep Ray from preferring the addresses of the environment to the one that was asked for."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _client(address: str) -> JobSubmissionClient:
    from ray.exceptions import AuthenticationError, RayError
    from ray.job_submission import JobSubmissionClient

    from pistoseg.stages.cluster import require_ray

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    try:
        if "://" not in address:
            require_ray(address)  # which knows where its dashboard is
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise PistoSegError(
            "refuses this user's token",
            file=address,
            field="--submit",
            remedy="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's token",
        ) from error
    except (ConnectionError, RuntimeError, ValueError, RayError, PistoSegError) as error:
        text = first_line((isinstance(error, PistoSegError) and error.__cause__) or error)
        raise PistoSegError(
            f"can't be reached ({text})", file=address, field="--submit", remedy=ADDRESS_REMEDY
        ) from error


def _submitted(client: JobSubmissionClient, address: str, **job: Any) -> str:
    """Submit a job; a cluster that has just started takes none for some seconds."""
    deadline = time.monotonic() + RECONNECT_S
    while True:
        try:
            return str(client.submit_job(**job))
        except (RuntimeError, OSError) as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise PistoSegError(
                    f"took no job ({first_line(error)})",
                    file=address,
                    field="--submit",
                    remedy="see that the cluster's head and its dashboard run",
                ) from error
            time.sleep(POLL_S)


def _follow(client: JobSubmissionClient, job: str) -> int:
    """Print a job's log as it grows; returns its exit code."""
    from aiohttp import ClientError  # what Ray's client follows logs with
    from ray.job_submission import JobStatus

    log, lost = _Log(), 0.0
    while True:
        try:
            asyncio.run(log.tail(client, job))
            info = client.get_job_info(job)
            lost = 0.0
        except (RuntimeError, OSError, ClientError) as error:
            if error is log.unwritable:
                raise
            lost = lost or time.monotonic()
            if time.monotonic() - lost > RECONNECT_S:
                raise PistoSegError(
                    f"can't be followed any more ({first_line(error)})",
                    file=job,
                    remedy="see that the cluster's head runs; submit the same command again to go on",
                ) from error
            time.sleep(POLL_S)
            continue
        if info.status.is_terminal():
            break
        time.sleep(POLL_S)
    code = info.driver_exit_code
    if code is not None and code >= 0:
        return int(code)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if code is None:
        reason, code = redact(" ".join((info.message or str(info.status)).split())[:500]), 1
    else:
        why = " (memory was short?)" if -code == signal.SIGKILL else ""
        reason = f"{signal.Signals(-code).name} ended its process{why}"
        code = 128 - code  # as shells count
    text = f"pistoseg: the job ended: {reason}; submit the same command again to go on"
    _say("job_ended", text, level="error", job=job)
    return int(code)


class _Log:
    """Prints a log once, however often the connection to it is made anew."""

    def __init__(self) -> None:
        self.shown = 0
        self.unwritable: OSError | None = None
        """Why it can't be printed, which says nothing of the cluster: nobody reads it any more, or a disk is full."""

    async def tail(self, client: JobSubmissionClient, job: str) -> None:
        """Print what was not printed yet until the log ends or the connection does."""
        seen = 0
        async for text in client.tail_job_logs(job):
            new = text[max(0, self.shown - seen) :]
            seen += len(text)
            if new:
                try:
                    print(new, end="", flush=True)
                except OSError as error:
                    self.unwritable = error
                    raise
                self.shown = seen
