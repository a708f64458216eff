"""Time over ranks: each rank has a slice of every segment, and the recurrence continues across them, gradient included.

A slice turns the incoming state S into kept * S + added.  `kept` is exp of its sum of log decays for each key channel
(zero if a document starts in it); in RWKV-7 it is a matrix (N, N), and the products below are those of matrices.
`added` is the state that it reaches from zeros.  One all-gather gives every rank both for every slice, and each rank
computes the states before its own slice and after the last one:

    S_0 = state of the segment before;    S_(p+1) = kept_p * S_p + added_p                (p = 0 .. P - 1)

Backward, g_p is the gradient that slice p alone gives its incoming state (one all-gather), and G_P is the gradient of
the state after the segment:

    G_p = g_p + kept_p^T * G_(p+1);       d added_p = G_(p+1);         d kept_p = S_p . G_(p+1), over value channels

The token shift gets the last vector of the previous slice and returns its gradient.

The states before and after the segment are the same on every rank, bit for bit.  So are their gradients: every rank
holds them whole, and they are not summed over ranks.  Only gradients that depend on a rank's own tokens, such as those
of weights, are.  So windows, carries and checkpoints need not know about any of this.

Received over the wire by each rank for a layer, with activations of s bytes:
    forward   (P - 1) B (4 H N (N + 1) + 2 D s) bytes;        backward   (P - 1) B (4 H N N + 2 D s) bytes
(RWKV-7: N + N for N + 1) and nothing when a forward pass is recomputed: `Received` keeps the values that came in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from infctx.ops.wkv import wkv, wkv7
from infctx.recurrence.layer_segment import LayerSegment, LayerState, Shift
from infctx.recurrence.token_shift import token_shift

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


class TimeRanks:
    """The ranks of a process group that share the time of a segment, in order: slice p is on rank p."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def gather(self, x: Tensor) -> Tensor:
        """Returns the x of every rank: (P, *x.shape)."""
        everyone = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        _all_gather(everyone, x.contiguous(), group=self.group)
        return everyone.unflatten(0, (self.size, -1))


class Received:
    """Values received from the other ranks in a segment, by layer: empty at first, and filled by the first forward
    pass.  When the segment or one of its blocks is computed again, nothing is sent.

    time_shift, channel_shift (B, D): the vector before this rank's slice; came_in (B, H, N, N): the state before it;
    kept (P, B, H, N, 1), or (P, B, H, N, N) in RWKV-7: what each slice leaves of a state.
    """

    def __init__(self, layers: list[dict[str, Tensor]] | None = None) -> None:
        self.layers = layers or []

    def of_layer(self, number: int) -> dict[str, Tensor]:
        """Returns the values received for a layer, to read or fill in."""
        while len(self.layers) <= number:
            self.layers.append({})
        return self.layers[number]

    def stacked(self) -> dict[str, Tensor]:
        """Returns name -> (L, ...), layers stacked; empty if nothing was received."""
        names = self.layers[0] if self.layers else ()
        return {name: torch.stack([layer[name] for layer in self.layers]) for name in names}

    @classmethod
    def of_stacked(cls, parts: dict[str, Tensor]) -> Received:
        """Inverts `stacked`."""
        if not parts:
            return cls()
        return cls([dict(zip(parts, layer, strict=True)) for layer in zip(*parts.values(), strict=True)])


