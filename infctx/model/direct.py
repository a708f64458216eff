"""Gradients of weights that the products making them add to `.grad` themselves, on a CPU.

Autograd would keep a gradient as a tensor and add it to `.grad` afterwards, which goes over all weights once more in
every segment.  That is right only where nothing else looks at a gradient on its way: one process, no ZeRO, no hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Passes:
    """What goes for the passes in a context; copies: of weights in another dtype, None to keep none."""

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed
        self.copies: dict[int, tuple[Tensor, Tensor]] | None = None  # by id, with the weight to keep the id


_passes = [_Passes(False)]


@contextmanager
def adding_directly(allowed: bool) -> Iterator[None]:
    """Allows it or not, for the passes in this context, in which weights must not change."""
    _passes.append(_Passes(allowed))
    try:
        yield
    finally:
        _passes.pop()


def keep_copies(keep: bool) -> None:
    """Keeps copies of the weights in this context, or not: they need as much memory as all blocks' copies."""
    passes = _passes[-1]
    if passes.allowed and keep != (passes.copies is not None):
        passes.copies = {} if keep else None


def copy_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a weight in this dtype, detached; in a context that keeps copies, it is cast once."""
    copies = _passes[-1].copies
    if copies is None or weight.dtype == dtype:
        return weight.detach().to(dtype)
    if id(weight) not in copies:
        copies[id(weight)] = weight, weight.detach().to(dtype)
    return copies[id(weight)][1]


def adds_directly(weight: Tensor) -> bool:
    """Returns whether the gradient of a weight may be added to its `.grad`, which then need not exist yet."""
    return (
        _passes[-1].allowed
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
