"""AdamW over the official parameter groups, in the form the settings ask for, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from infctx.adapters.install import adapters_of
from infctx.model.rwkv import RWKV
from infctx.optimizers.adamw import LittleAdamW
from infctx.optimizers.gradients import add_up_in_bf16, add_up_in_fp32
from infctx.optimizers.host import HostAdamW
from infctx.settings.adapter import AdapterSettings
from infctx.settings.optimizer import OptimizerSettings

DECAY_LR_SCALE = 2.0
"""Decays learn at twice the rate of the rest (RWKV-LM src/model.py, configure_optimizers)."""


def make_optimizer(
    model: RWKV,
    settings: OptimizerSettings,
    adapter: AdapterSettings | None = None,
    *,
    seed: int = 0,
    on_host: bool = False,
    compute: torch.dtype | None = None,
) -> torch.optim.Optimizer:
    """Returns AdamW over the trainable parameters; each group has `lr_scale` and the names of its parameters.

    Where it asks for bf16 weights, the model's matrices become bf16, and their gradients add up as settings.gradients.
    adapter: the settings of the adapter that learns, if one does
    seed:    of all rounding at random
    on_host: steps fp32 weights in host memory; the model's matrices become `compute`
    """
    state_scale = 1.0 if adapter is None else adapter.state_lr / settings.peak_lr
    groups = parameter_groups(model, settings.weight_decay, state_scale)
    numbers: dict[str, Any] = {
        "lr": settings.peak_lr,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
    }
    is_narrow = compute == torch.bfloat16 if on_host else settings.weights == "bf16_stochastic"
    if on_host:
        optimizer: torch.optim.Optimizer = HostAdamW(groups, **numbers)
    elif settings.states == "int8" or is_narrow:
        optimizer = LittleAdamW(groups, **numbers, eight_bits=settings.states == "int8", seed=seed)
    else:
        optimizer = torch.optim.AdamW(groups, **numbers, fused=True)
    if is_narrow:
        matrices = [matrix for matrix in _matrices(model) if matrix.requires_grad]
        for matrix in matrices:
            matrix.data = matrix.data.to(torch.bfloat16)
        if settings.gradients == "fp32":
            add_up_in_fp32(matrices)
        else:
            add_up_in_bf16(matrices, seed, lambda matrix: int(optimizer.state[matrix].get("step", 0)))
    return optimizer


def parameter_groups(model: RWKV, weight_decay: float, state_scale: float = 1.0) -> list[dict]:
    """Applies the official rules: twice the rate for decays; weight decay for matrices, embeddings and initial state.

    Everything else has no weight decay: Finch's low-rank products, token-shift weights, bonuses and norms.  An
    adapter's matrices are matrices.  state_scale: of the initial state's learning rate.
    """
    matrices = {id(matrix) for matrix in _matrices(model)}
    if state_scale == 1:
        matrices.add(id(model.initial_wkv))
    matrices |= {id(getattr(its, part)) for its in adapters_of(model).values() for part in its.matrices}
    groups: dict[str, dict[str, Any]] = {
        "matrices": {"lr_scale": 1.0, "weight_decay": weight_decay},
        "state": {"lr_scale": state_scale, "weight_decay": weight_decay},
        "decays": {"lr_scale": DECAY_LR_SCALE, "weight_decay": 0.0},
        "rest": {"lr_scale": 1.0, "weight_decay": 0.0},
    }
    for group in groups.values():
        group |= {"params": [], "names": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "matrices" if id(parameter) in matrices else "decays" if name.endswith(".decay") else "rest"
        kind = "state" if name == "initial_wkv" and state_scale != 1 else kind
        groups[kind]["params"].append(parameter)
        groups[kind]["names"].append(name)
    return [group for group in groups.values() if group["params"]]


def _matrices(model: RWKV) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and "weight" in module._parameters:  # not quantized
            yield module.get_parameter("weight")


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, step: int) -> float:
    """Sets the learning rate of step 1, 2, ... in every group; returns it without any group's `lr_scale`."""
    rate = learning_rate(settings, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    return rate


def learning_rate(settings: OptimizerSettings, step: int) -> float:
    """Returns the learning rate of step 1, 2, ..., steps: linear warm-up from 1 %, then the schedule to final_lr."""
    warmup, peak = settings.warmup, settings.peak_lr
    if step <= warmup:
        return peak * (0.01 + 0.99 * step / warmup)
    if settings.schedule == "constant":
        return peak
    final = peak / 10 if settings.final_lr is None else settings.final_lr
    progress = (step - warmup) / (settings.steps - warmup)  # 1 at the last step
    remaining = (1 + math.cos(math.pi * progress)) / 2 if settings.schedule == "cosine" else 1 - progress
    return final + (peak - final) * remaining
