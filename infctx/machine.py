"""Facts about this machine: its devices, the memory of each and of the host, a process's peak, the allocator."""

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
    """Returns the device that "auto", "cpu" or "cuda" means here; raises InputError if there is no such GPU."""
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise InputError(f"device cuda: torch {torch.__version__} finds no GPU here; choose cpu or auto")
    return torch.device("cuda" if found and device != "cpu" else "cpu")


def own_device(device: str, count: int) -> torch.device:
    """Returns this rank's device, in a run with `count` devices on each node."""
    picked, number = pick_device(device), local_rank()
    if picked.type == "cuda" and count > 1 and number is not None:
        return torch.device("cuda", min(number, torch.cuda.device_count() - 1))
    return picked


def device_memory(device_type: str, count: int = 1) -> int | None:
    """Returns the memory in bytes of the smallest of the first `count` GPUs; None for a CPU or without a GPU."""
    present = torch.cuda.device_count() if device_type == "cuda" and torch.cuda.is_available() else 0
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(min(count, present))]
    return min(sizes, default=None)


def free_device_memory(device: torch.device) -> int:
    """Returns a GPU's free bytes; 0 for a CPU, whose memory is the host's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def host_memory() -> int:
    """Returns this machine's memory in bytes."""
    return psutil.virtual_memory().total


def free_host_memory() -> int:
    """Returns this machine's available bytes, including caches that the system would drop."""
    return psutil.virtual_memory().available


def peak_memory(device: torch.device) -> int:
    """Returns peak bytes: the most allocated on a GPU, or the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    if found:  # getrusage's figure also counts the parent before the exec
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


@functools.cache
def keep_freed_memory() -> None:
    """Lets the process keep up to 1 GiB that it has freed; does nothing if the C library is not glibc.

    Each segment frees its activations.  By default glibc returns them to the system, which clears the pages again for
    the next segment; on a CPU that costs 4 to 6 % of training time (`infctx bench`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
