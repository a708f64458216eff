"""AdamW on the host: fp32 weights and moments in host memory, and on the device only weights to compute with.

DeepSpeed's does the same, with a compiler and for several devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from infctx.optimizers.moments import MOMENTS


class HostAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) that steps fp32 copies of the weights on the CPU, one parameter after another.

    It takes the copies when it is made; afterwards the device's weights may be cast to any dtype.  A step copies each
    gradient to the host and each new weight to the device, and frees the gradient.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.masters: dict[Tensor, Tensor] = {
            parameter: parameter.detach().to("cpu", torch.float32, copy=True)
            for group in self.param_groups
            for parameter in group["params"]
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Steps every parameter that has a gradient; closure: None."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(parameter, group)

    def _step_parameter(self, parameter: Tensor, group: dict[str, Any]) -> None:
        master = self.masters[parameter]
        if not self.state[parameter]:
            self.state[parameter] = {name: torch.zeros_like(master) for name in MOMENTS} | {"step": torch.zeros(())}
        state = self.state[parameter]
        assert parameter.grad is not None
        gradient = parameter.grad.to("cpu", torch.float32)
        parameter.grad = None
        beta1, beta2 = group["betas"]
        adamw(
            [master],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        parameter.copy_(master)
