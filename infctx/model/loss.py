"""Cross entropy of a segment, with the head applied in slices: a whole segment's logits never exist."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from infctx.conventions import MASKED
from infctx.cpu import head_loss
from infctx.model.direct import adds_directly, copy_of, gradient_dtype
from infctx.model.layers import LowRank
from infctx.model.rwkv import RWKV
from infctx.model.state import State
from infctx.ops.precision import state_dtype
from infctx.recurrence.time_parallel import Received

SLICE_LOGITS = 1 << 25
"""Logits held at the same time: 128 MiB in fp32."""

L2WRAP = 1e-4
"""Factor of RWKV-LM's L2Wrap: its gradient adds this times the largest logit, at the largest logit."""


class Segment(NamedTuple):
    """A segment as the model and its loss see it.

    tokens:  (B, T) int64
    targets: (B, T) int64, -100 where there is no loss; None to compute only the state, without head and loss
    starts:  (B, number of 16-token boundaries inside the segment) bool, None if no document starts
    offset:  place of the first token on the 16-token grid of the window, 0..15; 0 if time is shared over ranks
    sources: (B, T) int64, the number of each token's source of documents; None if there is only one
    rows:    (B, T) int64, what the dropout of adapters is drawn from; None for no dropout
    """

    tokens: Tensor
    targets: Tensor | None
    starts: Tensor | None = None
    offset: int = 0
    sources: Tensor | None = None
    rows: Tensor | None = None


class SegmentLoss(nn.Module):
    """The module that a window runs: model, head and loss of a segment, whose tokens are of num_sources sources."""

    def __init__(self, model: RWKV, l2wrap: bool = False, num_sources: int = 1) -> None:
        super().__init__()
        self.model, self.l2wrap, self.num_sources = model, l2wrap, num_sources

    def forward(
        self, segment: Segment, state: State | None, received: Received | None = None, each_token: bool = False
    ) -> tuple[Tensor, State, Tensor]:
        """Runs a segment from `state`, None for the initial one; received: see `RWKV.forward`.

        Returns the sum of the cross entropies over unmasked targets, fp32 or fp64; the state; and the sum of each
        source (num_sources,), without a gradient.
        each_token: returns `token_losses` instead of their sum, and nothing of the sources
        """
        tokens, targets, starts, offset, sources, rows = segment
        on_grid = -offset % 16  # tokens before the first boundary
        if starts is None or on_grid == 0:
            hidden, state = self.model(tokens, state, starts, received, rows)
        elif on_grid >= tokens.shape[1]:
            hidden, state = self.model(tokens, state, rows=rows)
        else:
            parts = (None, None) if rows is None else (rows[:, :on_grid], rows[:, on_grid:])
            before, state = self.model(tokens[:, :on_grid], state, rows=parts[0])
            after, state = self.model(tokens[:, on_grid:], state, starts, rows=parts[1])
            hidden = torch.cat([before, after], dim=1)
        if targets is None:
            return hidden.new_zeros(()), state, hidden.new_zeros(self.num_sources)
        head, adapter = self.model.head.weight, self.model.head_adapter(hidden, rows)
        if each_token:
            return token_losses(hidden, head, targets, adapter), state, hidden.new_zeros(self.num_sources)
        of_sources = None if sources is None else (sources, self.num_sources)
        loss_sum, by_source = cross_entropy_sum(hidden, head, targets, self.l2wrap, of_sources, adapter)
        return loss_sum, state, by_source


