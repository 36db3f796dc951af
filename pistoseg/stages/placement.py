"""Whether the cluster can give what a run asks for: said at once, where Ray would wait for ever."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pistoseg import storage
from pistoseg.config import ComputeConfig, Config
from pistoseg.errors import PistoSegError, UnavailableError
from pistoseg.stages import cluster
from pistoseg.training.stream import SAMPLE_CPUS
from pistoseg.training.trainer import worker_resources

TRAINED = ("preliminary", "classifier", "subcategories", "refiner", "precise")
READING = ("patches", "validation", "synthesis")
POLL_S = 2.0
PROBE_S = 120.0
"""How long a node may take to say whether it sees a folder; it may have to start a process for that."""
SHARED = "give a URI, e.g. s3://bucket/folder, or a folder that all nodes mount at the same path"

Resources = Mapping[str, float]


def check(config: Config, stages: Sequence[str], say: Callable[[str], None]) -> None:
    """Refuse stages that the cluster's nodes can't run, after waiting `compute.wait_for_nodes` for an autoscaler.

    Args:
        config: of the run.
        stages: names of those that are to be computed.
        say: told once, before waiting.
    Raises:
        UnavailableError: naming what is missing.
    """
    if ray.is_initialized():
        _wait(lambda: _missing(config, stages, _nodes()), config.compute.wait_for_nodes, say)


def check_networks(compute: ComputeConfig, networks: int, say: Callable[[str], None]) -> None:
    """Wait `compute.wait_for_nodes` for nodes with room for networks; where it is 0 they share what is there.

    Args:
        compute: what the networks may use; only with `cuda` each is given a GPU.
        networks: at a time.
        say: told once, before waiting.
    Raises:
        PistoSegError: the nodes did not come.
    """
    bundle = {"GPU": 1.0, "CPU": 1.0} if compute.device == "cuda" else {"CPU": 1.0}

    def missing() -> tuple[PistoSegError | None, list[dict[str, float]]]:
        nodes, bundles = _nodes(), [bundle] * networks
        if fits(bundles, nodes):
            return None, []
        reason = f"{networks} networks need {_each(bundle)} each, and {_has(nodes)}"
        remedy = "give a longer --wait-for-nodes" + (", or fewer --workers" if networks > 1 else "")
        return PistoSegError(reason, field="--workers" if networks > 1 else "--device", remedy=remedy), bundles

    if compute.wait_for_nodes:
        _wait(missing, compute.wait_for_nodes, say)


def _wait(
    missing: Callable[[], tuple[PistoSegError | None, list[dict[str, float]]]], seconds: int, say: Callable[[str], None]
) -> None:
    """Ask an autoscaler for what is missing, until nothing is or the time is up."""
    deadline, told = time.monotonic() + seconds, False
    try:
        while True:
            problem, bundles = missing()
            if problem is None:
                return
            if time.monotonic() >= deadline:
                raise problem
            if not told:
                say(f"waiting up to {seconds} s for nodes: {problem.reason}")
            told = True
            _request(bundles)
            time.sleep(POLL_S)
    finally:
        if told:
            _request([])  # what is placed now keeps its nodes by itself


def _request(bundles: list[dict[str, float]]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{key: int(-(-value // 1)) for key, value in bundle.items()} for bundle in bundles])


def _nodes() -> list[dict[str, float]]:
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _missing(
    config: Config, stages: Sequence[str], nodes: Sequence[Resources]
) -> tuple[PistoSegError | None, list[dict[str, float]]]:
    """The first thing that the nodes can't hold, and all that it needs."""
    compute = config.compute
    has = _has(nodes)
    if compute.device == "cuda" and stages and not _count(nodes, "GPU"):
        problem = _error(f"cuda needs a GPU, and {has}", "device", "set compute.device=auto, or start a node with one")
        return problem, [{"GPU": 1, "CPU": 1}]
    if any(stage in READING for stage in stages):
        bundles = [{"CPU": 1.0}] * max(1, compute.workers)
        if not fits(bundles, nodes):
            remedy = "set compute.workers=0 for one a CPU" if compute.workers else "start a node with a CPU"
            return _error(f"{len(bundles)} workers need a CPU each, and {has}", "workers", remedy), bundles
    if any(stage in TRAINED for stage in stages):
        bundles = _training(compute)
        if not fits(bundles, nodes):
            needs = f"need {_each(bundles[0])} each, beside one that makes samples"
            reason = f"{compute.train_workers} training workers {needs}, and {has}"
            return _error(reason, "train_workers", "set compute.train_workers to fewer, or start more nodes"), bundles
    return None, []


