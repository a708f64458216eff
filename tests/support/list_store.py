"""A store of documents in memory, for tests of what reads stores."""

from pathlib import Path

import numpy as np


class ListStore:
    """Documents in memory with the store interface that lanes need; counts the tokens read.

    masked: whether random runs of tokens are no targets
    """

    path = Path("memory/store")

    def __init__(self, lengths, seed=0, masked=False):
        rng = np.random.default_rng(seed)
        self.documents = [np.append(rng.integers(1, 257, max(n - 1, 0)), 0)[:n] for n in lengths]
        self.limits, self.fingerprint = {}, "of no file"
        self.num_documents = len(self.documents)
        self.num_tokens = sum(lengths)
        self.num_read = 0
        flips = [np.cumsum(rng.random(n) < 0.1) % 2 > 0 if masked else np.ones(n, bool) for n in lengths]
        self.masks = [np.append(False, mask[1:])[: len(mask)] for mask in flips]  # the first is never a target

    def number(self, i):
        return i

    def length(self, i):
        return len(self.documents[i])

    def tokens(self, i, begin, end):
        assert 0 <= begin <= end <= len(self.documents[i])
        self.num_read += end - begin
        return self.documents[i][begin:end].astype(np.int64)

    def count_targets(self, i, begin, end):
        return int(self.targets(i, begin, end).sum())

    def targets(self, i, begin, end):
        return self.masks[i][begin:end]
