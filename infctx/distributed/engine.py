"""The engine: how a backward call is made, gradients are reduced and clipped, and the optimizer steps.

The loop and the window know none of this; they call the Engine.  One device and ddp are here, ZeRO is in `zero`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from infctx.distributed.devices import Devices
from infctx.distributed.watchdog import Watchdog
from infctx.model.loss import SegmentLoss
from infctx.model.rwkv import RWKV
from infctx.model.state import State

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state of a parameter, of its shape; besides them it counts steps."""


class Engine:
    """One device, or several that hold everything (ddp): the plain way of each call.

    segment_loss: runs a segment, as `SegmentLoss`.
    scale:        what a sum of losses is multiplied with, so that the mean of the gradients over all ranks is the
                  gradient of the mean loss of the step.
    busy_seconds: since the step began, up to where the ranks wait for each other to reduce its gradients.
    """

    def __init__(
        self, devices: Devices, segment_loss: SegmentLoss, optimizer: torch.optim.Optimizer, clip_norm: float | None
    ) -> None:
        self.fabric, self.ranks, self.optimizer, self.clip_norm = devices.fabric, devices.ranks, optimizer, clip_norm
        self.device, self.reduction = devices.fabric.device, devices.plan.reduction
        self.parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self.model: RWKV = segment_loss.model
        self.watchdog: Watchdog | None = None
        self.scale = 1.0
        self.step_number, self.segment = 0, 0
        self.busy_seconds = 0.0
        self._began, self._backwards_left = 0.0, 0
        self.wrapped = self._wrap(segment_loss)
        # Fabric's own wrapper would cast a state to its precision at every seam.
        self.segment_loss: nn.Module = self.wrapped._forward_module
        self._until_backward = ExitStack()

    def _wrap(self, segment_loss: SegmentLoss):  # noqa: ANN202  (Fabric's class is its own affair)
        return self.fabric.setup_module(segment_loss)

    @property
    def holds_whole_weights(self) -> bool:
        """Whether the model in this process is one to be run alone."""
        return True

    def begin_step(self, step: int, num_targets: int, num_backwards: int) -> None:
        """Before the first segment of a step.

        num_targets:   unmasked targets of the step, over all ranks
        num_backwards: backward calls of this rank in the step; in the last of them gradients are reduced
        """
        self.step_number, self._began = step, time.perf_counter()
        self.scale = self.ranks.world_size / max(num_targets, 1)
        self._backwards_left = num_backwards

    def enter(self, segment: int, doing: Literal["forward", "backward"]) -> None:
        """See `infctx.train.window.Backward`."""
        self.segment = segment
        self.mark(doing)
        if doing == "forward":
            return
        self._backwards_left -= 1
        ends_step = self._backwards_left == 0
        if ends_step:
            if self.device.type == "cuda" and self.ranks.world_size > 1:
                torch.cuda.synchronize(self.device)
            self.busy_seconds = time.perf_counter() - self._began
        self._expect_backward(ends_step)

    def mark(self, doing: str) -> None:
        """Lets the other ranks know where this one is."""
        if self.watchdog:
            self.watchdog.mark(self.step_number, self.segment, doing)

    def _expect_backward(self, ends_step: bool) -> None:
        """Gradients are reduced once a step, in its last backward call."""
        if self.ranks.world_size > 1:
            self._until_backward.enter_context(self.fabric.no_backward_sync(self.wrapped, enabled=not ends_step))

    def backward(self, scalar: Tensor) -> None:
        """One backward call."""
        with self._until_backward:
            self.fabric.backward(scalar)

    def step(self) -> Tensor:
        """Clips the gradient to clip_norm and steps the optimizer; the gradients are gone after it.

        Returns the global norm before clipping.  Where that is not finite nothing is done, and the gradients stay.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if norm.isfinite():
            if self.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
            self.optimizer.step()
            # The buckets that ddp reduces are the gradients themselves, as long as these stay where they are.
            self.optimizer.zero_grad(set_to_none=self.ranks.world_size == 1)
        return norm

    def parameters_without_finite_gradient(self) -> list[str] | None:
        """Their names, after a step that found the norm not finite; None where no rank has whole gradients."""
        gradients = ((name, parameter.grad) for name, parameter in self.model.named_parameters())
        return [name for name, gradient in gradients if gradient is not None and not gradient.isfinite().all()]

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Inside, these parameters are whole on every rank; every rank must enter it."""
        return nullcontext()

    def learned_state(self) -> State | None:
        """See `RWKV.learned_state`; every rank must ask."""
        with self.gathered([part for part in self.model.initial_parts() if part is not None]):
            return self.model.learned_state()

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """The values of a parameter, on some device; every rank must ask for the same ones in the same order."""
        return parameter.detach()

    def whole_moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's state of a parameter: MOMENTS and "step", nothing before the first; as for `whole`."""
        return self.optimizer.state.get(parameter, {})

    def begin_moments(self, steps: float) -> None:
        """Makes room for the state of an optimizer that has done so many steps."""

    def set_moments(self, parameter: nn.Parameter, moments: dict[str, Tensor]) -> None:
        """The inverse of `whole_moments`, after `begin_moments`."""
        self.optimizer.state[parameter] = {name: part.to(self.device) for name, part in moments.items()}
