"""Devices and strategies: how a backward call is made, gradients are reduced and clipped, and the optimizer steps.

The loop and the window know none of this; they call the Engine.  One device and ddp are here, ZeRO is in `sharded`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn

from infctx.config import Config, OptimizerSettings, dump_config
from infctx.distributed.ranks import Ranks, ranks_started, refuse_other_settings
from infctx.distributed.watchdog import Watchdog, open_watch_store
from infctx.distributed.zero import Sharded, sharded_strategy
from infctx.errors import InputError, TrainingFailed
from infctx.model.loss import SegmentLoss
from infctx.model.rwkv import RWKV
from infctx.model.state import State
from infctx.plan.plan import device_memory, model_sizes, pick_device, resolve_strategy
from infctx.train.checkpoint import checkpoints
from infctx.train.optimizer import make_optimizer

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""For what all ranks do together; a rank that is gone is found by the watchdog long before."""

ONE_LINE_ERRORS = (
    InputError,
    OSError,
    TrainingFailed,
    MemoryError,
    torch.OutOfMemoryError,
    KeyboardInterrupt,
    SystemExit,
)
"""What the command line tells in one line."""

VERDICT_SECONDS = 45.0
"""For the watchdog to find out who is gone, where a collective failed; it needs 20 to 25."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state of a parameter, of its shape; besides them it counts steps."""


class Devices(NamedTuple):
    """What a run runs on: Lightning's Fabric, where this process stands, the strategy (ddp, zero1, zero2 or zero3) and
    when gradients are reduced (step or segment)."""

    fabric: Fabric
    ranks: Ranks
    strategy: str
    reduction: str

    def describe(self) -> str:
        """A few words for people."""
        shared = f", each document's time over {self.ranks.time_ranks}" if self.ranks.time_ranks > 1 else ""
        return f"{self.ranks.world_size} ranks on {self.fabric.device.type}, {self.strategy}{shared}"


def open_devices(config: Config) -> Devices:
    """The devices of a configuration, with the process group of all ranks open if there is one.

    Precision is ours, explicit at the casts.  Raises InputError where the ranks that were started are not those of the
    configuration.
    """
    settings, device = config.distributed, pick_device(config.run.device)
    started = ranks_started()
    if started not in (None, settings.world_size):
        raise InputError(
            f"distributed.devices: {settings.devices} on distributed.nodes {settings.nodes} are {settings.world_size} "
            f"ranks, and {started} were started; set them to what was started"
        )
    sizes = model_sizes(config)
    chosen = resolve_strategy(config, sizes, device.type, device_memory(device.type, settings.devices)).distributed
    strategy, reduction = chosen.strategy, "step" if chosen.gradient_reduction == "auto" else chosen.gradient_reduction
    options = {"process_group_backend": "nccl" if device.type == "cuda" else "gloo", "timeout": COLLECTIVE_TIMEOUT}
    if strategy != "ddp":
        with_strategy = {"strategy": sharded_strategy(strategy, config, sizes and sizes.width, **options)}
    elif settings.world_size > 1:
        with_strategy = {"strategy": DDPStrategy(gradient_as_bucket_view=True, **options)}
    else:
        with_strategy = {}
    for name in ("lightning.fabric", "lightning.pytorch"):  # whichever was imported last says who has joined
        logging.getLogger(name).setLevel(logging.WARNING)
    accelerator = {"cuda": "gpu", "cpu": "cpu"}[device.type]
    fabric = Fabric(
        accelerator=accelerator,
        devices=settings.devices,
        num_nodes=settings.nodes,
        precision="32-true",
        **with_strategy,
    )
    fabric.launch()
    ranks = Ranks(fabric.global_rank, settings.world_size, settings.time_ranks)
    if not ranks.is_first:
        logging.getLogger("infctx").setLevel(logging.WARNING)
    if ranks.world_size > 1:
        refuse_other_settings(ranks, f"distributed.strategy: {strategy}, {reduction}\n{dump_config(config)}")
    return Devices(fabric, ranks, strategy, reduction)


@contextmanager
def watched(ranks: Ranks, checkpoint_folder: Path) -> Iterator[Watchdog | None]:
    """Inside, the ranks of a run watch each other: each ends where another is gone, and one of them says which.

    Behind it the ranks are on their own: the process group is closed.
    """
    if ranks.world_size == 1:
        yield None
        if dist.is_initialized():  # of a sharded strategy
            dist.destroy_process_group()
        return
    store = open_watch_store(ranks.rank, ranks.world_size)
    remedy = partial(_remedy, checkpoint_folder)
    watchdog = Watchdog(ranks.rank, ranks.world_size, store, describe_remedy=remedy)
    watchdog.start()
    try:
        yield watchdog
    except BaseException as error:
        if type(error) in (RuntimeError, dist.DistBackendError, dist.DistNetworkError):  # another rank may have died
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends at once; first it is said who
            watchdog.await_verdict(VERDICT_SECONDS)
        said = watchdog.leave(str(error) or type(error).__name__)
        watchdog.close()
        if said:  # by another rank, in the one line that there is to be
            raise SystemExit(2 if isinstance(error, InputError) else 1) from None
        if isinstance(error, ONE_LINE_ERRORS):
            raise
        traceback.print_exc()  # and no cleaning up, which would wait for the other ranks
        sys.stderr.flush()
        os._exit(1)
    watchdog.leave(None)
    watchdog.close()
    dist.destroy_process_group()


