"""Loss by position: shows how much a model gains from the part of a document that it has read."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from infctx.data.token_store import TokenStore
from infctx.data.tokenizer import get_tokenizer, refuse_other_tokenizer, tokenizer_for_vocab
from infctx.errors import InputError
from infctx.model.loss import token_losses
from infctx.model.rwkv import RWKV

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


@torch.no_grad()
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
    if segment_tokens < 1 or max_tokens < 1:
        raise InputError(f"evaluate: segment_tokens {segment_tokens} and max_tokens {max_tokens} must be >= 1")
    tokenizer = tokenizer_for_vocab(model.sizes.vocab_size)
    byte_lengths = torch.from_numpy(get_tokenizer(tokenizer).byte_lengths) if tokenizer else None
    buckets: list[Bucket] = []
    chosen = _choose(store, model.sizes.vocab_size, max_tokens)
    with _progress_bar(sum(chosen.values()) - len(chosen)) as bar:
        for document, tokens in _read(store, model.sizes.vocab_size, chosen):
            targets = torch.from_numpy(store.targets(document, 0, len(tokens)))
            state = None
            for begin in range(0, len(tokens) - 1, segment_tokens):
                piece = tokens[begin : begin + segment_tokens + 1].to(model.embedding.weight.device)
                hidden, state = model(piece[None, :-1], state)
                losses = token_losses(hidden, model.head.weight, piece[None, 1:])[0].double().cpu()
                if not losses.isfinite().all():
                    problem = f"document {document} has a loss of nan or inf; the weights are damaged"
                    raise InputError(f"{store.path}: {problem}")
                counted = targets[begin + 1 : begin + len(piece)]
                num_bytes = None if byte_lengths is None else byte_lengths[piece[1:].cpu()]
                _add(buckets, begin, losses, counted, num_bytes)
                bar.update(len(losses))
                each_segment()
    return [bucket for bucket in buckets if bucket.num_tokens]


def refuse_tokens_beyond(store: TokenStore, vocab_size: int, max_tokens: int) -> None:
    """Raises InputError if an evaluation of max_tokens would meet a token beyond the model's vocabulary."""
    for _ in _read(store, vocab_size, _choose(store, vocab_size, max_tokens)):
        pass


def format_table(buckets: list[Bucket], store: TokenStore) -> str:
    """Formats the buckets as a table, with a line for all of them together."""
    lines = [f"held-out loss by position in {store.path}", f"{_HEAD}   nats/token   bits/byte"]
    for bucket in [*buckets, total(buckets)]:
        bits = "-" if bucket.bits_per_byte is None else f"{bucket.bits_per_byte:.3f}"
        lines.append(f"{_place(bucket)} {bucket.nats_per_token:>12.4f} {bits:>11}")
    return "\n".join(lines)


def format_comparison(before: list[Bucket], after: list[Bucket], store: TokenStore, names: tuple[str, str]) -> str:
    """Formats two evaluations of the same documents side by side, in bits per byte if the bytes are known."""
    known = total(before).bits_per_byte is not None
    unit = "bits per byte" if known else "nats per token"
    lines = [f"held-out loss by position in {store.path}, {unit}", f"{_HEAD} {names[0]:>16} {names[1]:>16}      change"]
    for pair in zip([*before, total(before)], [*after, total(after)], strict=True):
        first, second = ((bucket.bits_per_byte or 0.0) if known else bucket.nats_per_token for bucket in pair)
        lines.append(f"{_place(pair[0])} {first:>16.3f} {second:>16.3f} {second - first:>+11.3f}")
    return "\n".join(lines)


_HEAD = "        position     tokens"


def _place(bucket: Bucket) -> str:
    name = "all" if bucket.end == 0 else f"{bucket.begin:,} - {bucket.end - 1:,}"
    return f"{name:>16} {bucket.num_tokens:>10,}"


def summarize(buckets: list[Bucket]) -> str:
    """Summarizes the loss in one clause: of all targets, the first bucket and the last."""
    first, last, whole = buckets[0], buckets[-1], total(buckets)
    if first is last:
        return f"{_value(whole)} {_unit(whole)}"
    return (
        f"{_value(whole)} {_unit(whole)}: {_value(first)} in a document's first {first.end} tokens, "
        f"{_value(last)} from {last.begin:,} on"
    )


def _value(bucket: Bucket) -> str:
    bits = bucket.bits_per_byte
    return f"{bucket.nats_per_token if bits is None else bits:.3f}"


def _unit(bucket: Bucket) -> str:
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


def _choose(store: TokenStore, vocab_size: int, max_tokens: int) -> dict[int, int]:
    """Returns document number -> tokens to read of it, for at most 1,024 evenly spaced documents that have a target."""
    refuse_other_tokenizer(str(store.path), store.tokenizer, vocab_size)
    stride = max(1, store.num_documents / MOST_DOCUMENTS)
    spaced = (int(place * stride) for place in range(min(store.num_documents, MOST_DOCUMENTS)))
    lengths = {document: store.length(document) for document in spaced}
    lengths = {document: length for document, length in lengths.items() if store.count_targets(document, 1, length)}
    if not lengths:
        raise InputError(f"{store.path}: no document of two tokens or more to evaluate")
    limit = _common_length(list(lengths.values()), max_tokens)
    chosen = {document: min(limit, length) for document, length in lengths.items()}
    if not any(store.count_targets(document, 1, length) for document, length in chosen.items()):
        raise InputError(
            f"{store.path}: no target in the first {limit:,} tokens of any document; evaluate on more tokens"
        )
    return chosen


def _read(store: TokenStore, vocab_size: int, chosen: dict[int, int]) -> Iterator[tuple[int, Tensor]]:
    """Yields the number and tokens of each chosen document."""
    for document, num_tokens in chosen.items():
        tokens = torch.from_numpy(store.tokens(document, 0, num_tokens))
        if tokens.max() >= vocab_size:
            raise InputError(
                f"{store.path}: document {document} has token {tokens.max()}, and the model has {vocab_size} ids; "
                "prepare the documents with the model's tokenizer"
            )
        yield document, tokens


def _common_length(lengths: list[int], max_tokens: int) -> int:
    """Returns the largest length to cut all documents at so that at most max_tokens are left; at least 2."""
    left = max_tokens
    for count, length in zip(range(len(lengths), 0, -1), sorted(lengths), strict=True):
        if length * count > left:
            return max(2, left // count)
        left -= length
    return max(lengths)


def _progress_bar(num_targets: int) -> tqdm:
    hidden = not sys.stderr.isatty()
    return tqdm(total=num_targets, desc="held-out loss", unit=" tokens", unit_scale=True, leave=False, disable=hidden)
