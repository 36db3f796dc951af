"""`pistoseg doctor`: tries what a run needs, on this machine and on every node, and says how to mend what fails."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

import pistoseg
from pistoseg import object_store, storage
from pistoseg.artifacts import Workspace
from pistoseg.config import Config
from pistoseg.errors import PistoSegError, explained
from pistoseg.redaction import first_line, redact

Status = Literal["ok", "warning", "failed"]
TARGETS = ("preliminary_evaluation", "evaluation")
SPEED_BYTES = 16 << 20
FEW_RETRIES = 3
NODE_S = 120.0
"""How long all nodes may take to answer: each starts a process for that."""
SERVER_S = "10"
DISK_FAILED, DISK_LOW = 2e9, 20e9
SHM_LOW = 1e9
COMPARED = ("pistoseg", "ray", "torch", "numpy", "pyarrow", "s3fs")
"""Packages whose versions must be the same on all nodes."""


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    Args:
        what: was looked at.
        status: `ok`, `warning` or `failed`.
        detail: what was found.
        remedy: what to do about it; empty where nothing is to be done.
    """

    what: str
    status: Status
    detail: str
    remedy: str = ""


def examine(config: Config, workspace: str, *, weights: bool = True) -> Iterator[Finding]:
    """Try everything that a pipeline with these settings needs.

    Args:
        config: the settings; of its data only what is set is looked at.
        workspace: path or URI of the workspace.
        weights: whether its networks' weights are, too; not those of settings that nobody has chosen yet.
    """
    object_store.use(config.storage)
    before, object_store.RETRIES = object_store.RETRIES, FEW_RETRIES
    try:
        for what, look in (
            ("python", _python),
            ("packages", _packages),
            ("disk", lambda: _disk("this machine", _local_facts())),
            ("workspace", lambda: _workspace(workspace)),
            ("data", lambda: _data(config)),
            ("mlflow", lambda: _mlflow(config, workspace)),
            ("weights", lambda: _weights(config) if weights else _no_weights()),
            ("openslide", _openslide),
            ("ray", lambda: _ray(config, workspace)),
        ):
            yield from _guarded(what, look)
    finally:
        object_store.RETRIES = before


def table(findings: Sequence[Finding]) -> Table:
    """A row a finding, its remedy below what was found."""
    styles = {"ok": "[green]ok[/green]", "warning": "[yellow]warning[/yellow]", "failed": "[red]failed[/red]"}
    rows = Table(show_edge=False, pad_edge=False)
    for title in ("", "what", "found"):
        rows.add_column(title, overflow="fold")
    for found in findings:
        remedy = f"\n-> {escape(found.remedy)}" if found.remedy else ""
        rows.add_row(styles[found.status], escape(found.what), f"{escape(found.detail)}{remedy}")
    return rows


def to_json(findings: Sequence[Finding]) -> str:
    """A list of objects with the fields of `Finding`."""
    return json.dumps([asdict(found) for found in findings], indent=1, ensure_ascii=False)


def _guarded(what: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A look's findings; what it raises is one more."""
    try:
        yield from look()
    except PistoSegError as error:
        where = ": ".join(part for part in (error.file, error.field) if part)
        yield Finding(what, "failed", f"{where}: {error.reason}" if where else error.reason, error.remedy or "")
    except Exception as error:  # whatever is wrong with it is what this is for
        first = (str(error).splitlines() or [""])[0]
        yield Finding(what, "failed", redact(f"{type(error).__name__}: {first}"), "see the message")


def _python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()}, PistoSeg {pistoseg.__version__}")


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in requires("pistoseg") or []]
    except PackageNotFoundError:
        yield Finding("packages", "warning", "PistoSeg is not installed as a package: versions can't be compared")
        return
    wrong, count = [], 0
    for item in wanted:
        if item.marker is not None and not item.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            found = version(item.name)
        except PackageNotFoundError:
            wrong.append(f"{item.name} is missing")
            continue
        if not item.specifier.contains(found, prereleases=True):
            wrong.append(f"{item.name} {found} is not {item.specifier}")
    if wrong:
        yield Finding("packages", "failed", "; ".join(wrong), "pip install -r requirements.lock")
    else:
        yield Finding("packages", "ok", f"{count} packages as PistoSeg wants them")


