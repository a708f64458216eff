"""Export: a model or a tuned state in, the file that another program loads out."""

from __future__ import annotations

from pathlib import Path

import torch

from infctx.errors import InputError
from infctx.model.other_names import NAMINGS, from_official
from infctx.model.rwkv import RWKV
from infctx.model.sizes import describe
from infctx.model.state_file import SUFFIXES, describe_state, is_state_file, load_state, read_state, save_state
from infctx.model.tensor_file import narrow, read_tensors, write_tensors
from infctx.model.weights import is_state_name, load_model, save_weights, stored_tensors
from infctx.train.model_files import ModelFiles, find_model

EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export(
    source: Path,
    output: Path,
    *,
    form: str | None = None,
    names: str = "official",
    dtype: str | None = None,
    state: Path | None = None,
    overwrite: bool = False,
) -> str:
    """Writes the weights or the state of a run, a checkpoint or a file; returns one line that says what was done.

    form:  "weights", or a form of `infctx.save_state` (pth, st, merged, infctx); None: what `source` is, a state in
           the form that the suffix of `output` says
    names: of the weights: "official", "huggingface" or "fla"
    dtype: of the weights (None: bf16, what the published files are) or of a state of form pth (None: fp32)
    state: a state file for form merged, in the place of the state that goes with `source`
    """
    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists; choose another name, or --overwrite")
    if names not in NAMINGS:
        raise InputError(f"export: there are no {names!r} names; choose {', '.join(NAMINGS)}")
    if form not in (None, "weights", *SUFFIXES):
        raise InputError(f"export: there is no form {form!r}; choose weights, {', '.join(SUFFIXES)}")
    alone = source.is_file() and is_state_file(source)
    files = ModelFiles(source, source) if alone else find_model(source)
    files = files._replace(state=state or files.state)
    if form is None and output.suffix not in SUFFIXES["st"]:
        form = "merged" if state else "weights" if files.state is None or names != "official" else None
    if alone and form in ("weights", "merged"):
        raise InputError(f"{source}: is a state without weights; name the model, and give this file with --state")
    if form == "weights":
        return _export_weights(files.weights, output, EXPORT_DTYPES[dtype or "bf16"], names)
    if names != "official":
        raise InputError(f"export: {names} names have no place for a state; export the weights: --form weights")
    return _export_state(files, output, form, dtype)


def _export_weights(weights: Path, output: Path, dtype: torch.dtype, names: str) -> str:
    model = load_model(weights)
    if names == "official":
        save_weights(model, output, dtype)
    else:
        tensors = narrow(_without_state(model), dtype, output)
        write_tensors(from_official(tensors, names, output), output)
    # Its configuration has one eps for all norms, and the official code 64e-5 for the heads'.
    more = "; once fla has loaded it, set g_norm.eps = 64e-5 in each layer's attn" if names == "fla" else ""
    return (
        f"{output}: {describe(model.sizes)}, {len(read_tensors(output))} tensors in {_name(dtype)} under {names} "
        f"names, from {weights}{more}"
    )


def _without_state(model: RWKV) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in stored_tensors(model).items() if not is_state_name(name)}


def _export_state(files: ModelFiles, output: Path, form: str | None, dtype: str | None) -> str:
    if files.state is None:
        # The state may lie in the weights themselves: a merged file, or a run that trained one.
        files = files._replace(state=files.weights)
    if form == "merged":
        model = load_model(files.weights)
        state = load_state(files.state, model)
        save_state(state, output, form, model=model, dtype=EXPORT_DTYPES[dtype or "bf16"])
        return f"{output}: {describe(model.sizes)} in {dtype or 'bf16'} with the state of {files.state}"
    state = read_state(files.state)
    save_state(state, output, form, dtype=EXPORT_DTYPES[dtype] if dtype else None)
    return f"{output}: a state of {describe_state(state)}, from {files.state}"


def _name(dtype: torch.dtype) -> str:
    return next(name for name, its in EXPORT_DTYPES.items() if its == dtype)
