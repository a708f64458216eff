"""Stochastic rounding to bf16, from seeds that a resumed run draws again."""

from __future__ import annotations

import torch
from torch import Tensor


def round_to_bf16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds fp32 to bf16, up or down at random, so that the mean of many roundings is the value.

    bf16 is the upper half of fp32's bits: a random lower half is added, and what it carries over counts.
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


class Dice:
    """Random generators that depend only on the run's seed and on what is drawn for."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def generator(self, device: torch.device, *what: int) -> torch.Generator:
        """Returns the generator for a use, such as (step, parameter); always the same draws for the same use."""
        found = self._generators.setdefault(device, torch.Generator(device))
        mixed = self.seed & _MASK
        for number in what:
            mixed = _mix(mixed ^ _mix(number & _MASK))
        return found.manual_seed(mixed >> 1)


_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """SplitMix64's step, which turns neighboring numbers into unrelated ones (Steele et al., OOPSLA 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
