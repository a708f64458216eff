"""The sources of documents of a run: the settings of the data in; opened stores with their shares out."""

from __future__ import annotations

import os
from typing import NamedTuple

from infctx.data.mixture import Mixture, Source
from infctx.data.pieces import Pieces
from infctx.data.token_store import TokenStore
from infctx.data.tokenizer import refuse_other_tokenizer
from infctx.settings.config import Config
from infctx.small_texts import counted


def open_sources(config: Config, vocab_size: int) -> list[Source]:
    """Opens the stores that the run trains on; InputError if one is damaged or made for another vocabulary."""
    data, sources = config.data, []
    for settings in data.all_sources:
        store = Selection(settings.store, data.min_tokens, data.max_tokens)
        refuse_other_tokenizer(str(store.path), store.tokenizer, vocab_size)
        weight = settings.weight or 1.0
        if settings.weight is None and len(data.all_sources) > 1:
            weight = float(max(store.kept().tokens, 1))  # without its mask: what is not learned is still read
        chosen = Pieces(store, data.document_tokens) if data.document_tokens else store
        sources.append(Source(settings.called, chosen, weight))
    return sources


def describe_sources(config: Config, mixture: Mixture) -> list[str]:
    """Returns a line for the shares of the sources, if there are several, and one for the documents left out."""
    data, lines = config.data, []
    if data.sources and len(data.sources) > 1:
        shares = zip(data.sources, mixture.shares, strict=True)
        lines.append("sources: " + ", ".join(f"{100 * share:.3g}% {settings.called}" for settings, share in shares))
    bounds = [(bound, words) for bound, words in ((data.min_tokens, "shorter"), (data.max_tokens, "longer")) if bound]
    if bounds:
        stores = [Selection(settings.store, data.min_tokens, data.max_tokens) for settings in data.all_sources]
        documents, kept = sum(store.num_documents for store in stores), sum(store.kept().documents for store in stores)
        limits = " or ".join(f"{words} than {bound:,} tokens" for bound, words in bounds)
        lines.append(f"left out {documents - kept:,} of {counted(documents, 'document')}: {limits}")
    return lines


class Kept(NamedTuple):
    """Documents of a store that are long enough to learn from and not left out, and the tokens predicted in them."""

    documents: int
    tokens: int


class Selection(TokenStore):
    """A store without its short and its long documents: they stay in it with nothing to learn, so lanes pass them over.

    min_tokens, max_tokens: of the documents that stay, their end included; None for no limit
    """

    def __init__(self, path: str | os.PathLike[str], min_tokens: int | None, max_tokens: int | None) -> None:
        super().__init__(path)
        self._limits = {"min_tokens": min_tokens, "max_tokens": max_tokens}
        self._least, self._most = min_tokens or 0, self.num_tokens if max_tokens is None else max_tokens

    @property
    def limits(self) -> dict[str, int]:
        """Returns the limits that are set, by the name of their setting."""
        return {name: limit for name, limit in self._limits.items() if limit is not None}

    def count_targets(self, i: int, begin: int, end: int) -> int:
        """Returns the number of targets among tokens begin..end-1 of document i; 0 for one that is left out."""
        return super().count_targets(i, begin, end) if self._least <= self.length(i) <= self._most else 0

    def kept(self) -> Kept:
        """Counts what is left, in one pass over the index."""
        documents = tokens = 0
        for lengths in self.lengths():
            lengths = lengths[(lengths >= max(2, self._least)) & (lengths <= self._most)]
            documents += len(lengths)
            tokens += int(lengths.sum()) - len(lengths)
        return Kept(documents, tokens)
