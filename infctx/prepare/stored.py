"""Stores as inputs: a token store in; its documents out, as tokens for the same tokenizer or as text for another."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import groupby, islice, pairwise

import numpy as np

from infctx.conventions import END_OF_DOCUMENT
from infctx.data.token_store import TokenStore
from infctx.data.tokenizer import Tokenizer, get_tokenizer
from infctx.documents.document import Document, Part, Reading, Source
from infctx.documents.read import ReadLog
from infctx.errors import InputError
from infctx.prepare.encode import Encoded, encode_documents

READ_TOKENS = 1 << 20
LATER_BYTES = bytes(range(0x80, 0xC0))  # of a character, after its first
MOST_LATER_BYTES = 3


def store_as_tokens(
    source: Source, reading: Reading, tokenizer: Tokenizer, workers: int, log: ReadLog
) -> Generator[Encoded, None, None]:
    """Yields the documents of a store as tokens of `tokenizer`, with their targets.

    Ids of the same tokenizer are copied; those of another one become text and then tokens again.
    """
    store = TokenStore(source.path)
    name = store.tokenizer or reading.from_tokenizer
    if name is None:
        raise InputError(f"{store.path}: no store.json here names its tokenizer; add --from-tokenizer world or bytes")
    made_with = get_tokenizer(name)
    numbers = islice(_good_documents(store, made_with, name != tokenizer.name, reading, log), reading.limit)
    if name == tokenizer.name:
        for i in numbers:
            yield stored_document(store, i)
    else:
        documents = (_document_as_text(store, i, made_with) for i in numbers)
        yield from encode_documents(documents, tokenizer, workers)


def stored_document(store: TokenStore, i: int) -> Encoded:
    """Returns a document of a store as it went in."""
    end, learns_end = end_of(store, i)
    return Encoded(stored_parts(store, i, 0, end), learns_end)


def stored_parts(store: TokenStore, i: int, begin: int, end: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Yields tokens begin..end-1 of a document, and whether a model learns to predict them."""
    for first in range(begin, end, READ_TOKENS):
        ids = store.tokens(i, first, min(first + READ_TOKENS, end))
        targets = store.targets(i, first, first + len(ids))
        if first == 0 and len(ids) > 1:
            targets[0] = targets[1]  # nothing comes before the first token: only its neighbor shows what it is part of
        borders = [0, *(np.flatnonzero(np.diff(targets)) + 1).tolist(), len(ids)]
        yield from ((ids[a:b], bool(targets[a])) for a, b in pairwise(borders))


def end_of(store: TokenStore, i: int) -> tuple[int, bool]:
    """Returns the tokens of a document without its end, and whether the end is learned."""
    length = store.length(i)
    if not length or store.tokens(i, length - 1, length)[0] != END_OF_DOCUMENT:  # made by another program
        return length, True
    return length - 1, bool(store.targets(i, length - 1, length)[0])


def _good_documents(
    store: TokenStore, made_with: Tokenizer, as_text: bool, reading: Reading, log: ReadLog
) -> Iterator[int]:
    """Yields the numbers of the documents that can be read; raises InputError for the others, or leaves them out."""
    for i in range(store.num_documents):
        try:
            _check_ids(store, i, made_with)
            if as_text and reading.skip_bad:
                for part in _document_as_text(store, i, made_with).parts:
                    for _ in part.pieces:
                        pass
        except InputError as error:
            if not reading.skip_bad:
                raise
            log.leave_out(error)
        else:
            log.count(str(store.path), "token store", made_with.name)
            yield i
        log.on_bytes(store.bin_path.stat().st_size * store.length(i) // store.num_tokens)


def _check_ids(store: TokenStore, i: int, made_with: Tokenizer) -> None:
    end, _ = end_of(store, i)
    for begin in range(0, end, READ_TOKENS):
        ids = store.tokens(i, begin, min(begin + READ_TOKENS, end))
        wrong = (ids >= made_with.vocab_size) | (made_with.byte_lengths[np.minimum(ids, made_with.vocab_size - 1)] == 0)
        if wrong.any():
            place = int(np.argmax(wrong))
            if ids[place] == END_OF_DOCUMENT:
                raise InputError(
                    f"{store.path}: document {i}: token {begin + place} is 0, which ends a document, and more tokens "
                    "follow; write each document as one of the store, or add --skip-bad"
                )
            raise InputError(
                f"{store.path}: document {i}: token {begin + place} has id {ids[place]}, which the tokenizer "
                f"{made_with.name} uses in no text; give the one that made it with --from-tokenizer"
            )


def _document_as_text(store: TokenStore, i: int, made_with: Tokenizer) -> Document:
    end, learns_end = end_of(store, i)
    place = f"{store.path}: document {i}"
    data = ((made_with.decode(ids), learned) for ids, learned in stored_parts(store, i, 0, end))
    runs = groupby(_whole_characters(data), key=lambda piece: piece[1])
    return Document(place, (Part(_texts(pieces, place), learned) for learned, pieces in runs), learns_end)


def _whole_characters(data: Iterator[tuple[bytes, bool]]) -> Iterator[tuple[bytes, bool]]:
    """Moves the rest of a character, where a token ends inside of one, to the piece in which it begins."""
    held, held_flag = b"", False
    for piece, flag in data:
        rest = len(piece) - len(piece[:MOST_LATER_BYTES].lstrip(LATER_BYTES) + piece[MOST_LATER_BYTES:]) if held else 0
        held += piece[:rest]
        if rest < len(piece):
            if held:
                yield held, held_flag
            held, held_flag = piece[rest:], flag
    if held:
        yield held, held_flag


def _texts(pieces: Iterator[tuple[bytes, bool]], place: str) -> Iterator[str]:
    for piece, _ in pieces:
        try:
            yield piece.decode()
        except UnicodeDecodeError:
            raise InputError(
                f"{place}: its tokens are no text in UTF-8; prepare the texts it was made of, or add --skip-bad"
            ) from None
