"""Chains of elementwise steps of the model as single passes over memory, compiled for the CPU by numba.

Plain torch goes over memory once for every step, and on a CPU that takes longer than the arithmetic.  Every function
here has a counterpart in plain torch, next to where it is called, for other devices and dtypes.  Results are the same
bit for bit with any number of threads; gradients of first order only.  Numba compiles the kernels at first use, in
about 5 s for a dtype, and later processes get them from its cache on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from infctx.cpu.threads import BLOCK, share_out

MIN_THREAD_NUMBERS = 1 << 15
"""Numbers of one input, about 20 us: below this, waking another thread costs more than it saves."""


def fits(x: Tensor) -> bool:
    """Returns whether the functions here take tensors like x."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def blend(origin: Tensor, difference: Tensor, mixes: Tensor) -> tuple[Tensor, ...]:
    """Returns origin + difference * mix for each mix: M tensors (B, T, D).

    origin, difference: (B, T, D); mixes: (M, B, T, D), or (M, 1, 1, D) for the same at every token
    """
    return _Blend.apply(origin, difference, mixes)


def squared_relu(x: Tensor) -> Tensor:
    """Returns max(x, 0)^2; x: (B, T, D)."""
    return _SquaredRelu.apply(x)


def delta_inputs(
    keys: tuple[Tensor, Tensor, Tensor],
    vectors: tuple[Tensor, ...],
    fastest: float,
    values: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, ...]:
    """Returns w, k, a, b for `infctx.wkv7`, and v if `values` are given; all (B, T, H, N).

    keys:    k, decay, rate (B, T, H, N)
    vectors: decay_base, rate_base, scale, key_rate (H, N)
    values:  v, first, share (B, T, H, N), share_base (H, N)

    With alpha = sigmoid(rate_base + rate) and kappa = k scale / |k scale|:
    w = fastest sigmoid(decay_base + decay), k (1 + (alpha - 1) key_rate), a = -kappa, b = kappa alpha,
    v + (first - v) sigmoid(share_base + share)
    """
    decay_base, rate_base, scale, key_rate = vectors
    share_base, tokens = (torch.zeros_like(scale), keys) if values is None else (values[3], (*keys, *values[:3]))
    return _DeltaInputs.apply(fastest, torch.stack([decay_base, rate_base, share_base, scale, key_rate]), *tokens)


