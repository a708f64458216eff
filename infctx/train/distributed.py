"""Devices and strategies: how a backward call is made, how gradients are clipped, how the optimizer steps.

The loop and the window know none of this; they call the Engine.
"""

from __future__ import annotations

import torch
from lightning.fabric import Fabric
from torch import Tensor

from infctx.train.loss import SegmentLoss
from infctx.train.plan import pick_device


def open_fabric(device: str) -> Fabric:
    """Lightning's Fabric on one device: "auto", "cpu" or "cuda".  Precision is ours, explicit at the casts."""
    accelerator = {"cuda": "gpu", "cpu": "cpu"}[pick_device(device).type]
    return Fabric(accelerator=accelerator, devices=1, precision="32-true")


class Engine:
    """One device: the plain way of each call."""

    def __init__(self, fabric: Fabric, segment_loss: SegmentLoss, optimizer: torch.optim.Optimizer) -> None:
        self.fabric = fabric
        self.optimizer = optimizer
        self.segment_loss = fabric.setup_module(segment_loss)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def backward(self, scalar: Tensor, ends_step: bool) -> None:
        """One backward call; `ends_step` is true for the last one before the optimizer steps."""
        self.fabric.backward(scalar)

    def clip(self, clip_norm: float | None) -> Tensor:
        """The global norm of the gradient before clipping; scales it down to clip_norm if that is given."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if clip_norm is not None and norm.isfinite():  # one that is not finite would be spread over every gradient
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip_norm, norm)
        return norm

    def step(self) -> None:
        """One step of the optimizer; the gradients are gone behind it."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
