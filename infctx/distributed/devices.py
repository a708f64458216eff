"""The devices of a run: Lightning's Fabric for a plan, its process group, and the watch that its ranks keep."""

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

from infctx.config import dump_config
from infctx.distributed.beats import open_watch_store
from infctx.distributed.ranks import Ranks, refuse_other_settings
from infctx.distributed.watchdog import Watchdog
from infctx.distributed.zero_strategy import zero_strategy
from infctx.environment import ranks_started
from infctx.errors import InputError, TrainingFailed
from infctx.formats.checkpoint_folder import checkpoints
from infctx.plan.plan import Plan, whole_weights

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
"""What the command line shows in one line."""

VERDICT_SECONDS = 45.0
"""For the watchdog to find out who is gone, where a collective failed; it needs 20 to 25."""


class Devices(NamedTuple):
    """What a run runs on: Lightning's Fabric, where this process stands, and the plan."""

    fabric: Fabric
    ranks: Ranks
    plan: Plan

    def describe(self) -> str:
        """A few words for people."""
        shared = f", each document's time over {self.ranks.time_ranks}" if self.ranks.time_ranks > 1 else ""
        return f"{self.ranks.world_size} ranks on {self.fabric.device.type}, {self.plan.strategy}{shared}"


def open_devices(plan: Plan) -> Devices:
    """The devices of a plan, with the process group of all ranks open if there is one.

    Precision is ours, explicit at the casts.  Raises InputError where the ranks that were started are not those of the
    configuration.
    """
    settings = plan.config.distributed
    started = ranks_started()
    if started not in (None, settings.world_size):
        raise InputError(
            f"distributed.devices: {settings.devices} on distributed.nodes {settings.nodes} are {settings.world_size} "
            f"ranks, and {started} were started; set them to what was started"
        )
    for name in ("lightning.fabric", "lightning.pytorch"):  # whichever was imported last says who has joined
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
    """None for one device that holds everything."""
    backend = "nccl" if plan.device.type == "cuda" else "gloo"
    if plan.strategy != "ddp":
        return zero_strategy(plan, backend, COLLECTIVE_TIMEOUT)
    if plan.config.distributed.world_size == 1:
        return None
    return DDPStrategy(process_group_backend=backend, timeout=COLLECTIVE_TIMEOUT, gradient_as_bucket_view=True)


@contextmanager
def watched(ranks: Ranks, checkpoint_folder: Path) -> Iterator[Watchdog | None]:
    """Inside, the ranks of a run watch each other: each ends where another is gone, and one of them says which.

    After it the ranks are on their own: the process group is closed.
    """
    if ranks.world_size == 1:
        yield None
        if dist.is_initialized():  # of ZeRO
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
