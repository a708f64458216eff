"""Held-out losses on disk: the measurements of a model as JSON, to plot or compare later.

    {"store": "data/python/held_out", "tokens": 262144, "evaluations": [
      {"step": 240, "with_state": false, "buckets": [
        {"begin": 0, "end": 256, "num_tokens": 4096, "nats_per_token": 1.38, "bits_per_byte": 2.02}]}]}

tokens: the limit on tokens read; step: steps of the run so far, 0 before the first, null for a model without a run;
with_state: whether documents started from a learned initial state; bits_per_byte: null if the bytes of a token are
unknown.  Where documents come from several sources, `sources` has the buckets of each by its name.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from infctx.evaluate.loss_by_position import Bucket, total
from infctx.files import atomic_file
from infctx.small_texts import read_json

HELD_OUT = "held_out.json"
"""The record's name in a run's folder."""


class Evaluation(NamedTuple):
    """The measurement at a step, see above."""

    step: int | None
    with_state: bool
    buckets: list[Bucket]
    sources: dict[str, list[Bucket]] = {}  # noqa: RUF012  (never changed)


def held_out_loss(evaluation: Evaluation) -> float:
    """Returns the loss by which evaluations of the same documents are compared, in nats per token."""
    return total(evaluation.buckets).nats_per_token


def of_same_documents(one: Evaluation, other: Evaluation) -> bool:
    """Returns whether two evaluations measured the same documents, as far as their numbers of tokens show."""
    return [_place(bucket) for bucket in one.buckets] == [_place(bucket) for bucket in other.buckets]


def _place(bucket: Bucket) -> tuple[int, int, int]:
    return bucket.begin, bucket.end, bucket.num_tokens


def write_record(path: Path, store: str, tokens: int, evaluations: list[Evaluation]) -> None:
    """Writes the evaluations of one store, or several, reading at most `tokens`; completely or not at all."""
    entries = [_evaluation_entry(evaluation) for evaluation in evaluations]
    content = {"store": store, "tokens": tokens, "evaluations": entries}
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_record(path: Path, store: str, tokens: int) -> list[Evaluation]:
    """Returns earlier evaluations of the same documents; none if the file does not exist or is about others.

    Raises ValueError for a damaged file.
    """
    if not path.is_file():
        return []
    try:
        content = read_json(path)
        if (content["store"], content["tokens"]) != (store, tokens):
            return []
        return [_evaluation(entry) for entry in content["evaluations"] if isinstance(entry["step"], int)]
    except (KeyError, TypeError, AttributeError, OverflowError):
        raise ValueError("no record of held-out losses") from None


def _evaluation_entry(evaluation: Evaluation) -> dict[str, Any]:
    step, with_state, buckets, sources = evaluation
    entry = {"step": step, "with_state": with_state, "buckets": [_entry(bucket) for bucket in buckets]}
    by_source = {name: [_entry(bucket) for bucket in its] for name, its in sources.items()}
    return entry | ({"sources": by_source} if sources else {})


def _evaluation(entry: dict[str, Any]) -> Evaluation:
    sources = {str(name): [_bucket(bucket) for bucket in its] for name, its in entry.get("sources", {}).items()}
    buckets = [_bucket(bucket) for bucket in entry["buckets"]]
    if not buckets:
        raise KeyError("buckets")
    return Evaluation(entry["step"], bool(entry["with_state"]), buckets, sources)


def _entry(bucket: Bucket) -> dict[str, Any]:
    return {
        "begin": bucket.begin,
        "end": bucket.end,
        "num_tokens": bucket.num_tokens,
        "nats_per_token": bucket.nats_per_token,
        "bits_per_byte": bucket.bits_per_byte,
    }


def _bucket(entry: dict[str, Any]) -> Bucket:
    begin, end, num_tokens = (int(entry[name]) for name in ("begin", "end", "num_tokens"))
    nats, bits = float(entry["nats_per_token"]) * num_tokens, entry["bits_per_byte"]
    return Bucket(begin, end, num_tokens, nats, round(nats / math.log(2) / float(bits)) if bits else 0)
