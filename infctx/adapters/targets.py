"""Which matrices have an adapter and which weights learn with it: settings and a model in; names and numbers out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

from infctx.adapters.forms import make_adapter
from infctx.errors import InputError
from infctx.model.build import empty_model
from infctx.model.layers import Linear
from infctx.model.rwkv import RWKV
from infctx.model.sizes import Sizes, describe
from infctx.settings.adapter import AdapterSettings, Target

PARTS = {"att": "time_mix", "ffn": "channel_mix"}
"""The official names of a block's halves, and ours; their matrices have the same names."""


def refuse_targets(settings: AdapterSettings, sizes: Sizes) -> None:
    """Raises InputError for a matrix that models of this version do not have."""
    present = _present(empty_model(replace(sizes, num_layers=1)))
    for name in _wanted(settings, present):
        if name not in present:
            raise InputError(
                f"model.adapter.where: there is no {name} in {describe(sizes).partition(',')[0]}; it has "
                f"{', '.join(present)}"
            )


def target_matrices(model: RWKV, settings: AdapterSettings) -> Iterator[tuple[str, Linear]]:
    """Yields the matrices that get an adapter, by their names in the model, block by block."""
    wanted = _wanted(settings, _present(model))
    for layer in range(len(model.blocks)):
        for name in wanted:
            ours = f"blocks.{layer}.{_our_name(name)}"
            matrix = model.get_submodule(ours)
            assert isinstance(matrix, Linear)
            yield ours, matrix


def weights_that_learn(model: RWKV, settings: AdapterSettings) -> list[str]:
    """Returns the names of the weights that learn with the adapter, in full: those of `train_too`."""
    found = []
    for name, _ in model.named_parameters():
        *path, last = name.split(".")
        groups = {
            "norms": bool(path) and path[-1].endswith("_norm"),
            "mixes": last.startswith("mix_"),
            "decays": last in ("decay", "decay_down", "decay_up"),
            "bonus": last == "bonus",
        }
        if any(groups[group] for group in settings.train_too):
            found.append(name)
    return found


def count_learned(settings: AdapterSettings, sizes: Sizes) -> int:
    """Returns how many numbers learn: the adapter, the weights of `train_too`, the state."""
    layers = [_count(settings, replace(sizes, num_layers=count)) for count in (1, 2)]
    state = sizes.num_layers * sizes.width * sizes.head_size if settings.initial_state else 0
    return layers[0] + (sizes.num_layers - 1) * (layers[1] - layers[0]) + state


def target_shapes(settings: AdapterSettings, sizes: Sizes) -> list[tuple[int, int]]:
    """Returns the outputs and inputs of each matrix of a block that gets an adapter."""
    model = empty_model(replace(sizes, num_layers=1))
    return [(matrix.out_features, matrix.in_features) for _, matrix in target_matrices(model, settings)]


def _count(settings: AdapterSettings, sizes: Sizes) -> int:
    model = empty_model(sizes)
    count = sum(model.get_parameter(name).numel() for name in weights_that_learn(model, settings))
    for _, matrix in target_matrices(model, settings):
        count += sum(part.numel() for part in make_adapter(settings, matrix, 0, model.draws).parameters())
    return count


def _wanted(settings: AdapterSettings, present: list[str]) -> list[str]:
    if isinstance(settings.where, list):
        return list(dict.fromkeys(settings.where))
    return [name for name in present if settings.where == "all" or name.startswith("att.")]


def _present(model: RWKV) -> list[str]:
    """Returns the matrices of a block that can have an adapter, by their official names."""
    names = set(dict(model.blocks[0].named_modules()))
    return [name for name in get_args(Target) if _our_name(name) in names]


def _our_name(name: str) -> str:
    part, _, matrix = name.partition(".")
    return f"{PARTS[part]}.{matrix}"
