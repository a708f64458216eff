"""A segment as one layer sees it: where documents start in it, and the state they start from.

In: the layer's tensors and its memory before the segment; out: results, and the memory after the segment.
`LayerSegment` is for a rank that has the whole segment; when ranks share its time,
`infctx.recurrence.time_parallel.SharedLayerSegment` takes its place.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from infctx.ops.wkv import wkv, wkv7
from infctx.recurrence.token_shift import token_shift

Shift = Literal["time_shift", "channel_shift"]


class LayerState(NamedTuple):
    """The memory of one layer.

    wkv:           (B, H, N, N) the matrices, key channel by value channel
    time_shift:    (B, D) last normalised input of the time mix
    channel_shift: (B, D) last normalised input of the channel mix
    """

    wkv: Tensor
    time_shift: Tensor
    channel_shift: Tensor


class LayerSegment:
    """A whole segment on one rank.

    starts:  (B, ceil(T / 16)) bool: a document starts at this 16-token boundary; None if none does
    initial: the state that documents start from, None for zeros
    """

    def __init__(self, starts: Tensor | None = None, initial: LayerState | None = None) -> None:
        self.starts = starts
        self.initial: LayerState | tuple[None, None, None] = initial or (None, None, None)

    def token_shift(self, shift: Shift, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x (B, T, D) one token earlier, and the last vector to pass on.

        last: (B, D) the vector before the segment
        """
        return token_shift(x, last, self.starts, self.initial_shift(shift))

    def wkv(
        self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        """Returns `infctx.wkv` of the segment: y (B, T, H, N) and the state after it (B, H, N, N)."""
        return wkv(r, k, v, w, u, state, self.starts, self.initial[0], backend)

    # Eight parameters: those of the op that a layer has.
    def wkv7(
        self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        """Returns `infctx.wkv7` of the segment: y (B, T, H, N) and the state after it (B, H, N, N)."""
        return wkv7(r, w, k, v, a, b, state, self.starts, self.initial[0], backend)

    def initial_shift(self, shift: Shift) -> Tensor | None:
        """Returns the vector (B, D) that documents see before their first token; None for zeros."""
        return self.initial[LayerState._fields.index(shift)]