def _local_facts() -> dict[str, Any]:
    """What a node says of itself; runs in a Ray task, too."""
    import socket

    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {},
        "disk": shutil.disk_usage(tempfile.gettempdir()).free,
        "folder": tempfile.gettempdir(),
        "shm": shm.total if shm else None,
    }
    for name in COMPARED:
        try:
            facts["versions"][name] = pistoseg.__version__ if name == "pistoseg" else version(name)
        except PackageNotFoundError:
            facts["versions"][name] = "missing"
    return facts


def _disk(where: str, facts: dict[str, Any]) -> Iterator[Finding]:
    free = facts["disk"]
    status: Status = "failed" if free < DISK_FAILED else "warning" if free < DISK_LOW else "ok"
    remedy = "" if status == "ok" else "make room, or set TMPDIR to a larger disk: slides and objects are kept there"
    yield Finding(f"disk of {where}", status, f"{free / 1e9:,.1f} GB free in {facts['folder']}", remedy)
    if facts["shm"] is not None and facts["shm"] < SHM_LOW:
        yield Finding(
            f"shared memory of {where}",
            "warning",
            f"{facts['shm'] / 1e9:.2f} GB in /dev/shm: Ray keeps its objects on disk",
            "start the container with --shm-size=4g or more; in Kubernetes mount an emptyDir of medium Memory",
        )


def _workspace(workspace: str) -> Iterator[Finding]:
    """Write, read, create conditionally, list and delete, and how fast."""
    root = storage.absolute(workspace)
    try:
        with _leaving_no_folders(root):
            yield from _try_workspace(root)
    except OSError as error:
        raise explained(error, root) or PistoSegError(
            f"can't be written or read ({error.strerror or first_line(error)})",
            file=root,
            remedy="give --workspace a folder that you may write into, or the URI of a bucket",
        ) from error


def _try_workspace(root: str) -> Iterator[Finding]:
    folder = storage.join(root, f".doctor-{uuid.uuid4().hex[:8]}")
    probe = storage.join(folder, "x [1].bin")
    data = os.urandom(SPEED_BYTES)
    try:
        began = time.monotonic()
        storage.write_bytes(probe, data)
        written = time.monotonic()
        same = storage.read_bytes(probe) == data
        read = time.monotonic()
        if not same:
            yield Finding("workspace", "failed", f"{root}: other bytes come back than were written", "mend the storage")
            return
        up, down = (SPEED_BYTES / 1e6 / max(seconds, 1e-6) for seconds in (written - began, read - written))
        yield Finding("workspace", "ok", f"{root}: writes {up:,.0f} MB/s, reads {down:,.0f} MB/s")
        claim = storage.join(folder, "claim")
        first, second = storage.create_bytes(claim, b"1"), storage.create_bytes(claim, b"2")
        if first and not second and storage.read_bytes(claim) == b"1":
            yield Finding("conditional put", "ok", "a file that is there is not created again")
        else:
            yield Finding(
                "conditional put",
                "failed",
                f"{root}: the storage ignores it, so that two runs could write one artifact",
                "use a server that knows If-None-Match (AWS, MinIO, Ceph, SeaweedFS), or one run at a time",
            )
    finally:
        storage.remove_tree(folder)


@contextmanager
def _leaving_no_folders(root: str) -> Iterator[None]:
    """Remove the folders that the block makes for a workspace, and leave those that were there."""
    here = storage.local_path(root)
    made = [parent for parent in (here, *here.parents) if not parent.exists()] if here else []
    try:
        yield
    finally:
        for parent in made:
            with suppress(OSError):  # a run has begun in it since
                parent.rmdir()


def _data(config: Config) -> Iterator[Finding]:
    for field in ("uri", "validation"):
        uri = getattr(config.data, field)
        if not uri:
            continue
        uri = storage.absolute(uri)
        if not storage.exists(uri):
            yield Finding(f"data.{field}", "failed", f"{uri}: does not exist", "give its path or URI")
        elif storage.is_dir(uri) and next(storage.iter_details(uri), None) is None:
            yield Finding(f"data.{field}", "failed", f"{uri}: is empty", "give the folder of the data set")
        else:
            yield Finding(f"data.{field}", "ok", f"{uri}: can be read")


