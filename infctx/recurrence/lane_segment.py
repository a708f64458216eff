"""A segment whose documents start from the state that their lane is in, with no gradient back (window.carry: lane).

The WKV op has one state for all starts of a segment.  So it runs from border to border: between two places where a
document starts in some lane.  A border changes no state; where a document starts, the state is detached.  All of
this is inside a layer, so the modules of the model run once, on every rank alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from infctx.conventions import START_SPACING
from infctx.ops.wkv import wkv, wkv7
from infctx.recurrence.layer_segment import LayerSegment, Shift


class LaneLayerSegment(LayerSegment):
    """A whole segment on one rank.

    starts:  (B, ceil(T / 16)) bool: a document starts at this 16-token boundary
    borders: the places of the boundaries where one starts in any lane, see `borders_of`
    """

    def __init__(self, starts: Tensor, borders: list[int]) -> None:
        super().__init__()
        self.fresh, self.borders = starts, borders

    def token_shift(self, shift: Shift, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """See `LayerSegment.token_shift`; documents see the vector before them, detached."""
        num_tokens = x.shape[1]
        both = torch.cat([last.to(x.dtype)[:, None], x], dim=1)  # (B, T + 1, D)
        firsts = both[:, :num_tokens:START_SPACING]  # (B, ceil(T / 16), D)
        both[:, :num_tokens:START_SPACING] = torch.where(self.fresh[..., None], firsts.detach(), firsts)
        shifted, new_last = both.split([num_tokens, 1], dim=1)
        return shifted, new_last[:, 0].to(last.dtype)

    def wkv(
        self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        """See `LayerSegment.wkv`."""

        def run(r: Tensor, k: Tensor, v: Tensor, w: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return wkv(r, k, v, w, u, state, backend=backend)

        return self._from_border_to_border(run, (r, k, v, w), state)

    # Eight parameters: those of the op that a layer has.
    def wkv7(
        self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        """See `LayerSegment.wkv7`."""
        return self._from_border_to_border(partial(wkv7, backend=backend), (r, w, k, v, a, b), state)

    def _from_border_to_border(
        self, op: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], state: Tensor
    ) -> tuple[Tensor, Tensor]:
        results = []
        for begin, end in pairwise(sorted({0, *self.borders, inputs[0].shape[1]})):
            if begin in self.borders:
                fresh = self.fresh[:, begin // START_SPACING, None, None, None]  # (B, 1, 1, 1)
                state = torch.where(fresh, state.detach(), state)
            y, state = op(*(tensor[:, begin:end] for tensor in inputs), state)
            results.append(y)
        return torch.cat(results, dim=1), state


def borders_of(starts: Tensor) -> list[int]:
    """Returns the places, in tokens, where a document starts in any lane; on a GPU, this waits for it."""
    return [START_SPACING * place for place in starts.any(0).nonzero().flatten().tolist()]
