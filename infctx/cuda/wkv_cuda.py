"""WKV on a GPU: the kernels of wkv_forward.cu and wkv_backward.cu as one op of torch.

    y, state = wkv_cuda(r, k, v, w, u, state, starts, initial)

Long inputs are cut into spans that run side by side.  First each span finds what it adds to the state, then one pass
over the spans finds the state that each begins with, then all of them run.  README.md has the derivation.
torch.compile, CUDA graphs and opcheck see two ops, `infctx::wkv_forward` and `infctx::wkv_backward`.  They also run off
the GPU: the tests run them on the CPU with the emulator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from infctx.cuda.driver import Argument, check_torch, load_kernels
from infctx.cuda.wkv_layout import (
    CHUNK_TOKENS,
    HEAD_SIZES,
    Layout,
    backward_shared_bytes,
    compiler_options,
    forward_shared_bytes,
    kept_shape,
    span_shared_bytes,
)
from infctx.cuda.wkv_time import Processors, find_layout
from infctx.errors import InputError

DTYPES = (torch.bfloat16, torch.float32)


class Launcher(Protocol):
    """The kernels of one source, on a GPU (`driver.Kernels`) or in the tests' emulator."""

    def launch(
        self, name: str, grid: int, block: int, shared_bytes: int = 0, arguments: Sequence[Argument] = ()
    ) -> None: ...


@dataclass(frozen=True)
class Machine:
    """Where kernels run.

    load:   load(file_name, options) returns the kernels of a source
    layout: layout(shape of r, its dtype, "forward" or "backward") returns how the call is laid out
    """

    load: Callable[[str, tuple[str, ...]], Launcher]
    layout: Callable[[tuple[int, ...], torch.dtype, str], Layout]


