"""What learns: all weights, or the initial state of a model that stays as it is (state tuning), and in what units.

The steps of a run are the same either way (train/loop).
"""

from __future__ import annotations

import torch
from torch import Tensor

from infctx.config import WindowSettings
from infctx.data.lanes import Window
from infctx.model.rwkv import RWKV
from infctx.model.state import State
from infctx.recurrence.precision import state_dtype
from infctx.train.window import cut_window


def freeze_weights(model: RWKV, shifts: bool = False) -> None:
    """Leaves the initial state as all that learns, zeros at first where the model has none; shifts: with its shift
    vectors.  For frozen weights no gradient is computed, and the inputs of their products are not held."""
    model.requires_grad_(False)
    parts = model.add_initial_state(shifts)
    for part in parts if shifts else parts[:1]:
        assert part is not None  # it was added
        part.requires_grad_()


@torch.no_grad()
def natural_units(model: RWKV, window: Window, settings: WindowSettings, most_lanes: int | None = None) -> State:
    """The size of the states that the model itself makes of a window: what one unit of its initial state is.

    The root mean square over the seams, lanes and value channels for each key channel of `wkv`, over all channels for
    the shift vectors, rounded to a power of two.  States differ by orders of magnitude from model to model, layer to
    layer and channel to channel, with the decay and the size of the keys; and Adam moves every number by about the
    learning rate, whatever its gradient.  In these units one learning rate suits all.

    most_lanes: that are run at once, if settings.lanes_per_pass does not say it; None for all.
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
    """The nearest power of two by ratio, exact: x = mantissa * 2^n with 0.5 <= mantissa < 1."""
    x = x * 0.5**0.5
    return x / torch.frexp(x).mantissa
