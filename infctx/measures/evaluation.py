"""All measures of models on one store: models in, one after the other; tables for people and JSON out.

    {"store": "data/books/held_out", "tokens": 262144, "segment_tokens": 1024, "models": [
      {"name": "runs/exact", "positions": [...], "total": {...}, "reach": [...], "forgetting": [...], "recall": [...],
       "needle": [...], "states": [...]}]}

tokens: the limit on tokens read for positions, reach and states.  A measure is there only if it was asked for; its
rows have the fields of `Row` in its file; `total` is the row of all positions.  Distances of predictions in `reach` are
total variations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from infctx.data.token_store import TokenStore
from infctx.evaluate.loss_by_position import DocumentLoss, Reading, choose_documents, evaluate_reading
from infctx.files import atomic_file
from infctx.measures import MEASURES, forgetting, needle, positions, reach, recall, states
from infctx.measures.text import StoreText
from infctx.model.rwkv import RWKV


class Options(NamedTuple):
    """What to measure, and how.

    what:          names in MEASURES
    lengths:       distances, gaps and lengths of prompts; None for the usual ones of each measure
    samples:       how many texts, targets, documents or prompts for each number; None for the usual ones
    without_carry: compares the loss of each model with its own if each segment starts from the initial state
    """

    what: Sequence[str] = ("positions",)
    max_tokens: int = 262144
    segment_tokens: int = 1024
    lengths: Sequence[int] | None = None
    samples: int | None = None
    seed: int = 0
    without_carry: bool = False


class Evaluation:
    """The measures of models on a store, asked for before the first model is loaded.

    vocab_size: of the models
    Raises InputError for what the store or the vocabulary does not allow.
    """

    def __init__(self, store: TokenStore, vocab_size: int, options: Options) -> None:
        self.store, self.options = store, options
        self.models: list[dict[str, Any]] = []
        self._first: list[DocumentLoss] | None = None
        self._reading: Reading | None = None
        self._text: StoreText | None = None
        self._lengths: dict[str, list[int]] = {}
        if {"positions", "reach", "states"} & set(options.what):
            self._reading = choose_documents(store, vocab_size, options.segment_tokens, options.max_tokens)
        if {"forgetting", "needle"} & set(options.what):
            self._text = StoreText(store, vocab_size)
        if "forgetting" in options.what:
            self._lengths["forgetting"] = forgetting.distances_of(self.text, options.lengths, options.max_tokens)
        if "recall" in options.what:
            self._lengths["recall"] = recall.gaps_of(vocab_size, options.lengths)
        if "needle" in options.what:
            self._lengths["needle"] = needle.lengths_of(self.text, options.lengths)

    @property
    def reading(self) -> Reading:
        """Returns what positions, reach and states read."""
        assert self._reading is not None
        return self._reading

    @property
    def text(self) -> StoreText:
        """Returns the text that forgetting and needle take theirs from."""
        assert self._text is not None
        return self._text

    @property
    def _chosen(self) -> tuple[int, int | None, int]:
        return self.options.segment_tokens, self.options.samples, self.options.seed

    def measure(self, model: RWKV, name: str) -> Iterator[str]:
        """Measures a model, yields the table of each measure with a sentence about it, and keeps the rows."""
        entry: dict[str, Any] = {"name": name}
        self.models.append(entry)
        for what in (what for what in MEASURES if what in self.options.what):
            measure: Callable[[RWKV, dict[str, Any], str], str] = getattr(self, f"_{what}")
            yield measure(model, entry, f"{name} on {self.store.path}")

    def _positions(self, model: RWKV, entry: dict[str, Any], title: str) -> str:
        documents = evaluate_reading(model, self.reading)
        compared, against = self._first, None
        if self.options.without_carry:
            compared, against = evaluate_reading(model, self.reading, carries=False), "the same model without carry"
        elif compared is not None:
            against = self.models[0]["name"]
        rows = positions.position_rows(documents, self.options.seed, compared)
        entry["positions"], entry["total"] = [row.entry() for row in rows[:-1]], rows[-1].entry()
        self._first = self._first or documents
        return f"{positions.format_positions(rows, title, against)}\n{positions.HOW_TO_READ}"

    def _reach(self, model: RWKV, entry: dict[str, Any], title: str) -> str:
        rows = reach.measure_reach(model, self.reading, self.options.samples, self.options.seed)
        entry["reach"] = [row._asdict() for row in rows]
        return f"{reach.format_reach(rows, title)}\n{reach.HOW_TO_READ}"

    def _forgetting(self, model: RWKV, entry: dict[str, Any], title: str) -> str:
        segment_tokens, samples, seed = self._chosen
        distances = self._lengths["forgetting"]
        rows = forgetting.measure_forgetting(model, self.text, segment_tokens, distances, samples, seed)
        entry["forgetting"] = [row._asdict() for row in rows]
        return f"{forgetting.format_forgetting(rows, title)}\n{forgetting.HOW_TO_READ}"

    def _recall(self, model: RWKV, entry: dict[str, Any], _: str) -> str:
        segment_tokens, samples, seed = self._chosen
        rows = recall.measure_recall(model, segment_tokens, self._lengths["recall"], samples, seed)
        entry["recall"] = [row._asdict() for row in rows]
        return f"{recall.format_recall(rows, entry['name'])}\n{recall.HOW_TO_READ}"

    def _needle(self, model: RWKV, entry: dict[str, Any], title: str) -> str:
        segment_tokens, samples, seed = self._chosen
        rows = needle.measure_needle(model, self.text, segment_tokens, self._lengths["needle"], samples, seed)
        entry["needle"] = [row._asdict() for row in rows]
        return f"{needle.format_needle(rows, title)}\n{needle.HOW_TO_READ}"

    def _states(self, model: RWKV, entry: dict[str, Any], title: str) -> str:
        rows, collapse = states.measure_states(model, self.reading, self.options.samples)
        entry["states"] = [row._asdict() for row in rows]
        return f"{states.format_states(rows, collapse, title)}\n{states.HOW_TO_READ}"

    def write(self, path: Path) -> None:
        """Writes the rows of all models as JSON, completely or not at all."""
        content = {
            "store": str(self.store.path),
            "tokens": self.options.max_tokens,
            "segment_tokens": self.options.segment_tokens,
            "models": self.models,
        }
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
