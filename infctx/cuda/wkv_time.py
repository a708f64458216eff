"""The time of a call of the WKV kernels, as a model; from it, the number of spans that time is cut into.

What goes in is a problem's shape and the processors of a GPU, what comes out is the `Layout` with the shortest time.
Times are those of an H100, at 64 channels of bf16; elsewhere they serve to compare one number of spans with another.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from infctx.cuda.wkv_layout import (
    CHUNK_TOKENS,
    SPAN_TOKENS,
    Layout,
    backward_shared_bytes,
    cut,
    forward_shared_bytes,
    span_shared_bytes,
)

SMALLEST_SHARED_BYTES = 100 * 1024
"""Shared memory of a processor of compute capability 8.6, 8.9 or 12.0."""

BLOCK_SHARED_BYTES = 1024
"""Shared memory that a block takes besides what it asks for."""

PROCESSOR_REGISTERS = 65_536


@dataclass(frozen=True)
class Processors:
    """The multiprocessors of a GPU: how many, and the bytes of shared memory of each."""

    count: int
    shared_bytes: int = SMALLEST_SHARED_BYTES


@dataclass(frozen=True)
class Costs:
    """What one direction costs.

    run, sum:  microseconds for a chunk, where a processor has one block of the run, or of the sums of spans
    crowd:     each further block of the run on a processor adds this share of the time of one
    begin:     what a span costs besides its chunks, in chunks
    megabyte:  microseconds for a million bytes read or written
    roles:     warps of the run for each slab
    registers: of a lane of the run
    """

    run: float
    crowd: float
    sum: float
    begin: float
    megabyte: float
    roles: int
    registers: int


# Of commit 2681cb9, fitted to its 24 times for each direction in docs/benchmarks/wkv-nvidia-h100-80gb-hbm3.md, by least
# squares of the relative errors, which are 1.4 % (forward, to train) and 1.0 % (backward) on average and 7 % at most.
FITTED = {
    "forward": Costs(run=1.82, crowd=0.045, sum=0.76, begin=3.75, megabyte=0.159, roles=1, registers=168),
    "backward": Costs(run=3.40, crowd=0.0, sum=0.76, begin=1.2, megabyte=0.291, roles=2, registers=255),
}

# The kernels of today have not been timed.  Their times of a chunk are the fitted ones times the ratio of the cycles
# that `tools/machine_code.py --replay` finds for it; all else is as fitted.
CYCLES = {"forward": ((3323, 4588), (1815, 2676)), "backward": ((7482,), (3580,))}
"""Of the run, of 2681cb9 and today, by blocks on a processor."""
SUM_CYCLES = {"forward": (2072, 1778), "backward": (1937, 1729)}
"""Of the sums, with one block."""


def _scaled(direction: str, roles: int, registers: int) -> Costs:
    fitted, (before, now) = FITTED[direction], CYCLES[direction]
    run = fitted.run * now[0] / before[0]
    of_two = fitted.run * (1 + fitted.crowd) * now[-1] / before[-1]
    sum_before, sum_now = SUM_CYCLES[direction]
    sums = fitted.sum * sum_now / sum_before
    return replace(fitted, run=run, crowd=of_two / run - 1, sum=sums, roles=roles, registers=registers)


COSTS = {"forward": _scaled("forward", 2, 128), "backward": _scaled("backward", 4, 128)}
LAUNCHES = {"forward": 8.8, "backward": 31.1}
"""Microseconds of a call however it is cut, from the same fit."""

SUM_CROWD = 0.2
JOIN_SPAN = 0.3
"""The same for sums, and microseconds for a span that is joined.  No measured call depends on them, so these are
guesses; `tools/machine_code.py --replay` says 0.1 for the first, without the queues of the memory."""
SUM_REGISTERS = 128
MOST_WAVES = 20
"""More blocks than this many for each place on the GPU are not tried: the last wave is a small part then."""


@functools.lru_cache(maxsize=1024)
def find_layout(shape: tuple[int, ...], dtype: torch.dtype, processors: Processors, direction: str) -> Layout:
    """Returns the layout with the shortest time for a direction, "forward" or "backward".

    shape: (B, T, H, N) of r; heads of at most 64 channels
    """
    return min(_layouts(shape, dtype, processors), key=lambda layout: microseconds(layout, processors, direction))


def microseconds(
    layout: Layout, processors: Processors, direction: str, all_costs: Mapping[str, Costs] = COSTS
) -> float:
    """Returns the modeled time: spans that run in waves, their sums before that, the join, and memory traffic."""
    costs, threads = all_costs[direction], 32 * layout.warps
    shared_bytes = forward_shared_bytes(layout) if direction == "forward" else backward_shared_bytes(layout)
    run_slots = blocks_at_once(processors, costs.roles * threads, costs.registers, shared_bytes)
    traffic = layout.forward_bytes() if direction == "forward" else layout.backward_bytes()
    chunks = min(layout.span_tokens, layout.tokens) / CHUNK_TOKENS + costs.begin
    time = LAUNCHES[direction] + costs.megabyte * traffic * layout.rows * layout.tokens / 1e6
    time += costs.run * chunks * _waves(layout.rows * layout.spans, processors, run_slots, costs.crowd)
    if layout.spans > 1:
        slots = blocks_at_once(processors, threads, SUM_REGISTERS, span_shared_bytes(layout))
        time += costs.sum * chunks * _waves(layout.rows * (layout.spans - 1), processors, slots, SUM_CROWD)
        time += JOIN_SPAN * layout.spans
    return time


def _layouts(shape: tuple[int, ...], dtype: torch.dtype, processors: Processors) -> Iterator[Layout]:
    """Yields every way to cut time into spans of one length, with few spans first."""
    units = -(-shape[1] // SPAN_TOKENS)
    most = min(units, max(1, MOST_WAVES * processors.count // max(1, shape[0] * shape[2])))
    spans = 1
    while spans <= most:
        yield cut(shape, dtype, spans)
        span_units = -(-units // spans)
        # The fewest spans of a smaller length.
        spans = -(-units // (span_units - 1)) if span_units > 1 else most + 1


def blocks_at_once(processors: Processors, threads: int, registers: int, shared_bytes: int) -> int:
    """Returns how many blocks a processor has room for."""
    by_registers = PROCESSOR_REGISTERS // (threads * -(-registers // 8) * 8)
    return max(1, min(by_registers, processors.shared_bytes // (shared_bytes + BLOCK_SHARED_BYTES)))


def _waves(blocks: int, processors: Processors, slots: int, crowd: float) -> float:
    """Returns the time of that many blocks, in times of one."""
    by_processor = -(-blocks // processors.count)
    full, rest = divmod(by_processor, slots)
    return full * (1 + crowd * (slots - 1)) + (1 + crowd * (rest - 1) if rest else 0)
