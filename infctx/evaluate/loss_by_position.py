"""Loss by position: shows how much a model gains from the part of a document that it has read."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from infctx.data.token_store import TokenStore
from infctx.data.tokenizer import get_tokenizer, refuse_other_tokenizer, tokenizer_for_vocab
from infctx.errors import InputError
from infctx.model.loss import token_losses
from infctx.model.rwkv import RWKV
from infctx.model.state import State

FIRST_BUCKET_TOKENS = 256
BUCKET_GROWTH = 4
MOST_DOCUMENTS = 1024


@dataclass
class Bucket:
    """Targets begin..end-1 of the documents: their number, total loss in nats, and bytes (0: unknown)."""

    begin: int
    end: int
    num_tokens: int = 0
    nats: float = 0.0
    num_bytes: int = 0

    @property
    def nats_per_token(self) -> float:
        return self.nats / max(self.num_tokens, 1)

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else None


class DocumentLoss(NamedTuple):
    """The loss of a document, each target once in the buckets and once in the pieces.

    buckets: by position
    pieces:  of each segment: its number of targets, and their total loss in nats
    """

    buckets: list[Bucket]
    pieces: list[tuple[int, float]]


class Reading(NamedTuple):
    """What an evaluation reads of a store: tokens by document, in segments, for a vocabulary."""

    store: TokenStore
    tokens: dict[int, int]
    segment_tokens: int
    vocab_size: int

    def num_segments(self, document: int) -> int:
        return -(-(self.tokens[document] - 1) // self.segment_tokens)

    def spans(self, document: int) -> Iterator[tuple[int, int]]:
        """Yields the places of the tokens of each segment, with the target of its last one: begin, end."""
        last = self.tokens[document]
        for begin in range(0, last - 1, self.segment_tokens):
            yield begin, min(begin + self.segment_tokens + 1, last)

    def read(self, document: int, begin: int, end: int) -> Tensor:
        """Returns tokens begin..end-1 of a document; raises InputError for one beyond the vocabulary."""
        return read_tokens(self.store, self.vocab_size, document, begin, end)

    def only(self, documents: Iterable[int]) -> Reading:
        """Returns the reading of some of its documents."""
        return self._replace(tokens={document: self.tokens[document] for document in documents})


def read_tokens(store: TokenStore, vocab_size: int, document: int, begin: int, end: int) -> Tensor:
    """Returns tokens begin..end-1 of a document, at least one; raises InputError for one beyond the vocabulary."""
    tokens = torch.from_numpy(store.tokens(document, begin, end))
    if tokens.max() >= vocab_size:
        raise InputError(
            f"{store.path}: document {document} has token {tokens.max()}, and the model has {vocab_size} ids; "
            "prepare the documents with the model's tokenizer"
        )
    return tokens


RunSegment = Callable[[Tensor, Tensor, "State | None"], tuple[Tensor, State]]
"""Runs tokens (1, T) from a state, None for the initial one; returns the loss of each target (1, T), and the state."""


def evaluate_store(
    model: RWKV,
    store: TokenStore,
    segment_tokens: int,
    max_tokens: int,
    each_segment: Callable[[], None] = lambda: None,
) -> list[Bucket]:
    """Measures the loss of a store's targets by position in their document, each document read from its beginning.

    max_tokens:   total to read: every document (at most 1,024, evenly spaced) is read up to one common length
    each_segment: called after each segment, to show that this process is at work
    Returns the buckets 0-255, 256-1,023, 1,024-4,095, ... that have targets.  Shows a progress bar if standard
    error is a terminal.
    """
    reading = choose_documents(store, model.sizes.vocab_size, segment_tokens, max_tokens)
    return merge([document.buckets for document in evaluate_reading(model, reading, each_segment)])


def evaluate_reading(
    model: RWKV, reading: Reading, each_segment: Callable[[], None] = lambda: None, carries: bool = True
) -> list[DocumentLoss]:
    """Measures the documents of a reading, like `evaluate_store`, and returns the loss of each.

    carries: whether the state crosses from segment to segment; otherwise each starts from the initial state
    """

    def run(tokens: Tensor, targets: Tensor, state: State | None) -> tuple[Tensor, State]:
        hidden, state = model(tokens, state if carries else None)
        return token_losses(hidden, model.head.weight, targets, model.head_adapter(hidden)), state

    return [loss for _, loss in measure_documents(reading, run, model.embedding.weight.device, each_segment)]


@torch.no_grad()
def measure_documents(
    reading: Reading,
    run: RunSegment,
    device: torch.device,
    each_segment: Callable[[], None] = lambda: None,
    shows: bool = True,
) -> list[tuple[int, DocumentLoss]]:
    """Measures the documents of a reading; returns their numbers and losses.  Raises InputError for a loss of nan.

    shows: whether to show a progress bar, if standard error is a terminal
    """
    tokenizer = tokenizer_for_vocab(reading.vocab_size)
    byte_lengths = torch.from_numpy(get_tokenizer(tokenizer).byte_lengths) if tokenizer else None
    found = []
    with _progress_bar(sum(reading.tokens.values()) - len(reading.tokens), shows) as bar:
        for document in reading.tokens:
            state, measured = None, DocumentLoss([], [])
            for begin, end in reading.spans(document):
                piece = reading.read(document, begin, end).to(device)
                each, state = run(piece[None, :-1], piece[None, 1:], state)
                losses = each[0].double().cpu()
                if not losses.isfinite().all():
                    problem = f"document {document} has a loss of nan or inf; the weights are damaged"
                    raise InputError(f"{reading.store.path}: {problem}")
                counted = torch.from_numpy(reading.store.targets(document, begin + 1, end))
                num_bytes = None if byte_lengths is None else byte_lengths[piece[1:].cpu()]
                _add(measured.buckets, begin, losses, counted, num_bytes)
                measured.pieces.append((int(counted.sum()), losses[counted].sum().item()))
                bar.update(len(losses))
                each_segment()
            found.append((document, measured))
    return found


def merge(parts: Iterable[list[Bucket]]) -> list[Bucket]:
    """Adds the buckets of several documents or stores, place by place; returns those that have targets."""
    merged: dict[int, Bucket] = {}
    for part in (bucket for buckets in parts for bucket in buckets):
        whole = merged.setdefault(part.begin, Bucket(part.begin, part.end))
        whole.num_tokens += part.num_tokens
        whole.nats += part.nats
        whole.num_bytes += part.num_bytes
    return [merged[begin] for begin in sorted(merged) if merged[begin].num_tokens]


def refuse_tokens_beyond(readings: Mapping[str, Reading]) -> None:
    """Raises InputError if an evaluation would meet a token beyond the model's vocabulary."""
    for reading in readings.values():
        for document in reading.tokens:
            for begin, end in reading.spans(document):
                reading.read(document, begin, end)


