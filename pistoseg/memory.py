"""What becomes of the memory that a network on a CPU frees."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
MOST = 2**31 - 1
USUAL = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}
"""What glibc's own rule comes to in a process that has freed large blocks."""

_lock = threading.Lock()
_keeping = 0


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """While the block runs, this process keeps what it frees, where its C library is glibc; then the kernel gets it.

    A forward pass frees its activations one after the other, and glibc gives tensors of that size back to the kernel,
    which clears their pages again for the next ones: tens of thousands of page faults for a tile. Blocks may overlap;
    with the last of them that ends, the kernel gets what is free. Threads other than the main one need
    `MALLOC_ARENA_MAX=1` in the environment as well.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    _count(libc, 1)
    try:
        yield
    finally:
        if not _count(libc, -1):
            give_back()


def give_back() -> None:
    """Let the kernel have what is free in this process, also within such a block; does nothing without glibc."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _count(libc: ctypes.CDLL, change: int) -> int:
    """One block more or less, and how many are open: the first sets the C library, the last sets it back."""
    global _keeping
    with _lock:
        before, _keeping = _keeping, _keeping + change
        if not before:
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, MOST)
        elif not _keeping:
            for option, value in USUAL.items():
                libc.mallopt(option, value)
        return _keeping
