"""How gradients of bf16 weights add up over the backward calls of a step: in fp32, or rounded at random to bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from infctx.errors import InputError
from infctx.optimizers.rounding import Dice, round_to_bf16


def add_up_in_fp32(parameters: Iterable[nn.Parameter]) -> None:
    """Makes autograd add up the gradients of bf16 weights in fp32, 4 bytes for each weight.

    Raises InputError if torch is too old to.
    """
    for parameter in parameters:
        if not hasattr(parameter, "grad_dtype"):
            raise InputError(
                f"optimizer.weights: torch {torch.__version__} cannot add up gradients of bf16 weights in fp32; "
                "install torch 2.10 or newer"
            )
        parameter.grad_dtype = torch.float32


def add_up_in_bf16(parameters: Iterable[nn.Parameter], seed: int, steps_taken: Callable[[nn.Parameter], int]) -> None:
    """Makes autograd add up the gradients of bf16 weights in bf16, each sum rounded at random; 2 bytes for each weight.

    Rounded to the nearest instead, a segment's gradient would be lost in a sum that is 512 times as large.
    seed:        of the rounding, together with the step, the place of the parameter and the number of the sum
    steps_taken: returns the steps that a parameter has taken
    """
    dice = Dice(seed)
    for place, parameter in enumerate(parameters):
        parameter.register_hook(_Sum(parameter, steps_taken, dice, place))


class _Sum:
    """The hook of one parameter: it is called with a backward call's gradient, and returns the sum so far.

    Autograd then finds no earlier gradient to add that to.
    """

    def __init__(
        self, parameter: nn.Parameter, steps_taken: Callable[[nn.Parameter], int], dice: Dice, place: int
    ) -> None:
        self.parameter, self.steps_taken, self.dice, self.place = parameter, steps_taken, dice, place
        self.sums = 0

    def __call__(self, gradient: Tensor) -> Tensor:
        before = self.parameter.grad
        if before is None:  # the first of a step
            self.sums = 0
            return gradient
        self.sums += 1
        steps = self.steps_taken(self.parameter)
        generator = self.dice.generator(gradient.device, steps, self.place, self.sums)
        self.parameter.grad = None
        return round_to_bf16(before.float().add_(gradient), generator)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Returns the norm of all gradients together, computed in at least fp32 whatever their dtypes are."""
    if all(gradient.dtype != torch.bfloat16 for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))
