"""Finds where a loss or gradient that is not finite came from, and explains it so that the user can look there."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from infctx.data.lanes import Window
from infctx.distributed.engine import Engine
from infctx.model.loss import token_losses
from infctx.model.rwkv import RWKV
from infctx.model.state import State
from infctx.settings.config import Config
from infctx.train.window import cut_window


class Failure(NamedTuple):
    """The place of the first number that is not finite, and the documents of its lane (of all lanes if unknown).

    entry: the largest entry of the states that came into that segment; None if all that was computed is finite
    """

    place: str
    documents: str
    entry: float | None = None


def explain_failure(where: Failure, loss: Tensor, step: int, checkpoint: Path | None) -> list[str]:
    """Returns lines with the step and the layer, the documents, and the checkpoint that is left."""
    what = "the gradient is not finite" if loss.isfinite() else f"the loss is {loss.item()}"
    kept = f"the last checkpoint, {checkpoint}, is untouched" if checkpoint else "there is no checkpoint yet"
    grown = [f"the states before that segment had entries of up to {where.entry:.3g} in size"] if where.entry else []
    return [
        f"step {step}: {what}, first in {where.place}; lower optimizer.peak_lr, or look at these documents",
        *grown,
        f"documents of the step: {where.documents}",
        kept,
    ]


@torch.no_grad()
def find_failure(engine: Engine, window: Window, state: State, config: Config) -> Failure:
    """Computes the window again from the state before it, and checks every layer after every segment.

    If all of that is finite, the gradient broke.  It flows from the last layer to the first, so it broke in the last
    layer whose gradient is not finite.  Every rank must call it; all return the same.
    """
    model, lanes = engine.model, len(window.documents)
    groups = [slice(begin, begin + config.pass_lanes) for begin in range(0, lanes, config.pass_lanes)]
    with model.alone(), engine.gathered([model.head.weight]):  # every rank computes whole segments of its lanes
        seen = [_first_bad(model, window, state.lanes(group), group, config.window.segment_tokens) for group in groups]
    everyone = engine.ranks.gather(seen)
    first = min((place for rank in everyone for place, *_ in rank if place is not None), default=None)
    if first is None:
        return Failure(_where_gradient_broke(engine), _documents(engine.ranks.gather(window.documents), None, engine))
    segment, layer = first
    where = "the head" if layer == model.sizes.num_layers else f"layer {layer}"
    finite = [
        [ok for place, group, _ in rank for ok in (group if place == first else [True] * len(group))]
        for rank in everyone
    ]
    entry = max(largest for rank in everyone for place, _, largest in rank if place == first)
    documents = _documents(engine.ranks.gather(window.documents), finite, engine)
    return Failure(f"{where}, segment {segment}", documents, entry)


def _where_gradient_broke(engine: Engine) -> str:
    bad = engine.parameters_without_finite_gradient()
    if bad is None:
        return "an unknown layer (gradients are sharded)"
    layers = [int(name.split(".")[1]) for name in bad if name.startswith("blocks.")]
    in_head = any(name.startswith(("head.", "output_norm.")) for name in bad)
    learned = "the initial state" if all(name.startswith("initial_") for name in bad) else "the embedding"
    return "the head" if in_head else f"layer {max(layers)}" if layers else learned


def _first_bad(
    model: RWKV, window: Window, state: State, group: slice, segment_tokens: int
) -> tuple[tuple[int, int] | None, list[bool], float]:
    """Returns the first (segment, layer) that breaks in a group (layer L is the head), which lanes are finite, and the
    largest entry of the states that came into that segment."""
    device = state.wkv.device
    tokens, targets, starts = (part[group].to(device) for part in (window.tokens, window.targets, window.starts))
    found = None
    # Continue to the end even after a find: all ranks must do the same.
    for number, segment in enumerate(cut_window(tokens, targets, starts, segment_tokens)):
        largest = state.wkv.abs().max().item()
        hidden, state = model(segment.tokens, state, segment.starts)
        finite = torch.stack([part.isfinite().flatten(2).all(2) for part in state]).all(0)  # (L, B)
        assert segment.targets is not None  # cut_window always sets them
        losses = token_losses(hidden, model.head.weight, segment.targets, model.head_adapter(hidden))  # (B, T)
        for layer, lanes in enumerate([*finite.tolist(), losses.isfinite().all(1).tolist()]):
            if found is None and not all(lanes):
                found = (number, layer), lanes, largest
    return found or (None, [True] * state.batch_size, 0.0)


def _documents(documents: list[list[list[str]]], finite: list[list[bool]] | None, engine: Engine) -> str:
    """Lists the documents of the lanes that are not finite; finite: by rank and lane, None if no lane is."""
    lanes = []
    for rank in range(0, engine.ranks.world_size, engine.ranks.time_ranks):
        for lane, numbers in enumerate(documents[rank]):
            if finite is None or not finite[rank][lane]:
                number = rank // engine.ranks.time_ranks * len(documents[rank]) + lane
                lanes.append(f"lane {number}: {_numbers(numbers)}")
    return "; ".join(lanes)


def _numbers(documents: list[str], most: int = 8) -> str:
    shown = ", ".join(documents[:most])
    return shown + (f" and {len(documents) - most} more" if len(documents) > most else "")
