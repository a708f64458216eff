"""Adapters on disk, and weights merged with them.

One safetensors file holds the tensors of an adapter under the names of RWKV-PEFT (adapters/stored), and under their
official names the weights that learned with it.  Its header says what they compute; in a folder of RWKV-PEFT's,
adapter_config.json does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from infctx.adapters.learned import Learned
from infctx.adapters.stored import (
    CONFIG_FILE,
    MODEL_FILE,
    STEM,
    Header,
    PeftConfig,
    holds_adapter,
    old_kind,
    our_name,
    peft_config,
    stored_name,
)
from infctx.errors import InputError
from infctx.files import atomic_folder
from infctx.formats.stored_names import stored_names
from infctx.formats.tensor_file import read_metadata, read_shapes, read_tensors, write_tensors
from infctx.formats.tensor_stream import LazyTensors
from infctx.formats.weights import StoredWeights
from infctx.model.sizes import Sizes

KEY = "adapter"
"""Key of the header in the metadata of a file."""


def write_adapter(learned: Mapping[str, Tensor], path: Path, header: Header, sizes: Sizes) -> None:
    """Writes what learned, our name -> tensor on the CPU; atomic."""
    names = stored_names(sizes)
    tensors = {stored_name(name, names): tensor.contiguous() for name, tensor in learned.items()}
    write_tensors(tensors, path, {KEY: header.model_dump_json()})


def write_adapter_alone(adapter: Path, output: Path) -> str:
    """Copies a file of `write_adapter`, or writes it as a folder that RWKV-PEFT and peft read; returns what it did.

    output: a file if it has the suffix .safetensors, else a folder
    """
    header = _header(adapter)
    if not isinstance(header, Header):
        raise InputError(f"{adapter}: is in RWKV-PEFT's form already; copy it with its {CONFIG_FILE}")
    tensors = read_tensors(adapter)
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(STEM)}
    if output.suffix:
        write_tensors(tensors, output, read_metadata(adapter), suffixes=(".safetensors",))
        return f"{output}: an adapter of {len(tensors)} tensors, from {adapter}"
    with atomic_folder(output) as temporary:
        write_tensors(kept, temporary / MODEL_FILE)
        text = json.dumps(peft_config(header, list(kept)), indent=2)
        (temporary / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    line = f"{output}: an adapter of {len(kept)} tensors in RWKV-PEFT's form, from {adapter}"
    left_out = len(tensors) - len(kept)
    return line + f"\n  without the {left_out} weights that learned with it: it is only whole merged" * bool(left_out)


def read_adapter(path: Path, sizes: Sizes) -> Learned:
    """Reads an adapter for a model of these sizes, from a file or a folder of RWKV-PEFT's; see `merged_weights`."""
    path = path / MODEL_FILE if path.is_dir() else path
    header = _header(path)
    ours = {official: name for name, official in stored_names(sizes).items()}
    learned = {}
    for stored, tensor in read_tensors(path).items():
        name = our_name(stored, ours)
        if name is None:
            raise InputError(f"{path}: tensor {stored} is of no adapter for this model")
        if not tensor.isfinite().all():
            raise InputError(f"{path}: tensor {stored} has values that are not finite; the file is damaged")
        learned[name] = tensor
    return Learned(str(path), header.kind(), learned, header.weights)


def is_adapter_file(path: Path) -> bool:
    """Returns whether a file holds an adapter."""
    return holds_adapter(read_shapes(path))


def merged_weights(stored: StoredWeights, learned: Learned) -> StoredWeights:
    """Returns weights merged with an adapter, each computed when it is looked up; InputError if it does not fit."""
    names = stored_names(stored.sizes)
    ours, plan = {official: name for name, official in names.items()}, stored.tensors.plan
    for matrix in learned.matrices():
        learned.refuse_shapes(matrix, *plan[names[f"{matrix}.weight"]].shape)
    for name, tensor in learned.tensors.items():
        if name in names and tensor.numel() != plan[names[name]].numel():  # some write (1, 1, D) for (D)
            shape = tuple(tensor.shape)
            raise InputError(f"{learned.place}: {names[name]} has shape {shape}; use one trained on this model")
    merged = LazyTensors(plan, lambda official: learned.merged(ours.get(official, ""), stored.tensors[official]))
    return stored._replace(tensors=merged)


def _header(path: Path) -> Header | PeftConfig:
    """Reads what the adapters of a file compute."""
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; name an adapter (.safetensors), or the folder of a run that learned one"
        )
    said, beside = read_metadata(path).get(KEY), path.with_name(CONFIG_FILE)
    try:
        if said is not None:
            return Header.model_validate_json(said)
        if beside.is_file():
            return PeftConfig.model_validate_json(beside.read_bytes())
    except ValueError as error:
        raise InputError(f"{path if said else beside}: does not say what can be read ({_first(error)})") from None
    old = old_kind(read_shapes(path))
    if old is not None and old.form == "miss":
        return PeftConfig(peft_type="MISS", r=old.rank)
    remedy = f"keep {CONFIG_FILE} beside it"
    if old is not None:
        remedy = f'write {CONFIG_FILE} beside it: {{"peft_type": "LORA", "r": {old.rank}, "lora_alpha": its alpha}}'
    raise InputError(f"{path}: is no adapter that says what it computes; {remedy}")


def _first(error: ValueError) -> str:
    return " ".join(str(error).split("\n")[1:3]).strip() or str(error)
