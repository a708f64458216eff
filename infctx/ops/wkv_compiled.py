"""The WKV recurrences compiled for the CPU by numba: pairs of batch and head run side by side on torch's threads.

The kernels (infctx/cpu) are compiled at the first call, in 10 to 20 s, and come from numba's cache on disk in later
processes.  For the backward pass, besides the inputs, S is kept every 64 tokens: at N = 64 that is as many numbers as r
has; and so is the u of RWKV-7, as many again.  The results are the same bit for bit with any number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from infctx.conventions import START_SPACING
from infctx.cpu.threads import share_out
from infctx.ops.precision import state_dtype

MIN_THREAD_TOKENS = 256
"""Tokens of one head, about 50 us of forward: below this, waking another thread costs more than it saves."""


def wkv_compiled(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    starts: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `infctx.wkv`; computes in fp64 if r is fp64, else in fp32; gradients of first order only."""
    inputs = (r, k, v, w, u, state, *_without_none(r, state, starts, initial))
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _Compiled.apply(*inputs)
    return _forward(inputs, keep=False)[:2]


def wkv7_compiled(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    starts: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `infctx.wkv7`; computes in fp64 if r is fp64, else in fp32; gradients of first order only."""
    inputs = (r, w, k, v, a, b, state, *_without_none(r, state, starts, initial))
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _Compiled7.apply(*inputs)
    return _forward7(inputs, keep=False)[:2]


def _without_none(r: Tensor, state: Tensor, starts: Tensor | None, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    if starts is None:
        starts = torch.zeros((), dtype=torch.bool).expand(r.shape[0], -(-r.shape[1] // START_SPACING))
    if initial is None:
        initial = torch.zeros((), dtype=state_dtype(r.dtype)).expand(state.shape)
    return starts, initial


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        y, final, kept = _forward(inputs, keep=True)
        r, k, v, w, u, _, starts, initial = inputs
        ctx.save_for_backward(r, k, v, w, u, starts, initial, kept)
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _backward(ctx.saved_tensors, dy, dfinal)
        return tuple(x if needed else None for x, needed in zip(gradients, ctx.needs_input_grad, strict=True))


class _Compiled7(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        y, final, *kept = _forward7(inputs, keep=True)
        ctx.save_for_backward(*inputs[:6], *inputs[7:], *kept)
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _backward7(ctx.saved_tensors, dy, dfinal)
        return tuple(x if needed else None for x, needed in zip(gradients, ctx.needs_input_grad, strict=True))


def _forward(inputs: Sequence[Tensor], keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, the final state, and the states that the backward pass needs (empty unless `keep`)."""
    r, k, v, w, u, state, starts, initial = inputs
    y, final, kept = _results(r, keep)
    precise = final.dtype
    _run(_kernels(), "forward", *_rows(r, k, v, w), u.to(precise), starts, initial.to(precise), state.to(precise), y,
         final, kept)  # fmt: skip
    return y.to(r.dtype), final, kept


def _forward7(inputs: Sequence[Tensor], keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y, the final state, and the states and u that the backward pass needs (empty unless `keep`)."""
    *tokens, state, starts, initial = inputs
    y, final, kept = _results(tokens[0], keep)
    u, precise = torch.empty_like(y[:, : y.shape[1] if keep else 0]), final.dtype
    _run(_kernels7(), "forward", *_rows(*tokens), starts, initial.to(precise), state.to(precise), y, final, kept, u)
    return y.to(tokens[0].dtype), final, kept, u


def _results(r: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Makes room for y, the final state (zeros) and the states that the backward pass needs."""
    (B, T, H, N), precise = r.shape, state_dtype(r.dtype)
    padded = _kernels().padded_size(N, precise.itemsize)
    kept = torch.empty((B * H if keep else 0, -(-T // _kernels().KEPT_TOKENS), padded * padded), dtype=precise)
    return torch.empty((B, T, H, N), dtype=precise), torch.zeros((B, H, N, N), dtype=precise), kept


def _backward(saved: Sequence[Tensor], dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the gradients of r, k, v, w, u, state, starts (None) and initial."""
    r, k, v, w, u, starts, initial, kept = saved
    (B, T, H, N), precise = r.shape, state_dtype(r.dtype)
    dr, dk, dv, dw = (torch.empty((B, T, H, N), dtype=precise) for _ in range(4))
    du = torch.empty((B, H, N), dtype=precise)
    dstate, dinitial = (torch.zeros((B, H, N, N), dtype=precise) for _ in range(2))
    gradients = (dr, dk, dv, dw, du, dstate, dinitial)
    _run(_kernels(), "backward", *_rows(r, k, v, w), u.to(precise), starts, initial.to(precise), kept, *_rows(dy),
         dfinal, *gradients)  # fmt: skip
    # One after the other, whatever the number of threads.
    du = functools.reduce(torch.add, du, torch.zeros((H, N), dtype=precise))
    by_token = (x.to(like.dtype) for x, like in ((dr, r), (dk, k), (dv, v), (dw, w), (du, u)))
    return *by_token, dstate, None, dinitial


def _backward7(saved: Sequence[Tensor], dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the gradients of r, w, k, v, a, b, state, starts (None) and initial."""
    *tokens, starts, initial, kept, u = saved
    (B, T, H, N), precise = tokens[0].shape, state_dtype(tokens[0].dtype)
    by_token = [torch.empty((B, T, H, N), dtype=precise) for _ in tokens]
    dstate, dinitial = (torch.zeros((B, H, N, N), dtype=precise) for _ in range(2))
    _run(_kernels7(), "backward", *_rows(*tokens), starts, initial.to(precise), kept, u, *_rows(dy), dfinal, *by_token,
         dstate, dinitial)  # fmt: skip
    return *(x.to(like.dtype) for x, like in zip(by_token, tokens, strict=True)), dstate, None, dinitial


def _rows(*tokens: Tensor) -> list[Tensor]:
    """Returns tokens in the precise dtype with last stride 1, which the kernels' vector loads need."""
    return [_with_whole_rows(x.to(state_dtype(x.dtype))) for x in tokens]


def _run(kernels: ModuleType, kernel: str, *tensors: Tensor) -> None:
    """Divides the pairs of batch and head among threads, starting with this one."""
    arrays = [x.detach().numpy() for x in tensors]
    function: Callable[..., None] = kernels.compiled(kernel, arrays[0].dtype)
    B, T, H, _ = tensors[0].shape
    share_out(function, arrays, B * H, min(torch.get_num_threads(), B * H * T // MIN_THREAD_TOKENS))


def _kernels() -> ModuleType:
    """Imports numba at the first use, not with infctx."""
    from infctx.cpu import wkv_kernels

    return wkv_kernels


def _kernels7() -> ModuleType:
    from infctx.cpu import wkv7_kernels

    return wkv7_kernels


def _with_whole_rows(x: Tensor) -> Tensor:
    """Makes the last stride 1, which the kernels' vector loads need; other strides may be anything."""
    return x if x.stride(-1) == 1 else x.contiguous()
