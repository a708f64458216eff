"""The engine: makes backward calls, reduces and clips gradients, and steps the optimizer.

The loop and the window only call the Engine.  One device and ddp are here; ZeRO is in `zero`.
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
from infctx.optimizers.adamw import LittleAdamW
from infctx.optimizers.gradients import total_norm
from infctx.optimizers.host import HostAdamW
from infctx.optimizers.moments import to_fp32


class Engine:
    """The engine of one device, or of several that all hold everything (ddp).

    segment_loss: runs a segment, like `SegmentLoss`
    scale:        factor of a sum of losses, so that the mean of the gradients over all ranks is the gradient of the
                  step's mean loss
    busy_seconds: from the beginning of the step until the ranks wait for each other to reduce its gradients
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

    def _wrap(self, segment_loss: SegmentLoss):  # noqa: ANN202  (a private class of Fabric)
        return self.fabric.setup_module(segment_loss)

    @property
    def holds_whole_weights(self) -> bool:
        """Returns whether this process alone can run the model."""
        return True

    @property
    def alone(self) -> bool:
        """See `infctx.train.window.Backward`."""
        return self.ranks.world_size == 1

    def begin_step(self, step: int, num_targets: int, num_backwards: int) -> None:
        """Begins a step, before its first segment.

        num_targets:   unmasked targets of the step, over all ranks
        num_backwards: backward calls of this rank in the step; the last one reduces the gradients
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
        """Reports to the other ranks where this one is."""
        if self.watchdog:
            self.watchdog.mark(self.step_number, self.segment, doing)

    def _expect_backward(self, ends_step: bool) -> None:
        """Arranges for the last backward call of a step to reduce the gradients."""
        if self.ranks.world_size > 1:
            self._until_backward.enter_context(self.fabric.no_backward_sync(self.wrapped, enabled=not ends_step))

    def backward(self, scalar: Tensor) -> None:
        """Makes one backward call."""
        with self._until_backward:
            self.fabric.backward(scalar)

    def step(self) -> Tensor:
        """Clips the gradient to clip_norm, steps the optimizer and clears the gradients.

        Returns the global norm before clipping.  If it is not finite, does nothing and keeps the gradients.
        """
        norm = total_norm([p.grad for p in self.parameters if p.grad is not None])
        if norm.isfinite():
            if self.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
            self.optimizer.step()
            # The gradients are the buckets that ddp reduces, as long as they are not reallocated.
            self.optimizer.zero_grad(set_to_none=self.ranks.world_size == 1)
        return norm

    def parameters_without_finite_gradient(self) -> list[str] | None:
        """Returns their names, after a step whose norm was not finite; None if no rank has whole gradients."""
        gradients = ((name, parameter.grad) for name, parameter in self.model.named_parameters())
        return [name for name, gradient in gradients if gradient is not None and not gradient.isfinite().all()]

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
        """A context in which these parameters are whole on every rank; every rank must enter it."""
        return nullcontext()

    def learned_state(self) -> State | None:
        """See `RWKV.learned_state`; every rank must call it."""
        with self.gathered([part for part in self.model.initial_parts() if part is not None]):
            return self.model.learned_state()

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """Returns a parameter's values, on some device; every rank must ask for the same ones in the same order."""
        masters = self.optimizer.masters if isinstance(self.optimizer, HostAdamW) else {}
        return masters.get(parameter, parameter).detach()

    def whole_moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Returns a parameter's moments (infctx.optimizers.moments), or nothing before the first step; every rank must
        ask, as in `whole`."""
        return self.optimizer.state.get(parameter, {})

    def begin_moments(self, steps: float) -> None:
        """Makes room for the state of an optimizer after `steps` steps."""

    def set_moments(self, parameter: nn.Parameter, moments: dict[str, Tensor]) -> None:
        """Inverts `whole_moments`, after `begin_moments`."""
        own = self.optimizer
        moments = own.stored(moments) if isinstance(own, LittleAdamW) else to_fp32(moments)
        home = torch.device("cpu") if isinstance(own, HostAdamW) else self.device
        own.state[parameter] = {name: part.to(home) for name, part in moments.items()}
