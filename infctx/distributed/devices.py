"""Opens the devices of a run: Lightning's Fabric for a plan, its process group, and the watchdog of its ranks."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, Strategy

from infctx.distributed.beats import open_watch_store
from infctx.distributed.ranks import Ranks, refuse_other_settings
from infctx.distributed.watchdog import Watchdog
from infctx.distributed.zero_strategy import zero_strategy
from infctx.environment import ranks_started
from infctx.errors import InputError, TrainingFailed
from infctx.formats.checkpoint_folder import checkpoints
from infctx.plan.plan import Plan, whole_weights
from infctx.settings.load import dump_config

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Timeout of collectives; the watchdog finds a rank that is gone long before."""

ONE_LINE_ERRORS = (
    InputError,
    OSError,
    TrainingFailed,
    MemoryError,
    torch.OutOfMemoryError,
    KeyboardInterrupt,
    SystemExit,
)
"""Errors that the command line shows in one line."""

VERDICT_SECONDS = 45.0
"""Time for the watchdog to find out which rank is gone after a collective failed; it needs 20 to 25."""


class Devices(NamedTuple):
    """The devices of a run: Lightning's Fabric, this process's rank, and the plan."""

    fabric: Fabric
    ranks: Ranks
    plan: Plan

    def describe(self) -> str:
        """Returns a short description for the log."""
        shared = f", each document's time over {self.ranks.time_ranks}" if self.ranks.time_ranks > 1 else ""
        return f"{self.ranks.world_size} ranks on {self.fabric.device.type}, {self.plan.strategy}{shared}"


def open_devices(plan: Plan) -> Devices:
    """Opens the devices of a plan, and the process group of all ranks if there are several.

    Fabric's precision is off: ours is explicit at the casts.  Raises InputError if the number of ranks started is not
    that of the configuration.
    """
    settings = plan.config.distributed
    started = ranks_started()
    if started not in (None, settings.world_size):
        raise InputError(
            f"distributed.devices: {settings.devices} on distributed.nodes {settings.nodes} are {settings.world_size} "
            f"ranks, and {started} were started; set them to what was started"
        )
    for name in ("lightning.fabric", "lightning.pytorch"):  # the one imported last logs every rank that joins
        logging.getLogger(name).setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator={"cuda": "gpu", "cpu": "cpu"}[plan.device.type],
        devices=settings.devices,
        num_nodes=settings.nodes,
        precision="32-true",
        strategy=_fabric_strategy(plan) or "auto",
    )
    fabric.launch()
    ranks = Ranks(fabric.global_rank, settings.world_size, settings.time_ranks)
    if not ranks.is_first:
        logging.getLogger("infctx").setLevel(logging.WARNING)
    if ranks.world_size > 1:
        layout = f"distributed.strategy: {plan.strategy}, {plan.reduction}"
        refuse_other_settings(ranks, f"{layout}\n{dump_config(plan.config)}")
    return Devices(fabric, ranks, replace(plan, weights=ranks.from_first(lambda: whole_weights(plan))))


def _fabric_strategy(plan: Plan) -> Strategy | None:
    """Returns Fabric's strategy; None for one device that holds everything."""
    backend = "nccl" if plan.device.type == "cuda" else "gloo"
    if plan.strategy != "ddp":
        return zero_strategy(plan, backend, COLLECTIVE_TIMEOUT)
    if plan.config.distributed.world_size == 1:
        return None
    return DDPStrategy(process_group_backend=backend, timeout=COLLECTIVE_TIMEOUT, gradient_as_bucket_view=True)


@contextmanager
def watched(ranks: Ranks, checkpoint_folder: Path) -> Iterator[Watchdog | None]:
    """A context in which ranks watch each other: if one is gone, another reports which, and all of them end.

    At its end the process group is closed.
    """
    if ranks.world_size == 1:
        yield None
        if dist.is_initialized():  # by ZeRO
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
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it right away; report the dead rank first
            watchdog.await_verdict(VERDICT_SECONDS)
        reported = watchdog.leave(str(error) or type(error).__name__)
        watchdog.close()
        if reported:  # another rank has printed the one line
            raise SystemExit(2 if isinstance(error, InputError) else 1) from None
        if isinstance(error, ONE_LINE_ERRORS):
            raise
        traceback.print_exc()  # then skip cleanup, which would wait for the other ranks
        sys.stderr.flush()
        os._exit(1)
    watchdog.leave(None)
    watchdog.close()
    dist.destroy_process_group()


def _remedy(checkpoint_folder: Path) -> str:
    kept = checkpoints(checkpoint_folder)
    last = f"The last checkpoint, {kept[-1]}, is complete" if kept else "There is no checkpoint yet"
    return f"{last}; run the same command again to resume, on any number of ranks"