def format_table(buckets: list[Bucket], store: str) -> str:
    """Formats the buckets of a store as a table, with a line for all of them together."""
    lines = [f"held-out loss by position in {store}", f"{_HEAD}   nats/token   bits/byte"]
    for bucket in [*buckets, total(buckets)]:
        bits = "-" if bucket.bits_per_byte is None else f"{bucket.bits_per_byte:.3f}"
        lines.append(f"{_place(bucket)} {bucket.nats_per_token:>12.4f} {bits:>11}")
    return "\n".join(lines)


def format_comparison(before: list[Bucket], after: list[Bucket], store: str, names: tuple[str, str]) -> str:
    """Formats two evaluations of the same documents side by side, in bits per byte if the bytes are known."""
    known = total(before).bits_per_byte is not None
    unit = "bits per byte" if known else "nats per token"
    lines = [f"held-out loss by position in {store}, {unit}", f"{_HEAD} {names[0]:>16} {names[1]:>16}      change"]
    for pair in zip([*before, total(before)], [*after, total(after)], strict=True):
        first, second = ((bucket.bits_per_byte or 0.0) if known else bucket.nats_per_token for bucket in pair)
        lines.append(f"{_place(pair[0])} {first:>16.3f} {second:>16.3f} {second - first:>+11.3f}")
    return "\n".join(lines)


_HEAD = "        position     tokens"


def _place(bucket: Bucket) -> str:
    return f"{format_place(bucket):>16} {bucket.num_tokens:>10,}"


