"""The tensors of a checkpoint, divided among the ranks: each writes its share into separate files.

A single rank writes NAME.safetensors; several write NAME-00001-of-00004.safetensors and so on.  Parameters spread over
the ranks are gathered one at a time.  The rank that writes one keeps a copy in host memory and the others drop it, so
none ever holds more than its share.  When reading, each rank opens the files that have its tensors, however many ranks
there are now.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infctx.adapters.install import learned_names
from infctx.distributed.engine import Engine
from infctx.distributed.ranks import Ranks
from infctx.errors import InputError
from infctx.formats.checkpoint_folder import INDEX, tensor_files
from infctx.formats.stored_names import stored_names
from infctx.formats.tensor_file import open_safetensors, write_tensors
from infctx.formats.weights import state_name
from infctx.model.state import State
from infctx.ops.precision import state_dtype
from infctx.optimizers.moments import MOMENTS, PARTS, are_moments

ANOTHER_CHECKPOINT = "remove this checkpoint to resume from the one before"


def write_weights(folder: Path, engine: Engine) -> list[Path]:
    """Writes this rank's share of the weights under their official names, and with several ranks, rank 0's index.

    Returns the files written.
    """
    names = stored_names(engine.model.sizes)
    mine: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    for name, parameter, owner in _share_out(engine):
        whole = engine.whole(parameter)
        stored = _official(name, whole.cpu() if owner == engine.ranks.rank else whole.to("meta"), names)
        files |= dict.fromkeys(stored, _file("model", owner, engine.ranks.world_size))
        if owner == engine.ranks.rank:
            mine |= {ours: tensor.contiguous() for ours, tensor in stored.items()}
    order = [*names.values(), *(state_name(layer) for layer in range(engine.model.sizes.num_layers))]
    written = _write(folder, "model", {name: mine[name] for name in order if name in mine}, engine.ranks)
    if engine.ranks.is_first and engine.ranks.world_size > 1:
        ordered = {name: files[name] for name in order if name in files}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": ordered}, indent=1), encoding="utf-8")
        written.append(folder / INDEX)
    return written


def learned_weights(engine: Engine) -> dict[str, Tensor]:
    """Returns what learns with an adapter, by its names in the model, on the CPU; every rank must call it."""
    names = learned_names(engine.model)
    return {name: engine.whole(engine.model.get_parameter(name)).cpu().clone() for name in names}


def write_moments(folder: Path, engine: Engine) -> list[Path]:
    """Writes this rank's share of the optimizer's state, as <parameter>/<name>; returns its file."""
    mine = {}
    for name, parameter, owner in _share_out(engine):
        for key, values in engine.whole_moments(parameter).items():
            if owner == engine.ranks.rank:
                mine[f"{name}/{key}"] = values.detach().cpu().contiguous()
    return _write(folder, "optimizer", mine, engine.ranks)


def read_moments(folder: Path, engine: Engine) -> None:
    """Restores the optimizer's state, or this rank's part of it.

    Raises InputError if a parameter that learns has none, or one of another shape. Only the initial state may have
    none: it did not learn if the checkpoint was made with window.carry: lane, so it starts with zeros.
    """
    files = _tensors_of(folder, "optimizer")
    if not files:
        return
    steps = 0.0
    initial = {part for part in engine.model.initial_parts() if part is not None}
    without = []
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:
            continue
        keys = {key: f"{name}/{key}" for key in PARTS}
        moments = {key: _read(files[stored], stored) for key, stored in keys.items() if stored in files}
        shape = getattr(parameter, "ds_shape", parameter.shape)  # from ZeRO-3, which leaves an empty tensor
        if not moments and parameter in initial:
            without.append((name, parameter, shape))
            continue
        if not are_moments(moments, shape, state_dtype(parameter.dtype)):
            raise InputError(f"{folder}: the optimizer's state of {name} is incomplete; {ANOTHER_CHECKPOINT}")
        if not steps:
            steps = moments["step"].item()
            engine.begin_moments(steps)
        engine.set_moments(parameter, moments)
    for name, parameter, shape in without:
        if not steps:
            raise InputError(f"{folder}: the optimizer's state of {name} is missing; {ANOTHER_CHECKPOINT}")
        zeros = {key: torch.zeros(shape, dtype=parameter.dtype) for key in MOMENTS}
        engine.set_moments(parameter, zeros | {"step": torch.tensor(steps)})


def write_carry(folder: Path, carry: State, others: dict[str, Tensor], ranks: Ranks) -> list[Path]:
    """Writes the carried state of this rank's lanes, once for all ranks that share them, and rank 0's `others`.

    Returns the file written.
    """
    if ranks.time_rank > 0:
        return []
    tensors = {name: part.detach().cpu().contiguous() for name, part in carry._asdict().items()}
    shares = Ranks(ranks.data_rank, ranks.data_ranks)
    return _write(folder, "carry", tensors | (others if ranks.is_first else {}), shares)


def read_carry(folder: Path, ranks: Ranks) -> tuple[State, dict[str, Tensor]]:
    """Reads the carried state of this rank's current lanes, on the CPU, and the `others`.

    Raises InputError if a file has no state.
    """
    with ExitStack() as files:
        opened = [files.enter_context(open_safetensors(path)) for path in tensor_files(folder, "carry")]
        return _carry_in(opened, folder, ranks)


def _carry_in(opened: list[Any], folder: Path, ranks: Ranks) -> tuple[State, dict[str, Tensor]]:
    for file in opened:
        missing = set(State._fields) - set(file.keys())
        dimensions = [] if missing else [len(file.get_slice(name).get_shape()) for name in State._fields]
        if dimensions != [5, 3, 3]:
            raise InputError(f"{folder}: its carry is not the state of a model; {ANOTHER_CHECKPOINT}")
    lanes = [file.get_slice("wkv").get_shape()[1] for file in opened]
    wanted, first, parts = ranks.lanes(sum(lanes)), 0, []
    for file, count in zip(opened, lanes, strict=True):
        chosen = slice(max(wanted.start - first, 0), max(wanted.stop - first, 0))
        parts.append(State(*(file.get_slice(name)[:, chosen] for name in State._fields)))
        first += count
    others = {name: opened[0].get_tensor(name) for name in opened[0].keys() if name not in State._fields}  # noqa: SIM118
    return State.join_lanes(parts), others


def _share_out(engine: Engine) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Yields every parameter's name, itself, and the rank that writes it: the one with the least to write so far."""
    loads = [0] * engine.ranks.world_size
    for name, parameter in engine.model.named_parameters():
        owner = loads.index(min(loads))
        loads[owner] += getattr(parameter, "ds_numel", parameter.numel())  # from ZeRO-3, which leaves an empty tensor
        yield name, parameter, owner


def _official(name: str, tensor: Tensor, names: dict[str, str]) -> dict[str, Tensor]:
    """Returns a parameter under its official name; the initial state layer by layer, value-major."""
    if name == "initial_wkv":
        return {state_name(layer): wkv.mT for layer, wkv in enumerate(tensor)}
    return {names[name]: tensor}


def _file(stem: str, rank: int, count: int) -> str:
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{rank + 1:05d}-of-{count:05d}.safetensors"


def _write(folder: Path, stem: str, tensors: dict[str, Tensor], ranks: Ranks) -> list[Path]:
    if not tensors and ranks.world_size > 1:
        return []
    path = folder / _file(stem, ranks.rank, ranks.world_size)
    write_tensors(tensors, path)
    return [path]


def _tensors_of(folder: Path, stem: str) -> dict[str, Path]:
    """Returns the file of each tensor."""
    found: dict[str, Path] = {}
    for path in tensor_files(folder, stem):
        with open_safetensors(path) as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _read(path: Path, name: str) -> Any:
    with open_safetensors(path) as file:  # open it each time, so that memory of earlier reads is freed
        return file.get_tensor(name)
