"""WKV on a GPU: the kernels of wkv_forward.cu and wkv_backward.cu as one op of torch.

    y, state = wkv_cuda(r, k, v, w, u, state, starts, initial)

Long inputs are cut into spans that run side by side: first each span finds what it leaves of itself, then one pass over
the spans finds what each begins with, then all of them run.  README.md has the derivation.  torch.compile, CUDA graphs
and opcheck see two ops, `infctx::wkv_forward` and `infctx::wkv_backward`, which also serve other machines than a GPU:
the tests run them on the CPU with the emulator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from infctx.cuda.driver import Argument, load_kernels
from infctx.errors import InputError

CHUNK_TOKENS = 16
"""Tokens that a warp takes at once; a document may start at each multiple of them."""

SPAN_TOKENS = 64
"""Spans are multiples of this many tokens: of whole tiles, of every type of inputs."""

MAX_FILLED_SPANS = 3
"""Spans of a head where the heads alone fill a quarter of the processors: more would cost more memory traffic than
they gain, for each reads k, v and w once more."""


class Launcher(Protocol):
    """The kernels of one source: of a GPU (`driver.Kernels`), or of the tests' emulator."""

    def launch(
        self, name: str, grid: int, block: int, shared_bytes: int = 0, arguments: Sequence[Argument] = ()
    ) -> None: ...


@dataclass(frozen=True)
class Machine:
    """Where kernels run: `load(file_name, options)` gives those of a source; `processors` is how many blocks of
    threads can run at a time."""

    load: Callable[[str, tuple[str, ...]], Launcher]
    processors: int


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
    """See `infctx.wkv`; r, k and v in bf16 or fp32; gradients of first order only.

    Raises KernelsUnavailable where the kernels cannot be had.  The same input gives the same bits on the same device.
    """
    if r.dtype not in (torch.bfloat16, torch.float32):
        raise InputError(f"wkv: backend 'cuda' takes bf16 and fp32, not {r.dtype}; choose chunked")
    return _WKV.apply(r, k, v, w, u.float(), state, starts, initial)


class _WKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        r, k, v, w, u, _, starts, initial = inputs
        keep = any(ctx.needs_input_grad)
        y, final, kept = torch.ops.infctx.wkv_forward(*inputs, keep)
        if keep:
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
    def load(file_name: str, options: tuple[str, ...]) -> Launcher:
        return load_kernels(file_name, device, options)

    return Machine(load, torch.cuda.get_device_properties(device).multi_processor_count)


@torch.library.register_fake("infctx::wkv_forward", lib=_library)
def _forward_shapes(r, k, v, w, u, state, starts, initial, keep):
    B, T, H, N = r.shape
    kept = (B, H, -(-T // _tile_tokens(r.dtype)), *[Cut.of(N).head_size] * 2) if keep else (0,)
    return torch.empty_like(r, memory_format=torch.contiguous_format), torch.empty_like(state), state.new_empty(kept)


@torch.library.register_fake("infctx::wkv_backward", lib=_library)
def _backward_shapes(r, k, v, w, u, starts, initial, kept, dy, dfinal, learns):
    dr, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, k, v))
    state = dfinal.new_empty(dfinal.shape)
    return dr, dk, dv, w.new_empty(w.shape), u.new_empty(u.shape), state, dfinal.new_empty(_initial_shape(dfinal, learns))


def _initial_shape(dfinal: Tensor, learns: bool) -> Sequence[int]:
    return dfinal.shape if learns else (0,)


# ---- what the kernels want ----


