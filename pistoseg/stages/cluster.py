"""Ray: connecting to it, and what it can run at once."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import ray

from pistoseg import object_store
from pistoseg.config import ComputeConfig
from pistoseg.errors import PistoSegError, UnavailableError, explained

ANSWER_S = 10.0
CGROUP = "/sys/fs/cgroup"
MOST_STARTING = 16
"""Worker processes that a local Ray starts at a time."""
OBJECT_STORE_BYTES = 4 << 30
"""Largest object store of a local Ray; shared memory is taken only as it is used."""
_FOR_RAY = {
    # A run must not look for newer versions of Ray or ask who its user is.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # For `memory.keep_freed_memory`; only a local Ray has this process's variables.
    "MALLOC_ARENA_MAX": "1",
    # Ray Train looks every 2 s whether a training has ended.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
"""Environment of this process, unless it says otherwise."""
_FOR_LOCAL_RAY = {
    # Ray Data's own pools make the core worker warn about their constructor arguments on every start (ray#53727). Of a
    # cluster's driver Ray would print the level itself.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # An actor that watches for cloud nodes about to be taken away; this machine is none.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # For Ray's developers, for its dashboard, which is not started, and for its list of tasks.
    "RAY_event_stats": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    # A process looks through all logs ten times a second, for a terminal that does not show them: with these it looks
    # for the first ones after a year.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "31536000",
}
"""The same where Ray is started here, for its own processes to leave the CPUs to ours: beside a training all of them
take 12 % of one, and 16 % without the last four."""


@contextmanager
def connected(config: ComputeConfig) -> Iterator[None]:
    """Connect to the cluster of the config or of RAY_ADDRESS, else start a local Ray for the block.

    Raises:
        PistoSegError: when there is no such cluster, and in place of an error of the block that comes from one, or from
            a full disk, on whatever node.
    """
    if ray.is_initialized():
        yield
        return
    try:
        with _started(config):
            yield
    except Exception as error:
        known = explained(error)
        if known is None or known is error:
            raise
        raise known from error


@contextmanager
def _started(config: ComputeConfig) -> Iterator[None]:
    for name, value in _FOR_RAY.items():
        os.environ.setdefault(name, value)
    # On few CPUs the actors of a training are more than Ray expects at once, and it says so on the terminal.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(MOST_STARTING, available_cpus())))
    address = config.address or os.environ.get("RAY_ADDRESS")
    if not address:
        for name, value in _FOR_LOCAL_RAY.items():
            os.environ.setdefault(name, value)
    local: dict[str, Any] = (
        {}
        if address
        else {"num_cpus": available_cpus(), "object_store_memory": _object_store(), "include_dashboard": False}
    )
    if address and (settings := object_store.forwarded()):
        local = {"runtime_env": {"env_vars": settings}}  # a local Ray has this process's variables
    # Without an address Ray would join a cluster that someone else started on this machine, and refuse `local`.
    if address:
        require_ray(address)
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        # Of a cluster that ends the connection, Ray's C++ code says why before it ends the process.
        with nullcontext() if address else _quiet():
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if not address:
            raise
        raise _unreachable(address, error) from error
    except SystemExit:
        if not callable(on_term):
            raise
        raise KeyboardInterrupt from None  # SIGTERM, which meanwhile is Ray's
    finally:
        _restore(on_term)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    for name in ("ray", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised, too
    # `TRIES` has no other way into Ray Data. Ray 2.64 is to have none at all, and to be refused until it is looked at.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", DeprecationWarning)
    try:
        yield
    finally:
        ray.shutdown()


def _restore(on_term: Any) -> None:
    """Put a handler of SIGTERM back: Ray's would end this process at once, with a stack of C++."""
    if callable(on_term) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)


def require_ray(address: str) -> None:
    """Refuse an address where nobody speaks gRPC, as Ray does.

    Where nobody listens Ray would try for minutes, then end the process without a word; where another server does,
    such as its own dashboard, it would wait for ever.
    """
    if address.startswith(("http://", "https://")):
        raise PistoSegError(
            "is the address of a dashboard",
            file=address,
            field="compute.address",
            remedy="use --submit with it, or give Ray's own address, e.g. HOST:6379",
        )
    host, _, port = address.partition("://")[2].rpartition(":") if "://" in address else address.rpartition(":")
    if not host or not port.isdigit():
        return  # `auto` and what other schedulers understand
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_S) as connection:
            # With TLS a server says nothing to a greeting in the clear.
            if os.environ.get("RAY_USE_TLS", "").lower() not in ("1", "true"):
                _greet(connection)
    except OSError as error:
        raise _unreachable(address, error) from error


