"""Runs a kernel that numba compiled on torch's number of threads: each takes a range of the work."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

BLOCK = 64
"""Columns in a block, if that is what kernels share out: whole vectors, so no two threads write to the same one."""


def share_out(function: Callable[..., None], arguments: Sequence[Any], pieces: int, threads: int) -> None:
    """Calls function(*arguments, first, last) for ranges of the pieces, the first of them on this thread."""
    if pieces == 0:
        return
    threads = max(1, min(threads, pieces))
    bounds = [pieces * n // threads for n in range(threads + 1)]
    others = [_pool(os.getpid()).submit(function, *arguments, *bounds[n : n + 2]) for n in range(1, threads)]
    function(*arguments, *bounds[:2])
    for other in others:
        other.result()


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Returns the process's pool: threads do not survive a fork.  It starts only as many threads as it has work for."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="infctx-wkv")