def _mlflow(config: Config, workspace: str) -> Iterator[Finding]:
    from pistoseg.tracking import tracking_uri
    from pistoseg.tracking.server import database_file, open_client

    if not config.tracking.enabled:
        yield Finding("mlflow", "ok", "tracking is off")
        return
    uri = tracking_uri(config.tracking, Workspace(storage.absolute(workspace)))
    if database := database_file(uri):
        parent = database.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if database.exists():  # as a run does; it makes none
            open_client(uri)
        if os.access(parent, os.W_OK):
            yield Finding("mlflow", "ok", f"SQLite, in {parent} or below")
        else:
            yield Finding("mlflow", "failed", f"{parent} can't be written", "set MLFLOW_TRACKING_URI to a server")
        return
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", SERVER_S)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        yield Finding(
            "mlflow",
            "warning",
            f"{redact(uri)}: {first_line(error)}",
            "runs go on without it; check tracking.uri or MLFLOW_TRACKING_URI, and its user and password",
        )
        return
    yield Finding("mlflow", "ok", f"{redact(uri)} answers; whether it takes files was not tried")


def _weights(config: Config) -> Iterator[Finding]:
    """Build every network that a pipeline of this config trains as it does, and its encoder with its weights."""
    from pistoseg.graph import needed
    from pistoseg.models import encoders
    from pistoseg.pipeline import check_weights

    check_weights(config, TARGETS)
    wanted: dict[tuple[str, str | None], str] = {}
    for stage in needed(config, TARGETS):
        section = getattr(config, stage.name, None)
        if encoder := getattr(section, "encoder", None):
            if problems := list(_guarded(f"network of {stage.name}", partial(_network, config, stage.name))):
                yield from problems
                continue
            wanted.setdefault((encoder, getattr(section, "weights", None)), stage.name)
    for (encoder, weights), name in wanted.items():
        stride = 8 if encoder == encoders.RESNET38D else 32
        yield from _guarded(f"weights of {name}", lambda e=encoder, w=weights, s=stride: _encoder(e, w, s))  # type: ignore[misc]


def _no_weights() -> Iterator[Finding]:
    yield Finding(
        "weights",
        "ok",
        "not looked at: each preset and profile has its own, and none is named (add --preset, --profile or --config)",
    )


def _network(config: Config, stage: str) -> Iterator[Finding]:
    """Nothing where a stage's network can be built: its weights are what is reported."""
    from pistoseg.stages import trained

    trained.check_buildable(config, (stage,))
    yield from ()


def _encoder(encoder: str, weights: str | None, stride: int) -> Iterator[Finding]:
    from pistoseg.models import encoders

    encoders.create(encoder, weights, output_stride=stride)
    yield Finding("weights", "ok", f"{encoder}: {weights or 'untrained'}")


def _openslide() -> Iterator[Finding]:
    """Whether a slide that was just written opens, and through what."""
    import numpy as np
    import openslide
    import tifffile

    pixels = np.arange(512 * 512 * 3, dtype=np.uint32).astype(np.uint8).reshape(512, 512, 3)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "slide.tif"
        tifffile.imwrite(file, pixels, tile=(256, 256), photometric="rgb", metadata=None)
        with openslide.OpenSlide(file) as slide:
            same = np.array_equal(np.asarray(slide.read_region((0, 0), 0, (512, 512)))[..., :3], pixels)
    found = openslide.__library_version__
    if not same:
        yield Finding("openslide", "failed", f"{found} reads other pixels than were written", "reinstall openslide-bin")
    elif int(found.split(".")[0]) < 4:
        yield Finding("openslide", "warning", f"{found} has no DICOM", "pip install openslide-bin>=4")
    else:
        yield Finding("openslide", "ok", f"{found}: a slide opens; vendors' formats and DICOM")


