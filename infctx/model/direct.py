"""Gradients of weights that the products making them add to `.grad` themselves, on a CPU.

Autograd would keep a gradient as a tensor and add it to `.grad` afterwards, which goes over all weights once more in
every segment.  That is right only where nothing else looks at a gradient on its way: one process, no ZeRO, no hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_allowed = [False]


@contextmanager
def adding_directly(allowed: bool) -> Iterator[None]:
    """Allows it or not, for the passes in this context."""
    _allowed.append(allowed)
    try:
        yield
    finally:
        _allowed.pop()


def adds_directly(weight: Tensor) -> bool:
    """Returns whether the gradient of a weight may be added to its `.grad`, which then need not exist yet."""
    return (
        _allowed[-1]
        and weight.device.type == "cpu"
        and weight.is_leaf
        and gradient_dtype(weight) in (torch.float32, torch.float64)
        and weight.requires_grad
        and not weight._backward_hooks
        and not weight._post_accumulate_grad_hooks
    )


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """Returns the dtype of a weight's `.grad`, which for bf16 weights can be fp32 (infctx.optimizers.gradients)."""
    return (getattr(weight, "grad_dtype", None) if weight.is_leaf else None) or weight.dtype
