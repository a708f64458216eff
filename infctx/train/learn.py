"""Chooses what learns: all weights, only the initial state of a frozen model (state tuning), or an adapter; and in
which units a state learns.

Training steps are the same in each case (train/loop).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from infctx.adapters.dropout import row_keys
from infctx.adapters.install import add_adapters, learned_names, set_learned
from infctx.adapters.targets import weights_that_learn
from infctx.data.lanes import Window
from infctx.errors import InputError
from infctx.formats.adapter_file import read_adapter
from infctx.formats.model_files import ModelFiles, open_base
from infctx.formats.stored_names import stored_names
from infctx.formats.weights import StoredWeights, has_fingerprint
from infctx.model.rwkv import RWKV
from infctx.model.state import State
from infctx.ops.precision import state_dtype
from infctx.settings.adapter import AdapterSettings
from infctx.settings.config import Config
from infctx.settings.window import WindowSettings
from infctx.train.run import Run
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


def learn_adapter(model: RWKV, config: Config, files: ModelFiles) -> None:
    """Freezes everything but a new adapter and what learns with it.

    files: of the frozen weights, for the exact values of those that learn in fp32
    """
    settings = config.model.learned_adapter
    assert settings is not None
    add_adapters(model, settings, config.run.seed)
    names, wanted = stored_names(model.sizes), weights_that_learn(model, settings)
    stored = open_base(files) if wanted else None
    for name in wanted:
        assert stored is not None
        model.get_parameter(name).data.copy_(stored.tensors[names[name]])


def resume_adapter(model: RWKV, settings: AdapterSettings, path: Path, frozen: RWKV | StoredWeights) -> None:
    """Sets what learns to a checkpoint's values; InputError for another adapter, or one over other weights.

    frozen: the weights that stay, as the file has them
    """
    learned = read_adapter(path, model.sizes)
    if learned.tuned_over is None or not has_fingerprint(frozen, learned.tuned_over):
        raise InputError(f"{path}: was trained over other weights; name those weights, or choose another run.folder")
    wanted = {name: model.get_parameter(name).shape for name in learned_names(model)}
    found = {name: tensor.shape for name, tensor in learned.tensors.items()}
    if wanted != found or learned.kind != (settings.form, settings.scale):
        raise InputError(f"{path}: is of a run with another model.adapter; set it back, or choose another run.folder")
    set_learned(model, learned.tensors)


def dropout_rows(run: Run, num_tokens: int) -> Tensor | None:
    """Returns what the dropout of this rank's lanes is drawn from in this step (B, T); None without dropout."""
    config, engine = run.plan.config, run.engine
    adapter = config.model.learned_adapter
    if adapter is None or not adapter.dropout:
        return None
    lanes = engine.ranks.lanes(config.window.lanes)
    return row_keys(config.run.seed, engine.step_number, lanes, num_tokens, engine.device)


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
