"""Long documents cut into documents of at most so many tokens, each of which starts from the initial state.

What a run learns about its initial state it learns from the windows in which a document starts: whoever tunes a state
on books wants more starts than there are books.
"""

from array import array
from bisect import bisect_right

import numpy as np

from infctx.data.lanes import Store
from infctx.errors import InputError


class Pieces:
    """A store of the pieces of another store's documents; takes 8 bytes of memory a document of it.

    Each piece has `piece_tokens` targets, the last of a document what is left; the token that one piece ends with as a
    target begins the next one as an input, so that every target of the document is there once.
    """

    def __init__(self, store: Store, piece_tokens: int) -> None:
        if piece_tokens < 1:
            raise InputError(f"{store.path}: pieces of {piece_tokens} tokens: at least 1 is needed")
        self.path, self.num_tokens = store.path, store.num_tokens
        self._store, self.document_tokens = store, piece_tokens
        self._ends = array("q")  # pieces of documents 0..i
        count = 0
        for document in range(store.num_documents):
            count += max(1, -(-(store.length(document) - 1) // piece_tokens))
            self._ends.append(count)
        self.num_documents = count

    @property
    def fingerprint(self) -> str:
        """That of the store that was cut."""
        return self._store.fingerprint

    def length(self, i: int) -> int:
        """Tokens of piece i, its last target included."""
        document, begin = self._place(i)
        return min(self.document_tokens + 1, self._store.length(document) - begin)

    def tokens(self, i: int, begin: int, end: int) -> np.ndarray:
        """Tokens begin..end-1 of piece i."""
        document, first = self._place(i)
        return self._store.tokens(document, first + begin, first + end)

    def number(self, i: int) -> int:
        """The document that piece i belongs to, as people count them."""
        return self._place(i)[0]

    def _place(self, i: int) -> tuple[int, int]:
        """The document of piece i, and its first token there."""
        document = bisect_right(self._ends, i)
        before = self._ends[document - 1] if document else 0
        return document, (i - before) * self.document_tokens
