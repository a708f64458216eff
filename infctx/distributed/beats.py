"""Beats: the status that each rank sends the others once a second, through a store that rank 0 hosts."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore

CONNECT_SECONDS = 60.0
RECONNECT_SECONDS = 5.0


def open_watch_store(rank: int, world_size: int) -> TCPStore:
    """Opens the store for a Watchdog, on a free port of rank 0's machine; every rank calls it after init_process_group.

    Raises RuntimeError if rank 0 ($MASTER_ADDR) cannot be reached within CONNECT_SECONDS.
    """
    host, timeout = os.environ.get("MASTER_ADDR", "127.0.0.1"), timedelta(seconds=CONNECT_SECONDS)
    hosted = TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False) if rank == 0 else None
    port: list[Any] = [hosted.port if hosted else None]
    if world_size > 1:
        dist.broadcast_object_list(port, src=0)
    return hosted or TCPStore(host, port[0], is_master=False, timeout=timeout, wait_for_workers=False)


@dataclass(frozen=True)
class Beat:
    """A rank's status: where it is, whether and why it left, and whether it has reported a rank that is gone.

    `count` changes with every beat.
    """

    count: int = 0
    step: int | None = None
    segment: int | None = None
    doing: str = ""
    marks: int = 0
    """Marks so far in this step; they order the ranks within it."""
    host: str = ""
    address: Sequence | None = None
    """A socket that listens as long as the process lives."""
    left: bool = False
    reason: str | None = None
    verdict: tuple[int, ...] = ()
    """Ranks that it found gone, in the order in which they went: it is ending."""
    reported: bool = False

    @property
    def place(self) -> str:
        """Describes where the rank is."""
        doing = f" ({self.doing})" if self.doing else ""
        if not self.step:
            return f"before its first step{doing}"
        segment = "" if self.segment is None else f", segment {self.segment}"
        return f"in step {self.step}{segment}{doing}"


class Exchange:
    """A thread that writes this rank's beat to the store and reads the others', once a second or when woken.

    beats:   the newest beat of each rank seen so far
    written: this rank's newest beat in the store
    answers: the number of exchanges so far
    broken:  whether the last exchange raised
    """

    def __init__(self, store: TCPStore, rank: int, others: list[int], mine: Beat, seconds: float) -> None:
        self.store, self.rank, self.others, self.mine, self.seconds = store, rank, others, mine, seconds
        self.beats: dict[int, Beat] = {}
        self.answers, self.broken, self.written = 0, False, Beat()
        self.wake, self._lock, self._stopping = threading.Event(), threading.Lock(), False
        self.thread = threading.Thread(target=self._run, name="watchdog-exchange", daemon=True)
        store.set_timeout(timedelta(days=1))  # the judge notices an operation that hangs; torch should not log it

    def update(self, **changes: Any) -> None:
        """Changes this rank's next beats."""
        with self._lock:
            self.mine = replace(self.mine, **changes)

    def stop(self) -> None:
        """Ends the thread, unless it hangs in the store."""
        self._stopping = True
        self.wake.set()
        if self.thread.is_alive():
            self.thread.join(RECONNECT_SECONDS)

    def _run(self) -> None:
        while not self._stopping:
            try:
                if self.broken:
                    self._reconnect()
                self._exchange()
            except Exception:  # from the store: its host is gone
                self.broken = True
            self.wake.wait(self.seconds)
            self.wake.clear()

    def _exchange(self) -> None:
        self.update(count=self.mine.count + 1)
        mine = self.mine
        self.store.set(_key(self.rank), json.dumps(asdict(mine)))
        here = [rank for rank in self.others if rank in self.beats or self.store.check([_key(rank)])]
        found = self.store.multi_get([_key(rank) for rank in here]) if here else []
        self.beats = {rank: Beat(**json.loads(text)) for rank, text in zip(here, found, strict=True)}
        self.written, self.broken = mine, False
        self.answers += 1

    def _reconnect(self) -> None:
        host, port = self.store.host, self.store.port
        if refusal := knock((host, port)):  # a store would print it on standard error
            raise refusal
        timeout = timedelta(seconds=RECONNECT_SECONDS)
        self.store = TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        self.store.set_timeout(timedelta(days=1))


def _key(rank: int) -> str:
    return f"beat/{rank}"


def listen(store: TCPStore) -> socket.socket | None:
    """Opens a socket that others can knock at; returns None if there is no network."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as way:
            way.connect(target)  # sends nothing, but picks this machine's address for that route
            address = way.getsockname()
        return socket.create_server((address[0], 0), family=family)
    except OSError:
        return None


def knock(address: Sequence | None) -> OSError | None:
    """Returns None if something listens there, even in a busy process; ConnectionRefusedError if it is gone."""
    if address is None:
        return OSError("no address")
    try:
        socket.create_connection(tuple(address), timeout=1).close()
    except OSError as error:
        return error
    return None
