"""AdamW over the official parameter groups, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from infctx.model.rwkv import RWKV
from infctx.settings.optimizer import OptimizerSettings

DECAY_LR_SCALE = 2.0
"""Decays learn at twice the rate of the rest (RWKV-LM src/model.py, configure_optimizers)."""


def make_optimizer(model: RWKV, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Returns AdamW over the trainable parameters; each group has `lr_scale` and the names of its parameters."""
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.peak_lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )


def parameter_groups(model: RWKV, weight_decay: float) -> list[dict]:
    """Applies the official rules: twice the rate for decays; weight decay for matrices, embeddings and initial state.

    Everything else has no weight decay: Finch's low-rank products, token-shift weights, bonuses and norms.
    """
    matrices = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))
    } | {"initial_wkv"}
    groups: dict[str, dict[str, Any]] = {
        "matrices": {"lr_scale": 1.0, "weight_decay": weight_decay},
        "decays": {"lr_scale": DECAY_LR_SCALE, "weight_decay": 0.0},
        "rest": {"lr_scale": 1.0, "weight_decay": 0.0},
    }
    for group in groups.values():
        group |= {"params": [], "names": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "matrices" if name in matrices else "decays" if name.endswith(".decay") else "rest"
        groups[kind]["params"].append(parameter)
        groups[kind]["names"].append(name)
    return [group for group in groups.values() if group["params"]]


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
