"""Splits: documents as tokens in; the stores train and held_out, with what they hold, out."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infctx.data.store_writer import TokenStoreWriter
from infctx.data.token_store import TokenStore
from infctx.data.tokenizer import Tokenizer
from infctx.errors import InputError
from infctx.prepare.encode import Encoded
from infctx.prepare.stored import end_of, stored_document, stored_parts

TRAIN, HELD_OUT = "train", "held_out"
UNSPLIT = "unsplit"


@dataclass
class SplitSummary:
    """Documents, tokens (ends of documents included), UTF-8 bytes of text and targets of a split."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    targets: int = 0


@dataclass
class Splits:
    """What was written: the splits that have documents, and what has none.

    tail_tokens: of the only document, that are held out; 0 where whole documents are
    """

    splits: dict[str, SplitSummary]
    empty_documents: int = 0
    documents_without_target: int = 0
    tail_tokens: int = 0


def write_splits(
    folder: Path, documents: Iterable[Encoded], tokenizer: Tokenizer, held_out: float, seed: int
) -> Splits:
    """Writes documents to the splits of a folder.

    held_out: the share of the documents to hold out, see `infctx.prepare.prepare`
    seed: for the choice of the documents
    Raises InputError if there is nothing to write, or nothing to hold out.
    """
    group = documents_per_held_out(held_out)
    written = _write(folder, documents, _random_split(group, seed), tokenizer.byte_lengths)
    if not written.splits:
        problem = (
            "have nothing to learn; see --learn, or give chats with answers in them"
            if written.documents_without_target
            else "are empty; name files with text in them"
        )
        raise InputError(f"all documents {problem}")
    if group and len(written.splits) == 1:
        _hold_out_after_all(folder, written, tokenizer, held_out, seed)
    return written


def documents_per_held_out(held_out: float) -> int:
    """Returns the size of the groups of documents in which one is held out; 0 if none is.

    Raises InputError unless the share is one document out of a whole number of them, or none.
    """
    if not 0 <= held_out <= 0.5:
        raise InputError(
            f"--held-out: {held_out} is no share that can be held out; give 0 to 0.5 of the documents, such as 0.05"
        )
    if not held_out:
        return 0
    group = round(min(1 / held_out, 1e9))
    if abs(1 / group - held_out) > 0.1 * held_out:
        raise InputError(
            f"--held-out: {held_out} is not one document out of a whole number of them; give a share such as "
            f"{1 / group:.3g} or {1 / (group + 1):.3g}"
        )
    return group


def _random_split(group: int, seed: int) -> Callable[[int], str]:
    """Gives the split of document i: of every `group` documents, a random one is held out; group 0: none."""

    def split(i: int) -> str:
        if group and random.Random(f"{seed}/{i // group}").randrange(group) == i % group:
            return HELD_OUT
        return TRAIN

    return split


def _write(
    folder: Path, documents: Iterable[Encoded], split_of: Callable[[int], str], byte_lengths: np.ndarray
) -> Splits:
    """Writes each document to its split."""
    splits = {name: SplitSummary() for name in (TRAIN, HELD_OUT)}
    count = empty = untaught = 0
    with ExitStack() as stack:
        writers = {name: TokenStoreWriter(folder / name) for name in splits}
        for writer in writers.values():
            stack.callback(writer.abort)
        for document in documents:
            name = split_of(count)
            length = num_bytes = 0
            for ids, are_targets in document.parts:
                writers[name].extend(ids, are_targets)
                length += ids.size
                num_bytes += int(byte_lengths[ids].sum())
            if not length:
                empty += 1
            elif not writers[name].end_document(document.learns_end):
                untaught += 1
            else:
                splits[name].bytes += num_bytes
                count += 1
        for name, writer in writers.items():
            split = splits[name]
            split.documents, split.tokens, split.targets = writer.num_documents, writer.num_tokens, writer.num_targets
            if writer.num_documents:
                writer.close()
    return Splits({name: split for name, split in splits.items() if split.documents}, empty, untaught)


def _hold_out_after_all(folder: Path, written: Splits, tokenizer: Tokenizer, held_out: float, seed: int) -> None:
    """Holds out a random document, where they ended before the first one to hold out; or the tail of the only one."""
    (present,) = written.splits
    for path in folder.glob(f"{present}.*"):
        os.rename(path, path.with_stem(UNSPLIT))
    store = TokenStore(folder / UNSPLIT)
    if store.num_documents == 1:
        cut = _cut(store, tokenizer, held_out)
        end, learns_end = end_of(store, 0)
        # The document does not end at the cut, so that is nothing to learn.
        documents = iter(
            [Encoded(stored_parts(store, 0, 0, cut), False), Encoded(stored_parts(store, 0, cut, end), learns_end)]
        )
        chosen = 1
        written.tail_tokens = end - cut
    else:
        documents = (stored_document(store, i) for i in range(store.num_documents))
        chosen = random.Random(seed).randrange(store.num_documents)
    rewritten = _write(folder, documents, lambda i: HELD_OUT if i == chosen else TRAIN, tokenizer.byte_lengths)
    if len(rewritten.splits) < 2:
        raise InputError(
            "--held-out: the only document has nothing to learn before its tail or in it; give more documents, "
            "another share, or leave --held-out out"
        )
    written.splits = rewritten.splits
    for path in folder.glob(f"{UNSPLIT}.*"):
        path.unlink()


def _cut(store: TokenStore, tokenizer: Tokenizer, held_out: float) -> int:
    """Returns the first token of the tail of the only document: the first token of a character."""
    end, _ = end_of(store, 0)
    cut = end - max(1, round(held_out * end))
    while cut > 0 and tokenizer.decode(store.tokens(0, cut, cut + 1))[0] & 0xC0 == 0x80:
        cut -= 1
    if cut <= 0:
        raise InputError(
            "--held-out: the only document is too short to hold out its tail; give more documents, or leave it out"
        )
    return cut
