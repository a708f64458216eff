"""Cross entropy of a segment, with the head applied in slices: the logits of a whole segment never exist."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infctx.conventions import MASKED
from infctx.model.rwkv import RWKV
from infctx.model.state import State
from infctx.recurrence.precision import state_dtype
from infctx.recurrence.time_parallel import Received

SLICE_LOGITS = 1 << 25
"""Logits held at once: 128 MiB in fp32."""

L2WRAP = 1e-4
"""Factor of RWKV-LM's L2Wrap: its gradient adds this times the largest logit, at the largest logit."""


class Segment(NamedTuple):
    """What a segment is to the model and its loss.

    tokens:  (B, T) int64
    targets: (B, T) int64, -100 where there is no loss; None for the state alone, without head and loss
    starts:  (B, number of 16-token boundaries inside the segment) bool, None where no document starts
    offset:  place of the first token on the 16-token grid of the window, 0..15; 0 where time is shared over ranks
    """

    tokens: Tensor
    targets: Tensor | None
    starts: Tensor | None = None
    offset: int = 0


class SegmentLoss(nn.Module):
    """The one module that a window drives: model, head and loss of a segment."""

    def __init__(self, model: RWKV, l2wrap: bool = False) -> None:
        super().__init__()
        self.model, self.l2wrap = model, l2wrap

    def forward(self, segment: Segment, state: State, received: Received | None = None) -> tuple[Tensor, State]:
        """Runs a segment from `state`; received: see `RWKV.forward`.

        Returns the sum of the cross entropies over unmasked targets, fp32 or fp64, and the state.
        """
        tokens, targets, starts, offset = segment
        on_grid = -offset % 16  # tokens before the first boundary
        if starts is None or on_grid == 0:
            hidden, state = self.model(tokens, state, starts, received)
        elif on_grid >= tokens.shape[1]:
            hidden, state = self.model(tokens, state)
        else:
            before, state = self.model(tokens[:, :on_grid], state)
            behind, state = self.model(tokens[:, on_grid:], state, starts)
            hidden = torch.cat([before, behind], dim=1)
        if targets is None:
            return hidden.new_zeros(()), state
        return cross_entropy_sum(hidden, self.model.head.weight, targets, self.l2wrap), state


def cross_entropy_sum(hidden: Tensor, head: Tensor, targets: Tensor, l2wrap: bool = False) -> Tensor:
    """Sum of -log softmax(hidden head^T)[target] over unmasked targets: a scalar in fp32, or fp64 with fp64.

    hidden: (B, T, D); head: (V, D), computed in the dtype of hidden; targets: (B, T), -100 = masked.
    l2wrap: adds RWKV-LM's L2Wrap to the gradient (not to the value): that of 0.5e-4 max_logit^2 a target, under the
    same denominator as the loss, so that it weighs the same however a step is cut.
    """
    if not torch.is_grad_enabled():  # which a Function's forward cannot see
        hidden, head = hidden.detach(), head.detach()
    return _SlicedCrossEntropy.apply(hidden.flatten(0, 1), head, targets.flatten(), l2wrap)


@torch.no_grad()
def token_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(hidden head^T)[target] of each place (B, T), 0 where the target is masked; no gradients."""
    losses = [
        F.cross_entropy(logits, wanted, ignore_index=MASKED, reduction="none")
        for _, logits, wanted in _slices(hidden.flatten(0, 1), head, targets.flatten())
    ]
    return torch.cat(losses).view(targets.shape)


def _slices(hidden: Tensor, head: Tensor, targets: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, logits (rows, V) in at least fp32, targets (rows)) of slices of the rows of hidden (B * T, D)."""
    rows = max(1, SLICE_LOGITS // head.shape[0])
    head = head.to(hidden.dtype)
    for begin in range(0, len(hidden), rows):
        chosen = slice(begin, begin + rows)
        logits = F.linear(hidden[chosen], head)
        yield chosen, logits if logits.dtype == torch.float64 else logits.float(), targets[chosen]


class _SlicedCrossEntropy(torch.autograd.Function):
    """The gradient of a slice is made while its logits are there, so that the head is never run twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, l2wrap: bool) -> Tensor:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_head = torch.zeros_like(head) if needs_head else None
        loss_sum = hidden.new_zeros((), dtype=state_dtype(hidden.dtype))
        for rows, logits, wanted in _slices(hidden, head, targets):
            loss_sum += F.cross_entropy(logits, wanted, ignore_index=MASKED, reduction="sum")
            if d_hidden is None and d_head is None:
                continue
            d_logits = _logit_gradient(logits, wanted, l2wrap).to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, head.to(hidden.dtype), out=d_hidden[rows])
            if d_head is not None and head.dtype == hidden.dtype:
                d_head.addmm_(d_logits.T, hidden[rows])
            elif d_head is not None:
                d_head += d_logits.T @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_head)
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_hidden, d_head = ctx.saved_tensors
        d_hidden, d_head = (
            None if gradient is None else gradient * d_loss.to(gradient.dtype) for gradient in (d_hidden, d_head)
        )
        return d_hidden, d_head, None, None


def _logit_gradient(logits: Tensor, targets: Tensor, l2wrap: bool) -> Tensor:
    """d(loss sum) / d(logits) (rows, V), written over the logits."""
    unmasked = targets != MASKED
    largest, at = logits.max(dim=1, keepdim=True)
    gradient = logits.sub_(logits.logsumexp(dim=1, keepdim=True)).exp_()
    gradient.scatter_add_(1, targets.clamp_min(0)[:, None], torch.full_like(largest, -1))
    if l2wrap:
        gradient.scatter_add_(1, at, L2WRAP * largest)
    return gradient.mul_(unmasked[:, None])
