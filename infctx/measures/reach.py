"""Reach: how far back a prediction depends.

The distance of two predictions of the same token: after the whole past, and after its last `tokens` tokens alone, read
from the initial state.  It is their total variation, half the sum of |p - q|: 0 for the same, 1 for disjoint ones.
This is EffRem (arXiv 2507.02782), by the distance back instead of from the beginning.  In: a model and a reading of a
store.  Out: a row for each power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infctx.errors import InputError
from infctx.evaluate.loss_by_position import Reading
from infctx.measures.bootstrap import standard_error
from infctx.measures.predictions import probabilities, read_pieces, read_through, shown
from infctx.model.rwkv import RWKV

QUERIES = 32
QUERIES_PER_DOCUMENT = 4
HOW_TO_READ = "how much the part of the past that is further back changes a prediction, 0 to 1; 0 where it is forgotten"


class Row(NamedTuple):
    """tokens: how far back the first token is that both predictions come from; distance: their total variation."""

    tokens: int
    distance: float
    standard_error: float | None


def measure_reach(model: RWKV, reading: Reading, samples: int | None, seed: int, carries: bool = True) -> list[Row]:
    """Measures the reach at some targets in the second half of documents, the longest ones first.

    samples: how many targets, None for 32; at most 4 of a document
    carries: whether the state crosses from segment to segment; otherwise each starts from the initial state
    """
    asked = _choose(reading, samples or QUERIES, seed)
    found: dict[int, dict[int, list[float]]] = {}  # tokens -> document -> distances
    for document, places in shown(asked.items(), len(asked), "reach"):
        for place, whole in _predictions(model, reading, document, places, carries):
            tokens = 1
            while tokens < place:
                part = _prediction(model, reading, document, (place - tokens, place), carries)
                distance = float((whole - part).abs().sum() / 2)
                found.setdefault(tokens, {}).setdefault(document, []).append(distance)
                tokens *= 2
    if not found:
        raise InputError(f"{reading.store.path}: no document of three tokens or more; leave reach out of --what")
    return [_row(tokens, its, seed) for tokens, its in sorted(found.items()) if 2 * len(its) >= len(asked)]


def _choose(reading: Reading, count: int, seed: int) -> dict[int, list[int]]:
    """Returns the places of targets by document."""
    longest = sorted(reading.tokens, key=lambda document: -reading.tokens[document])[:count]
    each = min(QUERIES_PER_DOCUMENT, -(-count // len(longest)))
    chosen: dict[int, list[int]] = {}
    for document in sorted(longest):
        random = np.random.default_rng([seed, document])
        last = reading.tokens[document]
        for begin in (max(2, last // 2), 2):  # a target in the first half, if the second has none
            if begin < last and reading.store.count_targets(document, begin, last):
                places = begin + np.flatnonzero(reading.store.targets(document, begin, last))
                chosen[document] = sorted(random.choice(places, min(each, len(places)), replace=False).tolist())
                break
    return chosen


def _predictions(
    model: RWKV, reading: Reading, document: int, places: Sequence[int], carries: bool
) -> list[tuple[int, Tensor]]:
    """Returns the predictions of a document's targets after their whole past."""
    if not carries:
        return [(place, _prediction(model, reading, document, (0, place), carries)) for place in places]
    found, left = [], list(places)
    for piece in read_pieces(model, partial(reading.read, document), (0, places[-1]), reading.segment_tokens):
        end = piece.begin + len(piece.hidden)
        while left and left[0] <= end:
            place = left.pop(0)
            found.append((place, probabilities(model, piece.hidden[place - 1 - piece.begin])))
    return found


@torch.no_grad()
def _prediction(model: RWKV, reading: Reading, document: int, span: tuple[int, int], carries: bool) -> Tensor:
    """Returns the prediction of the target at the end of a span, after its tokens."""
    begin, end = span
    if not carries:
        begin = max(begin, (end - 1) // reading.segment_tokens * reading.segment_tokens)
    piece = read_through(model, partial(reading.read, document), (begin, end), reading.segment_tokens)
    return probabilities(model, piece.hidden[-1])


def _row(tokens: int, by_document: dict[int, list[float]], seed: int) -> Row:
    sums = np.array([sum(distances) for distances in by_document.values()])
    counts = np.array([len(distances) for distances in by_document.values()], np.float64)
    return Row(tokens, float(sums.sum() / counts.sum()), standard_error(sums, counts, seed))


def format_reach(rows: Sequence[Row], title: str) -> str:
    """Formats the rows as a table."""
    lines = [f"reach of {title}", f"{'tokens back':>16} {'distance':>10} {'+-':>9}"]
    for row in rows:
        error = "-" if row.standard_error is None else f"{row.standard_error:.4f}"
        lines.append(f"{row.tokens:>16,} {row.distance:>10.4f} {error:>9}")
    return "\n".join(lines)
