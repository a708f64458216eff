"""Numbers in 8 bits: blocks of fp32 values to codes and scales, and back.

A block of 256 values has one scale, its largest magnitude, and a code for each value, the number of a fraction of the
scale.  There are fractions down to a millionth, the more of them the larger they are (dynamic quantization, arXiv
2110.02861, section 2.2): between 0.1 and 1 they are 0.007 apart, or 0.014 with a sign, and in each power of ten below
a fifth of that.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 256
"""Values that share a scale."""


def quantize(values: Tensor, signed: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rounds fp32 values (n) to codes (n) uint8 and scales (ceil(n / 256)) fp32.

    Rounds up or down at random, so that the mean of many roundings is the value: an average that moves by less than the
    distance of two codes a step still moves.  A value that is not zero gets no code for zero, so that no moment that
    somebody divides by vanishes.
    signed: whether values may be negative
    """
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).unflatten(0, (-1, BLOCK))
    scales = blocks.abs().amax(1)
    fractions = blocks.div_(scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).flatten()[: len(values)]
    table = _fractions(signed, values.device)
    above = torch.bucketize(fractions, table, out_int32=True).clamp_(1, 255)
    low, high = table[above - 1], table[above]
    draw = torch.rand(fractions.shape, generator=generator, device=values.device)
    codes = above - (draw * (high - low) >= fractions - low).int()
    if not signed:
        codes.clamp_min_((fractions > 0).int())
    return codes.to(torch.uint8), scales


def dequantize(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """Inverts `quantize`: codes (n) and scales to fp32 values (n)."""
    return _fractions(signed, codes.device)[codes.int()].mul_(scales.repeat_interleave(BLOCK)[: len(codes)])


def zero_code(signed: bool) -> int:
    """Returns the code of zero."""
    return int((_fractions(signed, torch.device("cpu")) == 0).nonzero())


@cache
def _fractions(signed: bool, device: torch.device) -> Tensor:
    """Returns the 256 fractions in order: for each power of ten half as many steps as for the one above it."""
    bits = 7 if signed else 8
    positive = [
        10.0**-power * (0.1 + 0.9 * step / 2 ** (bits - 1 - power))
        for power in range(bits)
        for step in range(1, 2 ** (bits - 1 - power) + 1)
    ]
    # With a sign there is room for one more: the codes of -1 and below it are the same.
    both = [-1.0, *(-each for each in positive)] if signed else []
    return torch.tensor(sorted([*both, 0.0, *positive]), device=device)
