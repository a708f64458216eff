"""Lays out a call of the RWKV-7 kernels: shared memory, memory traffic, and the number of spans by a model of time.

What goes in is a problem's shape and the processors of a GPU, what comes out is a `Layout`, as for RWKV-6.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from infctx.cuda.wkv_layout import CHUNK_TOKENS, SPAN_TOKENS, Layout, cut
from infctx.cuda.wkv_time import Processors, blocks_at_once

SCORES_BYTES = 4 * 4 * CHUNK_TOKENS * 24
"""Four matrices of scores, as in wkv7_reader.cuh."""


@dataclass(frozen=True)
class Costs:
    """What one direction costs on an H100, at 64 channels of bf16: computed by `tools/machine_code.py --replay` at
    1,755 MHz, and not yet measured.

    run, sum: microseconds for a chunk, where a processor has one block of the run, or of the sums of spans
    crowd:    the share of that time that a second block on the processor adds
    megabyte: microseconds for a million bytes read or written, as for RWKV-6
    registers: of a lane of the run, on sm_90
    """

    run: float
    sum: float
    crowd: float
    megabyte: float
    registers: int


COSTS = {
    "forward": Costs(run=3.36, sum=3.24, crowd=0.3, megabyte=0.25, registers=168),
    "backward": Costs(run=11.4, sum=3.3, crowd=0.25, megabyte=0.29, registers=184),
}
JOIN_SPAN = 1.5
"""Microseconds for a span that is joined: a product of two matrices, computed in the same way."""
SUM_REGISTERS = 216
MOST_WAVES = 4
"""More blocks than this many for each place on the GPU are not tried."""


@functools.lru_cache(maxsize=1024)
def find_layout7(shape: tuple[int, ...], dtype: torch.dtype, processors: Processors, direction: str) -> Layout:
    """Returns the layout with the shortest modeled time for a direction, "forward" or "backward".

    shape: (B, T, H, N) of r; heads of at most 64 channels
    """
    units = -(-shape[1] // SPAN_TOKENS)
    most = min(units, max(1, MOST_WAVES * processors.count // max(1, shape[0] * shape[2])))
    layouts = (cut(shape, dtype, spans) for spans in range(1, most + 1))
    return min(layouts, key=lambda layout: microseconds(layout, processors, direction))


def microseconds(layout: Layout, processors: Processors, direction: str) -> float:
    """Returns the modeled time: spans that run in waves, their sums before that, the join, and memory traffic."""
    costs, threads = COSTS[direction], 32 * layout.warps
    shared_bytes, traffic = {
        "forward": (forward_shared_bytes, forward_bytes),
        "backward": (backward_shared_bytes, backward_bytes),
    }[direction]
    chunks = -(-min(layout.span_tokens, layout.tokens) // CHUNK_TOKENS)

    def waves(blocks: int, registers: int, block_bytes: int) -> float:
        slots = blocks_at_once(processors, threads, registers, block_bytes)
        full, rest = divmod(-(-blocks // processors.count), slots)
        return full * (1 + costs.crowd * (slots - 1)) + (1 + costs.crowd * (rest - 1) if rest else 0)

    time = costs.megabyte * traffic(layout) * layout.rows * layout.tokens / 1e6
    time += costs.run * chunks * waves(layout.rows * layout.spans, costs.registers, shared_bytes(layout))
    if layout.spans > 1:
        time += costs.sum * chunks * waves(layout.rows * (layout.spans - 1), SUM_REGISTERS, span_shared_bytes(layout))
        time += JOIN_SPAN * layout.spans
    return time


# ---- memory traffic: bytes read and written in device memory per token and head, without any cache hits ----


def forward_bytes(layout: Layout, keep: bool = True) -> float:
    """r w k v a b and y; the states and inner values that are kept; with several spans w k v a b again, and their sums,
    transitions and ends."""
    row, exact = layout.head_size * layout.dtype.itemsize, 4 * layout.head_size
    by_token: float = 6 * row + exact + (exact if keep else 0)
    if layout.spans > 1:
        by_token += (layout.spans - 1) * layout.span_tokens / layout.tokens * (4 * row + exact)
    return by_token + _states_bytes(layout, layout.tiles if keep else 0, kept_ends=keep)


def backward_bytes(layout: Layout) -> float:
    """r w k v a b dy, the kept states and inner values, dr dw dk dv da db; with several spans r w a b dy again."""
    row, exact = layout.head_size * layout.dtype.itemsize, 4 * layout.head_size
    by_token: float = 11 * row + 3 * exact
    if layout.spans > 1:
        by_token += (1 - layout.span_tokens / layout.tokens) * (4 * row + exact)
    return by_token + _states_bytes(layout, layout.tiles, kept_ends=False)


def _states_bytes(layout: Layout, kept: int, kept_ends: bool) -> float:
    states = kept + 2  # the first is read, the last one is written
    if layout.spans > 1:
        # Sums and transitions are written and read; ends are read, and written unless they are kept anyway.
        states += 4 * (layout.spans - 1) + layout.spans * (1 if kept_ends else 2)
    return states * 4 * layout.head_size**2 / layout.tokens


# ---- shared memory, as in the .cu and .cuh files ----


def forward_shared_bytes(layout: Layout) -> int:
    return 2 * _values_bytes(layout) + _chunk_bytes(layout)


def span_shared_bytes(layout: Layout) -> int:
    return forward_shared_bytes(layout)


def join_shared_bytes(layout: Layout) -> int:
    return 2 * 4 * layout.head_size * 16


def backward_shared_bytes(layout: Layout) -> int:
    chunks, place = layout.tile_tokens // CHUNK_TOKENS, 32
    return place + chunks * (2 * _values_bytes(layout) + _floats_bytes(layout)) + _chunk_bytes(layout)


def _chunk_bytes(layout: Layout) -> int:
    """Returns bytes of a staged chunk, its levels, bonuses and scores."""
    size = layout.head_size
    staged = 2 * CHUNK_TOKENS * (size + 8 + size + 4) + size
    levels = 2 * 4 * CHUNK_TOKENS * (size + 8)
    bonuses = 2 * CHUNK_TOKENS * layout.warps
    return 4 * (staged + levels + bonuses) + SCORES_BYTES


def _values_bytes(layout: Layout) -> int:
    """Returns bytes of a chunk of inputs."""
    pad = 8 if layout.dtype == torch.bfloat16 else 4
    return CHUNK_TOKENS * (layout.head_size + pad) * layout.dtype.itemsize


def _floats_bytes(layout: Layout) -> int:
    return CHUNK_TOKENS * (layout.head_size + 4) * 4
