"""Axes: the range of the numbers in; places on paper, round ticks and their labels out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from infctx.figures.figure import Axis

STEPS = (1, 2, 2.5, 5, 10)
"""Times a power of ten: the distances between ticks that people read easily."""
LEAST_RANGE = 1e-9
"""Of an axis, as a part of its numbers."""
LEVELS = ((1, 2, 5), (1,))
"""On a logarithmic axis, times powers of ten: densely, or sparsely where the axis is long."""


class Placed(NamedTuple):
    """An axis on paper: from `low` at `begin` to `high` at `end`."""

    axis: Axis
    low: float
    high: float
    begin: float
    end: float
    ticks: list[float]

    def at(self, value: float) -> float:
        """Returns where a number is on paper; numbers outside are at the edge."""
        low, high, value = (self._scaled(number) for number in (self.low, self.high, value))
        part = (value - low) / (high - low)
        return self.begin + min(max(part, 0.0), 1.0) * (self.end - self.begin)

    def label(self, tick: float) -> str:
        return tokens_text(tick) if self.axis.scale == "tokens" else tick_text(tick, self.ticks)

    def _scaled(self, value: float) -> float:
        return value if self.axis.scale == "linear" else math.log(max(value, 1e-300))


def place_axis(axis: Axis, values: Iterable[float], begin: float, end: float, most: int) -> Placed:
    """Returns an axis from `begin` to `end` that has all values, with at most about `most` ticks."""
    given = [value for value in (*values, *axis.include) if math.isfinite(value)]
    if axis.scale != "linear":
        given = [value for value in given if value > 0] or [1.0]
    low, high = (min(given), max(given)) if given else (0.0, 1.0)
    if axis.scale == "tokens":
        return _place_powers(axis, low, high, begin, end, most)
    if axis.scale == "log":
        return _place_log(axis, low, high, begin, end, most)
    if high - low <= abs(high) * LEAST_RANGE:  # as good as equal: floats have no round numbers between them
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    step = round_step((high - low) / most)
    low, high = math.floor(low / step + 1e-9) * step, min(math.ceil(high / step - 1e-9) * step, axis.most)
    ticks = [low + number * step for number in range(round((high - low) / step + 1e-6) + 1)]
    return Placed(axis, low, high, begin, end, [0.0 if abs(tick) < step / 1e6 else tick for tick in ticks])


def round_step(least: float) -> float:
    """Returns the smallest round distance that is at least this large."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in STEPS if step * power >= least * (1 - 1e-9))


def _place_powers(axis: Axis, low: float, high: float, begin: float, end: float, most: int) -> Placed:
    first, last = math.floor(math.log2(low) + 1e-9), math.ceil(math.log2(high) - 1e-9)
    last = max(last, first + 1)
    stride = -(-(last - first + 1) // most)
    ticks = [2.0**power for power in range(first, last + 1) if (last - power) % stride == 0]
    return Placed(axis, 2.0**first, 2.0**last, begin, end, ticks)


def _place_log(axis: Axis, low: float, high: float, begin: float, end: float, most: int) -> Placed:
    if low == high:
        low, high = low / 2, high * 2
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for levels in LEVELS:
        all_ticks = [level * 10.0**power for power in powers for level in levels]
        below = max((tick for tick in all_ticks if tick <= low * (1 + 1e-9)), default=low)
        above = min((tick for tick in all_ticks if tick >= high * (1 - 1e-9)), default=high)
        ticks = [tick for tick in all_ticks if below <= tick <= above]
        if len(ticks) <= most + 1:
            break
    stride = -(-len(ticks) // (most + 1))
    return Placed(axis, below, above, begin, end, ticks[::stride])


def tick_text(tick: float, ticks: Sequence[float]) -> str:
    """Returns a tick's label, with as many decimals as make the ticks differ, or as a power of ten."""
    largest = max(abs(other) for other in ticks)
    if tick == 0:
        return "0"
    if largest < 1e-3 or largest >= 1e7:
        exponent = math.floor(math.log10(abs(tick)) + 1e-9)
        return f"{tick / 10.0**exponent:.3g}e{exponent}"
    if largest >= 10_000 and tick % 1000 == 0:
        return f"{tick / 1e6:g}M" if tick >= 1e6 else f"{tick / 1000:g},000"
    apart = min((abs(later - earlier) for earlier, later in pairwise(ticks)), default=abs(tick))
    decimals = next((digits for digits in range(12) if abs(round(tick, digits) - tick) <= apart / 1000), 12)
    return f"{tick:,.{decimals}f}"


def tokens_text(tokens: float) -> str:
    """Returns a number of tokens, with k for 1,024 and M for 1,048,576 where it is a multiple."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{int(tokens) // size:,}{unit}"
    return f"{tokens:,.0f}"


def value_text(value: float) -> str:
    """Returns a number for people: four significant digits, thousands apart."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