def cross_entropy_sum(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    l2wrap: bool = False,
    sources: tuple[Tensor, int] | None = None,
    adapter: LowRank | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the sum of -log softmax(hidden head^T)[target] over unmasked targets, a scalar in fp32 (fp64 with fp64),
    and the same sum for each source (S,), without a gradient.

    hidden:  (B, T, D)
    head:    (V, D), computed in the dtype of hidden
    targets: (B, T), -100 = masked
    l2wrap:  adds RWKV-LM's L2Wrap to the gradient, not to the value: the gradient of 0.5e-4 max_logit^2 per target.
             It has the same denominator as the loss, so its weight does not depend on how a step is cut.
    sources: the number of each target's source (B, T), and how many there are; None for one
    adapter: what the head's adapter makes of its product with hidden; None without one
    """
    if not torch.is_grad_enabled():  # a Function's forward cannot see this
        hidden, head = hidden.detach(), head.detach()
        adapter = adapter and adapter.detach()
    numbers, count = sources or (None, 1)
    numbers = None if numbers is None else numbers.flatten()
    arguments = hidden.flatten(0, 1), head, targets.flatten(), l2wrap, numbers, count
    if adapter is not None:
        return _SlicedCrossEntropy.apply(*arguments, adapter.rows.flatten(0, 1), *adapter[1:])
    if head_loss.fits(hidden):
        return _FusedCrossEntropy.apply(*arguments)
    return _SlicedCrossEntropy.apply(*arguments, None, None, 1.0, None)


@torch.no_grad()
def token_losses(hidden: Tensor, head: Tensor, targets: Tensor, adapter: LowRank | None = None) -> Tensor:
    """Returns -log softmax(hidden head^T)[target] for each token (B, T), 0 for masked targets; no gradients.

    adapter: see `cross_entropy_sum`
    """
    vectors, wanted = hidden.flatten(0, 1), targets.flatten()
    if adapter is not None:
        adapter = adapter._replace(rows=adapter.rows.flatten(0, 1))
    elif head_loss.fits(vectors):
        vectors, wanted, chosen = _chosen(vectors, wanted)
        found = head_loss.head_loss(vectors, head.to(hidden.dtype), wanted, SLICE_LOGITS, (False, False))
        return _at(chosen, found.losses, targets.numel()).view(targets.shape)
    losses = [
        F.cross_entropy(part.logits, part.targets, ignore_index=MASKED, reduction="none")
        for part in _slices(vectors, head, wanted, adapter)
    ]
    return torch.cat(losses).view(targets.shape)


class _Slice(NamedTuple):
    """Some rows of hidden: the head's product with them, without the adapter's factors; logits in at least fp32."""

    rows: slice
    product: Tensor  # (rows, V)
    logits: Tensor  # (rows, V)
    targets: Tensor  # (rows)


def _slices(hidden: Tensor, head: Tensor, targets: Tensor, adapter: LowRank | None) -> Iterator[_Slice]:
    """Yields slices of the rows of hidden (B * T, D)."""
    rows = max(1, SLICE_LOGITS // head.shape[0])
    head = head.to(hidden.dtype)
    columns = None if adapter is None else adapter.columns.to(hidden.dtype)
    for begin in range(0, len(hidden), rows):
        chosen = slice(begin, begin + rows)
        logits = product = F.linear(hidden[chosen], head)
        if adapter is not None and columns is not None:
            product.addmm_(adapter.rows[chosen], columns.T, alpha=adapter.scale)
            logits = product if adapter.factors is None else product * adapter.factors.to(product.dtype)
        yield _Slice(chosen, product, logits if logits.dtype == torch.float64 else logits.float(), targets[chosen])


def _chosen(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns hidden vectors and targets of the tokens that have one, and which they are, None for all."""
    chosen = (targets != MASKED).nonzero()[:, 0]
    if len(chosen) == len(targets):
        return hidden.contiguous(), targets, None
    return hidden[chosen], targets[chosen], chosen


def _at(chosen: Tensor | None, values: Tensor, count: int) -> Tensor:
    """Returns the values of all `count` tokens, zeros but for those chosen."""
    return values if chosen is None else values.new_zeros(count, *values.shape[1:]).index_copy_(0, chosen, values)


class _FusedCrossEntropy(torch.autograd.Function):
    """The same as `_SlicedCrossEntropy`, by `head_loss`; nothing is computed for tokens without a target."""

    # Seven parameters: autograd hands them over one by one.
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        l2wrap: bool,
        sources: Tensor | None,
        num_sources: int,
    ) -> tuple[Tensor, Tensor]:
        vectors, wanted, ctx.chosen = _chosen(hidden, targets)
        ctx.num_tokens = len(targets)
        ctx.of_largest, ctx.direct = L2WRAP if l2wrap else 0.0, head if adds_directly(head) else None
        needed = ctx.needs_input_grad[:2]
        # The head's gradient takes many passes over memory less if it is made when it is added up.
        ctx.found = head_loss.head_loss(
            vectors,
            copy_of(head, hidden.dtype),
            wanted,
            SLICE_LOGITS,
            needed,
            ctx.of_largest,
            later=ctx.direct is not None,
        )
        losses = ctx.found.losses
        loss_sum = losses.sum()
        by_source = loss_sum.new_zeros(num_sources)
        if sources is None:
            by_source += loss_sum
        else:
            by_source.index_add_(0, sources if ctx.chosen is None else sources[ctx.chosen], losses)
        ctx.mark_non_differentiable(by_source)
        return loss_sum, by_source

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place: of a large head, one more pass takes as long as all else here.  So this can be called only once.
        found, ctx.found = ctx.found, None
        d_hidden, d_head, factor = found.d_hidden, found.d_head, d_loss.item()
        if found.slice is not None:
            here, direct = found.slice, ctx.direct
            d_hidden = torch.empty_like(here.hidden) if ctx.needs_input_grad[0] else None
            if direct.grad is None:
                direct.grad = torch.zeros_like(direct, dtype=gradient_dtype(direct))
            head_loss.gradients(here, ctx.of_largest, d_hidden, direct.grad, factor)
            head_loss.give_back(here)
        else:
            d_hidden, d_head = (None if x is None else x.mul_(factor) for x in (d_hidden, d_head))
        if d_hidden is not None:
            d_hidden = _at(ctx.chosen, d_hidden, ctx.num_tokens)
        return d_hidden, d_head, None, None, None, None


