"""Encoding: documents in; the ids of each document, and which of them are learned, out; in several processes."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from infctx.data.tokenizer import Tokenizer, get_tokenizer
from infctx.documents.document import STDIN, Document, Part, Source
from infctx.errors import InputError
from infctx.prepare.workers import WorkerKilled, Workers

# Characters that are sent to a worker at once, and the most that a document sent to one may have. With one batch and
# its ids per worker in flight, this bounds the memory. A longer document is encoded here, piece by piece.
BATCH_CHARS = 1 << 20
LONG_DOCUMENT_CHARS = 4 << 20
DOCUMENT_OVERHEAD = 256  # the cost of a document besides its characters, so that a batch of tiny ones ends too
MOST_PARTS = 1 << 12  # short ones, encoded in one go
# Encoding this much takes as long as starting a worker.
BYTES_PER_WORKER = 32 << 20


class Encoded(NamedTuple):
    """A document as tokens, without its end."""

    parts: Iterable[tuple[np.ndarray, bool]]
    """Ids, and whether a model learns to predict them; to be read to the end before the next document."""
    learns_end: bool


class _Short(NamedTuple):
    """A document in memory: the text of each part, and whether it is learned."""

    parts: list[tuple[str, bool]]
    learns_end: bool


def encode_documents(
    documents: Iterator[Document], tokenizer: Tokenizer, workers: int
) -> Generator[Encoded, None, None]:
    """Yields the documents as tokens, in order.

    workers: processes that encode; 1: this one does
    """
    if workers == 1:
        for document in documents:
            yield _encode(document, tokenizer)
        return
    with closing(Workers(workers, partial(_encode_batch, tokenizer.name))) as pool:
        try:
            for work in _batches(documents):
                if isinstance(work, Document):
                    while pool.num_pending:
                        yield from pool.result()
                    yield _encode(work, tokenizer)
                else:
                    done = pool.result() if pool.all_busy else ()
                    pool.submit(work)
                    yield from done
            while pool.num_pending:
                yield from pool.result()
        except WorkerKilled:
            raise InputError(
                "a worker process was killed, perhaps because memory ran out; use fewer workers (--workers 1)"
            ) from None


def count_workers(workers: int | None, tokenizer: Tokenizer, sources: Sequence[Source]) -> int:
    """Returns the number of processes that encode: the one asked for, or what CPUs and files call for."""
    if workers is not None:
        if workers < 1:
            raise InputError(f"{workers} workers are too few; give at least 1")
        return workers
    if tokenizer.name == "bytes":  # encoding is faster than sending the text to another process
        return 1
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if any(source.path == STDIN for source in sources):
        return cpus
    return max(1, min(cpus, sum(source.num_bytes for source in sources) // BYTES_PER_WORKER))


def _encode(document: Document, tokenizer: Tokenizer) -> Encoded:
    return Encoded(_encode_parts(document.parts, tokenizer), document.learns_end)


def _encode_parts(parts: Iterable[Part], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, bool]]:
    whole: list[tuple[str, bool]] = []
    for part in parts:
        if type(part.pieces) is tuple and len(part.pieces) == 1 and len(whole) < MOST_PARTS:
            whole.append((part.pieces[0], part.is_learned))
            continue
        yield from _encode_texts(whole, tokenizer)
        whole = []
        for ids in tokenizer.encode_pieces(part.pieces):
            yield ids, part.is_learned
    yield from _encode_texts(whole, tokenizer)


def _encode_texts(texts: list[tuple[str, bool]], tokenizer: Tokenizer) -> list[tuple[np.ndarray, bool]]:
    """Encodes each text by itself; neighbors that are both learned, or both not, then become one array.

    A chat has many short parts, and most of the time would go into handling their arrays.
    """
    return [
        (np.concatenate([tokenizer.encode(text) for text, _ in group]), is_learned)
        for is_learned, group in groupby(texts, key=itemgetter(1))
    ]


def _batches(documents: Iterator[Document]) -> Iterator[list[_Short] | Document]:
    """Yields short documents in batches, long ones one by one."""
    batch: list[_Short] = []
    size = 0
    for document in documents:
        begun, length = _read_ahead(document)
        if batch and size + length > BATCH_CHARS:
            yield batch
            batch, size = [], 0
        if length > LONG_DOCUMENT_CHARS:
            yield replace(document, parts=begun)
        else:
            batch.append(_Short([("".join(part.pieces), part.is_learned) for part in begun], document.learns_end))
            size += length + DOCUMENT_OVERHEAD
    if batch:
        yield batch


def _read_ahead(document: Document) -> tuple[Iterator[Part], int]:
    """Reads a document until its end, or until it is long.

    Returns the parts of the whole document, and the characters read.
    """
    begun: list[Part] = []
    length = 0
    for part in document.parts:
        pieces: list[str] = []
        rest = iter(part.pieces)
        for piece in rest:
            pieces.append(piece)
            length += len(piece)
            if length > LONG_DOCUMENT_CHARS:
                begun.append(part._replace(pieces=chain(pieces, rest)))
                return chain(begun, document.parts), length
        begun.append(part._replace(pieces=pieces))
        length += DOCUMENT_OVERHEAD if len(begun) > 1 else 0
    return iter(begun), length


def _encode_batch(tokenizer: str, batch: list[_Short]) -> list[Encoded]:
    return [Encoded(_encode_texts(parts, get_tokenizer(tokenizer)), end) for parts, end in batch]
