"""Pieces: a store of long documents in, a store of short ones out, each of which starts from the initial state.

A run learns about its initial state only where a document starts. To tune a state on books takes more starts than there
are books.
"""

from array import array
from bisect import bisect_right

import numpy as np

from infctx.data.mixture import Store
from infctx.errors import InputError


class Pieces:
    """A store of the pieces of another store's documents; needs 8 bytes of memory per document.

    Each piece has `piece_tokens` targets; the last one of a document has what is left. The last target of a piece is
    the first input of the next, so every target of the document is there exactly once.
    """

    def __init__(self, store: Store, piece_tokens: int) -> None:
        if piece_tokens < 1:
            raise InputError(f"{store.path}: pieces of {piece_tokens} tokens are too short; give at least 1")
        self.path, self.num_tokens = store.path, store.num_tokens
        self._store, self.piece_tokens = store, piece_tokens
        self.limits = {**store.limits, "document_tokens": piece_tokens}
        self._ends = array("q")  # pieces of documents 0..i
        count = 0
        for document in range(store.num_documents):
            count += max(1, -(-(store.length(document) - 1) // piece_tokens))
            self._ends.append(count)
        self.num_documents = count

    @property
    def fingerprint(self) -> str:
        """Returns the fingerprint of the original store."""
        return self._store.fingerprint

    def length(self, i: int) -> int:
        """Returns the number of tokens in piece i, its last target included."""
        document, begin = self._place(i)
        return min(self.piece_tokens + 1, self._store.length(document) - begin)

    def tokens(self, i: int, begin: int, end: int) -> np.ndarray:
        """Returns tokens begin..end-1 of piece i."""
        document, first = self._place(i)
        return self._store.tokens(document, first + begin, first + end)

    def count_targets(self, i: int, begin: int, end: int) -> int:
        """Returns the number of targets among tokens begin..end-1 of piece i."""
        document, first = self._place(i)
        return self._store.count_targets(document, first + begin, first + end)

    def targets(self, i: int, begin: int, end: int) -> np.ndarray:
        """Returns whether each of tokens begin..end-1 of piece i is a target, bool (end - begin,)."""
        document, first = self._place(i)
        return self._store.targets(document, first + begin, first + end)

    def number(self, i: int) -> int:
        """Returns the document that piece i belongs to: the number in messages."""
        return self._place(i)[0]

    def _place(self, i: int) -> tuple[int, int]:
        """Returns the document of piece i, and the place of the piece's first token in it."""
        document = bisect_right(self._ends, i)
        before = self._ends[document - 1] if document else 0
        return document, (i - before) * self.piece_tokens