class _SlicedCrossEntropy(torch.autograd.Function):
    """Computes the gradient of a slice while its logits exist, so that the head is never applied twice."""

    # Seven parameters and those of a LowRank: autograd hands them over one by one.
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        l2wrap: bool,
        sources: Tensor | None,
        num_sources: int,
        *beside: Any,
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad
        adapter = None if beside[0] is None else LowRank(*beside)
        if not needs[1]:
            head = head.to(hidden.dtype)  # once, not for each slice
        gradients = _Gradients(hidden, head, adapter, needs) if any(needs) else None
        loss_sum = hidden.new_zeros((), dtype=state_dtype(hidden.dtype))
        by_source = loss_sum.new_zeros(num_sources)
        for part in _slices(hidden, head, targets, adapter):
            if sources is None:
                loss_sum += F.cross_entropy(part.logits, part.targets, ignore_index=MASKED, reduction="sum")
            else:
                losses = F.cross_entropy(part.logits, part.targets, ignore_index=MASKED, reduction="none")
                loss_sum += losses.sum()
                # Not index_add, which adds in any order on a GPU.
                by_source += losses @ F.one_hot(sources[part.rows], num_sources).to(losses.dtype)
            if gradients is not None:
                gradients.add(part, l2wrap)
        ctx.save_for_backward(*(gradients.found() if gradients else ()))
        if sources is None:
            by_source += loss_sum
        ctx.mark_non_differentiable(by_source)
        return loss_sum, by_source

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head, d_rows, d_columns, d_factors = (
            None if gradient is None else gradient * d_loss.to(gradient.dtype) for gradient in ctx.saved_tensors
        )
        return d_hidden, d_head, None, None, None, None, d_rows, d_columns, None, d_factors


class _Gradients:
    """The gradients of hidden, head and adapter: rows of some, sums of the others, slice after slice."""

    def __init__(self, hidden: Tensor, head: Tensor, adapter: LowRank | None, needs: Sequence[bool]) -> None:
        self.hidden, self.head, self.adapter = hidden, head, adapter
        self.d_hidden = torch.empty_like(hidden) if needs[0] else None
        self.d_head = _sums(head) if needs[1] else None
        self.d_rows = self.d_columns = self.d_factors = None
        if adapter is not None and any(needs[6:]):
            self.d_rows, self.d_columns = torch.empty_like(adapter.rows), _sums(adapter.columns)
            self.d_factors = None if adapter.factors is None else _sums(adapter.factors)

    def add(self, part: _Slice, l2wrap: bool) -> None:
        """Adds those of a slice, over its logits and its product."""
        hidden, dtype = self.hidden[part.rows], self.hidden.dtype
        d_product = _logit_gradient(part.logits, part.targets, l2wrap).to(dtype)
        if self.adapter is not None and self.adapter.factors is not None:
            if self.d_factors is not None:
                self.d_factors += part.product.mul_(d_product).sum(0, dtype=self.d_factors.dtype)
            d_product = d_product.mul_(self.adapter.factors.to(dtype))
        if self.d_hidden is not None:
            torch.mm(d_product, self.head.to(dtype), out=self.d_hidden[part.rows])
        if self.d_head is not None:
            _add_product(self.d_head, d_product.T, hidden)
        if self.adapter is not None and self.d_rows is not None and self.d_columns is not None:
            rows, columns, scale, _ = self.adapter
            self.d_rows[part.rows] = scale * (d_product @ columns.to(dtype))
            _add_product(self.d_columns, d_product.T, scale * rows[part.rows])

    def found(self) -> tuple[Tensor | None, ...]:
        return self.d_hidden, self.d_head, self.d_rows, self.d_columns, self.d_factors


def _sums(like: Tensor) -> Tensor:
    """Returns zeros to add to, in at least fp32: a sum of slices."""
    return torch.zeros_like(like, dtype=state_dtype(like.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _logit_gradient(logits: Tensor, targets: Tensor, l2wrap: bool) -> Tensor:
    """Returns d(loss sum) / d(logits) (rows, V), written over the logits."""
    unmasked = targets != MASKED
    largest, at = logits.max(dim=1, keepdim=True)
    gradient = logits.sub_(logits.logsumexp(dim=1, keepdim=True)).exp_()
    gradient.scatter_add_(1, targets.clamp_min(0)[:, None], torch.full_like(largest, -1))
    if l2wrap:
        gradient.scatter_add_(1, at, L2WRAP * largest)
    return gradient.mul_(unmasked[:, None])
