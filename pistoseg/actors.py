"""What all processes have in common that Ray starts for a run, and those that a run must not lose before its driver."""

from __future__ import annotations

import atexit
import signal
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

TRIES = 4
"""How often Ray Data begins a piece of work whose process, or node, dies; of itself it would go on for ever, and say
nothing. A node that is taken away with notice counts as no try."""
RESTARTS = 20
"""How often in all Ray Data starts an actor whose process dies, whatever it was at: one that can't start must end."""
EXIT_S = 30
"""How long the exit of a process may take."""


def start_here(kind: type) -> Any:
    """Start an actor without a CPU of its own on this process's node; elsewhere, another node's loss would end the run.

    Args:
        kind: class without constructor arguments.

    Returns:
        The actor's handle.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(kind).remote()


def exit_in_time(seconds: int = EXIT_S) -> None:
    """Have the kernel end this process if its exit takes longer; called in every process that holds much.

    Now and then Ray's core worker waits for itself as it is taken apart (2.60.0: a message is left in its event loop
    which, as the loop is destroyed, wants to post another one to it). Python has ended by then, so that nothing but the
    kernel could end the process, and it keeps its memory, and a GPU's, for ever.

    Args:
        seconds: from the moment at which Python begins to end.
    """
    atexit.register(_set_alarm, seconds)


def _set_alarm(seconds: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