def _greet(connection: socket.socket) -> None:
    """Open an HTTP/2 connection, on which gRPC runs: its server's first frame is of the kind SETTINGS (RFC 9113, 3.4).

    Raises:
        OSError: the other side is not such a server.
    """
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
    with connection.makefile("rb") as answer:
        frame = answer.read(4)  # three bytes of length, and the kind
    if frame[3:] != b"\4":
        raise ConnectionError("something else than Ray listens there")


def _unreachable(address: str, error: Exception) -> PistoSegError:
    return PistoSegError(
        f"can't be connected to ({(str(error).splitlines() or [type(error).__name__])[0]})",
        file=address,
        field="compute.address",
        remedy="see that the cluster runs, with these versions of Ray and Python, and that RAY_AUTH_MODE and "
        "RAY_AUTH_TOKEN are its own; or use --submit",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Ray's C++ code says about its own settings out of the terminal; its errors are exceptions."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


_pipelines = 1


def share_cluster(pipelines: int) -> None:
    """Tell this process that so many pipelines run on the cluster at the same time: each takes its share."""
    global _pipelines
    _pipelines = max(1, pipelines)


def available_cpus() -> int:
    """CPUs this process may use: its affinity and its cgroup's quota, not what the machine has."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _cgroup("cpu.max") or _cgroup("cpu/cpu.cfs_quota_us") + _cgroup("cpu/cpu.cfs_period_us")
    if len(limit) == 2 and min(limit) > 0:  # version 1 says -1 where there is none
        count = min(count, max(1, round(limit[0] / limit[1])))
    return max(1, count)


def available_memory() -> int:
    """Bytes of memory that this process may use: its cgroup's limit, at the most what the machine has."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = _cgroup("memory.max") + _cgroup("memory/memory.limit_in_bytes")
    return min([memory, *(limit for limit in limits if limit > 0)])


def _cgroup(name: str) -> tuple[int, ...]:
    """Numbers of a file of the control group, version 2 or 1; empty where there is none or it says `max`."""
    try:
        with open(f"{CGROUP}/{name}") as file:
            return tuple(int(word) for word in file.read().split())
    except (OSError, ValueError):
        return ()


def _object_store() -> int:
    return min(OBJECT_STORE_BYTES, available_memory() // 4)


def cluster_cpus() -> int:
    """CPUs of the cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def cluster_gpus() -> int:
    """GPUs of the cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


def require_cuda() -> None:
    """Refuse to go on in a process that Ray gave a GPU where torch sees none: a network would run on the CPU instead.

    Raises:
        UnavailableError: names the node.
    """
    import torch

    if not torch.cuda.is_available():
        raise UnavailableError(
            f"Ray counts GPUs on {socket.gethostname()}, torch sees none",
            field="device",
            remedy="install a driver for torch's CUDA there (`pistoseg doctor` looks at every node), or use the "
            "device cpu",
        )


def cpu_pool(config: ComputeConfig) -> int:
    """Actors for CPU work: `compute.workers`, else one a CPU."""
    return config.workers or max(1, cluster_cpus() // _pipelines)


def node_threads() -> int:
    """Threads for the one network process of a CPU node; a head without CPUs runs none."""
    cpus = [count for node in ray.nodes() if node["Alive"] and (count := node["Resources"].get("CPU", 0)) >= 1]
    on_a_node = -(-_pipelines // max(1, len(cpus)))
    return max(1, int(min(cpus, default=1)) // on_a_node)


def network_pool(config: ComputeConfig) -> tuple[int, dict[str, float]]:
    """Actors that hold a network, and what Ray sets aside for each: a GPU, or a node's CPUs but one.

    One CPU stays free: whatever else holds a fraction of one would make an actor that wants all of them wait for ever.
    """
    gpus = 0 if config.device == "cpu" else cluster_gpus()
    if config.device == "cuda" and not gpus:
        remedy = "use auto, start a node with one, or wait for an autoscaler: --wait-for-nodes of segment, "
        remedy += "compute.wait_for_nodes of trainings"
        raise UnavailableError("the cluster has no GPU", field="device", remedy=remedy)
    if gpus:
        return max(1, gpus // _pipelines), {"num_gpus": 1, "num_cpus": 1}
    nodes = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1)
    return max(1, nodes // _pipelines), {"num_cpus": max(1, node_threads() - 1)}


def training_resources(config: ComputeConfig) -> dict[str, Any]:
    """What `training.train` may use: actors that make samples, threads of a CPU worker, and whether there are GPUs."""
    # One actor feeds many training steps on CPUs; GPUs eat as much as the CPUs make.
    actors = config.workers or (max(1, cluster_cpus() // _pipelines) if cluster_gpus() else 1)
    threads = max(1, node_threads() // config.train_workers)
    return {"actors": actors, "threads": threads, "gpus": config.device != "cpu" and cluster_gpus() > 0}
