"""The C library's allocator, told to keep what training frees and asks for again a moment later."""

from __future__ import annotations

import ctypes
import functools

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT_BYTES = 1 << 30
MAPPED_FROM_BYTES = 32 << 20  # the most that glibc accepts


@functools.cache
def keep_freed_memory() -> None:
    """Lets the process keep up to 1 GiB that it has freed, once; does nothing where the C library is not glibc.

    Each segment frees its activations, and glibc hands them back to the system, which clears the pages again for the
    next segment: on a CPU 4 to 6 % of the time of training (tools/bench_cpu.py).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
