"""A model reads: tokens by place in; hidden vectors and states, segment by segment, or predictions out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from infctx.errors import InputError
from infctx.model.loss import SLICE_LOGITS
from infctx.model.rwkv import RWKV
from infctx.model.state import State

ReadTokens = Callable[[int, int], Tensor]
"""Returns tokens begin..end-1 of a text, int64."""

Item = TypeVar("Item")


class Piece(NamedTuple):
    """A part of a text that a model has read: its tokens begin, begin + 1, ...

    hidden: (T, D), the vectors that predict the token after each of its tokens
    state:  after its last token
    """

    begin: int
    hidden: Tensor
    state: State


@torch.no_grad()
def read_pieces(
    model: RWKV, read: ReadTokens, span: tuple[int, int], segment_tokens: int, state: State | None = None
) -> Iterator[Piece]:
    """Reads tokens begin..end-1 of a text, in pieces that end at multiples of segment_tokens.

    state: where to start from; None for the initial state
    """
    begin, last = span
    device = model.embedding.weight.device
    while begin < last:
        end = min(last, (begin // segment_tokens + 1) * segment_tokens)
        hidden, state = model(read(begin, end)[None].to(device), state)
        yield Piece(begin, hidden[0], state)
        begin = end


def read_through(
    model: RWKV, read: ReadTokens, span: tuple[int, int], segment_tokens: int, state: State | None = None
) -> Piece:
    """Reads as `read_pieces` does, at least one token; returns the last piece."""
    for piece in read_pieces(model, read, span, segment_tokens, state):
        last = piece  # the others do not stay in memory
    return last


@torch.no_grad()
def most_likely(model: RWKV, hidden: Tensor) -> Tensor:
    """Returns the most likely token after each vector (T, D), int64 (T,) on the CPU; logits exist slice by slice."""
    rows = max(1, SLICE_LOGITS // model.sizes.vocab_size)
    return torch.cat([_finite(model.logits(part)).argmax(-1).cpu() for part in hidden.split(rows)])


@torch.no_grad()
def probabilities(model: RWKV, hidden: Tensor) -> Tensor:
    """Returns the prediction after a vector (D,), float64 (V,) on the CPU."""
    return _finite(model.logits(hidden)).double().cpu().softmax(-1)


def _finite(logits: Tensor) -> Tensor:
    if not logits.isfinite().all():
        raise InputError("evaluate: the model's logits are not finite; the weights are damaged")
    return logits


def shown(items: Iterable[Item], total: int, name: str) -> Iterable[Item]:
    """Returns the same items with a progress bar, if standard error is a terminal."""
    return tqdm(items, total=total, desc=name, leave=False, disable=not sys.stderr.isatty())
