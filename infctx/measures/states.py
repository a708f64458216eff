"""States: what the memory of each layer looks like along a document.

Of a layer's matrices (H, N, N) at a position, on average over documents:

    norm            the root of the sum of squares over all heads
    saturation      the share of their energy that the last segment left as it was: 1 - |change|^2 / |state|^2, 0 to 1;
                    near 1, new tokens hardly enter, or hardly count beside what is there
    effective_rank  exp of the entropy of a head's singular values, on average over heads: 1 for a single fact, N for
                    as many directions as there are

The sign of state collapse (arXiv 2410.07145) is a head that grows without end, in few directions, beyond the lengths
that a model was trained on: `format_states` says where.  In: a model and a reading of a store.  Out: a row for each
layer and position, and the worst head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from infctx.evaluate.loss_by_position import Reading
from infctx.measures.predictions import ReadTokens, read_pieces, shown
from infctx.model.rwkv import RWKV

DOCUMENTS = 8
SPAN, LINEAR, GROWTH, NARROWING = 4, 3.0, 2.5, 0.8
"""From a quarter of the last position to all of it, independent facts make a norm twice as large, and the same one
again and again four times.  A head shows collapse if its norm grows at least LINEAR times; or GROWTH times, while its
effective rank falls to this share."""
TINY = 1e-30
HOW_TO_READ = "a norm that levels off is healthy; see docs/evaluate.md for saturation and effective rank"


class Row(NamedTuple):
    """The state of a layer after `position` tokens."""

    layer: int
    position: int
    norm: float
    saturation: float
    effective_rank: float


class Collapse(NamedTuple):
    """The head that grew most, of those that grew too much: its norms and effective ranks at two positions."""

    layer: int
    head: int
    positions: tuple[int, int]
    norms: tuple[float, float]
    ranks: tuple[float, float]


class _Shape(NamedTuple):
    """A state, summed over documents: saturation (L,), and of each head its squares, norm and rank (L, H)."""

    saturation: Tensor
    squares: Tensor
    norms: Tensor
    ranks: Tensor


def measure_states(model: RWKV, reading: Reading, samples: int | None) -> tuple[list[Row], Collapse | None]:
    """Measures the states after 1, 2, 4, ... segments of the longest documents, as far as all of these go.

    samples: how many documents, None for 8; none that has less than half of the tokens of the longest
    """
    most = max(reading.tokens.values())
    long = [document for document, tokens in reading.tokens.items() if 2 * tokens >= most]
    long = sorted(long, key=lambda document: -reading.tokens[document])[: samples or DOCUMENTS]
    limit = min(reading.tokens[document] for document in long)
    step = min(reading.segment_tokens, limit)
    positions = [step << doublings for doublings in range((limit // step).bit_length())]
    shapes: dict[int, _Shape] = {}
    for document in shown(long, len(long), "states"):
        for position, shape in _along(model, partial(reading.read, document), step, positions):
            sums = shapes.get(position)
            shapes[position] = shape if sums is None else _Shape(*(a + b for a, b in zip(sums, shape, strict=True)))
    means = {position: _Shape(*(part / len(long) for part in shape)) for position, shape in shapes.items()}
    rows = [row for position, shape in means.items() for row in _rows(position, shape)]
    return sorted(rows, key=lambda row: (row.layer, row.position)), _collapse(means)


def _along(model: RWKV, read: ReadTokens, step: int, positions: Sequence[int]) -> Iterator[tuple[int, _Shape]]:
    """Yields the shape of the state at each position of a document."""
    before = model.initial_state(1).wkv[:, 0].detach()
    for piece in read_pieces(model, read, (0, positions[-1]), step):
        wkv, position = piece.state.wkv[:, 0], piece.begin + len(piece.hidden)  # (L, H, N, N)
        if position in positions:
            yield position, _shape_of(wkv.double().cpu(), before.double().cpu())
        before = wkv


def _shape_of(wkv: Tensor, before: Tensor) -> _Shape:
    """Returns the shape of a state (L, H, N, N); before: a segment earlier."""
    squares, changes = wkv.square().sum((2, 3)), (wkv - before).square().sum((2, 3))  # (L, H)
    saturation = (1 - changes.sum(1) / squares.sum(1).clamp_min(TINY)).clamp_min(0)
    values = torch.linalg.svdvals(wkv)  # (L, H, N)
    shares = values / values.sum(2, keepdim=True).clamp_min(TINY)
    return _Shape(saturation, squares, squares.sqrt(), torch.special.entr(shares).sum(2).exp())


def _rows(position: int, shape: _Shape) -> list[Row]:
    norms, ranks = shape.squares.sum(1).sqrt().tolist(), shape.ranks.mean(1).tolist()
    columns = zip(norms, shape.saturation.tolist(), ranks, strict=True)
    return [Row(layer, position, *values) for layer, values in enumerate(columns)]


def _collapse(shapes: dict[int, _Shape]) -> Collapse | None:
    """Returns the head that grew most, of those that grew too much; None if there is none."""
    last = max(shapes)
    if last // SPAN not in shapes:
        return None
    before, after = shapes[last // SPAN], shapes[last]
    growth = after.norms / before.norms.clamp_min(TINY)
    narrows = (growth >= GROWTH) & (after.ranks <= NARROWING * before.ranks)
    growth[~narrows & (growth < LINEAR)] = 0
    layer, head = divmod(int(growth.argmax()), growth.shape[1])
    if not growth[layer, head]:
        return None
    norms, ranks = (
        (getattr(before, name)[layer, head].item(), getattr(after, name)[layer, head].item())
        for name in ("norms", "ranks")
    )
    return Collapse(layer, head, (last // SPAN, last), norms, ranks)


def format_states(rows: Sequence[Row], collapse: Collapse | None, title: str) -> str:
    """Formats the first and the last position of each layer as a table, with a line about collapse."""
    lines = [f"states of {title}", _line("layer", "tokens", "norm", "saturation", "effective rank")]
    ends = {
        position for rows_of in _by_layer(rows).values() for position in (rows_of[0].position, rows_of[-1].position)
    }
    for row in rows:
        if row.position in ends:
            values = f"{row.norm:.4g}", f"{row.saturation:.3f}", f"{row.effective_rank:.2f}"
            lines.append(_line(str(row.layer), f"{row.position:,}", *values))
    return "\n".join([*lines, _collapse_line(rows, collapse)])


def _by_layer(rows: Sequence[Row]) -> dict[int, list[Row]]:
    return {layer: [row for row in rows if row.layer == layer] for layer in sorted({row.layer for row in rows})}


def _line(layer: str, *cells: str) -> str:
    return f"{layer:>6} " + " ".join(f"{cell:>{width}}" for cell, width in zip(cells, (11, 10, 11, 15), strict=True))


def _collapse_line(rows: Sequence[Row], collapse: Collapse | None) -> str:
    if len({row.position for row in rows}) < 3:
        return (
            "state collapse: not judged, since documents are shorter than four segments; take shorter --segment-tokens"
        )
    if collapse is None:
        return f"state collapse: no sign up to {rows[-1].position:,} tokens"
    (begin, end), norms, ranks = collapse.positions, collapse.norms, collapse.ranks
    return (
        f"state collapse, a sign: layer {collapse.layer}, head {collapse.head} grows {norms[1] / norms[0]:.1f} times "
        f"in norm from {begin:,} to {end:,} tokens; its effective rank was {ranks[0]:.1f} and is {ranks[1]:.1f}"
    )
