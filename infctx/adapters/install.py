"""Puts adapters into a model with frozen weights, and takes out what they have learned."""

from __future__ import annotations

import torch
from torch import Tensor

from infctx.adapters.forms import Adapter, make_adapter
from infctx.adapters.targets import target_matrices, weights_that_learn
from infctx.model.rwkv import RWKV
from infctx.ops.precision import state_dtype
from infctx.settings.adapter import AdapterSettings


def add_adapters(model: RWKV, settings: AdapterSettings, seed: int) -> None:
    """Freezes a model and adds an adapter that changes no output yet; what `settings` name learns, in at least fp32.

    seed: of the values that the adapter begins with, the same on every device
    """
    model.requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    for number, (_, matrix) in enumerate(target_matrices(model, settings)):
        adapter = make_adapter(settings, matrix, number, model.draws)
        adapter.begin(random, matrix.matrix)
        matrix.adapter = adapter
    for name in weights_that_learn(model, settings):
        weight = model.get_parameter(name)
        weight.data = weight.data.to(state_dtype(weight.dtype))
        weight.requires_grad_()
    if settings.initial_state:
        wkv = model.add_initial_state().wkv
        assert wkv is not None  # just added
        wkv.requires_grad_()


def adapters_of(model: RWKV) -> dict[str, Adapter]:
    """Returns the adapters of a model by the names of their matrices."""
    return {
        name.removesuffix(".adapter"): module for name, module in model.named_modules() if isinstance(module, Adapter)
    }


def learned_names(model: RWKV) -> list[str]:
    """Returns the names of the parameters that learn, without the initial state: of adapters, and other weights."""
    return [name for name, part in model.named_parameters() if part.requires_grad and not name.startswith("initial_")]


@torch.no_grad()
def set_learned(model: RWKV, learned: dict[str, Tensor]) -> None:
    """Sets all parameters of `learned_names`, from tensors of their shapes."""
    for name in learned_names(model):
        model.get_parameter(name).copy_(learned[name])
