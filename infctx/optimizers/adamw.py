"""AdamW in little memory: moments of 8 bits, and weights in bf16 with stochastic rounding, in plain torch.

Why not a library: bitsandbytes has no 8-bit AdamW for a CPU (its issue 1226), and torchao's first compiles itself, for
minutes and with a C++ compiler on a CPU (its pull request 746).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infctx.optimizers.eight_bits import BLOCK, dequantize, quantize
from infctx.optimizers.moments import SIGNED, no_moments, scales_of, to_eight_bits, to_fp32
from infctx.optimizers.rounding import Dice, round_to_bf16

SLICE = 1 << 21
"""Weights that are stepped at once, a multiple of BLOCK."""

SLICE_BYTES = 55
"""Bytes that a step needs for each weight of a slice, on top of those held, counted in 8 bits (tests/optimizers)."""


class LittleAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with 2 or 8 bytes of moments for each weight, and weights in fp32 or bf16.

    eight_bits: holds the moments in 8 bits, else in fp32
    seed:       of all rounding at random, together with the step and the place of the parameter
    A bf16 weight is stepped in fp32 and rounded to bf16 at random (`rounding`); its gradient may be fp32 or bf16.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        eight_bits: bool,
        seed: int,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.eight_bits, self._dice = eight_bits, Dice(seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Steps every parameter that has a gradient; closure: None."""
        parameters = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        # All before the first step: among what a step frees, they would leave gaps too small for the next one.
        for _, parameter in parameters:
            if parameter.grad is not None and not self.state[parameter]:
                self.state[parameter] = no_moments(parameter, self.eight_bits)
        for place, (group, parameter) in enumerate(parameters):
            if parameter.grad is not None:
                self._step_parameter(parameter, group, place)

    def stored(self, moments: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns moments in the form that this optimizer holds."""
        if not self.eight_bits:
            return to_fp32(moments)
        return to_eight_bits(moments, self._dice.generator(moments["exp_avg"].device))

    def _step_parameter(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        state["step"] += 1
        steps = int(state["step"].item())
        hyper = _Hyper.of(group, steps)
        assert parameter.is_contiguous() and parameter.grad is not None
        weights, gradients = parameter.view(-1), parameter.grad.reshape(-1)
        generator = self._dice.generator(parameter.device, steps, place)
        for begin in range(0, len(weights), SLICE):
            part = slice(begin, begin + SLICE)
            self._step_slice(weights[part], gradients[part].float(), _slice_of(state, part), hyper, generator)

    def _step_slice(
        self, weights: Tensor, gradient: Tensor, state: dict[str, Tensor], hyper: _Hyper, generator: torch.Generator
    ) -> None:
        """Steps at most SLICE weights; they, their gradient and their moments are parts of a parameter's, flattened."""
        mean, squares = (self._moment(state, name) for name in SIGNED)
        mean.lerp_(gradient, 1 - hyper.beta1)
        squares.mul_(hyper.beta2).addcmul_(gradient, gradient, value=1 - hyper.beta2)
        root = squares.sqrt()
        change = (root / hyper.root).add_(hyper.epsilon).reciprocal_().mul_(mean)
        stepped = weights.float() * hyper.keep
        stepped.add_(change, alpha=-hyper.rate)
        weights.copy_(round_to_bf16(stepped, generator) if weights.dtype == torch.bfloat16 else stepped)
        if self.eight_bits:
            for name, values in {"exp_avg": mean, "exp_avg_sq": root}.items():
                codes, scales = quantize(values, SIGNED[name], generator)
                state[name].copy_(codes)
                state[scales_of(name)].copy_(scales)

    def _moment(self, state: dict[str, Tensor], name: str) -> Tensor:
        """Returns a moment in fp32: the one that is held, or in 8 bits a copy."""
        if not self.eight_bits:
            return state[name]
        held = dequantize(state[name], state[scales_of(name)], SIGNED[name])
        return held if SIGNED[name] else held.square_()


class _Hyper(NamedTuple):
    """AdamW's numbers for one step; `rate` and `root` have its bias corrections in them."""

    keep: float  # what weight decay leaves of a weight
    beta1: float
    beta2: float
    rate: float
    root: float
    epsilon: float

    @classmethod
    def of(cls, group: dict[str, Any], steps: int) -> _Hyper:
        beta1, beta2 = group["betas"]
        rate, root = group["lr"] / (1 - beta1**steps), math.sqrt(1 - beta2**steps)
        return cls(1 - group["lr"] * group["weight_decay"], beta1, beta2, rate, root, group["eps"])


def _slice_of(state: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
    flat = {name: state[name].view(-1)[part] for name in SIGNED}
    return flat | {name: state[name][blocks] for name in map(scales_of, SIGNED) if name in state}
