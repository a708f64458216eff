"""Batches: a token store in, windows of lanes out, endlessly, each with the position to go on from.

A lane is one row of the batch: documents laid end to end, each at a multiple of 16 tokens. A window is filled lane by
lane; the next free lane takes the next document of the stream, and a document that is longer than what is left of the
window goes on in its lane in the next one. Lanes are counted over all processes: each process works out the whole
assignment from the lengths alone and reads the tokens of its own lanes, so that the same documents come in the same
order on any number of ranks.

A document d_0 .. d_{n-1} (d_{n-1} ends it) gives n - 1 places with input d_i and target d_{i+1}, filled up to a
multiple of 16 with input 0 and target -100.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from infctx.conventions import MASKED, START_SPACING
from infctx.data.document_stream import DocumentStream
from infctx.errors import InputError

FREE = -1  # in a position: the lane has no document


class Store(Protocol):
    """What lanes need of a token store."""

    path: Any
    num_documents: int
    num_tokens: int

    @property
    def document_tokens(self) -> int | None: ...

    @property
    def fingerprint(self) -> str: ...

    def length(self, i: int) -> int: ...

    def tokens(self, i: int, begin: int, end: int) -> np.ndarray: ...

    def number(self, i: int) -> int: ...


@dataclass
class Window:
    """One step's batch for the lanes of one process.

    Attributes:
        tokens: inputs, int64 (lanes, T).
        targets: the tokens that follow, int64 (lanes, T), -100 where there is none.
        starts: bool (lanes, T / 16), True where a document begins.
        documents: for each lane, the store's numbers of the documents in it.
        num_targets: targets that are not -100, over the lanes of ALL processes.
        epoch: epoch of the newest document that any lane has begun.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    starts: torch.Tensor
    documents: list[list[int]]
    num_targets: int
    epoch: int


@dataclass
class _Open:
    """A document that a lane is in: its stream index, number and length, and its first token not yet an input."""

    index: int
    document: int
    length: int
    begin: int = 0


@dataclass
class _Run:
    """`count` targets of a document, from its token `begin`, at place `place` of a lane."""

    document: int
    begin: int
    count: int
    place: int


