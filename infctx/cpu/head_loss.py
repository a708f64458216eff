"""The head and the cross entropy in one pass, for the CPU: logits are looked at while they lie in the cache.

A product makes a block of logits, some tokens by some columns of the vocabulary, and a kernel that numba compiled
keeps what the loss needs of it.  When all of the vocabulary is through, a second kernel makes each block its own
gradient, and two products turn that into those of the hidden vectors and of the head.  So between the products nothing
goes over all logits in memory.  Plain torch has the same in `infctx.model.loss`, for other devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infctx.cpu.threads import BLOCK, share_out

BLOCK_BYTES = 1 << 20
"""Of a block of logits: half of a core's second cache."""
LEAST_COLUMNS = 256
"""Columns of a block, if the vocabulary has as many: narrower products are slow."""
MIN_THREAD_NUMBERS = 1 << 14
"""Logits, about 10 us: below this, waking another thread costs more than it saves."""

_spare: list[Tensor] = []
"""The memory of logits that are gone."""


class Slice(NamedTuple):
    """Tokens whose logits exist: hidden (R, D), head (V, D), logits (V, R) at the beginning of the room, and what the
    kernels found in them."""

    hidden: Tensor
    head: Tensor
    room: Tensor
    logits: Tensor
    tokens: _Tokens
    columns: int


class Found(NamedTuple):
    """The losses (R,), and the gradients of their sum: of hidden (R, D) and of the head (V, D), None if not needed; or
    the slice to get them from."""

    losses: Tensor
    d_hidden: Tensor | None
    d_head: Tensor | None
    slice: Slice | None = None


def fits(hidden: Tensor) -> bool:
    """Returns whether `head_loss` takes hidden vectors like these."""
    return hidden.device.type == "cpu" and hidden.dtype in (torch.float32, torch.float64, torch.bfloat16)


# Seven parameters: what goes in, and what is to come out.
def head_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    most_logits: int,
    needed: tuple[bool, bool],
    of_largest: float = 0.0,
    later: bool = False,
) -> Found:
    """Returns -log softmax(hidden head^T)[target] for each token in at least fp32, and gradients of their sum.

    hidden:      (R, D)
    head:        (V, D) in the dtype of hidden
    targets:     (R,) int64, none of them masked
    most_logits: that exist at the same time, but one token's at least
    needed:      whether the gradients of hidden and of head are
    of_largest:  adds 0.5 of_largest (largest logit)^2 of each token to the gradient, not to the loss
    later:       if all logits may exist at the same time, returns them instead of the gradients, for `gradients`

    The gradient of the head is in at least fp32, a sum over all tokens.
    """
    R, V, keeps = len(hidden), len(head), any(needed)
    rows = max(1, min(R, most_logits // V, BLOCK_BYTES // (hidden.itemsize * LEAST_COLUMNS)))
    columns = min(V, max(LEAST_COLUMNS, BLOCK_BYTES // (hidden.itemsize * rows)))
    precise = torch.promote_types(hidden.dtype, torch.float32)
    losses, later = hidden.new_zeros(R, dtype=precise), later and keeps and rows == R
    d_hidden = torch.empty_like(hidden) if needed[0] and not later else None
    d_head = torch.zeros_like(head, dtype=precise) if needed[1] and not later else None
    kept = V if keeps else columns  # of the vocabulary
    room = _room(kept * rows, hidden.dtype)
    for begin in range(0, R, rows):
        chosen = slice(begin, min(begin + rows, R))
        logits = room[: kept * (chosen.stop - begin)].view(kept, chosen.stop - begin)
        here = Slice(hidden[chosen], head, room, logits, _Tokens.of(targets[chosen], precise), columns)
        for part in _parts(V, columns):
            block = logits[part if keeps else slice(part.stop - part.start)]
            torch.mm(head[part], here.hidden.T, out=block)
            _run("measure", here.tokens, block, part.start)
        losses[chosen] = here.tokens.losses()
        if later:
            return Found(losses, None, None, here)
        if keeps:
            gradients(here, of_largest, None if d_hidden is None else d_hidden[chosen], d_head)
    _spare.append(room)
    return Found(losses, d_hidden, d_head)


def gradients(
    here: Slice, of_largest: float, d_hidden: Tensor | None, d_head: Tensor | None, factor: float = 1.0
) -> None:
    """Writes factor times a slice's gradient of hidden to d_hidden, and adds that of the head to d_head.

    The logits are gone after that.
    """
    for part in _parts(len(here.head), here.columns):
        block = here.logits[part]
        _run("gradient", here.tokens, block, part.start, of_largest)
        if d_head is not None and d_head.dtype == block.dtype:
            d_head[part].addmm_(block, here.hidden, alpha=factor)
        elif d_head is not None:
            d_head[part].add_(block @ here.hidden, alpha=factor)
    if d_hidden is not None:
        torch.mm(here.logits.T, here.head, out=d_hidden)
        d_hidden.mul_(factor)


def give_back(here: Slice) -> None:
    """Lets the next segment have the room of a slice's logits."""
    _spare.append(here.room)


def _room(numbers: int, dtype: torch.dtype) -> Tensor:
    """Returns memory for logits, if possible what the last segment had: clearing new pages takes long."""
    room = _spare.pop() if _spare else None
    _spare.clear()
    fits_in = room is not None and room.dtype == dtype and len(room) >= numbers
    return room if room is not None and fits_in else torch.empty(numbers, dtype=dtype)


def _parts(vocab: int, columns: int) -> Iterator[slice]:
    for begin in range(0, vocab, columns):
        yield slice(begin, min(begin + columns, vocab))


class _Tokens(NamedTuple):
    """What the kernels find out about tokens, see `head_loss_kernels`."""

    found: np.ndarray
    totals: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, targets: Tensor, dtype: torch.dtype) -> _Tokens:
        found = torch.zeros(3, len(targets), dtype=dtype).numpy()
        found[0] = -np.inf
        return cls(found, np.zeros((2, len(targets))), targets.contiguous().numpy())

    def losses(self) -> Tensor:
        return torch.from_numpy(self.found[0] + np.log(self.totals[0]) - self.totals[1])


def _run(kernel: str, tokens: _Tokens, block: Tensor, begin: int, *numbers: float) -> None:
    from infctx.cpu import head_loss_kernels  # numba is imported at the first use, not with infctx

    array = (block.view(torch.uint16) if block.dtype == torch.bfloat16 else block).numpy()
    function = head_loss_kernels.compiled(kernel, array.dtype)
    threads = min(torch.get_num_threads(), block.numel() // MIN_THREAD_NUMBERS)
    arguments = [tokens.found, tokens.totals, array, tokens.targets, begin, *numbers]
    share_out(function, arguments, -(-array.shape[1] // BLOCK), threads)
