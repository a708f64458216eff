"""Lays out a call of the WKV kernels: time in spans, padding, shared memory, memory traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 16
"""Tokens that a warp processes together; a document may start at each multiple."""

SPAN_TOKENS = 64
"""Spans are multiples of this many tokens, which is whole tiles for every type of input."""

TILE_TOKENS = {torch.bfloat16: 64, torch.float32: 32}
"""Tokens between two states that are kept for the backward pass."""

HEAD_SIZES = (16, 32, 64)
"""Channels per head that kernels exist for; other heads are padded with zeros."""


def padded_size(channels: int) -> int:
    """Returns the channels of a head as the kernels need them, including zeros."""
    return next(size for size in HEAD_SIZES if size >= channels)


@dataclass(frozen=True)
class Layout:
    """The layout of a call in one direction; `cut` makes one."""

    batch: int
    tokens: int
    heads: int
    channels: int
    dtype: torch.dtype
    head_size: int
    spans: int
    span_tokens: int

    @property
    def options(self) -> tuple[str, ...]:
        """Options for the compiler."""
        return compiler_options(self.channels, self.dtype)

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    @property
    def warps(self) -> int:
        return self.head_size // 16

    @property
    def numbers(self) -> tuple[int, ...]:
        return (self.batch, self.tokens, self.heads, self.spans, self.span_tokens)

    @property
    def tile_tokens(self) -> int:
        """The state is kept every this many tokens."""
        return TILE_TOKENS[self.dtype]

    @property
    def tiles(self) -> int:
        return -(-self.tokens // self.tile_tokens)

    @property
    def kept_shape(self) -> tuple[int, ...]:
        return kept_shape(self.batch, self.tokens, self.heads, self.channels, self.dtype)

    def forward_bytes(self, keep: bool = True) -> float:
        """Returns bytes read and written in device memory per token and head, without any cache hits."""
        size, row = self.head_size, self.head_size * self.dtype.itemsize
        state, w = 4 * size**2, 4 * size
        again = (self.spans - 1) * self.span_tokens / self.tokens  # the last one is not summed
        by_token = 4 * row + w + again * (2 * row + w)
        states = (self.tiles if keep else 0) + 2  # the first is read, the final one is written
        if self.spans > 1:
            # Sums are written and read; ends are read, and written unless they are kept anyway.
            states += 2 * (self.spans - 1) + self.spans * (1 if keep else 2)
        return by_token + states * state / self.tokens

    def backward_bytes(self) -> float:
        """Returns the same for the backward pass."""
        size, row = self.head_size, self.head_size * self.dtype.itemsize
        state, w = 4 * size**2, 4 * size
        again = 1 - self.span_tokens / self.tokens if self.spans > 1 else 0.0  # the first one is not
        by_token = 7 * row + 2 * w + again * (2 * row + w) + 2 * w / CHUNK_TOKENS
        states = self.tiles + 2
        if self.spans > 1:
            states += 2 * (self.spans - 1) + 2 * self.spans
        return by_token + states * state / self.tokens

    def tokens_like(self, r: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Allocates padded results by token."""
        return r.new_empty((self.batch, self.tokens, self.heads, self.head_size), dtype=dtype or self.dtype)

    def whole(self, x: Tensor) -> Tensor:
        """Returns results by token without padding."""
        return x[..., : self.channels].contiguous()

    @property
    def is_padded(self) -> bool:
        return self.head_size != self.channels

    def inputs(self, *tensors: Tensor) -> list[Tensor]:
        """Returns inputs by token, contiguous and padded with zeros."""
        missing = self.head_size - self.channels
        return [_aligned(F.pad(x, (0, missing)) if missing else x.contiguous()) for x in tensors]

    def decays(self, w: Tensor) -> Tensor:
        """Returns decays with any strides, except that channels are contiguous."""
        missing = self.head_size - self.channels
        if missing:
            return F.pad(w, (0, missing))
        fits = w.stride(3) == 1 and all(stride % 2 == 0 for stride in w.stride()[:3]) and w.data_ptr() % 8 == 0
        return w if fits else w.clone(memory_format=torch.contiguous_format)

    def matrices(self, x: Tensor) -> Tensor:
        missing = self.head_size - self.channels
        return _aligned(F.pad(x, (0, missing, 0, missing)) if missing else x.contiguous())

    def initial(self, initial: Tensor | None) -> tuple[Tensor | None, int]:
        """Returns the matrices, and the number of heads from one lane to the next."""
        if initial is None:
            return None, 0
        if initial.stride(0) == 0 or self.batch == 1:
            return self.matrices(initial[:1]), 0
        return self.matrices(initial), self.heads

    def bonus(self, u: Tensor) -> Tensor:
        missing = self.head_size - self.channels
        return _aligned(F.pad(u, (0, missing)) if missing else u.contiguous())

    def unpadded(self, x: Tensor) -> Tensor:
        return x[..., : self.channels, : self.channels].contiguous() if self.is_padded else x


def kept_shape(batch: int, tokens: int, heads: int, channels: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Returns the padded shape of the states kept for the backward, (B, H, tiles, N, N); sizes may be symbolic."""
    size = padded_size(channels)
    return batch, heads, -(-tokens // TILE_TOKENS[dtype]), size, size


def cut(shape: Sequence[int], dtype: torch.dtype, spans: int) -> Layout:
    """Cuts time into at most that many spans, all of one length but the last, which may be shorter.

    shape: (B, T, H, N) of r
    """
    batch, tokens, heads, channels = shape
    units = -(-tokens // SPAN_TOKENS)
    span_units = -(-units // spans)
    span_tokens = span_units * SPAN_TOKENS
    return Layout(batch, tokens, heads, channels, dtype, padded_size(channels), -(-units // span_units), span_tokens)


def compiler_options(channels: int, dtype: torch.dtype) -> tuple[str, ...]:
    """Returns options for the compiler: heads of that many channels, and the type of r, k, v and y."""
    return (f"-DHEAD_SIZE={padded_size(channels)}", *(["-DINPUT_FLOAT"] if dtype == torch.float32 else []))


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _value_pitch(layout: Layout) -> int:
    return layout.head_size + (8 if layout.dtype == torch.bfloat16 else 4)


def _staged_bytes(layout: Layout, staged: int, levels: int, scores: int) -> int:
    """Returns bytes of shared memory as in wkv_reader.cuh; every level also has bonuses."""
    size = layout.head_size
    one_staged = 16 * (size + 8 + size + 4) + size
    one_level = 4 * 16 * (size + 8) + 16 * layout.warps
    return 4 * (staged * one_staged + levels * one_level + scores * 16 * 24)


def forward_shared_bytes(layout: Layout) -> int:
    values = 4 * CHUNK_TOKENS * _value_pitch(layout) * layout.dtype.itemsize
    return values + _staged_bytes(layout, staged=3, levels=2, scores=2)


def backward_shared_bytes(layout: Layout) -> int:
    tile = layout.tile_tokens // CHUNK_TOKENS
    chunks = (8 if tile > 2 else 3) + 2  # of v and of dy
    values = chunks * CHUNK_TOKENS * _value_pitch(layout) * layout.dtype.itemsize
    outside = 2 * 4 * (2 * CHUNK_TOKENS + 1) * layout.head_size
    others = 4 * layout.head_size + 64  # u, places, where documents start
    return values + 4 * layout.head_size**2 + outside + others + _staged_bytes(layout, staged=2, levels=1, scores=4)


def span_shared_bytes(layout: Layout) -> int:
    return 4 * CHUNK_TOKENS * _value_pitch(layout) * layout.dtype.itemsize
