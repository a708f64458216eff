"""Initial states on disk: reads and writes every form that programs of the RWKV world use.

    form    container                  holds
    pth     .pth                       only blocks.N.att.time_state (H, value, key) for each layer
    st      .st or .state              the same names, (H, key, value), fp16, safetensors: Ai00 and web-rwkv
    merged  .pth or .safetensors       a complete model with the tensors of form pth among its weights
    infctx  .safetensors               wkv (L, H, key, value), and time_shift, channel_shift (L, D) if they are
                                       learned: the parts of a `State`; the other forms have no place for shifts

The content decides the form of a file: the container, and the names in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from infctx.errors import InputError
from infctx.formats.checkpoint_folder import STATE_FILE
from infctx.formats.tensor_file import STORED_DTYPES, is_safetensors, narrow, read_shapes, read_tensors, write_tensors
from infctx.formats.weights import StoredWeights, copy_weights, is_state_name, state_name, stored_tensors
from infctx.hub.models import fetch_model
from infctx.model.rwkv import RWKV
from infctx.model.state import State, refuse_other_sizes
from infctx.ops.precision import state_dtype

SUFFIXES = {"pth": (".pth",), "st": (".st", ".state"), "merged": (".pth", ".safetensors"), "infctx": (".safetensors",)}
"""The forms and the suffixes of their files."""

OWN_NAMES = set(State._fields)


def load_state(path: str | Path, model: RWKV) -> State:
    """Reads an initial state of any form for `model`: B = 1, on its device, fp32 (fp64 for an fp64 model).

    `model(tokens, state)` starts one document from it, `model.set_initial_state(state)` every document.  Shift vectors
    that the file does not have are zeros.  Raises InputError for a state of other sizes and for other files.
    """
    state = read_state(Path(path))
    refuse_other_sizes(state, model.sizes, path)
    weight = model.embedding.weight
    return state.to(weight.device, state_dtype(weight.dtype))


def save_state(
    state: State,
    path: str | Path,
    form: str | None = None,
    *,
    model: RWKV | StoredWeights | None = None,
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes the state of one document (B = 1) in one of the forms above; atomic.

    form:  "pth", "st", "merged" or "infctx"; None: by the suffix of `path` (.pth, .st, .safetensors)
    model: its weights go into a merged file, one tensor at a time if they are `StoredWeights`
    dtype: of form pth, and of the weights in a merged file, whose state stays fp32; None: unchanged, and fp32 for
           `StoredWeights`
    metadata: text for the header of a file of form infctx
    Raises InputError for another suffix, for values beyond the dtype, for values that are not finite, and for shift
    vectors in a form that has no place for them.
    """
    path = Path(path)
    form = form or _form_of_suffix(path)
    _check(state, path, form, model, dtype)
    turned = state.wkv[:, 0].detach().cpu().float().mT.clone(memory_format=torch.contiguous_format)
    value_major = {state_name(layer): wkv.clone() for layer, wkv in enumerate(turned)}  # each with separate memory
    if form == "pth":
        write_tensors(narrow(value_major, dtype, path), path)
    elif form == "st":
        key_major = {name: wkv.mT.contiguous() for name, wkv in value_major.items()}
        narrowed = narrow(key_major, torch.float16, path, "write form pth, which can be fp32")
        write_tensors(narrowed, path, suffixes=SUFFIXES[form])
    elif isinstance(model, StoredWeights):
        copy_weights(model, path, dtype or torch.float32, state=value_major)
    elif form == "merged":
        assert model is not None  # otherwise _check has refused it
        weights = {name: tensor for name, tensor in stored_tensors(model).items() if not is_state_name(name)}
        write_tensors(narrow(weights, dtype, path) | value_major, path)
    else:
        parts = {name: part[:, 0].detach().cpu().contiguous() for name, part in state._asdict().items()}
        if not _has_shifts(state):
            parts = {"wkv": parts["wkv"]}
        write_tensors(parts, path, metadata)