@dataclass(frozen=True)
class Cut:
    """A head of `head_size` channels, zeros among them, in `pieces` times as many pieces of `piece_size`."""

    head_size: int
    piece_size: int

    @property
    def pieces(self) -> int:
        return self.head_size // self.piece_size

    @staticmethod
    def of(channels: int) -> Cut:
        if channels <= 64:
            size = -(-channels // 16) * 16
            return Cut(size, size)
        # Zeros cost as much as numbers; of two ways with as many, the one with fewer pieces.
        size = min((64, 48), key=lambda piece: -(-channels // piece) * piece)
        return Cut(-(-channels // size) * size, size)


@dataclass(frozen=True)
class Layout:
    """What both directions know of a call."""

    batch: int
    tokens: int
    heads: int
    channels: int
    dtype: torch.dtype
    cut: Cut
    spans: int
    span_tokens: int

    @staticmethod
    def of(r: Tensor, processors: int) -> Layout:
        B, T, H, N = r.shape
        cut = Cut.of(N)
        spans, span_tokens = find_spans(B * H * cut.pieces**2, T, processors)
        return Layout(B, T, H, N, r.dtype, cut, spans, span_tokens)

    @property
    def options(self) -> tuple[str, ...]:
        """For the compiler."""
        options = [f"-DHEAD_SIZE={self.cut.piece_size}"]
        options += ["-DINPUT_FLOAT"] * (self.dtype == torch.float32) + ["-DHEAD_IN_PIECES"] * (self.cut.pieces > 1)
        return tuple(options)

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    @property
    def warps(self) -> int:
        return self.cut.piece_size // 16

    @property
    def numbers(self) -> tuple[int, ...]:
        return (self.batch, self.tokens, self.heads, self.cut.head_size, self.spans, self.span_tokens)

    def blocks(self, spans: int) -> int:
        return self.rows * spans * self.cut.pieces**2

    def tokens_like(self, r: Tensor, parts: bool = True, dtype: torch.dtype | None = None) -> Tensor:
        """Room for results by token: (B, T, H, N), or a part for each piece, which are fp32."""
        shape = (self.batch, self.tokens, self.heads, self.cut.head_size)
        if parts and self.cut.pieces > 1:
            return r.new_empty((self.cut.pieces, *shape), dtype=torch.float32)
        return r.new_empty(shape, dtype=dtype or self.dtype)

    def whole(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Results by token as the caller knows them: parts added up, padding gone."""
        if x.ndim == 5:
            x = x.sum(0)
        return x[..., : self.channels].to(dtype) if self.is_padded or x.dtype != dtype else x

    @property
    def is_padded(self) -> bool:
        return self.cut.head_size != self.channels

    def inputs(self, *tensors: Tensor) -> list[Tensor]:
        """By token, each in one piece of memory, padded with zeros."""
        missing = self.cut.head_size - self.channels
        return [_aligned(F.pad(x, (0, missing)) if missing else x.contiguous()) for x in tensors]

    def decays(self, w: Tensor) -> Tensor:
        """Any strides but over channels, which lie side by side."""
        missing = self.cut.head_size - self.channels
        if missing:
            return F.pad(w, (0, missing))
        fits = w.stride(3) == 1 and all(stride % 2 == 0 for stride in w.stride()[:3]) and w.data_ptr() % 8 == 0
        return w if fits else w.clone(memory_format=torch.contiguous_format)

    def matrices(self, x: Tensor) -> Tensor:
        missing = self.cut.head_size - self.channels
        return _aligned(F.pad(x, (0, missing, 0, missing)) if missing else x.contiguous())

    def initial(self, initial: Tensor | None) -> tuple[Tensor | None, int]:
        """The matrices, and the heads from one lane's to the next."""
        if initial is None:
            return None, 0
        if initial.stride(0) == 0 or self.batch == 1:
            return self.matrices(initial[:1]), 0
        return self.matrices(initial), self.heads

    def unpadded(self, x: Tensor) -> Tensor:
        return x[..., : self.channels, : self.channels].contiguous() if self.is_padded else x


def find_spans(rows: int, num_tokens: int, processors: int) -> tuple[int, int]:
    """Into how many spans each of `rows` heads is cut, and their tokens: enough to give every processor work."""
    longest = -(-num_tokens // SPAN_TOKENS)  # in units of SPAN_TOKENS
    most = min(longest, max(1, processors // rows))
    if rows * 4 >= processors:
        most = min(most, MAX_FILLED_SPANS)
    units = -(-longest // most)
    return -(-longest // units), units * SPAN_TOKENS


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _tile_tokens(dtype: torch.dtype) -> int:
    return 64 if dtype == torch.bfloat16 else 32


def _value_pitch(layout: Layout) -> int:
    return layout.cut.piece_size + (8 if layout.dtype == torch.bfloat16 else 4)


def _staged_bytes(layout: Layout, staged: int, levels: int, scores: int) -> int:
    """Of shared memory, as wkv_reader.cuh lays it out; levels come with as many bonuses."""
    size = layout.cut.piece_size
    one_staged = 16 * (size + 8 + size + 4) + size
    one_level = 4 * 16 * (size + 8) + 16 * layout.warps
    return 4 * (staged * one_staged + levels * one_level + scores * 16 * 24)


def forward_shared_bytes(layout: Layout) -> int:
    values = 4 * CHUNK_TOKENS * _value_pitch(layout) * layout.dtype.itemsize
    return values + _staged_bytes(layout, staged=3, levels=2, scores=2)


def backward_shared_bytes(layout: Layout) -> int:
    tokens = _tile_tokens(layout.dtype)
    values = 2 * tokens * _value_pitch(layout) * layout.dtype.itemsize
    states = 4 * (tokens // 32) * layout.cut.piece_size**2
    return values + states + _staged_bytes(layout, staged=2, levels=1, scores=1 + tokens // CHUNK_TOKENS)


def span_shared_bytes(layout: Layout) -> int:
    return 4 * CHUNK_TOKENS * _value_pitch(layout) * layout.dtype.itemsize


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
    """y, the final state, and with `keep` the states before each tile, (B, H, tiles, N, N) with padding: for backward."""
    layout = Layout.of(r, machine.processors)
    kernels = machine.load("wkv_forward.cu", layout.options)
    r, k, v = layout.inputs(r, k, v)
    w, (initial, initial_heads) = layout.decays(w), layout.initial(initial if starts is not None else None)
    u = F.pad(u, (0, layout.cut.head_size - layout.channels)).contiguous()
    starts = None if starts is None else starts.contiguous().view(torch.uint8)
    numbers = (*layout.numbers, *w.stride()[:3], initial_heads)
    states = state = layout.matrices(state)
    if layout.spans > 1:
        sums, decays, states = _span_buffers(layout, state)
        arguments = (k, v, w, starts, initial, sums, decays, *numbers)
        _launch_spans(kernels, "wkv_sum_spans", layout, arguments)
        _launch_join(kernels, "wkv_join_spans", layout, state, sums, decays, states)
    y = layout.tokens_like(r)
    final = torch.empty_like(state)
    tiles = -(-layout.tokens // _tile_tokens(layout.dtype))
    size = layout.cut.head_size
    kept = state.new_empty((layout.batch, layout.heads, tiles, size, size) if keep else (0,))
    arguments = (r, k, v, w, u, states, starts, initial, y, final, kept if keep else None, *numbers)
    grid, block = layout.blocks(layout.spans), 32 * layout.warps
    kernels.launch("wkv_forward", grid, block, forward_shared_bytes(layout), arguments)
    return layout.whole(y, layout.dtype), layout.unpadded(final), kept


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
    """The gradients of r, k, v, w, u, the state and, with `learns`, the initial state."""
    layout = Layout.of(r, machine.processors)
    kernels = machine.load("wkv_backward.cu", layout.options)
    r, k, v, dy = layout.inputs(r, k, v, dy)
    w, (initial, initial_heads) = layout.decays(w), layout.initial(initial if starts is not None else None)
    u = F.pad(u, (0, layout.cut.head_size - layout.channels)).contiguous()
    starts = None if starts is None else starts.contiguous().view(torch.uint8)
    numbers = (*layout.numbers, *w.stride()[:3])
    gradients = dfinal = layout.matrices(dfinal)
    if layout.spans > 1:
        sums, decays, gradients = _span_buffers(layout, dfinal)
        _launch_spans(kernels, "wkv_sum_span_gradients", layout, (r, dy, w, starts, sums, decays, *numbers))
        _launch_join(kernels, "wkv_join_span_gradients", layout, dfinal, sums, decays, gradients)
    dr, dk, dv = (layout.tokens_like(r) for _ in range(3))
    dw = layout.tokens_like(r, dtype=torch.float32)
    chunks = -(-layout.tokens // CHUNK_TOKENS)
    du = r.new_empty((layout.cut.pieces * layout.batch * chunks, *u.shape), dtype=torch.float32)
    dstate = torch.empty_like(dfinal)
    size = layout.cut.head_size
    matrices = (layout.batch, layout.heads, layout.spans, size, size)
    dinitial = dfinal.new_zeros(matrices) if learns and starts is not None else None
    arguments = (r, k, v, w, u, dy, gradients, starts, initial, kept, dr, dk, dv, dw, du, dstate, dinitial)
    grid, block = layout.blocks(layout.spans), 64 * layout.warps
    kernels.launch("wkv_backward", grid, block, backward_shared_bytes(layout), (*arguments, *numbers, initial_heads))
    dr, dk, dv = (layout.whole(x, layout.dtype) for x in (dr, dk, dv))
    dw = layout.whole(dw, torch.float32)
    du = du.sum(0)[..., : layout.channels].contiguous()
    dinitial = dfinal.new_zeros(matrices) if learns and dinitial is None else dinitial
    dinitial = layout.unpadded(dinitial.sum(2)) if learns else dfinal.new_empty(0)
    return dr, dk, dv, dw, du, layout.unpadded(dstate), dinitial


def _span_buffers(layout: Layout, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the spans but one leave, by how much they decay what was before, and what each of all begins with."""
    size, rows = layout.cut.head_size, layout.rows
    sums = state.new_empty((rows, layout.spans - 1, size, size))
    return sums, state.new_empty((rows, layout.spans - 1, size)), state.new_empty((rows, layout.spans, size, size))


def _launch_spans(kernels: Launcher, name: str, layout: Layout, arguments: Sequence[Argument]) -> None:
    grid = layout.blocks(layout.spans - 1)
    kernels.launch(name, grid, 32 * layout.warps, span_shared_bytes(layout), arguments)


def _launch_join(
    kernels: Launcher, name: str, layout: Layout, outside: Tensor, sums: Tensor, decays: Tensor, ends: Tensor
) -> None:
    block = 256
    grid = -(-outside.numel() // block)
    arguments = (outside, sums, decays, ends, layout.rows, layout.spans - 1, layout.cut.head_size)
    kernels.launch(name, grid, block, 0, arguments)