def _ray(config: Config, workspace: str) -> Iterator[Finding]:
    import ray

    from pistoseg.graph import needed
    from pistoseg.stages import cluster, placement

    address = config.compute.address or os.environ.get("RAY_ADDRESS")
    with cluster.connected(config.compute):
        nodes = [node for node in ray.nodes() if node["Alive"]]
        cpus, gpus = cluster.cluster_cpus(), cluster.cluster_gpus()
        where = address or "a local one"
        yield Finding("ray", "ok", f"{ray.__version__}, {where}: {len(nodes)} nodes, {cpus} CPUs, {gpus} GPUs")
        yield from _nodes(nodes)
        names = tuple(stage.name for stage in needed(config, TARGETS))
        read = {"data.uri": config.data.uri, "data.validation": config.data.validation}
        with _leaving_no_folders(storage.absolute(workspace)):
            placement.check_shared(workspace, read)
        placement.check(config.model_copy(update={"compute": _impatient(config)}), names, lambda text: None)
        yield Finding("placement", "ok", "all stages find room")


def _impatient(config: Config) -> Any:
    return config.compute.model_copy(update={"wait_for_nodes": 0})


def _nodes(nodes: list[dict[str, Any]]) -> Iterator[Finding]:
    """Versions, disk and GPUs of every node, asked of a process on it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask, look = (ray.remote(num_cpus=0, max_retries=0)(task) for task in (_local_facts, _cuda_device))
    here = _local_facts()
    asked = []
    for node in nodes:
        strategy, gpus = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False), node["Resources"].get("GPU", 0)
        # Apart: a node whose GPUs are in use answers for the rest.
        answer = ask.options(scheduling_strategy=strategy).remote()
        seen = look.options(scheduling_strategy=strategy, num_gpus=min(gpus, 0.01)).remote() if gpus else None
        asked.append((node, answer, seen))
    answers = [item for _, *both in asked for item in both if item is not None]
    _, silent = ray.wait(answers, num_returns=len(answers), timeout=NODE_S)
    for node, answer, seen in asked:
        name = f"node {node['NodeManagerHostname']}"
        if answer in silent:
            yield Finding(name, "failed", f"no answer within {NODE_S:g} s", "look at the node's logs")
            continue
        try:
            facts = ray.get(answer)
            device = "" if seen is None or seen in silent else ray.get(seen)
        except ray.exceptions.RayError as error:
            yield Finding(
                name, "failed", first_line(error), "look at the node's logs; are PistoSeg and its packages there?"
            )
            continue
        yield _node(name, node["Resources"], facts, here, device, busy=seen in silent)
        if len(nodes) > 1 or facts["host"] != here["host"]:  # else it is this machine's, which was shown
            yield from _disk(name, facts)


def _node(
    name: str, resources: dict[str, float], facts: dict[str, Any], here: dict[str, Any], device: str | None, busy: bool
) -> Finding:
    """What a node that answered is like beside this machine.

    Args:
        name: of the line.
        resources: of the node, as Ray counts them.
        facts: of the node.
        here: facts of this machine.
        device: name of a GPU; empty where there is none or it did not answer, None where torch sees none.
        busy: whether its GPUs did not answer.
    """
    known = here["versions"]
    other = {key: found for key, found in facts["versions"].items() if _public(found) != _public(known[key])}
    if facts["python"] != here["python"]:
        other["python"] = facts["python"]
    if other:
        text = ", ".join(f"{key} {found}" for key, found in other.items())
        return Finding(name, "failed", f"has {text}, unlike this machine", "use one image, or one lock file, on all")
    if device is None:
        return Finding(name, "failed", "Ray counts GPUs on it, torch sees none", "install a driver for torch's CUDA")
    text = f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs, versions as here"
    if busy:
        text = f"{text}; no answer of its GPUs within {NODE_S:g} s: they may be in use"
        return Finding(name, "warning", text, "ask again when the runs on it have ended")
    return Finding(name, "ok", f"{text}{', ' + device if device else ''}")


def _public(version: str) -> str:
    """A version without its build: a node without GPUs may have torch 2.14.1+cpu beside 2.14.1+cu130."""
    return version.partition("+")[0]


def _cuda_device() -> str | None:
    """Name of the GPU that torch sees, None where it sees none; runs in a Ray task."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