def read_state(path: Path) -> State:
    """Reads the state from a file of any form, in the file's sizes: B = 1, fp32 (fp64 if stored as that).

    path: the file, or the folder of a run or a checkpoint with a STATE_FILE, or a name on the hub, OWNER/REPO:FILE
    """
    path = fetch_model(path)
    path = path / STATE_FILE if path.is_dir() else path
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; name a state (.pth, .st, .state or .safetensors), or the folder of a tuned run"
        )
    shapes = read_shapes(path)
    if "wkv" in shapes and shapes.keys() <= OWN_NAMES:
        tensors = read_tensors(path)
    else:
        names = _layer_names(shapes, path)
        stored = read_tensors(path, names)
        tensors = {"wkv": torch.stack([stored[name] for name in names])}
        if shapes.keys() != set(names) or not is_safetensors(path):
            tensors["wkv"] = tensors["wkv"].mT  # key by value if alone in a safetensors file, otherwise value by key
    wkv = tensors["wkv"]
    if wkv.ndim != 4 or wkv.shape[-1] != wkv.shape[-2] or 0 in wkv.shape:
        raise InputError(f"{path}: the state has shape {tuple(wkv.shape)}; layers, heads, N, N are expected")
    layers, heads, size, _ = wkv.shape
    zeros = torch.zeros(layers, heads * size)
    state = State(wkv, tensors.get("time_shift", zeros), tensors.get("channel_shift", zeros))
    for name, part in state._asdict().items():
        if name != "wkv" and part.shape != zeros.shape:
            raise InputError(f"{path}: tensor {name} has shape {tuple(part.shape)}; wkv needs {tuple(zeros.shape)}")
        if not part.isfinite().all():
            raise InputError(f"{path}: {name} of the state has values that are not finite; the file is damaged")
    return State(*(part[:, None].to(state_dtype(part.dtype)).contiguous() for part in state))


def state_among(weights: StoredWeights) -> State | None:
    """Returns the initial state among the weights of a file, B = 1, in fp32; None if there is none."""
    if not weights.has_state:
        return None
    wkv = weights.initial_wkv().float()
    zeros = torch.zeros(weights.sizes.num_layers, weights.sizes.width)
    return State(*(part[:, None] for part in (wkv, zeros, zeros)))


def is_state_file(path: Path) -> bool:
    """Returns whether a file holds a state and no weights."""
    names = read_shapes(path).keys()
    return bool(names) and ("wkv" in names and names <= OWN_NAMES or all(map(is_state_name, names)))


def _layer_names(shapes: dict[str, tuple[int, ...]], path: Path) -> list[str]:
    """Returns `blocks.N.att.time_state` of layers 0, 1, ...; raises InputError if the file is something else."""
    found = [name for name in shapes if is_state_name(name)]
    is_model = any(name.endswith(("emb.weight", "embeddings.weight")) for name in shapes)
    if not found:
        what = "a model without an initial state" if is_model else f"no state ({_some(shapes)})"
        raise InputError(f"{path}: is {what}; name a state, such as the state.safetensors of a tuned run")
    strangers = [name for name in shapes if name not in found]
    if strangers and not is_model:
        raise InputError(f"{path}: tensor {strangers[0]} belongs neither to a state nor to a model; remove it")
    names = [state_name(layer) for layer in range(len(found))]
    for name in names:
        if name not in shapes:
            raise InputError(f"{path}: tensor {name} is missing ({_some(found)}); every layer has one")
        if shapes[name] != shapes[names[0]] or len(shapes[name]) != 3:
            raise InputError(
                f"{path}: tensor {name} has shape {shapes[name]}; every layer has three dimensions, heads, N, N, and "
                f"the shape of the first, {shapes[names[0]]}"
            )
    return names


def _check(state: State, path: Path, form: str, model: RWKV | StoredWeights | None, dtype: torch.dtype | None) -> None:
    if form not in SUFFIXES:
        raise InputError(f"{path}: there is no form {form!r} of a state; choose {', '.join(SUFFIXES)}")
    if path.suffix not in SUFFIXES[form]:
        raise InputError(f"{path}: a state of form {form} is written as {' or '.join(SUFFIXES[form])}; rename it")
    if model is None:
        if form == "merged":
            raise InputError(f"{path}: a merged file holds a model's weights; give the model")
        if state.batch_size != 1:
            raise InputError(f"{path}: the state has {state.batch_size} documents; choose one with state.lanes")
    else:
        refuse_other_sizes(state, model.sizes, path)
    if dtype not in (None, *STORED_DTYPES):
        raise InputError(f"{path}: a state cannot be written as {dtype}; choose fp32, bf16 or fp16")
    if form != "infctx" and _has_shifts(state):
        raise InputError(
            f"{path}: the state has shift vectors, and a file of form {form} has no place for them; write form infctx "
            "(.safetensors), or tune without them (model.learn: initial_state)"
        )
    for name, part in state._asdict().items():
        if not part.isfinite().all():
            raise InputError(f"{path}: {name} of the state has values that are not finite; not written")


def _form_of_suffix(path: Path) -> str:
    known = {suffix: form for form in ("pth", "st", "infctx") for suffix in SUFFIXES[form]}
    if path.suffix not in known:
        raise InputError(f"{path}: a state is written as {', '.join(known)}; choose one of these suffixes")
    return known[path.suffix]


def _has_shifts(state: State) -> bool:
    return bool(state.time_shift.any() or state.channel_shift.any())


def _some(names: Iterable[object]) -> str:
    """Shows a few of the names, cut to a readable length."""
    shown = [re.sub(r"(?<=.{60}).+", "...", str(name)) for name in sorted(names, key=str)[:2]]
    return f"found {', '.join(shown)}" if shown else "the file has no tensors"
