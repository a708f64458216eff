"""Export: a checkpoint in, a weights file that other programs load out."""

from __future__ import annotations

from pathlib import Path

import torch

from infctx.errors import InputError
from infctx.model.sizes import describe
from infctx.model.tensor_file import read_tensors
from infctx.model.weights import load_model, save_weights
from infctx.train.checkpoint import resolve_model

EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export_weights(source: Path, output: Path, dtype: str, overwrite: bool = False) -> str:
    """Writes the weights of a run, a checkpoint or a weights file to a `.pth` or `.safetensors`; says what it did.

    dtype: bf16 (what the published files are), fp16 or fp32.  The names, shapes and order are the official ones.
    """
    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists; choose another name, or --overwrite")
    found = resolve_model(source)
    model = load_model(found)
    save_weights(model, output, EXPORT_DTYPES[dtype])
    return f"{output}: {describe(model.sizes)}, {len(read_tensors(output))} tensors in {dtype}, from {found}"