def format_place(bucket: Bucket) -> str:
    """Formats the positions of a bucket: 256 - 1,023."""
    return "all" if bucket.end == 0 else f"{bucket.begin:,} - {bucket.end - 1:,}"


def summarize(buckets: list[Bucket]) -> str:
    """Summarizes the loss in one clause: of all targets, the first bucket and the last."""
    first, last, whole = buckets[0], buckets[-1], total(buckets)
    if first is last:
        return f"{format_value(whole)} {unit_of(whole)}"
    return (
        f"{format_value(whole)} {unit_of(whole)}: {format_value(first)} in a document's first {first.end} tokens, "
        f"{format_value(last)} from {last.begin:,} on"
    )


def format_value(bucket: Bucket) -> str:
    """Formats `shown_value`."""
    return f"{shown_value(bucket):.3f}"


def shown_value(bucket: Bucket) -> float:
    """Returns the loss of a bucket in bits per byte if the bytes are known, else in nats per token."""
    return bucket.nats_per_token if bucket.bits_per_byte is None else bucket.bits_per_byte


def unit_of(bucket: Bucket) -> str:
    """Returns the unit of `shown_value`."""
    return "nats per token" if bucket.bits_per_byte is None else "bits per byte"


def total(buckets: list[Bucket]) -> Bucket:
    """Adds all buckets into one, with begin = end = 0."""
    sums = (sum(getattr(bucket, name) for bucket in buckets) for name in ("num_tokens", "nats", "num_bytes"))
    return Bucket(0, 0, *sums)


def _add(buckets: list[Bucket], begin: int, losses: Tensor, counted: Tensor, num_bytes: Tensor | None) -> None:
    """Adds the losses of positions begin, begin + 1, ... to their buckets, where `counted` is True."""
    end = begin + len(losses)
    while not buckets or buckets[-1].end < end:
        last_end = buckets[-1].end if buckets else 0
        buckets.append(Bucket(last_end, last_end * BUCKET_GROWTH or FIRST_BUCKET_TOKENS))
    for bucket in buckets:
        part = slice(max(bucket.begin - begin, 0), max(bucket.end - begin, 0))
        here = counted[part]
        bucket.num_tokens += int(here.sum())
        bucket.nats += losses[part][here].sum().item()
        bucket.num_bytes += 0 if num_bytes is None else int(num_bytes[part][here].sum())


def choose_documents(store: TokenStore, vocab_size: int, segment_tokens: int, max_tokens: int) -> Reading:
    """Chooses at most 1,024 evenly spaced documents that have a target, and how much to read of each."""
    if segment_tokens < 1 or max_tokens < 1:
        raise InputError(f"evaluate: segment_tokens {segment_tokens} and max_tokens {max_tokens} must be >= 1")
    refuse_other_tokenizer(str(store.path), store.tokenizer, vocab_size)
    stride = max(1, store.num_documents / MOST_DOCUMENTS)
    spaced = (int(place * stride) for place in range(min(store.num_documents, MOST_DOCUMENTS)))
    lengths = {document: store.length(document) for document in spaced}
    lengths = {document: length for document, length in lengths.items() if store.count_targets(document, 1, length)}
    if not lengths:
        raise InputError(f"{store.path}: no document of two tokens or more to evaluate")
    limit = _common_length(list(lengths.values()), max_tokens)
    tokens = {document: min(limit, length) for document, length in lengths.items()}
    if not any(store.count_targets(document, 1, length) for document, length in tokens.items()):
        raise InputError(
            f"{store.path}: no target in the first {limit:,} tokens of any document; allow more with "
            "--max-tokens, or run.evaluate_tokens in a run"
        )
    return Reading(store, tokens, segment_tokens, vocab_size)


def _common_length(lengths: list[int], max_tokens: int) -> int:
    """Returns the largest length to cut all documents at so that at most max_tokens are left; at least 2."""
    left = max_tokens
    for count, length in zip(range(len(lengths), 0, -1), sorted(lengths), strict=True):
        if length * count > left:
            return max(2, left // count)
        left -= length
    return max(lengths)


def _progress_bar(num_targets: int, shows: bool) -> tqdm:
    hidden = not shows or not sys.stderr.isatty()
    return tqdm(total=num_targets, desc="held-out loss", unit=" tokens", unit_scale=True, leave=False, disable=hidden)
