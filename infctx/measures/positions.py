"""Loss by position with standard errors: losses of documents in; rows by bucket and a table out.

The losses are those of evaluate/loss_by_position.  Two models are compared on the same documents and tokens, so the
error of their difference is paired: what makes a document hard for both cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from infctx.evaluate.loss_by_position import Bucket, DocumentLoss, format_place, merge, total
from infctx.measures.bootstrap import standard_error

HOW_TO_READ = "a loss that falls with position uses what came before; +- is a standard error over documents"


class Row(NamedTuple):
    """The loss of the targets begin..end-1 of the documents; begin = end = 0 for all of them.

    standard_error: of nats_per_token; None with one document
    difference:     nats per token less those of what it is compared with; None if there is nothing
    """

    begin: int
    end: int
    num_tokens: int
    nats_per_token: float
    bits_per_byte: float | None
    standard_error: float | None
    difference: float | None = None
    difference_error: float | None = None

    def entry(self) -> dict[str, Any]:
        """Returns the row for JSON: without a difference if nothing is compared."""
        names = self._fields if self.difference is not None else self._fields[:-2]
        return {name: getattr(self, name) for name in names}


def position_rows(
    documents: Sequence[DocumentLoss], seed: int, compared: Sequence[DocumentLoss] | None = None
) -> list[Row]:
    """Returns a row for each bucket with targets, and one for all of them.

    compared: the losses of the same documents, of another model or the same one without carry
    """
    buckets = merge([document.buckets for document in documents])
    rows = []
    for bucket in [*buckets, total(buckets)]:
        nats, counts = _by_document(documents, bucket)
        row = Row(*_values(bucket), standard_error(nats, counts, seed))
        if compared is not None:
            others = _by_document(compared, bucket)[0]
            error = standard_error(nats, counts, seed, others)
            row = row._replace(difference=float((nats - others).sum() / counts.sum()), difference_error=error)
        rows.append(row)
    return rows


def _values(bucket: Bucket) -> tuple[int, int, int, float, float | None]:
    return bucket.begin, bucket.end, bucket.num_tokens, bucket.nats_per_token, bucket.bits_per_byte


def _by_document(documents: Sequence[DocumentLoss], wanted: Bucket) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nats and the targets of each document in a bucket, or in all for begin = end."""
    every = wanted.begin == wanted.end
    parts = [[bucket for bucket in its.buckets if every or bucket.begin == wanted.begin] for its in documents]
    nats = np.array([sum(bucket.nats for bucket in part) for part in parts])
    return nats, np.array([sum(bucket.num_tokens for bucket in part) for part in parts], np.float64)


def format_positions(rows: Sequence[Row], title: str, against: str | None) -> str:
    """Formats the rows as a table; against: what the differences are to, None if there are none."""
    heads = ["position", "tokens", "nats/token", "+-", "bits/byte", *(["difference", "+-"] if against else [])]
    lines = [f"held-out loss by position in {title}", _line(*heads)]
    for row in rows:
        bits = "-" if row.bits_per_byte is None else f"{row.bits_per_byte:.3f}"
        place = format_place(Bucket(row.begin, row.end))
        cells = [place, f"{row.num_tokens:,}", f"{row.nats_per_token:.4f}", _error(row.standard_error), bits]
        if against:
            cells += [f"{row.difference:+.4f}", _error(row.difference_error)]
        lines.append(_line(*cells))
    return "\n".join([*lines, *([f"difference: nats per token less those of {against}"] if against else [])])


def _line(place: str, *cells: str) -> str:
    widths = (10, 12, 9, 11, 12, 9)
    return f"{place:>16} " + " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False))


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
