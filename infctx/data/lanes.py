"""Batches: a token store in, windows of lanes out, endlessly, each with the position from which to continue.

A lane is one row of the batch: documents laid end to end, each starting at a multiple of 16 tokens. A window is filled
lane by lane. The next free lane gets the next document of the stream; a document that does not fit in the rest of the
window continues in the same lane in the next one. Lanes are counted over all processes. Each process computes the whole
assignment from the lengths alone and reads tokens only for its lanes, so the same documents come in the same order on
any number of ranks.

A document d_0 .. d_{n-1} (d_{n-1} ends it) gives n - 1 places with input d_i and target d_{i+1}, padded to a multiple
of 16 with input 0 and target -100. Where d_{i+1} is not to be learned, the target is -100 too. A document with nothing
to learn is passed over.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from infctx.conventions import MASKED, START_SPACING
from infctx.data.document_stream import DocumentStream
from infctx.errors import InputError
from infctx.small_texts import quoted

FREE = -1  # in a position: the lane has no document
SETTINGS = {
    "num_lanes": "window.lanes",
    "document_tokens": "data.document_tokens",
    "seed": "run.seed",
    "shuffle": "data.shuffle",
}
"""Key that a position must agree on -> its setting."""
NEW_RUN = "a new run from the weights of this one: another run.folder, and model.weights=THIS_RUN_FOLDER"


class Store(Protocol):
    """What lanes need from a token store."""

    path: Any
    num_documents: int
    num_tokens: int

    @property
    def document_tokens(self) -> int | None: ...

    @property
    def fingerprint(self) -> str: ...

    def length(self, i: int) -> int: ...

    def tokens(self, i: int, begin: int, end: int) -> np.ndarray: ...

    def count_targets(self, i: int, begin: int, end: int) -> int: ...

    def targets(self, i: int, begin: int, end: int) -> np.ndarray: ...

    def number(self, i: int) -> int: ...


@dataclass
class Window:
    """One step's batch for the lanes of one process.

    tokens: inputs, int64 (lanes, T)
    targets: the tokens that follow, int64 (lanes, T), -100 for none
    starts: bool (lanes, T / 16), True where a document begins
    documents: for each lane, the store's numbers of the documents in it
    num_targets: targets that are not -100, over the lanes of ALL processes
    epoch: of the newest document that any lane has begun
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    starts: torch.Tensor
    documents: list[list[int]]
    num_targets: int
    epoch: int


@dataclass
class _Open:
    """A lane's current document: its stream index, number and length, and its first token that is not an input yet."""

    index: int
    document: int
    length: int
    begin: int = 0


@dataclass
class _Part:
    """`count` inputs of a document, from its token `begin` on, at place `place` of a lane; `num_targets` of the tokens
    that follow them are to be learned."""

    document: int
    begin: int
    count: int
    place: int
    num_targets: int


