"""Chooses what learns: all weights, or only the initial state of a frozen model (state tuning), and in which units.

Training steps are the same either way (train/loop).
"""

from __future__ import annotations

import torch
from torch import Tensor

from infctx.data.lanes import Window
from infctx.model.rwkv import RWKV
from infctx.model.state import State
from infctx.ops.precision import state_dtype
from infctx.settings.window import WindowSettings
from infctx.train.window import cut_window


def freeze_weights(model: RWKV, shifts: bool = False) -> None:
    """Freezes everything but the initial state, which begins as zeros if the model has none.

    shifts: whether its shift vectors learn too
    Frozen weights get no gradient, and the inputs of their products are not kept.
    """
    model.requires_grad_(False)
    parts = model.add_initial_state(shifts)
    for part in parts if shifts else parts[:1]:
        assert part is not None  # just added
        part.requires_grad_()


@torch.no_grad()
def natural_units(model: RWKV, window: Window, settings: WindowSettings, most_lanes: int | None = None) -> State:
    """Returns the typical size of the model's own states in a window, to use as the units of its initial state.

    A unit is a root mean square over seams and lanes, rounded to a power of two: for each key channel of `wkv`, over
    its value channels; for the shift vectors, over all channels.  States differ by orders of magnitude between models,
    layers and channels, because decays and keys do; but Adam moves every number by about the learning rate, whatever
    its gradient.  In these units, one learning rate suits them all.

    most_lanes: how many lanes to compute at once if settings.lanes_per_pass is not set; None for all
    """
    weight = model.embedding.weight
    squares = []
    at_once = settings.lanes_per_pass or most_lanes or len(window.tokens)
    for lanes in range(0, len(window.tokens), at_once):
        group = slice(lanes, lanes + at_once)
        tokens, targets, starts = (
            part[group].to(weight.device) for part in (window.tokens, window.targets, window.starts)
        )
        segments = cut_window(tokens, targets, starts, settings.segment_tokens)
        state = State.zeros(model.sizes, len(segments[0].tokens), state_dtype(weight.dtype), weight.device)
        for segment in segments:
            _, state = model(segment.tokens, state, segment.starts)
            wkv = state.wkv.square().mean((1, 4))[..., None]  # (L, H, N, 1)
            squares.append((wkv, *(part.square().mean((1, 2))[:, None] for part in state[1:])))
    means = (torch.stack(parts).mean(0) for parts in zip(*squares, strict=True))
    return State(*(_power_of_two(mean.clamp_min(1e-12).sqrt()) for mean in means))


def _power_of_two(x: Tensor) -> Tensor:
    """Rounds to the power of two nearest in ratio, exactly: x = mantissa * 2^n with 0.5 <= mantissa < 1."""
    x = x * 0.5**0.5
    return x / torch.frexp(x).mantissa
