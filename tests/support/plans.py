"""Runs on many GPUs that are planned but not started, and what a block really keeps."""

import torch

import infctx
from infctx.adapters.install import add_adapters
from infctx.model.sizes import published_sizes
from infctx.plan.memory import Strategy, rank_memory, with_distributed, with_strategy
from infctx.plan.plan import find_weights
from infctx.plan.strategy import resolve_strategy
from infctx.recurrence.layer_segment import LayerSegment
from infctx.settings.adapter import AdapterSettings
from infctx.train.learn import freeze_weights

from plan_tables import example_config

FINCH = published_sizes("finch-3b")


def many(gpus=8, **changes):
    """Returns Finch 3B on several GPUs, without a file; changes are section__setting=value."""
    config = example_config("finch-3b", gpus)
    for name, value in changes.items():
        section, setting = name.split("__")
        part = getattr(config, section).model_copy(update={setting: value})
        config = config.model_copy(update={section: part})
    return type(config).model_validate(config.model_dump())


def other_run(config, *strategy, reduction="segment"):
    return with_distributed(with_strategy(config, Strategy(*strategy)), gradient_reduction=reduction)


def bytes_of(config, *strategy, reduction="segment"):
    return rank_memory(other_run(config, *strategy, reduction=reduction), FINCH, "cuda")


def planned_bytes(config, sizes, device):
    """Returns a rank's memory, with "auto" resolved for a device of unknown memory."""
    return rank_memory(resolve_strategy(config, sizes, device), sizes, device)


def model_sizes(config):
    return find_weights(config)[1]


def saved_bytes(version, low, backend, frozen, width, num_tokens):
    """Returns what autograd saves in one block, in bytes per token and channel; storages count once, weights do not.

    frozen: whether the weights are, or the adapter beside them
    """
    sizes = {"num_layers": 2, "width": width, "vocab_size": 16}
    model = infctx.build_model(version=version, **sizes, backend=backend)
    dtype = torch.bfloat16 if low else torch.float32
    if frozen:
        freeze_weights(model.to(dtype))
    if isinstance(frozen, AdapterSettings):
        add_adapters(model, frozen, seed=0)
        model.draws.rows = torch.arange(num_tokens)[None]
    x = torch.randn(1, num_tokens, width, dtype=dtype).requires_grad_()
    state = model.initial_state(1).leaf().layers()[0]
    weights = [view for p in model.parameters() for view in ((p, p.T) if p.ndim == 2 else (p,))]
    assert num_tokens not in {length for weight in weights for length in weight.shape}
    held = {}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        model.blocks[1](x, state, LayerSegment(), torch.randn_like(x) if version == 7 else None)
    shapes = {tuple(weight.shape) for weight in weights}
    counted = [tensor for tensor in held.values() if tuple(tensor.shape) not in shapes]
    return sum(tensor.untyped_storage().nbytes() for tensor in counted) / num_tokens / width
