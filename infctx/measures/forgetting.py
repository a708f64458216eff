"""The forgetting curve: how well a model copies a text that it has read, by the length of the text.

A text of `distance` tokens is followed by itself, so each token of the copy is that far from its first occurrence; and
for comparison it follows another text of the same length.  The accuracy is the share of tokens in its second half whose
likeliest prediction is right, with the true tokens before them: in the first half, a model may not know yet that it is
a copy.  This is the forgetting curve of arXiv 2410.04727; it takes forward passes only, and suits any model.  In: a
model and a store's text.  Out: a row for each distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from infctx.measures.bootstrap import standard_error
from infctx.measures.predictions import most_likely, read_pieces, read_through, shown
from infctx.measures.text import StoreText
from infctx.model.rwkv import RWKV
from infctx.model.state import State

TEXTS = 8
FEWEST_TEXTS = 3
"""A text follows the one after it, so with three of them none follows the one before it in the store."""
FIRST_DISTANCE, GROWTH = 64, 4
HOW_TO_READ = "copy - language is what memory adds; where it is near 0, the model has forgotten the text"


class Row(NamedTuple):
    """The accuracies at a distance, 0 to 1; standard_error: of their difference, over texts."""

    distance: int
    copy_accuracy: float
    language_accuracy: float
    difference: float
    standard_error: float | None


# Six parameters: the model, the text, how it is read, where, how often, and by which chance.
def measure_forgetting(
    model: RWKV, text: StoreText, segment_tokens: int, distances: Sequence[int], samples: int | None, seed: int
) -> list[Row]:
    """Measures the accuracies at each distance, on texts evenly spaced over the store.

    distances: from `distances_of`
    samples:   how many texts, None for 8; fewer if the store does not have as many, but at least 3
    """
    return [_row(model, text, segment_tokens, distance, samples or TEXTS, seed) for distance in distances]


def distances_of(text: StoreText, lengths: Sequence[int] | None, max_tokens: int) -> list[int]:
    """Returns the given lengths, or 64, 256, 1,024, ... as far as 8 such texts are in max_tokens and in the store.

    Raises InputError if the store is too short.
    """
    for distance in lengths or [FIRST_DISTANCE]:
        text.refuse_shorter(FEWEST_TEXTS * distance, f"and forgetting at {distance:,} takes")
    if lengths:
        return list(lengths)
    distances = [FIRST_DISTANCE]
    while TEXTS * GROWTH * distances[-1] <= min(text.num_tokens, max_tokens):
        distances.append(GROWTH * distances[-1])
    return distances


# The text and how it is read come first, as above.
def _row(model: RWKV, text: StoreText, segment_tokens: int, distance: int, samples: int, seed: int) -> Row:
    count = max(FEWEST_TEXTS, min(samples, text.num_tokens // distance))
    begins = text.begins(count, distance)
    copied, followed = np.zeros(count), np.zeros(count)
    for number, begin in shown(enumerate(begins), count, f"forgetting, {distance:,} tokens"):
        before = (number - 1) % count
        state = read_through(model, text.read, (begin, begin + distance), segment_tokens).state
        copied[number] = _accuracy(model, text, segment_tokens, (begin, begin + distance), state)
        followed[before] = _accuracy(model, text, segment_tokens, (begins[before], begins[before] + distance), state)
    copy, language = float(copied.mean()), float(followed.mean())
    error = standard_error(copied, np.ones(count), seed, followed)
    return Row(distance, copy, language, copy - language, error)


def _accuracy(model: RWKV, text: StoreText, segment_tokens: int, span: tuple[int, int], state: State) -> float:
    """Returns the accuracy in the second half of a span that is read from a state."""
    begin, end = span
    first = max(begin + 1, (begin + end) // 2)
    right = 0
    for piece in read_pieces(model, text.read, span, segment_tokens, state):
        # A piece predicts the tokens one after its own.
        predicted = slice(max(first, piece.begin + 1), min(end, piece.begin + 1 + len(piece.hidden)))
        if predicted.start < predicted.stop:
            hidden = piece.hidden[predicted.start - 1 - piece.begin : predicted.stop - 1 - piece.begin]
            right += int((most_likely(model, hidden) == text.read(predicted.start, predicted.stop)).sum())
    return right / (end - first)


def format_forgetting(rows: Sequence[Row], title: str) -> str:
    """Formats the rows as a table."""
    lines = [
        f"forgetting curve of {title}",
        f"{'distance':>16} {'copy':>7} {'language':>9} {'difference':>11} {'+-':>7}",
    ]
    for row in rows:
        error = "-" if row.standard_error is None else f"{row.standard_error:.3f}"
        accuracies = f"{row.copy_accuracy:>7.3f} {row.language_accuracy:>9.3f} {row.difference:>+11.3f}"
        lines.append(f"{row.distance:>16,} {accuracies} {error:>7}")
    return "\n".join(lines)
