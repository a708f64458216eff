"""A run in the middle of its work: what changes from step to step, and what it works with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from infctx.data.lanes import Lanes
from infctx.distributed.engine import Engine
from infctx.formats.checkpoint_folder import STATE_FILE
from infctx.model.rwkv import RWKV
from infctx.model.state import State
from infctx.plan.plan import Plan

STATE_FILES = (STATE_FILE, "state.st", "state.pth")
"""What a run that tunes a state leaves in its folder at its end, in each form that can hold the state."""


class Progress(NamedTuple):
    """What a run knows besides its tensors: steps done, position of the lanes (None before the first), tokens seen."""

    step: int
    position: dict[str, Any] | None
    num_tokens: int


@dataclass
class Run:
    """Made by `infctx.train.start.open_run`, taken on by the loop, closed by `infctx.train.finish.finish`.

    tuned_over: fingerprint of the frozen weights that a state learns over; None where the weights learn
    checkpoint: the newest, None before the first
    """

    plan: Plan
    model: RWKV
    engine: Engine
    lanes: Lanes
    carry: State
    progress: Progress
    tuned_over: str | None
    checkpoint: Path | None
