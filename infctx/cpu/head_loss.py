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


class Found(NamedTuple):
    """The losses (R,), and the gradients of their sum: of hidden (R, D), and of the head (V, D), None if not needed."""

    losses: Tensor
    d_hidden: Tensor | None
    d_head: Tensor | None


def fits(hidden: Tensor) -> bool:
    """Returns whether `head_loss` takes hidden vectors like these."""
    return hidden.device.type == "cpu" and hidden.dtype in (torch.float32, torch.float64, torch.bfloat16)


# Six parameters: what goes in, and what is to come out.
def head_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, most_logits: int, needed: tuple[bool, bool], of_largest: float = 0.0
) -> Found:
    """Returns -log softmax(hidden head^T)[target] for each token in at least fp32, and gradients of their sum.

    hidden:      (R, D)
    head:        (V, D) in the dtype of hidden
    targets:     (R,) int64, none of them masked
    most_logits: that exist at the same time, but one token's at least
    needed:      whether the gradients of hidden and of head are
    of_largest:  adds 0.5 of_largest (largest logit)^2 of each token to the gradient, not to the loss

    The gradient of the head is in at least fp32, a sum over all tokens.
    """
    (R, _), V, keeps = hidden.shape, len(head), any(needed)
    rows = max(1, min(R, most_logits // V, BLOCK_BYTES // (hidden.itemsize * LEAST_COLUMNS)))
    columns = min(V, max(LEAST_COLUMNS, BLOCK_BYTES // (hidden.itemsize * rows)))
    room = hidden.new_empty((V if keeps else columns) * rows)
    precise = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_zeros(R, dtype=precise)
    d_hidden = torch.empty_like(hidden) if needed[0] else None
    d_head = torch.zeros_like(head, dtype=precise) if needed[1] and R == 0 else None
    d_head = torch.empty_like(head, dtype=precise) if needed[1] and R > 0 else d_head
    for begin in range(0, R, rows):
        chosen = slice(begin, min(begin + rows, R))
        here, tokens = hidden[chosen], _Tokens.of(targets[chosen], precise)
        logits = room[: len(room) // rows * len(here)].view(-1, len(here))  # (V, rows), or a part of it
        for part in _parts(V, columns):
            block = logits[part if keeps else slice(part.stop - part.start)]
            torch.mm(head[part], here.T, out=block)
            _run("measure", tokens, block, part.start)
        losses[chosen] = tokens.losses()
        for part in _parts(V, columns) if keeps else ():
            _run("gradient", tokens, logits[part], part.start, of_largest)
            if d_head is not None:
                _add_product(d_head[part], logits[part], here, first=begin == 0)
        if d_hidden is not None:
            torch.mm(logits.T, head, out=d_hidden[chosen])
    return Found(losses, d_hidden, d_head)


def _parts(vocab: int, columns: int) -> Iterator[slice]:
    for begin in range(0, vocab, columns):
        yield slice(begin, min(begin + columns, vocab))


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Adds left right to a sum in at least fp32; the first product takes the place of what is there."""
    if total.dtype == left.dtype:
        torch.mm(left, right, out=total) if first else total.addmm_(left, right)
    elif first:
        total.copy_(left @ right)
    else:
        total += left @ right


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
