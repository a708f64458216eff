"""New models: a published name or sizes in, a model with the official initialization out."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch

from infctx.errors import InputError
from infctx.model.initialise import initialise
from infctx.model.rwkv import RWKV, Compute
from infctx.model.sizes import Sizes, make_sizes, published_sizes

SIZES = inspect.signature(make_sizes).parameters
"""The sizes of a model by keyword."""


def build_model(
    name: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    backend: str = "auto",
    **sizes: Any,
) -> RWKV:
    """Builds a new model with the official initialization; device "meta" needs no memory and draws no weights.

    name: a published size, such as "finch-3b"; or sizes by keyword: version, num_layers, width, and optionally
    vocab_size, head_size, ffn_width and the ranks of its low-rank products (see `infctx.model.sizes.make_sizes`)
    Raises InputError for other names, and if the sizes do not make a model.
    """
    _refuse_unknown(sizes)
    if (name is None) == (not sizes):
        raise InputError("build_model: give the name of a published size, or version, num_layers, width, ...")
    missing = [name for name, size in SIZES.items() if size.default is size.empty and name not in sizes]
    if sizes and missing:
        raise InputError(f"build_model: needs more than {', '.join(sizes)}; give {', '.join(missing)} too")
    wanted = published_sizes(name) if name else make_sizes(**sizes)
    return new_model(wanted, device, dtype, seed, Compute(backend=backend))


def _refuse_unknown(sizes: dict[str, Any]) -> None:
    known = [*SIZES, *(name for name in inspect.signature(build_model).parameters if name not in ("name", "sizes"))]
    for name in sizes.keys() - SIZES.keys():
        close = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        raise InputError(f"build_model: there is no size or option {name!r}; {remedy}")


def new_model(
    sizes: Sizes,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
    compute: Compute = Compute(),  # noqa: B008
) -> RWKV:
    """Builds a new model, as `build_model` does, for given sizes."""
    model = empty_model(sizes, compute).to(dtype)
    if torch.device(device).type == "meta":
        return model
    model = model.to_empty(device=device)
    initialise(model, seed)
    return model


def empty_model(sizes: Sizes, compute: Compute = Compute(), with_state: bool = False) -> RWKV:  # noqa: B008
    """Makes the module on the meta device: shapes without memory; with_state: adds an initial state to learn."""
    with torch.device("meta"):
        model = RWKV(sizes, compute)
        if with_state:
            model.add_initial_state()
    return model
