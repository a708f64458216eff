"""Seams: the states that a window keeps between its segments, on the device or in host memory."""

from __future__ import annotations

import torch
from torch import Tensor

from infctx.errors import InputError
from infctx.model.state import State
from infctx.recurrence.time_parallel import Received

SEAM_STORES = ("auto", "device", "host")


class Seams:
    """The states before some segments, in one block of device or host memory (pinned for a GPU).  When ranks share
    time, also the values that other ranks sent in these segments.

    Copies to and from pinned memory are queued on the current stream, which keeps them in order.
    """

    def __init__(self, segments: range, like: State, store: str = "auto") -> None:
        self.segments, self.device = segments, like.wkv.device
        if store not in SEAM_STORES:
            raise InputError(f"seam_store: {store!r} is not known; choose {', '.join(SEAM_STORES)}")
        self.on_host = self.device.type != "cpu" and store != "device"
        self.states = State(*(self._block(part) for part in like))
        self.received: dict[str, Tensor] = {}
        self.with_received: set[int] = set()

    def put(self, index: int, state: State) -> None:
        """Keeps the state before a segment."""
        for block, part in zip(self.states, state, strict=True):
            block[index - self.segments[0]].copy_(part.detach(), non_blocking=True)

    def get(self, index: int) -> State:
        """Returns the state before a segment."""
        return State(*(self._fetch(block, index) for block in self.states))

    def put_received(self, index: int, received: Received) -> None:
        """Keeps the values received during a segment."""
        for name, part in received.stacked().items():
            if name not in self.received:
                self.received[name] = self._block(part)
            self.received[name][index - self.segments[0]].copy_(part, non_blocking=True)
        if received.layers:
            self.with_received.add(index)

    def get_received(self, index: int) -> Received:
        """Returns the values received during a segment; empty if there are none."""
        if index not in self.with_received:
            return Received()
        return Received.of_stacked({name: self._fetch(block, index) for name, block in self.received.items()})

    def _block(self, like: Tensor) -> Tensor:
        shape = (len(self.segments), *like.shape)
        if self.on_host:
            return torch.empty(shape, dtype=like.dtype, pin_memory=self.device.type == "cuda")
        return torch.empty(shape, dtype=like.dtype, device=self.device)

    def _fetch(self, block: Tensor, index: int) -> Tensor:
        return block[index - self.segments[0]].to(self.device, non_blocking=True)
