"""A run while it trains: its model, engine and data, and the values that change from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from infctx.data.lanes import Lanes
from infctx.distributed.engine import Engine
from infctx.evaluate.loss_by_position import Reading
from infctx.evaluate.record import Evaluation
from infctx.formats.checkpoint_folder import STATE_FILE
from infctx.model.rwkv import RWKV
from infctx.model.state import State
from infctx.plan.plan import Plan

STATE_FILES = (STATE_FILE, "state.st", "state.pth")
"""Files that a state-tuning run writes at its end, in each format that can hold the state."""


class Progress(NamedTuple):
    """Steps done, position of the lanes (None before the first step), tokens seen."""

    step: int
    position: dict[str, Any] | None
    num_tokens: int


@dataclass
class Run:
    """Opened by `infctx.train.start.open_run`, trained by the loop, and finished by `infctx.train.finish.finish`.

    carry:      the state of this rank's lanes, carried from step to step
    tuned_over: fingerprint of the frozen weights that a state is tuned over; None if the weights learn
    checkpoint: the newest, None before the first
    held_out:   what to read of each source of held-out documents
    measured:   the newest evaluation of this start; None before the first
    best:       the evaluation with the lowest loss that has a checkpoint
    """

    plan: Plan
    model: RWKV
    engine: Engine
    lanes: Lanes
    carry: State
    progress: Progress
    tuned_over: str | None
    checkpoint: Path | None
    held_out: dict[str, Reading] = field(default_factory=dict)
    measured: Evaluation | None = None
    best: Evaluation | None = None
