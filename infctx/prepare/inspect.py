"""`infctx inspect`: a token store in; its figures, or one of its documents with what is learned marked, out."""

from __future__ import annotations

import codecs
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from infctx.conventions import START_SPACING
from infctx.data.token_store import TokenStore
from infctx.data.tokenizer import TOKENIZER_NAMES, Tokenizer, get_tokenizer
from infctx.errors import InputError
from infctx.small_texts import counted

WINDOWS = (1024, 4096, 16384, 65536)
BAR_COLUMNS = 30
COLOR, FAINT, RESET = "\033[32m", "\033[2m", "\033[0m"
"""Green for what is learned, faint for the rest."""
JOINERS = "\u200c\u200d"  # of Persian and Indian scripts, and of emoji
BEGIN, END = "⟦", "⟧"
"""Marks around what is learned, where there is no color."""


@dataclass
class Lengths:
    """The lengths of the documents of a store, in tokens, with their ends.

    counts, tokens: of the documents of 2^i to 2^(i + 1) - 1 tokens, for each i
    longer: for each window, the documents that do not fit in it, and their tokens
    padding: places that hold no token, since each document starts at a multiple of 16
    """

    counts: np.ndarray
    tokens: np.ndarray
    longer: dict[int, tuple[int, int]]
    padding: int
    median: int
    longest: tuple[int, int]


def describe_store(store: TokenStore, windows: Sequence[int] = WINDOWS) -> str:
    """Returns the figures of a store as lines: sizes, targets, a histogram of lengths, and how documents fit windows.

    windows: tokens of a window, as in window.window_tokens
    """
    lengths = _measure(store, windows)
    every = store.num_tokens - store.num_documents
    lines = [
        f"{store.path}: {counted(store.num_documents, 'document')}, {store.num_tokens:,} tokens "
        f"({store.tokenizer or 'of an unknown tokenizer'})",
        f"learned: {store.num_targets:,} tokens, {_percent(store.num_targets, every)} of those that follow another",
        f"length: median {lengths.median:,}, mean {store.num_tokens / store.num_documents:,.0f}, longest "
        f"{lengths.longest[0]:,} tokens (document {lengths.longest[1]})",
        "",
        *_histogram(lengths),
        "",
        f"padding: {_percent(lengths.padding, lengths.padding + every)} of the places in a window, whatever its size",
        *_windows(lengths, store),
    ]
    return "\n".join(lines)


def _measure(store: TokenStore, windows: Sequence[int]) -> Lengths:
    counts, tokens = np.zeros(64, np.int64), np.zeros(64, np.int64)
    longer = {window: (0, 0) for window in windows}
    padding, longest, begin = 0, (0, 0), 0
    for lengths in store.lengths():
        places = np.frexp(np.maximum(lengths, 1).astype(np.float64))[1] - 1
        counts += np.bincount(places, minlength=64)
        np.add.at(tokens, places, lengths)
        padding += int((-np.maximum(lengths - 1, 0) % START_SPACING).sum())
        for window, (documents, total) in longer.items():
            beyond = lengths - 1 > window
            longer[window] = documents + int(beyond.sum()), total + int(lengths[beyond].sum())
        largest = int(lengths.argmax())
        longest = max(longest, (int(lengths[largest]), -(begin + largest)))
        begin += len(lengths)
    return Lengths(counts, tokens, longer, padding, _median(store), (longest[0], -longest[1]))


