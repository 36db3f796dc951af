"""`--submit ADDRESS`: the same command as a job on a Ray cluster.

The package and the resolved settings travel with the job; data, workspace and results are where both machines reach
them. The job uses the environment of the cluster: no variable and no credential of this machine goes along.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import shlex
import shutil
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

import yaml

import pistoseg
from pistoseg import storage
from pistoseg.errors import PistoSegError
from pistoseg.redaction import first_line, has_secret, redact

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from pistoseg.config import Config

SETTINGS = "job.yaml"
PLACES = ("--data", "--workspace", "--out", "--model", "--slides")
SHIPPED = ("--classes", "--space")
"""Options whose files travel with the job; a value that names no file here stays as it is."""
SETTINGS_OPTIONS = ("--preset", "--profile", "--config", "--set")
NEEDS_WORKSPACE = ("train", "synthesize", "search", "ablate")
"""Verbs whose results are in the workspace."""
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
    if verb == "segment" and not _given(command, "--workspace"):
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


def package(arguments: list[str], options: argparse.Namespace, folder: Path, here: bool) -> list[str]:
    """Put what a job needs into a folder, and say with which arguments it runs there.

    Args:
        arguments: of the command line.
        options: what they were parsed to.
        folder: an empty one; gets the package and, unless they are in object storage, the resolved settings.
        here: whether the cluster is on this machine, and sees its files.
    """
    command = _without(arguments, ("--submit",))
    if any(has_secret(argument) for argument in command):
        raise PistoSegError(
            "holds credentials, and everyone who sees the cluster sees a job's arguments",
            file=next(argument for argument in command if has_secret(argument)),
            remedy="give the URI without them, and the cluster's nodes the AWS_* variables, a profile or a role",
        )
    shutil.copytree(Path(pistoseg.__file__).parent, folder / "pistoseg", ignore=shutil.ignore_patterns("__pycache__"))
    if hasattr(options, "config") and (options.config is None or storage.is_local(options.config)):
        values = _portable(_resolved(options), here)
        _require_no_secret(values)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        (folder / SETTINGS).write_text(text, encoding="utf-8")
        command = [*_without(command, SETTINGS_OPTIONS), "--config", SETTINGS]
    for flag in _needed(options, here):
        if not _given(command, flag):
            command += [flag, getattr(options, flag.strip("-"))]
    return [*_reachable(command, here, folder)]


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


def _needed(options: argparse.Namespace, here: bool) -> Iterator[str]:
    """Options whose defaults are places of this machine, which a job has to be told."""
    stage = getattr(options, "stage", None)  # of `evaluate`: its masks are in the workspace
    # Elsewhere a job that looks for a registered model has its cluster's tracking server, and wants no workspace.
    if options.verb in NEEDS_WORKSPACE or stage or (here and options.verb in ("segment", "evaluate")):
        yield "--workspace"
    if getattr(options, "preview", None):
        yield "--out"


def _resolved(options: argparse.Namespace) -> Config:
    from pistoseg.config import load_config

    return load_config(options.preset, options.profile, options.config, options.overrides)


def _portable(config: Config, here: bool) -> dict[str, Any]:
    """A config as plain values, without what is this machine's."""
    values = config.model_dump(mode="json")
    values["compute"]["address"] = None  # the job is told by Ray
    _settle(values, here)
    return values


def _settle(values: dict[str, Any], here: bool) -> bool:
    """Make the places in settings absolute, or refuse those that only this machine has; whether any was changed."""
    changed = False
    for section, settings in values.items():
        for field, value in settings.items() if isinstance(settings, dict) else ():
            if isinstance(value, str) and (place := _settled(value, section, field, here)) != value:
                settings[field], changed = place, True
    return changed


def _settled(value: str, section: str, field: str, here: bool) -> str:
    from pistoseg import places
    from pistoseg.tracking.server import database_file

    name = f"{section}.{field}"
    if name == "tracking.uri" and (database := database_file(value)) and not here and not database.is_absolute():
        raise PistoSegError(
            "is on this machine, where the cluster can't reach it",
            file=value,
            field=name,
            remedy="name a tracking server, or leave it to MLFLOW_TRACKING_URI of the cluster's nodes",
        )
    if places.is_data(section, field, value):
        _require(value, name, here)
    return places.absolute(section, field, value)


def _require(value: str, field: str, here: bool) -> None:
    """Refuse what only this machine has; an absolute path may be a share that all nodes mount."""
    _require_no_secret(value, field)
    if not here and storage.is_local(value) and not os.path.isabs(value):
        raise PistoSegError(
            "is on this machine, where the cluster can't reach it",
            file=value,
            field=field,
            remedy="give a URI, e.g. s3://bucket/folder, or the absolute path of a folder that all nodes mount",
        )


def _require_no_secret(value: Any, field: str = "") -> None:
    """Refuse a setting, or a section with one, that holds credentials."""
    if isinstance(value, dict):
        for key, item in value.items():
            _require_no_secret(item, f"{field}.{key}" if field else str(key))
    elif isinstance(value, list):
        for item in value:
            _require_no_secret(item, field)
    elif isinstance(value, str) and has_secret(value):
        raise PistoSegError(
            "holds credentials, and everyone who sees the cluster sees a job's settings",
            file=value,
            field=field,
            remedy="give it without them; the cluster's nodes have credentials of their own",
        )


def _reachable(command: list[str], here: bool, folder: Path) -> Iterator[str]:
    """The arguments with local paths made absolute, and small files put into the job's folder."""
    flag = ""
    for argument in command:
        name, equals, value = argument.partition("=")
        if flag == "--set":
            yield _setting(argument, here, folder)
        elif name == "--set" and equals:
            yield f"--set={_setting(value, here, folder)}"
        elif flag in PLACES + SHIPPED:
            yield _place(argument, flag, here, folder)
        elif equals and name in PLACES + SHIPPED:
            yield f"{name}={_place(value, name, here, folder)}"
        else:
            yield argument
        flag = argument


def _setting(item: str, here: bool, folder: Path) -> str:
    """A `section.key=value` beside settings that the job reads itself."""
    from pistoseg.config import parse_override

    ((key, value),) = (values := parse_override(item)).items()
    changed = _settle(values, here)
    if key == "classes" and isinstance(value, str):
        value, changed = _place(value, "--classes", here, folder), True
    return f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" if changed else item


def _place(value: str, flag: str, here: bool, folder: Path) -> str:
    if value.startswith("models:/"):
        return value
    if flag in SHIPPED:
        source = storage.local_path(value)
        if source is None or not source.is_file():
            return value
        name = f"{flag.strip('-')}{source.suffix}"
        shutil.copy(source, folder / name)
        return name
    _require(value, flag, here)
    return storage.absolute(value)


def _given(command: list[str], flag: str) -> bool:
    return any(argument == flag or argument.startswith(f"{flag}=") for argument in command)


def _without(command: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The arguments without some options and their values."""
    kept, skip = [], False
    for argument in command:
        if skip:
            skip = False
        elif argument in flags:
            skip = True
        elif argument.partition("=")[0] not in flags:
            kept.append(argument)
    return kept


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
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    reason = redact(" ".join((info.message or str(info.status)).split())[:500])
    text = f"pistoseg: the job ended: {reason}; submit the same command again to go on"
    _say("job_ended", text, level="error", job=job)
    return 1


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
