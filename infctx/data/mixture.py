"""Mixtures: sources of documents and their shares in; an endless order of all their documents out.

The next document always comes from the source whose tokens so far are furthest below its share: the one with the
largest share * tokens - its tokens.  So the shares hold within about a document at any time, whatever the lengths.
Within a source, documents come in the same order as without the others, epoch after epoch.  A document with nothing to
learn is passed over.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from infctx.data.document_stream import DocumentStream
from infctx.errors import InputError


class Store(Protocol):
    """What lanes need from a store of documents.

    limits: the settings that leave out documents or cut them, by name
    """

    path: Any
    num_documents: int
    num_tokens: int

    @property
    def limits(self) -> dict[str, int]: ...

    @property
    def fingerprint(self) -> str: ...

    def length(self, i: int) -> int: ...

    def tokens(self, i: int, begin: int, end: int) -> np.ndarray: ...

    def count_targets(self, i: int, begin: int, end: int) -> int: ...

    def targets(self, i: int, begin: int, end: int) -> np.ndarray: ...

    def number(self, i: int) -> int: ...


class Source(NamedTuple):
    """A store, what messages and logs call it, and its weight: any positive number, in proportion to its share."""

    name: str
    store: Store
    weight: float = 1.0


class Drawn(NamedTuple):
    """A document of the order: its source, its place in the stream of that source, its number in the store."""

    source: int
    place: int
    document: int


class Mixture:
    """The order of the documents of all sources, and how far it has come.

    shares: of the tokens, for each source; they add up to 1
    next:   stream index of the next document of each source
    taken:  tokens that each source has given so far, as inputs
    Raises InputError if a source has no document with a target.
    """

    def __init__(self, sources: Sequence[Source], seed: int, shuffle: bool) -> None:
        self.sources = list(sources)
        for source in self.sources:
            if not any(_has_targets(source.store, i) for i in range(source.store.num_documents)):
                raise InputError(_nothing_to_learn(source.store))
        total = sum(source.weight for source in self.sources)
        self.shares = [source.weight / total for source in self.sources]
        self.next = [0] * len(self.sources)
        self.taken = [0] * len(self.sources)
        self._streams = [DocumentStream(source.store.num_documents, seed, shuffle) for source in self.sources]
        ties = DocumentStream(len(self.sources), seed)
        self._among_equals = [ties.document(i) for i in range(len(self.sources))]

    @property
    def epoch(self) -> int:
        """Returns the epoch of the newest document, in the source that has come furthest."""
        return max(stream.epoch(index - 1) for stream, index in zip(self._streams, self.next, strict=True))

    def draw(self) -> Drawn:
        """Returns the next document."""
        so_far = sum(self.taken)

        def missing(i: int) -> tuple[float, int]:
            return self.shares[i] * so_far - self.taken[i], self._among_equals[i]

        source = max(range(len(self.sources)), key=missing)
        store = self.sources[source].store
        while True:
            drawn = self.at(source, self.next[source])
            self.next[source] += 1
            if _has_targets(store, drawn.document):
                break
        self.taken[source] += store.length(drawn.document) - 1
        return drawn

    def at(self, source: int, index: int) -> Drawn:
        """Returns the document at a stream index of a source."""
        return Drawn(source, index, self._streams[source].document(index))


def _has_targets(store: Store, document: int) -> bool:
    return store.count_targets(document, 1, store.length(document)) > 0


def _nothing_to_learn(store: Store) -> str:
    bounds = [name for name in ("min_tokens", "max_tokens") if name in store.limits]
    if bounds:
        settings = " and ".join(f"data.{name} {store.limits[name]:,}" for name in bounds)
        return f"{store.path}: no document with something to learn is left by {settings}; choose others"
    return f"{store.path}: no document has 2 tokens or more to learn from; prepare longer texts"