class Lanes:
    """An endless iterator of (Window, position).

    store: the documents
    num_lanes: lanes of all processes together
    window_tokens: T, a multiple of 16
    seed, shuffle: the order of the documents
    vocab_size: ids that the model has; a larger id in the store raises InputError
    lanes: the lanes of this process, None for all
    position: one that came with a window, on any number of processes; the first window is then the one after it
    Raises InputError if the store has no document with a target, if `window_tokens` is not a multiple of 16, and
    if `position` belongs to other documents, lanes or another order.
    """

    # Eight parameters, each from its setting: together they make two runs see the same documents in the same order.
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
            raise InputError(f"a window of {window_tokens} tokens is not a multiple of {START_SPACING}; change it")
        if num_lanes < 1:
            raise InputError(f"{num_lanes} lanes are too few; give at least one")
        self.store = store
        self.num_lanes = num_lanes
        self.window_tokens = window_tokens
        self.vocab_size = vocab_size
        self.lanes = range(num_lanes) if lanes is None else lanes
        assert all(0 <= lane < num_lanes for lane in self.lanes), f"lanes {self.lanes} of {num_lanes}"
        if not any(self._has_targets(i) for i in range(store.num_documents)):
            raise InputError(f"{store.path}: no document has 2 tokens or more to learn from; prepare longer texts")
        self._stream = DocumentStream(store.num_documents, seed, shuffle)
        # A position must agree on these; otherwise, "the next window" means nothing.
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
        parts = [self._fill(lane) for lane in range(self.num_lanes)]
        num_targets = sum(part.num_targets for lane_parts in parts for part in lane_parts)
        window = self._read([parts[lane] for lane in self.lanes], num_targets)
        return window, self._position()

    def _fill(self, lane: int) -> list[_Part]:
        """Gives one lane its documents for this window."""
        parts: list[_Part] = []
        place = 0
        while place < self.window_tokens:
            current = self._open[lane] or self._next_usable()
            left = current.length - 1 - current.begin
            count = min(left, self.window_tokens - place)
            num_targets = self.store.count_targets(current.document, current.begin + 1, current.begin + count + 1)
            parts.append(_Part(current.document, current.begin, count, place, num_targets))
            # The window and all starts are multiples of 16, so the padding of a document always fits.
            place += -(-count // START_SPACING) * START_SPACING
            current.begin += count
            self._open[lane] = current if count < left else None
        return parts

    def _next_usable(self) -> _Open:
        """Returns the next document of the stream that has a target."""
        while True:
            found = self._at(self._next)
            self._next += 1
            if self._has_targets(found.document):
                return found

    def _has_targets(self, document: int) -> bool:
        return self.store.count_targets(document, 1, self.store.length(document)) > 0

    def _at(self, index: int, begin: int = 0) -> _Open:
        document = self._stream.document(index)
        return _Open(index, document, self.store.length(document), begin)

    def _read(self, lanes: list[list[_Part]], num_targets: int) -> Window:
        tokens = np.zeros((len(lanes), self.window_tokens), np.int64)
        targets = np.full_like(tokens, MASKED)
        starts = np.zeros((len(lanes), self.window_tokens // START_SPACING), bool)
        for row, parts in enumerate(lanes):
            for part in parts:
                ids = self._checked_tokens(part)
                tokens[row, part.place : part.place + part.count] = ids[:-1]
                targets[row, part.place : part.place + part.count] = np.where(self._mask_of(part), ids[1:], MASKED)
                starts[row, part.place // START_SPACING] = part.begin == 0
        return Window(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            starts=torch.from_numpy(starts),
            documents=[[self.store.number(part.document) for part in parts] for parts in lanes],
            num_targets=num_targets,
            epoch=self._stream.epoch(self._next - 1),
        )

    def _checked_tokens(self, part: _Part) -> np.ndarray:
        """Returns the inputs of a part and its last target."""
        ids = self.store.tokens(part.document, part.begin, part.begin + part.count + 1)
        if ids.max() >= self.vocab_size:
            place = int(np.argmax(ids >= self.vocab_size))
            document = self.store.number(part.document)
            raise InputError(
                f"{self.store.path}.bin: token {part.begin + place} of document {document} is {ids[place]}, and the "
                f"model's vocabulary has {self.vocab_size} ids; prepare it with the model's tokenizer"
            )
        return ids

    def _mask_of(self, part: _Part) -> np.ndarray:
        """Returns which of the tokens after a part's inputs are to be learned."""
        mask = self.store.targets(part.document, part.begin + 1, part.begin + part.count + 1)
        if np.count_nonzero(mask) != part.num_targets:
            raise InputError(
                f"{self.store.path}.mask: its running counts and its bits disagree in document "
                f"{self.store.number(part.document)}; copy it again, or make it with `infctx prepare`"
            )
        return mask

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
                if name in ("num_documents", "num_tokens"):
                    raise self._other_documents()
                raise InputError(
                    f"{SETTINGS[name]}: {_shown(name, before.get(name))} when the checkpoint was saved, "
                    f"{_shown(name, value)} now; set it back, or begin a new run",
                    NEW_RUN,
                )
        if before["store"] != self._identity["store"]:
            raise self._other_documents()
        self._next = _integers([position.get("next")], 1)[0]
        indices = _integers(position.get("indices"), self.num_lanes)
        begins = _integers(position.get("begins"), self.num_lanes)
        if self._next < 0:
            raise _damaged(f"continues at stream index {self._next}")
        for lane, (index, begin) in enumerate(zip(indices, begins, strict=True)):
            if (index, begin) == (FREE, 0):
                continue
            current = self._at(index, begin) if 0 <= index < self._next else None
            if current is None or not 0 <= begin < current.length - 1 or begin % START_SPACING:
                raise _damaged(f"is at token {begin} of stream index {index}, where no lane can be")
            self._open[lane] = current

    def _other_documents(self) -> InputError:
        return InputError(
            f"data.store: {self.store.path} holds other documents than when the checkpoint was saved; put those back, "
            "or begin a new run",
            NEW_RUN,
        )


def _shown(name: str, value: Any) -> str:
    """Returns a setting as it is written in a configuration."""
    return "null" if value is None else str(bool(value)).lower() if name == "shuffle" else quoted(str(value))


def _integers(values: Any, count: int) -> list[int]:
    if not isinstance(values, list) or len(values) != count or not all(type(value) is int for value in values):
        raise _damaged(f"holds {quoted(repr(values))}, not {count} whole numbers")
    return list(values)


def _damaged(problem: str) -> InputError:
    return InputError(f"the saved position {problem}; the checkpoint is damaged, resume from an earlier one")
