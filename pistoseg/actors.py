"""Ray actors that a run must not lose before its driver."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def start_here(kind: type) -> Any:
    """Start an actor without a CPU of its own on this process's node; elsewhere, another node's loss would end the run.

    Args:
        kind: class without constructor arguments.

    Returns:
        The actor's handle.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(kind).remote()