class SharedLayerSegment(LayerSegment):
    """This rank's slice of a segment; `starts` and the tensors of `token_shift` and `wkv` are those of the slice.

    When the slice is computed again, the state and vectors after the segment are zeros: only their gradients matter.
    """

    def __init__(
        self,
        starts: Tensor | None,
        initial: LayerState | None,
        ranks: TimeRanks,
        received: dict[str, Tensor],
    ) -> None:
        super().__init__(starts, initial)
        self.ranks, self.received = ranks, received

    def token_shift(self, shift: Shift, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the shifted slice, and the last vector of the segment to pass on.

        last: the vector before the segment
        """
        before, passed_on = _Shift.apply(x[:, -1], last, self, shift)
        shifted, _ = token_shift(x, before, self.starts, self.initial_shift(shift))
        return shifted, passed_on

    def wkv(
        self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        """Returns y of the slice and the state after the segment.

        state: the state before the segment
        The op runs twice, the first time for `added`: slices must exchange it before they know their states.
        """
        starts, initial = self.starts, self.initial[0]
        _, added = wkv(r.detach(), k, v, w, u.detach(), torch.zeros_like(state), starts, initial, backend)
        kept = w.sum(1).exp()[..., None]  # (B, H, N, 1)
        if starts is not None:
            kept = kept.masked_fill(starts.any(1)[:, None, None, None], 0)
        came_in, after = _Join.apply(kept, added, state, self)
        y, _ = wkv(r, k, v, w, u, came_in, starts, initial, backend)
        return y, after

    # Eight parameters: those of the op.
    def wkv7(
        self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        """The same for `infctx.wkv7`, which runs once more for `kept`: what becomes of the unit matrix if no token
        writes its value.  A document that starts leaves nothing of it."""
        starts, initial, still = self.starts, self.initial[0], r.detach()
        _, added = wkv7(still, w, k, v, a, b, torch.zeros_like(state), starts, initial, backend)
        unit = torch.eye(state.shape[-1], dtype=state.dtype, device=state.device).expand_as(state)
        _, kept = wkv7(still, w, k.detach(), torch.zeros_like(v), a, b, unit, starts, None, backend)
        came_in, after = _Join.apply(kept, added, state, self)
        y, _ = wkv7(r, w, k, v, a, b, came_in, starts, initial, backend)
        return y, after


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, last: Tensor, segment: SharedLayerSegment, name: str) -> tuple[Tensor, Tensor]:
        ctx.ranks = ranks = segment.ranks
        ctx.dtypes = mine.dtype, last.dtype
        if name in segment.received:
            return segment.received[name].detach(), torch.zeros_like(last)
        vectors = ranks.gather(mine)  # (P, B, D)
        before = last if ranks.rank == 0 else vectors[ranks.rank - 1]
        segment.received[name] = before.to(mine.dtype, copy=True)
        return segment.received[name].detach(), vectors[-1].to(last.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_before: Tensor, d_behind: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ranks, (x_dtype, last_dtype) = ctx.ranks, ctx.dtypes
        asked = ranks.gather(d_before)  # (P, B, D)
        d_mine = d_behind.to(x_dtype) if ranks.rank == ranks.size - 1 else asked[ranks.rank + 1]
        return d_mine, asked[0].to(last_dtype), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kept: Tensor, added: Tensor, state: Tensor, segment: SharedLayerSegment
    ) -> tuple[Tensor, Tensor]:
        ctx.ranks = ranks = segment.ranks
        if "came_in" in segment.received:
            everyone_kept, came_in = segment.received["kept"], segment.received["came_in"]
            after = torch.zeros_like(state)
        else:
            everyone = ranks.gather(torch.cat([kept, added], dim=-1))  # (P, B, H, N, 1 + N or N + N)
            everyone_kept = everyone[..., : kept.shape[-1]].clone()
            after = state
            for rank in range(ranks.size):
                if rank == ranks.rank:
                    came_in = after
                after = _keep(everyone_kept[rank], after) + everyone[rank, ..., kept.shape[-1] :]
            segment.received["kept"], segment.received["came_in"] = everyone_kept, came_in
        ctx.save_for_backward(everyone_kept, came_in)
        return came_in.detach(), after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_came_in: Tensor, d_behind: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        everyone_kept, came_in = ctx.saved_tensors
        ranks, asked, is_matrix = ctx.ranks, d_behind, everyone_kept.shape[-1] > 1
        everyone_asked = ranks.gather(d_came_in)  # (P, B, H, N, N)
        for rank in reversed(range(ranks.size)):
            if rank == ranks.rank:
                d_kept = asked @ came_in.mT if is_matrix else (came_in * asked).sum(-1, keepdim=True)
                d_added = asked
            asked = everyone_asked[rank] + _keep(everyone_kept[rank].mT if is_matrix else everyone_kept[rank], asked)
        return d_kept, d_added, asked, None


def _keep(kept: Tensor, state: Tensor) -> Tensor:
    return kept * state if kept.shape[-1] == 1 else kept @ state
