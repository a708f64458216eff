"""WKV-7 on a GPU: the kernels of wkv7_forward.cu and wkv7_backward.cu as one op of torch.

    y, state = wkv7_cuda(r, w, k, v, a, b, state, starts, initial)

Long inputs are cut into spans that run side by side, as for RWKV-6, but what a span makes of the state before it is a
whole matrix.  README.md has the derivation.  torch.compile, CUDA graphs and opcheck see two ops, `infctx::wkv7_forward`
and `infctx::wkv7_backward`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from infctx.cuda.compile import KernelsUnavailable
from infctx.cuda.wkv7_layout import (
    backward_shared_bytes,
    find_layout7,
    forward_shared_bytes,
    join_shared_bytes,
    span_shared_bytes,
)
from infctx.cuda.wkv_cuda import (
    DTYPES,
    Launcher,
    Machine,
    launch_spans,
    machine_on,
    new_matrices,
    sum_over_spans,
    zeros_by_span,
)
from infctx.cuda.wkv_layout import HEAD_SIZES, Layout, compiler_options, kept_shape, padded_size
from infctx.errors import InputError

SOURCES = ("wkv7_forward.cu", "wkv7_backward.cu")


def wkv7_cuda(
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
    """See `infctx.wkv7`; r, k, v, a and b in bf16 or fp32, computed in fp32; gradients of first order only.

    Raises KernelsUnavailable if the kernels are unavailable.  The same input gives the same bits on the same device.
    """
    if r.dtype not in DTYPES:
        raise InputError(f"wkv7: backend 'cuda' takes bf16 and fp32, not {r.dtype}; choose chunked")
    too_large = _why_too_large(r.shape[3])
    if too_large:
        raise InputError(f"wkv7: backend 'cuda' takes {too_large}; choose chunked")
    inputs = (r, w, k, v, a, b, state, starts, initial)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _WKV7.apply(*inputs)
    return torch.ops.infctx.wkv7_forward(*inputs, False)[:2]


def _why_too_large(channels: int) -> str | None:
    """Returns what heads the kernels take, if these are too large.

    Those of RWKV-6 are cut into pieces; here the keys of a head meet in every token, so pieces would not be
    independent.  No published model has larger heads.
    """
    most = HEAD_SIZES[-1]
    return f"heads of at most {most} channels, not {channels}" if channels > most else None


def compile_kernels7(device: int, dtype: torch.dtype, channels: int) -> None:
    """Builds the kernels of both directions, so that no later call compiles; raises KernelsUnavailable."""
    too_large = _why_too_large(channels)
    if too_large:
        raise KernelsUnavailable(f"the CUDA kernels take {too_large}")
    for source in SOURCES:
        _gpu(device).load(source, compiler_options(channels, dtype))


class _WKV7(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        *tokens, _, starts, initial = inputs
        y, final, kept, inner = torch.ops.infctx.wkv7_forward(*inputs, True)
        ctx.save_for_backward(*tokens, starts, initial, kept, inner)
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        learns = ctx.needs_input_grad[8]
        *gradients, dinitial = torch.ops.infctx.wkv7_backward(*ctx.saved_tensors, dy, dfinal, learns)
        found = (*gradients, None, dinitial)
        return tuple(x if needed else None for x, needed in zip(found, ctx.needs_input_grad, strict=True))


# ---- the two ops ----

_library = torch.library.Library("infctx", "FRAGMENT")
_TOKENS = "Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b"
_library.define(
    f"wkv7_forward({_TOKENS}, Tensor state, Tensor? starts, Tensor? initial, bool keep) -> "
    "(Tensor y, Tensor final, Tensor kept, Tensor inner)"
)
_library.define(
    f"wkv7_backward({_TOKENS}, Tensor? starts, Tensor? initial, Tensor kept, Tensor inner, Tensor dy, Tensor dfinal, "
    "bool learns) -> (Tensor dr, Tensor dw, Tensor dk, Tensor dv, Tensor da, Tensor db, Tensor dstate, Tensor dinitial)"
)


@torch.library.impl(_library, "wkv7_forward", "CUDA")
def _forward_on_gpu(r: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return forward7(_gpu(r.device.index), r, *others)


@torch.library.impl(_library, "wkv7_backward", "CUDA")
def _backward_on_gpu(r: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return backward7(_gpu(r.device.index), r, *others)


@functools.cache
def _gpu(device: int) -> Machine:
    return machine_on(device, find_layout7)


@torch.library.register_fake("infctx::wkv7_forward", lib=_library)
def _forward_shapes(r, w, k, v, a, b, state, starts, initial, keep):
    B, T, H, N = r.shape
    kept = kept_shape(B, T, H, N, r.dtype) if keep else (0,)
    y = torch.empty_like(r, memory_format=torch.contiguous_format)
    inner = (B, T, H, padded_size(N)) if keep else (0,)
    return y, state.new_empty(state.shape), state.new_empty(kept), state.new_empty(inner)


@torch.library.register_fake("infctx::wkv7_backward", lib=_library)
def _backward_shapes(r, w, k, v, a, b, starts, initial, kept, inner, dy, dfinal, learns):
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, k, v, a, b)]
    found.insert(1, w.new_empty(w.shape))
    initial_shape = dfinal.shape if learns else (0,)
    return (*found, dfinal.new_empty(dfinal.shape), dfinal.new_empty(initial_shape))


# ---- the launches ----


def forward7(
    machine: Machine,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    starts: Tensor | None,
    initial: Tensor | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    """Returns y, the final state and, with `keep`, padded and for the backward pass, the states before each tile and
    the inner values of each token."""
    layout = machine.layout(tuple(r.shape), r.dtype, "forward")
    kernels = machine.load("wkv7_forward.cu", layout.options)
    r, k, v, a, b = layout.inputs(r, k, v, a, b)
    w, (initial, initial_heads) = layout.decays(w), layout.initial(initial if starts is not None else None)
    starts = None if starts is None else starts.contiguous().view(torch.uint8)
    numbers = (*layout.numbers, *w.stride()[:3], initial_heads)
    states = state = layout.matrices(state)
    kept = state.new_empty(layout.kept_shape if keep else (0,))
    row_states, state_step = 1, 0
    if layout.spans > 1:
        if keep:
            states, row_states, state_step = kept, layout.tiles, layout.span_tokens // layout.tile_tokens
        else:
            states, row_states, state_step = new_matrices(layout, state, layout.spans), layout.spans, 1
        sums, transitions = (new_matrices(layout, state, layout.spans - 1) for _ in range(2))
        arguments = (w, k, v, a, b, starts, initial, sums, transitions, *numbers)
        launch_spans(kernels, "wkv7_sum_spans", layout, span_shared_bytes(layout), arguments)
        ends = (states, layout.spans - 1, row_states, state_step)
        _launch_join(kernels, "wkv7_join_spans", layout, (state, sums, transitions, *ends))
    y, final = layout.tokens_like(r), state.new_empty(state.shape)
    inner = layout.tokens_like(r, torch.float32) if keep else state.new_empty(0)
    saved = (kept, inner) if keep else (None, None)
    arguments = (r, w, k, v, a, b, states, starts, initial, y, final, *saved, *numbers, row_states, state_step)
    grid = layout.rows * layout.spans
    if grid:  # the driver refuses an empty launch
        kernels.launch("wkv7_forward", grid, 32 * layout.warps, forward_shared_bytes(layout), arguments)
    return layout.whole(y), layout.unpadded(final), kept, inner


def backward7(
    machine: Machine,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    starts: Tensor | None,
    initial: Tensor | None,
    kept: Tensor,
    inner: Tensor,
    dy: Tensor,
    dfinal: Tensor,
    learns: bool,
) -> tuple[Tensor, ...]:
    """Returns the gradients of r, w, k, v, a, b, the state and, with `learns`, the initial state."""
    layout = machine.layout(tuple(r.shape), r.dtype, "backward")
    kernels = machine.load("wkv7_backward.cu", layout.options)
    r, k, v, a, b, dy = layout.inputs(r, k, v, a, b, dy)
    w, (initial, initial_heads) = layout.decays(w), layout.initial(initial if starts is not None else None)
    starts = None if starts is None else starts.contiguous().view(torch.uint8)
    numbers = (*layout.numbers, *w.stride()[:3])
    gradients = dfinal = layout.matrices(dfinal)
    if layout.spans > 1:
        gradients = new_matrices(layout, dfinal, layout.spans)
        sums, transitions = (new_matrices(layout, dfinal, layout.spans - 1) for _ in range(2))
        spans = (r, w, a, b, dy, starts, sums, transitions, *numbers)
        launch_spans(kernels, "wkv7_sum_span_gradients", layout, span_shared_bytes(layout), spans)
        join = (dfinal, sums, transitions, gradients, layout.spans - 1, layout.spans, 1)
        _launch_join(kernels, "wkv7_join_span_gradients", layout, join)
    dr, dk, dv, da, db = (layout.tokens_like(r) for _ in range(5))
    dw = layout.tokens_like(r, dtype=torch.float32)
    dstate = dfinal.new_empty(dfinal.shape)
    dinitial = zeros_by_span(layout, dfinal) if learns and starts is not None else None
    arguments = (r, w, k, v, a, b, inner, dy, gradients, starts, initial, kept, dr, dw, dk, dv, da, db, dstate)
    grid = layout.rows * layout.spans
    if grid:
        given = (*arguments, dinitial, *numbers, initial_heads)
        kernels.launch("wkv7_backward", grid, 32 * layout.warps, backward_shared_bytes(layout), given)
    found = [layout.whole(x) for x in (dr, dw, dk, dv, da, db)]
    return (*found, layout.unpadded(dstate), sum_over_spans(layout, dfinal, dinitial, learns))


def _launch_join(kernels: Launcher, name: str, layout: Layout, arguments: tuple[Any, ...]) -> None:
    grid = layout.rows * layout.warps
    kernels.launch(name, grid, 4 * layout.head_size, join_shared_bytes(layout), arguments)
