"""Token shift: the inputs one token earlier."""

from __future__ import annotations

import torch
from torch import Tensor

from infctx.model import START_SPACING


def token_shift(x: Tensor, last: Tensor, starts: Tensor | None, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shifts x by one token and hands on its last vector.

    x:       (B, T, D)
    last:    (B, D), the vector before x[:, 0]
    starts:  (B, ceil(T / 16)) bool: a document starts there and sees `initial` before its first token
    initial: (B, D), None for zeros
    Returns the shifted x (B, T, D), and the vector to hand on (B, D) in the dtype of `last`.
    """
    shifted = torch.cat([last.to(x.dtype)[:, None], x[:, :-1]], dim=1)
    if starts is not None:
        first = shifted[:, ::START_SPACING]  # (B, ceil(T / 16), D)
        before = torch.zeros_like(last)[:, None] if initial is None else initial[:, None]
        shifted[:, ::START_SPACING] = torch.where(starts[..., None], before.to(x.dtype), first)
    return shifted, x[:, -1].to(last.dtype)
