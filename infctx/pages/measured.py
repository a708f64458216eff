"""The rows of an evaluation, as `infctx evaluate --output` and a run write them: JSON files in; typed rows out.

evaluation.json is {"store": ..., "models": [...]}: for each model, the measures that were asked for.  held_out.json is
{"store": ..., "evaluations": [...]}: the loss by position at some steps of a run (evaluate/record).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, Field

from infctx.errors import InputError
from infctx.small_texts import quoted, read_json_as

EVALUATION = "evaluation.json"
"""The file in a run's folder, if somebody has measured the run and kept it there."""
HELD_OUT = "held_out.json"
"""The record of a run; evaluate/record has the name too, and loads torch, which a page does without."""


Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class Position(BaseModel):
    """The loss of targets begin..end-1; difference: to the first model, or to the same without carry."""

    begin: Count
    end: Count
    num_tokens: Count
    nats_per_token: float
    bits_per_byte: float | None = None
    standard_error: float | None = None
    difference: float | None = None
    difference_error: float | None = None


class Reach(BaseModel):
    """How far predictions move when everything before the last `tokens` tokens is cut off."""

    tokens: Count
    distance: float
    standard_error: float | None = None


class Forgetting(BaseModel):
    """How well a model repeats what it saw `distance` tokens ago, and how well it predicts new text."""

    distance: Count
    copy_accuracy: float
    language_accuracy: float
    difference: float
    standard_error: float | None = None


class Recall(BaseModel):
    """Right answers about keys that were set `gap_tokens` before; chance: of a guess, if the task says so."""

    gap_tokens: Count
    keys: Count
    overwritten: bool = False
    right: Count
    asked: Annotated[Count, Field(ge=1)]
    chance: float | None = None


class Needle(BaseModel):
    """Right answers about a sentence at a depth (0: beginning, 1: end) of a text."""

    task: str
    length: Count
    depth: float
    right: Count
    asked: Annotated[Count, Field(ge=1)]


class StateSize(BaseModel):
    """The state of a layer after `position` tokens."""

    layer: Count
    position: Count
    norm: float
    saturation: float | None = None
    effective_rank: float | None = None


class Measures(BaseModel):
    """What was measured of a model."""

    name: str
    positions: list[Position] = []
    reach: list[Reach] = []
    forgetting: list[Forgetting] = []
    recall: list[Recall] = []
    needle: list[Needle] = []
    states: list[StateSize] = []


class Measured(BaseModel):
    """evaluation.json."""

    models: list[Measures]


class HeldOutLoss(BaseModel):
    """The loss by position at a step, of all documents and by source."""

    step: Count | None
    with_state: bool = False
    buckets: list[Position]
    sources: dict[str, list[Position]] = {}


class HeldOut(BaseModel):
    """held_out.json."""

    evaluations: list[HeldOutLoss]


AnyFile = TypeVar("AnyFile", bound=BaseModel)


def read_measures(schema: type[AnyFile], path: Path) -> AnyFile:
    """Reads a file of measurements; raises InputError if it is none."""
    try:
        return read_json_as(schema, path)
    except ValueError as error:
        problem = quoted(str(error), 60)
        raise InputError(f"{path}: is not readable ({problem}); measure again, or move it away") from None


def whole_loss(buckets: list[Position]) -> tuple[float, float | None]:
    """Returns the loss over all positions: nats per token, and bits per byte if every bucket has them."""
    tokens = sum(bucket.num_tokens for bucket in buckets)
    nats = sum(bucket.nats_per_token * bucket.num_tokens for bucket in buckets)
    if not tokens or not all(bucket.bits_per_byte for bucket in buckets):
        return nats / max(tokens, 1), None
    # The bytes of a bucket follow from its two losses; ln 2 cancels out.
    num_bytes = sum(bucket.nats_per_token * bucket.num_tokens / (bucket.bits_per_byte or 1) for bucket in buckets)
    return nats / tokens, nats / num_bytes
