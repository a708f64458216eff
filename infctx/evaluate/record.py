"""Held-out losses on disk: the measurements of a model as JSON, to plot or compare later.

    {"store": "data/python/held_out", "tokens": 262144, "evaluations": [
      {"step": 240, "with_state": false, "buckets": [
        {"begin": 0, "end": 256, "num_tokens": 4096, "nats_per_token": 1.38, "bits_per_byte": 2.02}]}]}

tokens: the limit on tokens read; step: steps of the run so far, 0 before the first, null for a model without a run;
with_state: whether documents started from a learned initial state; bits_per_byte: null if the bytes of a token are
unknown.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from infctx.evaluate.loss_by_position import Bucket
from infctx.files import atomic_file
from infctx.small_texts import read_json

HELD_OUT = "held_out.json"
"""The record's name in a run's folder."""


class Evaluation(NamedTuple):
    """The measurement at a step, see above."""

    step: int | None
    with_state: bool
    buckets: list[Bucket]


def write_record(path: Path, store: Path, tokens: int, evaluations: list[Evaluation]) -> None:
    """Writes the evaluations of one store, reading at most `tokens` of it; completely or not at all."""
    entries = [
        {"step": step, "with_state": with_state, "buckets": [_entry(bucket) for bucket in buckets]}
        for step, with_state, buckets in evaluations
    ]
    content = {"store": str(store), "tokens": tokens, "evaluations": entries}
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_record(path: Path, store: Path, tokens: int) -> list[Evaluation]:
    """Returns earlier evaluations of the same documents; none if the file does not exist or is about others.

    Raises ValueError for a damaged file.
    """
    if not path.is_file():
        return []
    try:
        content = read_json(path)
        if (content["store"], content["tokens"]) != (str(store), tokens):
            return []
        return [
            Evaluation(entry["step"], bool(entry["with_state"]), [_bucket(bucket) for bucket in entry["buckets"]])
            for entry in content["evaluations"]
            if isinstance(entry["step"], int)
        ]
    except (KeyError, TypeError, AttributeError, OverflowError):
        raise ValueError("no record of held-out losses") from None


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