def delta_output(tokens: tuple[Tensor, ...], vectors: tuple[Tensor, ...], eps: float) -> Tensor:
    """Returns (norm(y) weight + bias + (r . bonus k) v) gate (B, T, H, N); the norm is over each head's N.

    tokens: y, r, k, v, gate (B, T, H, N); vectors: weight, bias, bonus (H, N)
    """
    return _DeltaOutput.apply(eps, torch.stack(vectors), *tokens)


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, origin: Tensor, difference: Tensor, mixes: Tensor) -> tuple[Tensor, ...]:
        difference, mixes = difference.contiguous(), mixes.contiguous()
        # Only the gradient of the mixes needs it, and frozen mixes have none.
        ctx.save_for_backward(difference if ctx.needs_input_grad[2] else None, mixes)
        blends = origin.new_empty(len(mixes), *origin.shape)
        _run("blend", _blocks(origin), origin.shape, (mixes.flatten(1, 2),), (origin, difference, blends))
        return blends.unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        difference, mixes = ctx.saved_tensors
        d_origin, d_difference = (gradients[0].new_empty(gradients[0].shape) for _ in range(2))
        if difference is None:
            difference = gradients[0]  # it is not read
        d_mixes = torch.zeros_like(mixes) if ctx.needs_input_grad[2] else mixes[:0]
        _run("blend_back", _blocks(difference), difference.shape, (mixes.flatten(1, 2), d_mixes.flatten(1, 2)),
             (difference, d_origin, d_difference, *gradients))  # fmt: skip
        return d_origin, d_difference, d_mixes if ctx.needs_input_grad[2] else None


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        _run("squared_relu", _blocks(x), x.shape, (x.flatten(0, -2), y.flatten(0, -2)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        rows = (array.flatten(0, -2) for array in (x, gradient.contiguous(), dx))
        _run("squared_relu_back", _blocks(x), x.shape, tuple(rows))
        return dx


class _DeltaInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fastest: float, vectors: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
        """vectors: (5, H, N) bases of decay, rate and share, scale, key_rate; tokens: k, decay, rate; v, first, share.

        Returns w, k, a, b, v.
        """
        tokens = tuple(x.contiguous() for x in tokens)
        ctx.fastest = fastest
        ctx.save_for_backward(vectors, *tokens)
        results = [torch.empty_like(tokens[0]) for _ in range(4 + (len(tokens) > 3))]
        places = (*tokens[:3], *results[:4], *_or_none(tokens[3:], 3), *_or_none(results[4:], 1))
        _run("delta_inputs", vectors.shape[1], tokens[0].shape, (vectors,), places, fastest)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        vectors, *tokens = ctx.saved_tensors
        gradients, d_vectors = tuple(x.contiguous() for x in gradients), torch.zeros_like(vectors)
        found = [torch.empty_like(x) for x in (tokens if len(tokens) == 3 else tokens[:5])]
        places = (*tokens[:3], *gradients[:4], *found[:3], *_or_none(tokens[3:], 3), *_or_none(gradients[4:], 1))
        _run("delta_inputs_back", vectors.shape[1], tokens[0].shape, (vectors, d_vectors),
             (*places, *_or_none(found[3:], 2)), ctx.fastest)  # fmt: skip
        if len(tokens) == 3:
            return None, d_vectors, *found
        dk, ddecay, drate, dv, dshare = found
        d_first = gradients[4] - dv if ctx.needs_input_grad[6] else None
        return None, d_vectors, dk, ddecay, drate, dv, d_first, dshare


class _DeltaOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, vectors: Tensor, *tokens: Tensor) -> Tensor:
        """vectors: (3, H, N) weight, bias, bonus; tokens: y, r, k, v, gate."""
        tokens = tuple(x.contiguous() for x in tokens)
        ctx.eps = eps
        ctx.save_for_backward(vectors, *tokens)
        output = torch.empty_like(tokens[0])
        _run("delta_output", vectors.shape[1], output.shape, (vectors,), (*tokens, output), eps)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        vectors, *tokens = ctx.saved_tensors
        found, d_vectors = [torch.empty_like(x) for x in tokens], torch.zeros_like(vectors)
        _run("delta_output_back", vectors.shape[1], gradient.shape, (vectors, d_vectors), (*tokens, gradient, *found),
             ctx.eps)  # fmt: skip
        return None, d_vectors, *found


def _or_none(tensors: Sequence[Tensor], number: int) -> Sequence[Tensor | None]:
    return tensors or [None] * number


def _blocks(x: Tensor) -> int:
    return -(-x.shape[-1] // BLOCK)


# Six parameters: a kernel takes arrays, addresses of tokens, and perhaps a number.
def _run(
    kernel: str,
    pieces: int,
    shape: torch.Size,
    arrays: Sequence[Tensor],
    tokens: Sequence[Tensor | None] = (),
    *numbers: float,
) -> None:
    """Runs a kernel over the rows of tokens, all of this shape; see `fused_kernels`."""
    from infctx.cpu import fused_kernels  # numba is imported at the first use, not with infctx

    whole = [None if x is None else x.contiguous() for x in tokens]  # kept alive until the kernel is through
    arguments: list[Any] = [x.detach().numpy() for x in arrays]
    if tokens:
        places = np.array([0 if x is None else x.data_ptr() for x in whole])
        rows = shape[:2].numel()
        arguments += [places, rows, *numbers]
    function = fused_kernels.compiled(kernel, arguments[0].dtype)
    share_out(function, arguments, pieces, min(torch.get_num_threads(), shape.numel() // MIN_THREAD_NUMBERS))
