"""Which matrices have an adapter and which weights learn with it: settings and a model in; names and numbers out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

from infctx.adapters.forms import inputs_and_outputs, make_adapter
from infctx.errors import InputError
from infctx.model.build import empty_model
from infctx.model.layers import Embedding, Linear
from infctx.model.rwkv import RWKV
from infctx.model.sizes import Sizes, describe
from infctx.settings.adapter import AdapterSettings, Target

PARTS = {"att": "time_mix", "ffn": "channel_mix"}
"""The official names of a block's halves, and ours; their matrices have the same names."""
ENDS = {"head": "head", "emb": "embedding"}
"""The same of the matrices outside of the blocks, which `all` leaves out."""


def refuse_targets(settings: AdapterSettings, sizes: Sizes) -> None:
    """Raises InputError for a matrix that models of this version do not have."""
    present = _present(empty_model(replace(sizes, num_layers=1)))
    for name in _wanted(settings, present):
        if name not in present:
            raise InputError(
                f"model.adapter.where: there is no {name} in {describe(sizes).partition(',')[0]}; it has "
                f"{', '.join(present)}"
            )


def target_matrices(model: RWKV, settings: AdapterSettings) -> Iterator[tuple[str, Linear | Embedding]]:
    """Yields the matrices that get an adapter, by their names in the model, block by block, then the others."""
    wanted = _wanted(settings, _present(model))
    in_blocks = [_our_name(name) for name in wanted if name not in ENDS]
    names = [f"blocks.{layer}.{name}" for layer in range(len(model.blocks)) for name in in_blocks]
    for name in names + [ENDS[name] for name in wanted if name in ENDS]:
        matrix = model.get_submodule(name)
        assert isinstance(matrix, (Linear, Embedding))
        yield name, matrix


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


def target_shapes(settings: AdapterSettings, sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Returns the inputs and outputs of each matrix of the first block that gets an adapter, and of `ENDS`."""
    model = empty_model(replace(sizes, num_layers=1))
    return {name: inputs_and_outputs(matrix) for name, matrix in target_matrices(model, settings)}


def _count(settings: AdapterSettings, sizes: Sizes) -> int:
    model = empty_model(sizes)
    count = sum(model.get_parameter(name).numel() for name in weights_that_learn(model, settings))
    for _, matrix in target_matrices(model, settings):
        count += sum(part.numel() for part in make_adapter(settings, matrix, 0, model.draws).parameters())
    return count


def _wanted(settings: AdapterSettings, present: list[str]) -> list[str]:
    given = settings.where if isinstance(settings.where, list) else [settings.where]
    groups = {
        "all": [name for name in present if name not in ENDS],
        "attention": [name for name in present if name.startswith("att.")],
    }
    return list(dict.fromkeys(name for word in given for name in groups.get(word, [word])))


def _present(model: RWKV) -> list[str]:
    """Returns the matrices that can have an adapter, by their official names."""
    names = set(dict(model.blocks[0].named_modules()))
    return [name for name in get_args(Target) if name in ENDS or _our_name(name) in names]


def _our_name(name: str) -> str:
    part, _, matrix = name.partition(".")
    return f"{PARTS[part]}.{matrix}"