def _training(compute: ComputeConfig) -> list[dict[str, float]]:
    """What a training can't do without: its workers, and an actor that makes samples."""
    given = cluster.training_resources(compute)
    return [worker_resources(given["threads"], given["gpus"])] * compute.train_workers + [{"CPU": SAMPLE_CPUS}]


def gpu_trainings(compute: ComputeConfig) -> int:
    """Trainings that find room on the cluster's GPUs, and on the CPUs beside them, at the same time."""
    nodes, training = _nodes(), _training(compute)
    most = cluster.cluster_gpus() // compute.train_workers
    return next((count for count in range(most, 0, -1) if fits(training * count, nodes)), 0)


def fits(bundles: Sequence[Resources], nodes: Sequence[Resources]) -> bool:
    """Whether bundles of resources, each on one node, have room on empty nodes: the largest are placed first."""
    free = [dict(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda item: (item.get("GPU", 0), item.get("CPU", 0)), reverse=True):
        wanted = bundle.items()
        room = [node for node in free if all(node.get(key, 0) + 1e-6 >= value for key, value in wanted)]
        if not room:
            return False
        # What needs no GPU goes where there is none.
        best = min(room, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)))
        for key, value in wanted:
            best[key] -= value
    return True


def _count(nodes: Sequence[Resources], key: str) -> int:
    return int(sum(node.get(key, 0) for node in nodes))


def _has(nodes: Sequence[Resources]) -> str:
    return f"the cluster has {_count(nodes, 'CPU')} CPUs and {_count(nodes, 'GPU')} GPUs on {len(nodes)} nodes"


def _each(bundle: Resources) -> str:
    return " and ".join(f"{value:g} {key}" for key, value in bundle.items())


def _error(reason: str, field: str, remedy: str) -> UnavailableError:
    return UnavailableError(reason, field=f"compute.{field}", remedy=remedy)


def local_places(read: Mapping[str, str | None]) -> dict[str, str]:
    """Absolute paths of what is on this machine's disks, by what it is called in messages.

    Args:
        read: path or URI by name; None and what is not there are passed over.
    """
    local = {name: storage.absolute(uri) for name, uri in read.items() if uri and storage.is_local(uri)}
    return {name: path for name, path in local.items() if os.path.exists(path)}


def require_seen(places: Mapping[str, str]) -> None:
    """Refuse to go on in a process on a node that does not see what the driver's does.

    Args:
        places: `local_places` of the driver.
    Raises:
        UnavailableError: naming this node.
    """
    for name in _unseen(places):
        raise _not_seen(socket.gethostname(), places[name], name)


def check_shared(written: str, read: Mapping[str, str | None]) -> None:
    """Refuse local paths that not all nodes of the cluster see.

    Args:
        written: path or URI of the folder that the run writes.
        read: path or URI by what it is called in the message; None and what is not there are passed over.
    Raises:
        UnavailableError: naming a node that does not see one, or that does not answer in time.
    """
    if not ray.is_initialized():
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]
    places = local_places(read)
    target = storage.local_path(storage.absolute(written))
    if len(nodes) < 2 or not (places or target):
        return
    with _probe(target) as probe:
        seen = places | ({str(target): probe} if probe else {})
        look = ray.remote(num_cpus=0, max_retries=0)(_unseen)
        asked = []  # several nodes may have one host's name
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked.append((node["NodeManagerHostname"], look.options(scheduling_strategy=there).remote(seen)))
        for host, answer in asked:
            for name in _answer(host, answer):
                raise _not_seen(host, places.get(name, name), name if name in places else None)


def _answer(host: str, answer: ray.ObjectRef[list[str]]) -> list[str]:
    """What a node does not see."""
    try:
        return ray.get(answer, timeout=PROBE_S)
    except GetTimeoutError as error:
        raise UnavailableError(
            f"node {host} did not say in {PROBE_S:.0f} s whether it sees the folders",
            remedy="look with `ray status` whether it is overloaded or lost; stop it, or try again when it answers",
        ) from error


@contextmanager
def _probe(folder: Path | None) -> Iterator[str | None]:
    """A new file in a folder, which no other machine has by chance in one of the same name."""
    if folder is None:
        yield None
        return
    probe = folder / f".{uuid.uuid4().hex}.part"
    storage.write_bytes(str(probe), b"")
    try:
        yield str(probe)
    finally:
        probe.unlink()


def _unseen(probes: Mapping[str, str]) -> list[str]:
    return [name for name, path in probes.items() if not os.path.exists(path)]


def _not_seen(host: str, path: str, name: str | None) -> UnavailableError:
    return UnavailableError(f"node {host} does not see it", file=path, field=name, remedy=SHARED)
