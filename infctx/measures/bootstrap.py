"""Standard errors by bootstrap: sums of each document in, the standard error of the ratio of their totals out.

Documents are drawn anew with replacement, the same ones for everything that is compared, so differences are paired.
"""

from __future__ import annotations

import numpy as np

DRAWS = 1000


def draw_documents(num_documents: int, seed: int) -> np.ndarray:
    """Returns how often each document is in each draw, float64 (DRAWS, num_documents)."""
    random = np.random.default_rng(seed)
    return random.multinomial(num_documents, np.full(num_documents, 1 / num_documents), DRAWS).astype(np.float64)


def standard_error(sums: np.ndarray, counts: np.ndarray, seed: int, other: np.ndarray | None = None) -> float | None:
    """Returns the standard error of total(sums) / total(counts); None with fewer than two documents that count.

    sums, counts: of each document (num_documents,), such as nats and tokens
    other:        the same sums of another model; the error is then that of the difference
    """
    if np.count_nonzero(counts) < 2:
        return None
    drawn = draw_documents(len(counts), seed)
    totals = drawn @ counts
    ratios = (drawn @ (sums if other is None else sums - other))[totals > 0] / totals[totals > 0]
    return float(ratios.std(ddof=1))
