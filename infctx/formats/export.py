"""Export: a model or a tuned state in; a file or folder for other programs out, written one tensor at a time."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from infctx.errors import InputError
from infctx.formats.adapter_file import write_adapter_alone
from infctx.formats.hub_folder import CODE, write_hub_folder
from infctx.formats.model_files import (
    ModelFiles,
    find_adapter,
    find_model,
    find_state,
    is_of_others,
    open_base,
    with_adapter,
)
from infctx.formats.other_names import NAMINGS
from infctx.formats.state_file import SUFFIXES, is_state_file, read_state, save_state, state_among
from infctx.formats.tensor_file import read_metadata
from infctx.formats.weights import StoredWeights, copy_weights, open_weights
from infctx.hub.models import fetch_model
from infctx.hub.published import refuse_stopped_download
from infctx.model.sizes import Sizes, describe
from infctx.model.state import State, describe_state, refuse_other_sizes

EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

log = logging.getLogger(__name__)


# Eight parameters: one for each option of `infctx export`.
def export(
    source: Path,
    output: str | Path,
    *,
    form: str | None = None,
    names: str = "official",
    dtype: str | None = None,
    state: Path | None = None,
    adapter: Path | None = None,
    overwrite: bool = False,
) -> str:
    """Writes the weights, state or adapter of a run, a checkpoint or a file; returns lines that describe the output.

    output: a file.  With names other than the official ones, an output that ends in / or has no suffix is a folder in
            Hugging Face's layout, see `write_hub_folder`.
    form:   "weights", merged with the adapter if there is one; or a form of `infctx.save_state` (pth, st, merged,
            infctx); or "adapter", alone.  None: a state if `source` is one or tuned one, in the form of the suffix of
            `output`; otherwise weights.
    names:  naming of the weights' tensors: "official", "huggingface" or "fla"
    dtype:  of the weights (None: bf16, as in the published files), or of a state of form pth (None: fp32)
    state:  a state file to merge with the weights, instead of the state of `source`
    adapter: a file or a run whose adapter is merged with the weights of `source`
    """
    source = fetch_model(source)
    refuse_stopped_download(source)
    as_folder = names != "official" and _is_folder(output)
    output = Path(output)
    form = form or ("weights" if adapter and not state else _form(source, output, names, state))
    _refuse(source, output, form, names, dtype, state, overwrite)
    if form == "adapter":
        return write_adapter_alone(source if source.is_file() else find_adapter(source) or source, output)
    if form in ("weights", "merged"):
        files = find_model(source) if adapter is None else with_adapter(find_model(source), adapter)
        if form == "weights":
            return _export_weights(files, output, EXPORT_DTYPES[dtype or "bf16"], names, as_folder)
        return _export_merged(files, output, EXPORT_DTYPES[dtype or "bf16"], state)
    found = find_state(source)
    if found is None:  # it may be among the weights
        found = find_model(source).weights
        found_state = state_among(open_weights(found))
        if found_state is None:
            raise InputError(f"{found}: is a model without an initial state; tune one with `infctx tune`")
        metadata = None
    else:
        found_state, metadata = read_state(found), read_metadata(found)
    save_state(found_state, output, form, dtype=EXPORT_DTYPES[dtype] if dtype else None, metadata=metadata)
    return f"{output}: a state of {describe_state(found_state)}, from {found}"


def _is_folder(output: str | Path) -> bool:
    return str(output).endswith(("/", os.sep)) or not Path(output).suffix or Path(output).is_dir()


def _form(source: Path, output: Path, names: str, state: Path | None) -> str:
    """Returns the form to write if none is given."""
    if state is not None:
        return "merged"
    if find_adapter(source) is not None and output.suffix not in SUFFIXES["st"]:
        return "weights"
    is_state = output.suffix in SUFFIXES["st"] or (names == "official" and find_state(source) is not None)
    if not is_state:
        return "weights"
    return next((form for form in ("pth", "st", "infctx") if output.suffix in SUFFIXES[form]), "pth")


def _refuse(
    source: Path, output: Path, form: str, names: str, dtype: str | None, state: Path | None, overwrite: bool
) -> None:
    """Raises InputError for options that do not go together, before anything is read."""
    alone = source.is_file() and is_state_file(source)
    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists; choose another name, or give --overwrite")
    if names not in NAMINGS:
        raise InputError(f"export: there are no {names!r} names; choose {', '.join(NAMINGS)}")
    if form not in ("weights", "adapter", *SUFFIXES):
        raise InputError(f"export: there is no form {form!r}; choose weights, adapter, {', '.join(SUFFIXES)}")
    if names != "official" and form != "weights":
        raise InputError(f"export: {names} names have no place for a state; give --form weights to export the weights")
    if alone and form in ("weights", "merged"):
        raise InputError(f"{source}: is a state without weights; name the model, and give this file with --state")
    if state is not None and form != "merged":
        raise InputError(
            f"export: --state {state} is for --form merged, not {form}; to convert a state alone, name it as MODEL"
        )
    if dtype is not None and form in ("st", "infctx"):
        written = {"st": "fp16", "infctx": "fp32"}[form]
        raise InputError(f"export: a state of form {form} is always {written}; leave --dtype out")


def _export_weights(files: ModelFiles, output: Path, dtype: torch.dtype, names: str, as_folder: bool) -> str:
    stored, (weights, tuned, adapters) = open_base(files), files
    leaves_out = names != "official" and stored.has_state
    if as_folder:
        num_tensors = write_hub_folder(stored, output, dtype, names)
    else:
        num_tensors = copy_weights(stored, output, dtype, names, state={} if leaves_out else None)
    lines = [
        f"{output}: {describe(stored.sizes)}",
        f"  {num_tensors} tensors in {_name(dtype)} under {names} names, from {weights}",
        *(f"  merged with {adapter}" for adapter in adapters),
    ]
    if tuned or leaves_out:
        lines.append(f"  without the initial state of {tuned or weights}: export that by itself, or --form merged")
    if as_folder:
        lines.append(f"  {_still_missing(stored.sizes, names)}")
    # Its configuration has one eps for all norms, and for RWKV-7 head_size times that for the heads' norm: 64e-5.
    if names == "fla" and (stored.sizes.version, stored.sizes.head_size) != (7, 64):
        lines.append("  once fla has loaded it, set g_norm.eps = 64e-5 in each layer's attn")
    return "\n".join(lines)


def _still_missing(sizes: Sizes, names: str) -> str:
    """Describes the files that a folder still needs and their source; they are not ours to distribute."""
    wanted = ["the model's .py files"] if names == "huggingface" else []
    if sizes.vocab_size == 65536:
        wanted.append("the tokenizer")
    if not wanted:
        return "it has no tokenizer"
    return f"add {' and '.join(wanted)} from {CODE.get(sizes.version, CODE[6])} on the hub (docs/models.md)"


def _export_merged(files: ModelFiles, output: Path, dtype: torch.dtype, state: Path | None) -> str:
    stored, tuned = open_base(files), state or files.state
    initial = state_among(stored) if tuned is None else _tuned_state(tuned, stored, files)
    if initial is None:
        raise InputError(f"{files.weights}: is a model without an initial state; give a state file with --state")
    save_state(initial, output, "merged", model=stored, dtype=dtype)
    hint = "\n  the rwkv package does not read RWKV-7's state from it: give that by hand" * (stored.sizes.version == 7)
    return f"{output}: {describe(stored.sizes)} in {_name(dtype)} with the state of {tuned or files.weights}{hint}"


def _tuned_state(path: Path, stored: StoredWeights, files: ModelFiles) -> State:
    """Reads the state that `open_model` would start documents from, with the same refusal and warning."""
    state = read_state(path)
    refuse_other_sizes(state, stored.sizes, path)
    if is_of_others(path, files, stored):
        log.warning("%s: was tuned over other weights than %s holds", path, files.weights)
    return state


def _name(dtype: torch.dtype) -> str:
    return next(name for name, its in EXPORT_DTYPES.items() if its == dtype)
