"""Token shift: the inputs one token earlier, and blends of current and earlier inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infctx.conventions import START_SPACING
from infctx.cpu import fused


def token_shift(x: Tensor, last: Tensor, starts: Tensor | None, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shifts x by one token and passes on its last vector.

    x:       (B, T, D)
    last:    (B, D), the vector before x[:, 0]
    starts:  (B, ceil(T / 16)) bool: a document starts there and sees `initial` before its first token
    initial: (B, D), None for zeros
    Returns the shifted x (B, T, D), and the vector to pass on (B, D) in the dtype of `last`.
    """
    num_tokens = x.shape[1]
    both = torch.cat([last.to(x.dtype)[:, None], x], dim=1)  # (B, T + 1, D)
    if starts is not None:
        firsts = both[:, :num_tokens:START_SPACING]  # (B, ceil(T / 16), D)
        before = torch.zeros_like(last)[:, None] if initial is None else initial[:, None]
        both[:, :num_tokens:START_SPACING] = torch.where(starts[..., None], before.to(x.dtype), firsts)
    shifted, new_last = both.split([num_tokens, 1], dim=1)  # whose backward is one concatenation
    return shifted, new_last[:, 0].to(last.dtype, copy=True)  # a view would keep all of `both`


def blend(origin: Tensor, difference: Tensor, mixes: Tensor) -> tuple[Tensor, ...]:
    """Returns origin + difference * mix for each mix: M tensors (B, T, D).

    origin, difference: (B, T, D); mixes: (M, B, T, D), or (M, 1, 1, D) for the same at every token
    """
    if fused.fits(origin):
        return fused.blend(origin, difference, mixes)
    return _Blend.apply(origin, difference, mixes)


class _Blend(torch.autograd.Function):
    """The blends in plain torch; their backward makes half as many passes over memory as autograd's."""

    @staticmethod
    def forward(ctx: Any, origin: Tensor, difference: Tensor, mixes: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(difference if ctx.needs_input_grad[2] else None, mixes)
        return tuple(torch.addcmul(origin, difference, mix) for mix in mixes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        difference, mixes = ctx.saved_tensors
        d_origin = gradients[0]
        d_difference = gradients[0] * mixes[0]
        d_mixes = torch.empty_like(mixes) if difference is not None else None
        for place, (gradient, mix) in enumerate(zip(gradients, mixes, strict=True)):
            if d_mixes is None:  # frozen
                pass
            elif mixes.shape[1:] == difference.shape:
                torch.mul(gradient, difference, out=d_mixes[place])
            else:
                d_mixes[place] = (gradient * difference).sum((0, 1))
            if place > 0:
                d_difference.addcmul_(gradient, mix)
            if place == 1:
                d_origin = d_origin + gradient  # not in place: the first gradient is not ours
            elif place > 1:
                d_origin += gradient
        return d_origin, d_difference, d_mixes