def wkv_cuda(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    starts: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `infctx.wkv`; r, k and v in bf16 or fp32, computed in fp32; gradients of first order only.

    Raises KernelsUnavailable if the kernels are unavailable.  The same input gives the same bits on the same device.
    """
    if r.dtype not in DTYPES:
        raise InputError(f"wkv: backend 'cuda' takes bf16 and fp32, not {r.dtype}; choose chunked")
    if r.shape[3] > HEAD_SIZES[-1]:
        return _in_pieces(r, k, v, w, u, state, starts, initial)
    inputs = (r, k, v, w, u.float(), state, starts, initial)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _WKV.apply(*inputs)
    return torch.ops.infctx.wkv_forward(*inputs, False)[:2]


def _in_pieces(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    starts: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Runs heads above 64 channels, which no published model has: every 64 keys by 64 values become one head in fp32,
    and y is the sum over the keys."""
    B, T, H, N = r.shape
    size = HEAD_SIZES[-1]
    pieces = -(-N // size)
    missing = pieces * size - N

    def by_key(x: Tensor) -> Tensor:
        """(..., H, N) -> (..., H * keys * values, 64)"""
        x = F.pad(x.float(), (0, missing)).unflatten(-1, (pieces, 1, size))
        return x.expand(*x.shape[:-2], pieces, size).flatten(-4, -2)

    def by_value(x: Tensor) -> Tensor:
        x = F.pad(x.float(), (0, missing)).unflatten(-1, (1, pieces, size))
        return x.expand(*x.shape[:-3], pieces, pieces, size).flatten(-4, -2)

    def matrices(x: Tensor) -> Tensor:
        """(B, H, N, N) -> (B, H * keys * values, 64, 64)"""
        x = F.pad(x, (0, missing, 0, missing)).unflatten(3, (pieces, size)).unflatten(2, (pieces, size))
        return x.transpose(3, 4).flatten(1, 3)

    initial = None if initial is None else matrices(initial)
    y, state = wkv_cuda(by_key(r), by_key(k), by_value(v), by_key(w), by_key(u), matrices(state), starts, initial)
    y = y.unflatten(2, (H, pieces, pieces)).sum(3).flatten(3)[..., :N].to(r.dtype)
    state = state.unflatten(1, (H, pieces, pieces)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return y, state[..., :N, :N]


def compile_kernels(device: int, dtype: torch.dtype, channels: int) -> None:
    """Builds the kernels of both directions, so that no later call compiles; raises KernelsUnavailable."""
    if channels > HEAD_SIZES[-1]:
        dtype, channels = torch.float32, HEAD_SIZES[-1]
    for source in ("wkv_forward.cu", "wkv_backward.cu"):
        _gpu(device).load(source, compiler_options(channels, dtype))


class _WKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        r, k, v, w, u, _, starts, initial = inputs
        y, final, kept = torch.ops.infctx.wkv_forward(*inputs, True)
        ctx.save_for_backward(r, k, v, w, u, starts, initial, kept)
        return y, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        r, k, v, w, u, starts, initial, kept = ctx.saved_tensors
        learns = ctx.needs_input_grad[7]
        gradients = torch.ops.infctx.wkv_backward(r, k, v, w, u, starts, initial, kept, dy, dfinal, learns)
        *gradients, dinitial = gradients
        gradients = (*gradients, None, dinitial)
        return tuple(x if needed else None for x, needed in zip(gradients, ctx.needs_input_grad, strict=True))


# ---- the two ops ----

_library = torch.library.Library("infctx", "DEF")
_library.define(
    "wkv_forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state, Tensor? starts, Tensor? initial, "
    "bool keep) -> (Tensor y, Tensor final, Tensor kept)"
)
_library.define(
    "wkv_backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? starts, Tensor? initial, Tensor kept, "
    "Tensor dy, Tensor dfinal, bool learns) -> "
    "(Tensor dr, Tensor dk, Tensor dv, Tensor dw, Tensor du, Tensor dstate, Tensor dinitial)"
)


@torch.library.impl(_library, "wkv_forward", "CUDA")
def _forward_on_gpu(r: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return forward(_gpu(r.device.index), r, *others)


@torch.library.impl(_library, "wkv_backward", "CUDA")
def _backward_on_gpu(r: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return backward(_gpu(r.device.index), r, *others)


@functools.cache
def _gpu(device: int) -> Machine:
    return machine_on(device, find_layout)


def machine_on(device: int, find: Callable[[tuple[int, ...], torch.dtype, Processors, str], Layout]) -> Machine:
    """Returns a GPU; find: finds the layout of a call."""
    check_torch()

    def load(file_name: str, options: tuple[str, ...]) -> Launcher:
        return load_kernels(file_name, device, options)

    processors = processors_of(device)

    def layout(shape: tuple[int, ...], dtype: torch.dtype, direction: str) -> Layout:
        return find(shape, dtype, processors, direction)

    return Machine(load, layout)


def processors_of(device: torch.device | int) -> Processors:
    """Returns the processors of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return Processors(properties.multi_processor_count, properties.shared_memory_per_multiprocessor)


@torch.library.register_fake("infctx::wkv_forward", lib=_library)
def _forward_shapes(r, k, v, w, u, state, starts, initial, keep):
    B, T, H, N = r.shape
    kept = kept_shape(B, T, H, N, r.dtype) if keep else (0,)
    y = torch.empty_like(r, memory_format=torch.contiguous_format)
    return y, state.new_empty(state.shape), state.new_empty(kept)


@torch.library.register_fake("infctx::wkv_backward", lib=_library)
def _backward_shapes(r, k, v, w, u, starts, initial, kept, dy, dfinal, learns):
    dr, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, k, v))
    state = dfinal.new_empty(dfinal.shape)
    return (
        dr,
        dk,
        dv,
        w.new_empty(w.shape),
        u.new_empty(u.shape),
        state,
        dfinal.new_empty(_initial_shape(dfinal, learns)),
    )


def _initial_shape(dfinal: Tensor, learns: bool) -> Sequence[int]:
    return dfinal.shape if learns else (0,)


# ---- the launches ----


def forward(
    machine: Machine,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    starts: Tensor | None,
    initial: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, the final state and, with `keep`, the padded states before each tile for the backward pass."""
    layout = machine.layout(tuple(r.shape), r.dtype, "forward")
    kernels = machine.load("wkv_forward.cu", layout.options)
    r, k, v = layout.inputs(r, k, v)
    w, (initial, initial_heads) = layout.decays(w), layout.initial(initial if starts is not None else None)
    u = layout.bonus(u)
    starts = None if starts is None else starts.contiguous().view(torch.uint8)
    numbers = (*layout.numbers, *w.stride()[:3], initial_heads)
    states = state = layout.matrices(state)
    kept = state.new_empty(layout.kept_shape if keep else (0,))
    row_states, state_step = 1, 0
    if layout.spans > 1:
        sums, decays = _span_buffers(layout, state)
        spans = (k, v, w, starts, initial, sums, decays, *numbers)
        launch_spans(kernels, "wkv_sum_spans", layout, span_shared_bytes(layout), spans)
        if keep:
            states, row_states, state_step = kept, layout.tiles, layout.span_tokens // layout.tile_tokens
        else:
            states, row_states, state_step = new_matrices(layout, state, layout.spans), layout.spans, 1
        ends = (states, row_states, state_step)
        _launch_join(kernels, "wkv_join_spans", layout, state, sums, decays, *ends)
    y = layout.tokens_like(r)
    final = state.new_empty(state.shape)
    arguments = (r, k, v, w, u, states, starts, initial, y, final, kept if keep else None, *numbers)
    arguments = (*arguments, row_states, state_step)
    grid, block = layout.rows * layout.spans, 64 * layout.warps
    if grid:  # the driver refuses an empty launch
        kernels.launch("wkv_forward", grid, block, forward_shared_bytes(layout), arguments)
    return layout.whole(y), layout.unpadded(final), kept


def backward(
    machine: Machine,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    starts: Tensor | None,
    initial: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dfinal: Tensor,
    learns: bool,
) -> tuple[Tensor, ...]:
    """Returns the gradients of r, k, v, w, u, the state and, with `learns`, the initial state."""
    layout = machine.layout(tuple(r.shape), r.dtype, "backward")
    kernels = machine.load("wkv_backward.cu", layout.options)
    r, k, v, dy = layout.inputs(r, k, v, dy)
    w, (initial, initial_heads) = layout.decays(w), layout.initial(initial if starts is not None else None)
    u = layout.bonus(u)
    starts = None if starts is None else starts.contiguous().view(torch.uint8)
    numbers = (*layout.numbers, *w.stride()[:3])
    gradients = dfinal = layout.matrices(dfinal)
    if layout.spans > 1:
        sums, decays = _span_buffers(layout, dfinal)
        gradients = new_matrices(layout, dfinal, layout.spans)
        spans = (r, dy, w, starts, sums, decays, *numbers)
        launch_spans(kernels, "wkv_sum_span_gradients", layout, span_shared_bytes(layout), spans)
        _launch_join(kernels, "wkv_join_span_gradients", layout, dfinal, sums, decays, gradients, layout.spans, 1)
    dr, dk, dv = (layout.tokens_like(r) for _ in range(3))
    dw = layout.tokens_like(r, dtype=torch.float32)
    chunks = -(-layout.tokens // CHUNK_TOKENS)
    du = r.new_empty((layout.batch * chunks, *u.shape), dtype=torch.float32)
    dstate = dfinal.new_empty(dfinal.shape)
    dinitial = zeros_by_span(layout, dfinal) if learns and starts is not None else None
    arguments = (r, k, v, w, u, dy, gradients, starts, initial, kept, dr, dk, dv, dw, du, dstate, dinitial)
    grid, block = layout.rows * layout.spans, 128 * layout.warps
    if grid:
        all_arguments = (*arguments, *numbers, initial_heads)
        kernels.launch("wkv_backward", grid, block, backward_shared_bytes(layout), all_arguments)
    dr, dk, dv, dw = (layout.whole(x) for x in (dr, dk, dv, dw))
    du = du.sum(0)[..., : layout.channels].contiguous()
    return dr, dk, dv, dw, du, layout.unpadded(dstate), sum_over_spans(layout, dfinal, dinitial, learns)


def _span_buffers(layout: Layout, state: Tensor) -> tuple[Tensor, Tensor]:
    """Allocates, for all spans but one, the state that a span adds and its decay of the state before it."""
    count = layout.spans - 1
    return new_matrices(layout, state, count), state.new_empty((layout.rows, count, layout.head_size))


def _launch_join(
    kernels: Launcher,
    name: str,
    layout: Layout,
    outside: Tensor,
    sums: Tensor,
    decays: Tensor,
    ends: Tensor,
    row_ends: int,
    end_step: int,
) -> None:
    block = 256
    grid = -(-outside.numel() // block)
    arguments = (outside, sums, decays, ends, layout.rows, layout.spans - 1, row_ends, end_step)
    kernels.launch(name, grid, block, 0, arguments)


# ---- what the launches of RWKV-7 share ----


def new_matrices(layout: Layout, like: Tensor, count: int) -> Tensor:
    """Allocates that many matrices for each head."""
    return like.new_empty((layout.rows, count, layout.head_size, layout.head_size))


def zeros_by_span(layout: Layout, like: Tensor) -> Tensor:
    """Returns zeros for each span to add its gradient of the initial state to."""
    return like.new_zeros((layout.batch, layout.heads, layout.spans, layout.head_size, layout.head_size))


def sum_over_spans(layout: Layout, like: Tensor, by_span: Tensor | None, learns: bool) -> Tensor:
    """Returns the gradient of the initial state: zeros if no document starts, nothing unless it learns."""
    if not learns:
        return like.new_empty(0)
    return layout.unpadded((zeros_by_span(layout, like) if by_span is None else by_span).sum(2))


def launch_spans(
    kernels: Launcher, name: str, layout: Layout, shared_bytes: int, arguments: Sequence[Argument]
) -> None:
    """Launches a block for each span but one."""
    kernels.launch(name, layout.rows * (layout.spans - 1), 32 * layout.warps, shared_bytes, arguments)
