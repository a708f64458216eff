"""Weights under other programs' names in, under the official names out, and back; no value changes.

Hugging Face's remote code (`Rwkv5ForCausalLM`, `Rwkv6ForCausalLM`) only renames the tensors.  flash-linear-attention
(`RWKV6ForCausalLM` and `RWKV7ForCausalLM`, no Eagle) also stacks and transposes some, and orders the low-rank products
of Finch differently.  Its first files of Goose stack the six blends of a token and the one before; those are only read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from infctx.errors import InputError
from infctx.formats.stored_names import block_names

READ = "RWKV-5.2, RWKV-6 and RWKV-7"
"""What infctx reads, for messages."""
NAMINGS = ("official", "huggingface", "fla")
"""The naming schemes that the tensors of a file can have."""
EARLY_FLA = "early fla"
"""The names of fla's first files of Goose, for messages."""


def naming_of(names: Iterable[str]) -> str:
    """Returns which of NAMINGS these names belong to; "official" if neither of the others fits."""
    names = set(names)
    for naming, pattern in (("huggingface", r"rwkv\."), ("fla", r"model\.(embeddings|layers\.[0-9]+\.attn)\.")):
        if "emb.weight" not in names and any(re.match(pattern, name) for name in names):
            return naming
    return "official"


def to_official(tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Returns official name -> tensor, in the official order, from any naming; official tensors are returned unchanged.

    path: the file they come from, for messages
    Raises InputError naming a tensor that does not belong, is missing or has a shape that cannot be converted; other
    odd shapes are left to the reader of the official names.
    """
    return {name: convert(tensors) for name, convert in conversions_to_official(tensors, path).items()}


def from_official(tensors: Mapping[str, Tensor], naming: str, path: str | Path) -> dict[str, Tensor]:
    """Returns their name -> contiguous tensor, in the order of their module's state_dict(), from official tensors.

    path: the file they go to, for messages
    Raises InputError if the tensors are not a complete model, and for models that these names do not cover: with a
    learned initial state, and Eagle for fla.
    """
    return {name: convert(tensors) for name, convert in conversions_from_official(tensors, naming, path).items()}


Conversion = Callable[[Mapping[str, Tensor]], Tensor]
"""Makes one tensor from those that it looks up; on the meta device it gives the shape alone."""


def conversions_to_official(names: Collection[str], path: str | Path) -> dict[str, Conversion]:
    """Returns official name -> its conversion in `to_official`; raises for bad names, a conversion for bad shapes."""
    naming = naming_of(names)
    if naming == "official":
        return {name: itemgetter(name) for name in names}
    version = _version(names, naming)
    layers = _layers(names, naming)
    if version == 7 and _stacks_blends(names):
        naming = EARLY_FLA
    _check_names(names, naming, version, layers, path)
    found: dict[str, Conversion] = {}
    for row in _rows(naming, version, layers):
        name, official, layout = row
        for number, part_name in enumerate(official):
            found[part_name] = itemgetter(name) if layout is _SAME else partial(_part, row, number, path)
    return {name: found[name] for name, _, _ in _rows("official", version, layers)}


def conversions_from_official(names: Collection[str], naming: str, path: str | Path) -> dict[str, Conversion]:
    """Returns their name -> its conversion in `from_official`; raises like that function."""
    if naming == "official":
        return {name: itemgetter(name) for name in names}
    for name in names:
        if name.endswith(".att.time_state"):
            remedy = "leave the initial state out, or use the official names"
            raise InputError(f"{path}: tensor {name!r} has no place under the {naming} names; {remedy}")
    version = version_of(names)
    if version == 7:
        names = [name for name in names if name not in UNUSED]
    if (naming, version) not in _LAYERS:
        known = ", ".join(other for other in NAMINGS if (other, version) in _LAYERS)
        raise InputError(f"{path}: RWKV-{version} has no {naming} names; choose one of {known}")
    layers = _layers(names, "official")
    _check_names(names, "official", version, layers, path)
    return {row[0]: partial(_whole, row) for row in _rows(naming, version, layers)}


def _part(row: _Row, number: int, path: str | Path, tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns the official tensor at place `number` in one of theirs."""
    name, official, layout = row
    tensor = tensors[name]
    _check_shape(name, tensor, layout, path)
    part = layout.to_official(tensor).chunk(len(official))[number]
    return part.clone(memory_format=torch.contiguous_format)  # a view would keep, and store, the whole tensor


def _whole(row: _Row, tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns one of their tensors, made of the official ones in it."""
    _, official, layout = row
    parts = [tensors[name] for name in official]
    return layout.to_theirs(torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()


def version_of(names: Collection[str]) -> int:
    """Returns the version of a model with these official names; the reader of names finds what does not belong."""
    if any(re.match(r"blocks\.[0-9]+\.att\.(k_k|r_k)$", name) for name in names):
        return 7
    return 6 if any(".time_maa_" in name for name in names) else 5


def _version(names: Collection[str], naming: str) -> int:
    if naming == "fla":
        return 7 if any(re.match(r"model\.layers\.[0-9]+\.attn\.(k_k|r_k)$", name) for name in names) else 6
    return version_of(names)


def _stacks_blends(names: Iterable[str]) -> bool:
    ends = {name.rpartition(".")[2] for name in names}
    return "x_x" in ends and "x_r" not in ends


def _layers(names: Iterable[str], naming: str) -> list[str]:
    """Returns the layers of these names, in order; as digits, since a name can have too many for int()."""
    layer = re.compile(re.escape(_MODULES[naming][1]) + r"\.(0|[1-9][0-9]*)\.")
    found = {match[1] for name in names if (match := layer.match(name))}
    return sorted(found, key=lambda digits: (len(digits), digits))


def _rows(naming: str, version: int, layers: list[str]) -> Iterator[_Row]:
    """Yields every tensor of a model, in the order of its module's state_dict()."""
    embedding, blocks, norm, head = _MODULES[naming]
    yield f"{embedding}.weight", ("emb.weight",), _SAME
    for layer in layers:
        for name, official, layout in _LAYERS[naming, version]:
            if (layer == "0" or not official[0].startswith("ln0.")) and (layer != "0" or official[0] not in _BLEND):
                yield f"{blocks}.{layer}.{name}", tuple(f"blocks.{layer}.{part}" for part in official), layout
    yield f"{norm}.weight", ("ln_out.weight",), _SAME
    yield f"{norm}.bias", ("ln_out.bias",), _SAME
    yield f"{head}.weight", ("head.weight",), _SAME


def _check_names(names: Collection[str], naming: str, version: int, layers: list[str], path: str | Path) -> None:
    """Raises InputError for an unknown or missing name.  A hostile file can imply too many names to keep them all."""
    known = {name for name, _, _ in _rows(naming, version, layers) if name in names}
    kind = f"RWKV-{version} under the {naming} names"
    for name in names:
        if name not in known:
            raise InputError(f"{path}: tensor {name!r} does not belong to {kind}; infctx reads {READ}")
    for name, _, _ in _rows(naming, version, layers):
        if name not in known:
            raise InputError(f"{path}: tensor {name} is missing; not a whole model of {kind}")


def _check_shape(name: str, tensor: Tensor, layout: _Layout, path: str | Path) -> None:
    shape, letters = tuple(tensor.shape), layout.shape.split()
    fits = len(shape) == len(letters) and all(
        size == int(letter) if letter.isdigit() else size > 0 and size % (5 if letter[0] == "5" else 1) == 0
        for size, letter in zip(shape, letters, strict=True)
    )
    if not fits:
        expected = f"({', '.join(letters)}) is expected, D being the width, M and R ranks"
        raise InputError(f"{path}: tensor {name} has shape {shape}; {expected}")


class _Layout(NamedTuple):
    """The layout of one of their tensors: its shape, and the conversions there and back."""

    shape: str
    to_theirs: Callable[[Tensor], Tensor]
    to_official: Callable[[Tensor], Tensor]


_Row = tuple[str, tuple[str, ...], _Layout]
"""The name of one of their tensors, the official names of the tensors stacked in it, mostly one, and its layout."""

# The official order of the five low-rank products is w, k, v, r, g; in flash-linear-attention r comes first.
_THERE, _BACK = [3, 0, 1, 2, 4], [1, 2, 3, 0, 4]

_SAME = _Layout("", lambda x: x, lambda x: x)
_VECTOR = _Layout("D", lambda x: x.flatten(), lambda x: x[None, None])  # (1, 1, D)
_STACKED = _Layout("5 D", lambda x: x.squeeze(1), lambda x: x.unsqueeze(1))  # (5, 1, D), five times (1, 1, D)
_STACKED_SIX = _STACKED._replace(shape="6 D")
_TRANSPOSED = _Layout("R D", lambda x: x.mT, lambda x: x.mT)
_DOWN = _Layout(
    "5M D",
    lambda x: x.mT.unflatten(0, (5, -1))[_THERE].flatten(0, 1),  # (D, 5 M) -> (5, M, D) -> (5 M, D)
    lambda x: x.unflatten(0, (5, -1))[_BACK].flatten(0, 1).mT,
)
_UP = _Layout(
    "D 5M",
    lambda x: x[_THERE].permute(2, 0, 1).flatten(1),  # (5, M, D) -> (D, 5, M) -> (D, 5 M)
    lambda x: x.unflatten(1, (5, -1)).permute(1, 2, 0)[_BACK],
)


def _layer(*modules: tuple[str, str, _Layout]) -> list[_Row]:
    """Returns a layer's tensors: a norm has a weight and a bias, a matrix a weight, and time_... is itself a tensor, as
    is each of RWKV-7 with such a short name as x_r or w0."""
    rows = []
    for theirs, official, layout in modules:
        bare = "time_" in official or re.search(r"\.(\w_\w|\w\d)$", official)
        ends = ("",) if bare else (".weight", ".bias") if "ln" in official else (".weight",)
        rows += [(theirs + end, tuple(name + end for name in official.split()), layout) for end in ends]
    return rows


def _official(version: int) -> list[_Row]:
    return [(name, (name,), _SAME) for name in block_names(version, True, keeps_first_blend=True).values()]


def _renamed(names: str, words: Mapping[str, str]) -> list[_Row]:
    """Returns a layer's tensors that differ only by words in their names; names: official, in the others' order."""
    return _layer(
        *((".".join(words.get(word, word) for word in name.split(".")), name, _SAME) for name in names.split())
    )


_BLEND = ("att.v0", "att.v1", "att.v2")
"""Goose's weights of a blend with the values of the first block, which has no use for its own."""
UNUSED = tuple(f"blocks.0.{name}" for name in _BLEND)


def _fla_product(letter: str) -> list[tuple[str, str, _Layout]]:
    lora = f"attn.{letter}_lora.lora"
    return [
        (f"{lora}.0.weight", f"att.{letter}1", _TRANSPOSED),
        (f"{lora}.2.weight", f"att.{letter}2", _TRANSPOSED),
        (f"{lora}.2.bias", f"att.{letter}0", _VECTOR),
    ]


def _fla_goose(*blends: tuple[str, str, _Layout]) -> list[_Row]:
    return _layer(
        ("pre_norm", "ln0", _SAME),
        ("attn_norm", "ln1", _SAME),
        *blends,
        ("attn.k_k", "att.k_k", _VECTOR),
        ("attn.k_a", "att.k_a", _VECTOR),
        ("attn.r_k", "att.r_k", _SAME),
        ("attn.r_proj", "att.receptance", _SAME),
        ("attn.k_proj", "att.key", _SAME),
        ("attn.v_proj", "att.value", _SAME),
        ("attn.o_proj", "att.output", _SAME),
        *(row for letter in "wva" for row in _fla_product(letter)),
        *_fla_product("g")[:2],
        ("attn.g_norm", "att.ln_x", _SAME),
        ("ffn_norm", "ln2", _SAME),
        ("ffn.x_k", "ffn.x_k", _VECTOR),
        ("ffn.key", "ffn.key", _SAME),
        ("ffn.value", "ffn.value", _SAME),
    )


_HUGGINGFACE = {"ln0": "pre_ln", "att": "attention", "ffn": "feed_forward"} | {
    f"time_mix_{word[0]}": f"time_mix_{word}" for word in ("key", "value", "receptance", "gate")
}

_MODULES = {
    "official": ("emb", "blocks", "ln_out", "head"),
    "huggingface": ("rwkv.embeddings", "rwkv.blocks", "rwkv.ln_out", "head"),
    "fla": ("model.embeddings", "model.layers", "model.norm", "lm_head"),
}
_MODULES[EARLY_FLA] = _MODULES["fla"]

_LAYERS = {
    ("official", 5): _official(5),
    ("huggingface", 5): _renamed(
        "ln0 ln1 ln2 att.time_decay att.time_faaaa att.time_mix_g att.time_mix_k att.time_mix_v att.time_mix_r "
        "att.key att.value att.receptance att.gate att.output att.ln_x "
        "ffn.time_mix_k ffn.time_mix_r ffn.key ffn.receptance ffn.value",
        _HUGGINGFACE,
    ),
    ("official", 6): _official(6),
    ("huggingface", 6): _renamed(
        "ln0 ln1 ln2 att.time_maa_x att.time_maa_w att.time_maa_k att.time_maa_v att.time_maa_r att.time_maa_g "
        "att.time_maa_w1 att.time_maa_w2 att.time_decay att.time_decay_w1 att.time_decay_w2 att.time_faaaa "
        "att.receptance att.key att.value att.gate att.output att.ln_x "
        "ffn.time_maa_k ffn.time_maa_r ffn.key ffn.receptance ffn.value",
        _HUGGINGFACE,
    ),
    ("fla", 6): _layer(
        ("pre_norm", "ln0", _SAME),
        ("attn_norm", "ln1", _SAME),
        ("attn.x_bias", "att.time_maa_r att.time_maa_w att.time_maa_k att.time_maa_v att.time_maa_g", _STACKED),
        ("attn.bonus", "att.time_faaaa", _SAME),
        ("attn.x_proj.0.mu", "att.time_maa_x", _VECTOR),
        ("attn.x_proj.0.linear.weight", "att.time_maa_w1", _DOWN),
        ("attn.x_proj.2.weight", "att.time_maa_w2", _UP),
        ("attn.r_proj.linear", "att.receptance", _SAME),
        ("attn.w_proj.linear.lora.0.weight", "att.time_decay_w1", _TRANSPOSED),
        ("attn.w_proj.linear.lora.2.weight", "att.time_decay_w2", _TRANSPOSED),
        ("attn.w_proj.linear.lora.2.bias", "att.time_decay", _VECTOR),
        ("attn.k_proj.linear", "att.key", _SAME),
        ("attn.v_proj.linear", "att.value", _SAME),
        ("attn.g_proj.linear", "att.gate", _SAME),
        ("attn.g_norm", "att.ln_x", _SAME),
        ("attn.o_proj", "att.output", _SAME),
        ("ffn_norm", "ln2", _SAME),
        ("ffn.key.mu", "ffn.time_maa_k", _VECTOR),
        ("ffn.key.linear", "ffn.key", _SAME),
        ("ffn.value", "ffn.value", _SAME),
        ("ffn.receptance.mu", "ffn.time_maa_r", _VECTOR),
        ("ffn.receptance.linear", "ffn.receptance", _SAME),
    ),
    ("official", 7): _official(7),
    ("fla", 7): _fla_goose(*((f"attn.x_{letter}", f"att.x_{letter}", _SAME) for letter in "rwkvag")),
    (EARLY_FLA, 7): _fla_goose(("attn.x_x", " ".join(f"att.x_{letter}" for letter in "rwkvag"), _STACKED_SIX)),
}
"""Naming and version -> the tensors of a layer, in the order of the module's state_dict()."""