def _median(store: TokenStore) -> int:
    """Returns the median length; of stores with more than a million documents, that of a million evenly spaced ones."""
    step = max(1, store.num_documents // 1_000_000)
    begin, chosen = 0, []
    for lengths in store.lengths():
        chosen.append(lengths[-begin % step :: step])
        begin += len(lengths)
    return int(np.median(np.concatenate(chosen)))


def _histogram(lengths: Lengths) -> list[str]:
    present = np.flatnonzero(lengths.counts)
    most, block = int(lengths.counts.max()), "█" if _shows("█") else "#"
    lines = [f"{'tokens':>23}  {'documents':>11} {'of all tokens':>14}"]
    for place in range(int(present[0]), int(present[-1]) + 1):
        count = int(lengths.counts[place])
        bar = block * -(-count * BAR_COLUMNS // most)
        share = _percent(int(lengths.tokens[place]), int(lengths.tokens.sum()))
        lines.append(f"{f'{1 << place:,} - {(2 << place) - 1:,}':>23}  {count:>11,} {share:>14}  {bar}".rstrip())
    return lines


def _windows(lengths: Lengths, store: TokenStore) -> list[str]:
    lines = [f"{'window':>10}  {'documents longer than it':>26}  {'their tokens':>12}"]
    for window, (documents, tokens) in lengths.longer.items():
        share = f"{documents:,} ({_percent(documents, store.num_documents)})"
        lines.append(f"{window:>10,}  {share:>26}  {_percent(tokens, store.num_tokens):>12}")
    return lines


def _percent(part: int, whole: int) -> str:
    share = part / max(whole, 1)
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def show_document(store: TokenStore, number: int, most_tokens: int, tokenizer: str | None, color: bool) -> str:
    """Returns the text of a document, with what is learned in color, or between marks.

    most_tokens: how many of its tokens to show; 0 for all
    tokenizer:   its name, for a store that does not say
    Raises InputError for a number that the store does not have.
    """
    if not 0 <= number < store.num_documents:
        raise InputError(f"{store.path}: has no document {number}; give 0 to {store.num_documents - 1}")
    length = store.length(number)
    shown = min(length, most_tokens or length)
    marks = (COLOR, RESET) if color else (BEGIN, END) if _shows(BEGIN) else ("[[", "]]")
    unlearned = (FAINT, RESET) if color else ("", "")
    targets = store.count_targets(number, 1, length)
    lines = [
        f"{store.path}: document {number}, {length:,} tokens, {targets:,} learned"
        + (f" ({'green' if color else f'between {marks[0]} and {marks[1]}'})" if targets else "")
    ]
    parts = []
    for text, is_learned in _runs(store, number, shown, _tokenizer_of(store, tokenizer)):
        before, after = marks if is_learned else unlearned
        parts.append(f"{before}{text}{after}")
    lines.append("".join(parts))
    if shown < length:
        lines.append(f"... and {length - shown:,} more tokens; --first 0 shows all")
    return "\n".join(lines)


def _tokenizer_of(store: TokenStore, name: str | None) -> Tokenizer:
    known = store.tokenizer or name
    if known is None:
        raise InputError(
            f"{store.path}: nothing says which tokenizer made it; add --tokenizer {' or '.join(TOKENIZER_NAMES)}"
        )
    return get_tokenizer(known)


def _runs(store: TokenStore, number: int, shown: int, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Yields stretches of text with whether they are learned; the end of the document is a visible mark."""
    ids, targets = store.tokens(number, 0, shown), store.targets(number, 0, shown)
    if shown > 1:
        targets = np.append(targets[1], targets[1:])  # the first token is never learned, which is no news
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    borders = [0, *(np.flatnonzero(np.diff(targets)) + 1).tolist(), shown]
    for begin, end in pairwise(borders):
        text = decoder.decode(tokenizer.decode(ids[begin:end]), final=end == shown)
        text = "".join(letter if _is_text(letter) else _escaped(letter) for letter in text)
        if ids[end - 1] == tokenizer.end_of_document:
            text += "<end>"
        if text:
            yield text, bool(targets[begin])


def _is_text(letter: str) -> bool:
    """Returns whether a terminal shows a letter as text; of what Python calls not printable, spaces and joiners are."""
    return letter.isprintable() or letter in "\n\t" + JOINERS or unicodedata.category(letter) == "Zs"


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def _shows(letter: str) -> bool:
    """Returns whether standard output can write a letter."""
    try:
        letter.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError, AttributeError):
        return False
    return True
