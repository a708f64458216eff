"""Dropout that is drawn from places instead of a random generator.

Whether an input is set to zero is a function of the seed, the step, the lane, the token's place in its window, the
adapter and the channel.  So both passes over a segment, its recomputation, any cut into segments and any number of
ranks see the same mask, and a resumed run draws what it would have drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

# splitmix64 (Steele, Lea and Flood 2014): its increment, and the two factors of its mixing, as signed numbers.
STEP = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST, SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
ADAPTERS = 1 << 32
"""Distance of the numbers of two adapters' first channels: more than any adapter has channels."""


def row_keys(seed: int, step: int, lanes: range, num_tokens: int, device: torch.device) -> Tensor:
    """Returns a number for each token of some lanes in a step's window: (B, T) int64."""
    key = torch.full((1, 1), seed, dtype=torch.int64, device=device)
    numbers = (
        torch.tensor([[step]], device=device),
        torch.arange(lanes.start, lanes.stop, device=device)[:, None],
        torch.arange(num_tokens, device=device)[None],
    )
    for number in numbers:
        key = _mixed(key + number * STEP)
    return key


def kept(rows: Tensor, adapter: int, width: int, rate: float) -> Tensor:
    """Returns which inputs of an adapter stay (B, T, width), bool: on average all but the share `rate`."""
    columns = _mixed((adapter * ADAPTERS + torch.arange(width, device=rows.device)) * STEP)
    return _mixed(rows[..., None] + columns) >= round(rate * 2**64) - (1 << 63)


def _mixed(x: Tensor) -> Tensor:
    """Mixes all 64 bits; products wrap."""
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, count: int) -> Tensor:
    """Shifts to the right, with zeros from the left."""
    return (x >> count) & ((1 << 64 - count) - 1)
