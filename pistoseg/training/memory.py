"""Memory of trainings on CPUs."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
MOST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where its C library is glibc.

    A step frees all activations, and glibc gives tensors of that size back to the kernel, which clears their pages
    again for the next step: hundreds of thousands of page faults. The process keeps its peak until it ends. Threads
    other than the main one need `MALLOC_ARENA_MAX=1` in the environment as well; `stages/cluster.py` sets it for a
    local Ray.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, MOST)
