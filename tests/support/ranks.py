"""Real ranks for tests: processes with a torch process group, and their results."""

import os
import socket
import struct
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from forked import fork_server

TCPI_BYTES_RECEIVED = 128
"""Offset of tcpi_bytes_received in struct tcp_info (linux/tcp.h)."""


def run_ranks(count, function, *arguments, folder):
    """Runs function(*arguments) on each of `count` ranks of a gloo process group; returns their results by rank.

    function must be importable: at the top of a module.  Its results go through `torch.save` into `folder`.
    """
    port = free_port()
    fork_server()
    multiprocessing.start_processes(
        _rank, (count, port, function, arguments, str(folder)), count, join=True, start_method="forkserver"
    )
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(count)]


def bytes_received():
    """Returns the bytes received over all TCP connections of this process, as the kernel counts them (Linux)."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(descriptor))) as connection:
                information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # not TCP, or closed by now
            continue
        total += struct.unpack_from("=Q", information, TCPI_BYTES_RECEIVED)[0]
    return total


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _rank(rank, count, port, function, arguments, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    dist.init_process_group("gloo", rank=rank, world_size=count)
    try:
        torch.save(function(*arguments), f"{folder}/rank-{rank}.pt")
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the other ranks may wait for this one in a collective
    dist.destroy_process_group()
