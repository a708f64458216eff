"""Early reports: says in a line when the held-out loss rises with position, or rises while the run trains.

In: evaluations with the loss of every document.  Out: a line with what is seen and what to do, only for a difference
that noise does not explain: ALARM standard errors of the mean over documents, and at least LEAST_RISE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from infctx.evaluate.loss_by_position import (
    FIRST_BUCKET_TOKENS,
    Bucket,
    DocumentLoss,
    format_value,
    merge,
    shown_value,
    total,
    unit_of,
)
from infctx.evaluate.record import Evaluation, held_out_loss
from infctx.settings.config import Config

ALARM = 4.0
"""Standard errors, of many samples: noise alone exceeds them once in 30,000 times."""
FEWEST_SAMPLES = 5
"""With fewer, their spread says too little."""
LEAST_RISE = 0.01
"""A rise by less, as a fraction of the loss, is nothing to act on."""
RISES = 3
"""Evaluations in a row that must each be worse than the one before."""


class EarlyReport:
    """Watches the evaluations of a run, from this start on."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.best: tuple[Evaluation, list[DocumentLoss]] | None = None
        self.last, self.rises = math.inf, 0
        self.said_position = self.said_rise = False

    def add(self, evaluation: Evaluation, documents: list[DocumentLoss]) -> list[str]:
        """Returns lines about the newest evaluation: none if all is well, or once it has been reported."""
        by_position, rise = rise_by_position(documents), self._rise(evaluation, documents)
        lines = [by_position] if by_position and not self.said_position else []
        lines += [rise] if rise and not self.said_rise else []
        self.said_position, self.said_rise = bool(by_position), bool(rise)
        return lines

    def _rise(self, evaluation: Evaluation, documents: list[DocumentLoss]) -> str | None:
        loss = held_out_loss(evaluation)
        self.rises = self.rises + 1 if loss > self.last else 0
        self.last = loss
        if self.best is None or loss < held_out_loss(self.best[0]):
            self.best = evaluation, documents
            return None
        best, its_documents = self.best
        small = loss < (1 + LEAST_RISE) * held_out_loss(best)
        if self.rises < RISES or small or not _surely_worse(documents, its_documents):
            return None
        kept = f"{self.config.run.checkpoints}/best has the best" if self.config.run.keep_best else "stop earlier"
        return (
            f"held-out loss: has risen {self.rises} times in a row, from {format_value(total(best.buckets))} at step "
            f"{best.step} to {format_value(total(evaluation.buckets))} {unit_of(total(best.buckets))}: the model "
            f"memorizes its documents; {kept}, or train on more documents, with a lower optimizer.peak_lr"
        )


def rise_by_position(documents: Sequence[DocumentLoss]) -> str | None:
    """Returns a line if later positions of the same documents have a larger loss than earlier ones, else None.

    The first bucket is left out: many documents begin with what is easier than the rest.
    """
    longest = max((len(document.buckets) for document in documents), default=0)
    for number in range(2, longest):
        reach = [document.buckets for document in documents if _reaches(document, number)]
        rises = [shown_value(buckets[number]) - shown_value(buckets[number - 1]) for buckets in reach]
        earlier, later = (merge([[buckets[place]] for buckets in reach]) for place in (number - 1, number))
        if not _is_sure(rises, [1.0] * len(rises)):
            continue
        if sum(rises) < LEAST_RISE * sum(shown_value(buckets[number - 1]) for buckets in reach):
            continue
        return (
            f"held-out loss by position: rises from {format_value(earlier[0])} at {_range(earlier[0])} to "
            f"{format_value(later[0])} {unit_of(later[0])} at {_range(later[0])} in the same {len(reach)} documents: "
            "the model loses track of long documents; train on documents this long, with a window.window_tokens of "
            f"{later[0].end:,} or more, or with a lower optimizer.peak_lr"
        )
    return None


def _reaches(document: DocumentLoss, number: int) -> bool:
    """Returns whether a document has enough targets in a bucket, and in the one before, for a loss to say something."""
    found = document.buckets[number - 1 : number + 1]
    return len(found) == 2 and all(bucket.num_tokens >= FIRST_BUCKET_TOKENS for bucket in found)


def _range(bucket: Bucket) -> str:
    return f"{bucket.begin:,} - {bucket.end - 1:,}"


def _surely_worse(now: Sequence[DocumentLoss], best: Sequence[DocumentLoss]) -> bool:
    """Returns whether the same documents are worse now; where they are few, their segments are the samples."""
    both = [(one, other) for one, other in zip(now, best, strict=True)]
    rises = [sum(nats for _, nats in one.pieces) - sum(nats for _, nats in other.pieces) for one, other in both]
    weights = [float(sum(count for count, _ in one.pieces)) for one, _ in both]
    if _effective(weights) < FEWEST_SAMPLES:
        pairs = [pair for one, other in both for pair in zip(one.pieces, other.pieces, strict=True)]
        rises, weights = [one[1] - other[1] for one, other in pairs], [float(one[0]) for one, _ in pairs]
    return _is_sure(rises, weights)


def _is_sure(sums: Sequence[float], weights: Sequence[float]) -> bool:
    """Returns whether the mean of samples, sum(sums) / sum(weights), is positive beyond noise.

    Its standard error is that of a ratio: from how far each sample is from the mean.
    """
    samples = _effective(weights)
    if samples < FEWEST_SAMPLES:
        return False
    weight = sum(weights)
    mean = sum(sums) / weight
    spread = sum((one - mean * its) ** 2 for one, its in zip(sums, weights, strict=True))
    error = math.sqrt(spread * samples / (samples - 1)) / weight
    return mean > _alarm(samples) * error


def _effective(weights: Sequence[float]) -> float:
    """Returns the number of samples of equal weight that would say as much."""
    squares = sum(weight**2 for weight in weights)
    return sum(weights) ** 2 / squares if squares else 0.0


def _alarm(samples: float) -> float:
    """Returns the standard errors to exceed: Student's quantile that is as rare as ALARM in a normal distribution.

    Its expansion in 1 / (degrees of freedom), Abramowitz and Stegun 26.7.5.
    """
    z, free = ALARM, samples - 1
    terms = [
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    ]
    return sum(term / free**power for power, term in enumerate(terms))