def _remedy(checkpoint_folder: Path) -> str:
    kept = checkpoints(checkpoint_folder)
    last = f"The last checkpoint, {kept[-1]}, is whole" if kept else "There is no checkpoint yet"
    return f"{last}: run the same command again to go on, on any number of ranks"


def open_engine(devices: Devices, segment_loss: SegmentLoss, settings: OptimizerSettings) -> Engine:
    """The engine of a strategy, with its optimizer; the model may be anywhere, and is on its device afterwards."""
    kind = Engine if devices.strategy == "ddp" else ShardedEngine
    optimizer = make_optimizer(segment_loss.model, settings)
    return kind(devices.fabric, devices.ranks, segment_loss, optimizer, settings.clip_norm, devices.reduction)


class Engine:
    """One device, or several that hold everything (ddp): the plain way of each call.

    segment_loss: runs a segment, as `SegmentLoss`.
    scale:        what a sum of losses is multiplied with, besides 1 / number of targets of the step, so that the mean
                  of the gradients over all ranks is the gradient.
    busy_seconds: since the step began, up to where the ranks wait for each other to reduce its gradients.
    """

    def __init__(
        self,
        fabric: Fabric,
        ranks: Ranks,
        segment_loss: SegmentLoss,
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None,
        reduction: str = "step",
    ) -> None:
        self.fabric, self.ranks, self.optimizer, self.clip_norm = fabric, ranks, optimizer, clip_norm
        self.device, self.reduction = fabric.device, reduction
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.model: RWKV = segment_loss.model
        self.watchdog: Watchdog | None = None
        self.scale = float(ranks.world_size)
        self.step_number, self.segment = 0, 0
        self.busy_seconds = 0.0
        self.wrapped = self._wrap(segment_loss)
        # Fabric's own wrapper would cast a state to its precision at every seam.
        self.segment_loss: nn.Module = self.wrapped._forward_module
        self._until_backward = ExitStack()

    def _wrap(self, segment_loss: SegmentLoss) -> nn.Module:
        return self.fabric.setup_module(segment_loss)

    @property
    def holds_whole_weights(self) -> bool:
        """Whether the model in this process is one to be run alone."""
        return True

    def begin_step(self, step: int) -> None:
        """Before the first segment of a step."""
        self.step_number, self._began = step, time.perf_counter()

    def enter(self, segment: int, doing: str, ends_step: bool) -> None:
        """See `infctx.train.window.Backward`."""
        self.segment = segment
        self.mark(doing)
        if ends_step:
            if self.device.type == "cuda" and self.ranks.world_size > 1:
                torch.cuda.synchronize(self.device)
            self.busy_seconds = time.perf_counter() - self._began
        if doing == "backward":
            self._expect_backward(ends_step)

    def mark(self, doing: str) -> None:
        """Tells the other ranks where this one is."""
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
        """Clips the gradient to clip_norm and steps the optimizer; the gradients are gone behind it.

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
        """Their names, behind a step that found the norm not finite; None where no rank has whole gradients."""
        gradients = ((name, parameter.grad) for name, parameter in self.model.named_parameters())
        return [name for name, gradient in gradients if gradient is not None and not gradient.isfinite().all()]

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
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
        """The inverse of `whole_moments`, behind `begin_moments`."""
        self.optimizer.state[parameter] = {name: part.to(self.device) for name, part in moments.items()}


class ShardedEngine(Engine):
    """DeepSpeed's ZeRO, stages 1 to 3, with or without offload."""

    def _wrap(self, segment_loss: SegmentLoss) -> nn.Module:
        wrapped, _ = self.fabric.setup(segment_loss, self.optimizer, move_to_device=False)
        self.sharded = Sharded(wrapped._forward_module, self.reduction)
        return wrapped

    @property
    def holds_whole_weights(self) -> bool:
        return not self.sharded.cuts_weights

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self.sharded.begin_step()

    def _expect_backward(self, ends_step: bool) -> None:
        self.sharded.expect_backward(ends_step)

    def backward(self, scalar: Tensor) -> None:
        self.sharded.engine.backward(scalar)

    def step(self) -> Tensor:
        """As of Engine; a gradient that is not finite is gone too, and its norm is inf."""
        return self.sharded.step()

    def parameters_without_finite_gradient(self) -> None:
        return None

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
        return self.sharded.gathered(parameters)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        return self.sharded.whole(parameter)

    def whole_moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return self.sharded.whole_moments(parameter, MOMENTS)

    def begin_moments(self, steps: float) -> None:
        self.sharded.begin_moments(steps, MOMENTS)

    def set_moments(self, parameter: nn.Parameter, moments: dict[str, Tensor]) -> None:
        self.sharded.set_moments(parameter, {name: moments[name] for name in MOMENTS})
