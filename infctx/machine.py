"""This machine: its devices, how much memory they and the host have and a process has taken, and its allocator."""

from __future__ import annotations

import ctypes
import functools
import re
import resource
from pathlib import Path

import psutil
import torch

from infctx.environment import local_rank
from infctx.errors import InputError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT_BYTES = 1 << 30
MAPPED_FROM_BYTES = 32 << 20  # the most that glibc accepts


def pick_device(device: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" stands for here; raises InputError where there is no such GPU."""
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise InputError(f"device cuda: torch {torch.__version__} finds no GPU here; choose cpu or auto")
    return torch.device("cuda" if found and device != "cpu" else "cpu")


def own_device(device: str, count: int) -> torch.device:
    """The same for this rank, of a run that has `count` devices on each node."""
    picked, number = pick_device(device), local_rank()
    if picked.type == "cuda" and count > 1 and number is not None:
        return torch.device("cuda", min(number, torch.cuda.device_count() - 1))
    return picked


def device_memory(device_type: str, count: int = 1) -> int | None:
    """Memory of the smallest of the first `count` GPUs here, in bytes; None for a CPU, or where there is no GPU."""
    present = torch.cuda.device_count() if device_type == "cuda" and torch.cuda.is_available() else 0
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(min(count, present))]
    return min(sizes, default=None)


def free_device_memory(device: torch.device) -> int:
    """Bytes that a GPU has left; 0 for a CPU, whose memory is the host's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def host_memory() -> int:
    """Bytes of memory that this machine has."""
    return psutil.virtual_memory().total


def free_host_memory() -> int:
    """Bytes of memory that this machine has left, what the system would give back counted in."""
    return psutil.virtual_memory().available


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU, or the largest resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if found:  # getrusage's figure also counts the parent before the exec
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


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
