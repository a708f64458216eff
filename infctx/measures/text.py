"""A token store as one text: its documents laid end to end, without their ends, read by place."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from infctx.data.token_store import TokenStore
from infctx.data.tokenizer import refuse_other_tokenizer
from infctx.errors import InputError
from infctx.evaluate.loss_by_position import read_tokens


class StoreText:
    """The text of a store; in memory are only the lengths of its documents.

    num_tokens: tokens of all documents, without their ends
    """

    def __init__(self, store: TokenStore, vocab_size: int) -> None:
        refuse_other_tokenizer(str(store.path), store.tokenizer, vocab_size)
        self.store, self.vocab_size = store, vocab_size
        lengths = [np.maximum(block - 1, 0) for block in store.lengths()]
        self._borders = np.append(0, np.cumsum(np.concatenate(lengths)))
        self.num_tokens = int(self._borders[-1])

    def read(self, begin: int, end: int) -> Tensor:
        """Returns tokens begin..end-1, int64; begin < end <= num_tokens."""
        first, last = np.searchsorted(self._borders, [begin, end - 1], side="right") - 1
        pieces = []
        for document, (its_begin, its_end) in enumerate(pairwise(self._borders[first : last + 2].tolist()), int(first)):
            span = max(begin, its_begin) - its_begin, min(end, its_end) - its_begin
            if span[0] < span[1]:
                pieces.append(read_tokens(self.store, self.vocab_size, document, *span))
        return torch.cat(pieces)

    def begins(self, count: int, num_tokens: int) -> list[int]:
        """Returns the places of `count` stretches of num_tokens, evenly spaced over the text; they may overlap."""
        spare = self.num_tokens - num_tokens
        return [spare * number // max(count - 1, 1) for number in range(count)]

    def refuse_shorter(self, num_tokens: int, what: str) -> None:
        """Raises InputError if the text has fewer tokens; what: what takes them, and a verb."""
        if self.num_tokens < num_tokens:
            problem = f"has {self.num_tokens:,} tokens of text, {what} {num_tokens:,}"
            raise InputError(f"{self.store.path}: {problem}; give a longer store, or shorter --lengths")