class Lanes:
    """An endless iterator of (Window, position).

    Args:
        store: the documents.
        num_lanes: lanes of all processes together.
        window_tokens: T, a multiple of 16.
        seed, shuffle: the order of the documents.
        vocab_size: ids the model has; a larger id in the store raises InputError.
        lanes: the lanes of this process, None for all.
        position: a position that came with a window (of any number of processes): the next window is the one after.

    Raises InputError when the store has no document of 2 tokens or more, when `window_tokens` is not a multiple of 16
    and when `position` belongs to other documents, lanes or another order.
    """

    # Eight parameters: what makes two runs see the same documents in the same order, each given apart by its setting.
    def __init__(
        self,
        store: Store,
        *,
        num_lanes: int,
        window_tokens: int,
        seed: int,
        vocab_size: int,
        shuffle: bool = True,
        lanes: Sequence[int] | None = None,
        position: dict[str, Any] | None = None,
    ) -> None:
        if window_tokens < 1 or window_tokens % START_SPACING:
            raise InputError(f"a window of {window_tokens} tokens is not a multiple of {START_SPACING}: change it")
        if num_lanes < 1:
            raise InputError(f"{num_lanes} lanes: at least one is needed")
        self.store = store
        self.num_lanes = num_lanes
        self.window_tokens = window_tokens
        self.vocab_size = vocab_size
        self.lanes = range(num_lanes) if lanes is None else lanes
        assert all(0 <= lane < num_lanes for lane in self.lanes), f"lanes {self.lanes} of {num_lanes}"
        if not any(store.length(i) >= 2 for i in range(store.num_documents)):
            raise InputError(f"{store.path}: no document has 2 tokens or more, nothing to learn: prepare longer texts")
        self._stream = DocumentStream(store.num_documents, seed, shuffle)
        # What a position must agree on: with anything else, "the next window" has no meaning.
        self._identity = {
            "num_lanes": num_lanes,
            "document_tokens": store.document_tokens,
            "num_documents": store.num_documents,
            "num_tokens": store.num_tokens,
            "seed": seed,
            "shuffle": int(shuffle),
            "store": store.fingerprint,
        }
        self._next = 0  # stream index of the next document
        self._open: list[_Open | None] = [None] * num_lanes
        if position is not None:
            self._restore(position)

    def __iter__(self) -> Iterator[tuple[Window, dict[str, Any]]]:
        return self

    def __next__(self) -> tuple[Window, dict[str, Any]]:
        runs = [self._fill(lane) for lane in range(self.num_lanes)]
        num_targets = sum(run.count for lane_runs in runs for run in lane_runs)
        window = self._read([runs[lane] for lane in self.lanes], num_targets)
        return window, self._position()

    def _fill(self, lane: int) -> list[_Run]:
        """Give one lane its documents for this window."""
        runs: list[_Run] = []
        place = 0
        while place < self.window_tokens:
            current = self._open[lane] or self._next_usable()
            left = current.length - 1 - current.begin
            count = min(left, self.window_tokens - place)
            runs.append(_Run(current.document, current.begin, count, place))
            # Window and starts are multiples of 16, so the filled-up rest of a document always fits.
            place += -(-count // START_SPACING) * START_SPACING
            current.begin += count
            self._open[lane] = current if count < left else None
        return runs

    def _next_usable(self) -> _Open:
        """The next document of the stream that has a target."""
        while True:
            found = self._at(self._next)
            self._next += 1
            if found.length >= 2:
                return found

    def _at(self, index: int, begin: int = 0) -> _Open:
        document = self._stream.document(index)
        return _Open(index, document, self.store.length(document), begin)

    def _read(self, lanes: list[list[_Run]], num_targets: int) -> Window:
        tokens = np.zeros((len(lanes), self.window_tokens), np.int64)
        targets = np.full_like(tokens, MASKED)
        starts = np.zeros((len(lanes), self.window_tokens // START_SPACING), bool)
        for row, runs in enumerate(lanes):
            for run in runs:
                ids = self._checked_tokens(run)
                tokens[row, run.place : run.place + run.count] = ids[:-1]
                targets[row, run.place : run.place + run.count] = ids[1:]
                starts[row, run.place // START_SPACING] = run.begin == 0
        return Window(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            starts=torch.from_numpy(starts),
            documents=[[self.store.number(run.document) for run in runs] for runs in lanes],
            num_targets=num_targets,
            epoch=self._stream.epoch(self._next - 1),
        )

    def _checked_tokens(self, run: _Run) -> np.ndarray:
        """The inputs of a run and its last target."""
        ids = self.store.tokens(run.document, run.begin, run.begin + run.count + 1)
        if ids.max() >= self.vocab_size:
            place = int(np.argmax(ids >= self.vocab_size))
            document = self.store.number(run.document)
            raise InputError(
                f"{self.store.path}.bin: token {run.begin + place} of document {document} is {ids[place]}, "
                f"the model's vocabulary has {self.vocab_size} ids: prepare the store with the model's tokenizer"
            )
        return ids

    def _position(self) -> dict[str, Any]:
        return {
            **self._identity,
            "next": self._next,
            "indices": [FREE if current is None else current.index for current in self._open],
            "begins": [0 if current is None else current.begin for current in self._open],
        }

    def _restore(self, position: dict[str, Any]) -> None:
        before = {"store": self._identity["store"]} | position  # 0.1.0 did not keep it
        for name, value in self._identity.items():
            if name != "store" and before.get(name) != value:
                raise InputError(
                    f"the saved position in {self.store.path} was made with {name} = {position.get(name)}, "
                    f"this run has {value}: set it back, or begin a new run"
                )
        if before["store"] != self._identity["store"]:
            raise InputError(
                f"{self.store.path}: holds other documents than when the checkpoint was saved: put those back, or "
                "begin a new run in another run.folder"
            )
        self._next = _integers([position.get("next")], 1)[0]
        indices = _integers(position.get("indices"), self.num_lanes)
        begins = _integers(position.get("begins"), self.num_lanes)
        if self._next < 0:
            raise InputError(f"the saved position goes on at stream index {self._next}: it is damaged")
        for lane, (index, begin) in enumerate(zip(indices, begins, strict=True)):
            if (index, begin) == (FREE, 0):
                continue
            current = self._at(index, begin) if 0 <= index < self._next else None
            if current is None or not 0 <= begin < current.length - 1 or begin % START_SPACING:
                raise InputError(f"the saved position has no place {begin} in stream index {index}: it is damaged")
            self._open[lane] = current


def _integers(values: Any, count: int) -> list[int]:
    if not isinstance(values, list) or len(values) != count or not all(type(value) is int for value in values):
        raise InputError(f"the saved position holds {values!r} for {count} whole numbers: it is damaged")
    return list(values)
