"""Batches: sources of documents in, windows of lanes out, endlessly, each with the position from which to continue.

A lane is one row of the batch: documents laid end to end, each starting at a multiple of 16 tokens. A window is filled
lane by lane. The next free lane gets the next document of the order (data/mixture); a document that does not fit in the
rest of the window continues in the same lane in the next one. Lanes are counted over all processes. Each process
computes the whole assignment from the lengths alone and reads tokens only for its lanes, so the same documents come in
the same order on any number of ranks.

A document d_0 .. d_{n-1} (d_{n-1} ends it) gives n - 1 places with input d_i and target d_{i+1}, padded to a multiple
of 16 with input 0 and target -100. Where d_{i+1} is not to be learned, the target is -100 too.

A curriculum (data/curriculum) cuts long documents: what is left comes next in the same lane, as another
document. The last target before a cut is the first input after it, so every target is still there exactly once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from infctx.conventions import MASKED, START_SPACING
from infctx.data.curriculum import Curriculum
from infctx.data.mixture import Drawn, Mixture, Source
from infctx.data.position import damaged, read_position, whole_numbers
from infctx.errors import InputError

FREE = NO_CUT = -1  # in a position: the lane has no document, or one that is not cut


@dataclass
class Window:
    """One step's batch for the lanes of one process.

    tokens: inputs, int64 (lanes, T)
    targets: the tokens that follow, int64 (lanes, T), -100 for none
    starts: bool (lanes, T / 16), True where a document begins
    sources: the number of each token's source, int64 (lanes, T); None if there is only one
    documents: for each lane, what messages call the documents in it: their numbers, after the source's name if there
               are several
    num_targets: targets that are not -100, over the lanes of ALL processes
    source_targets: the same of each source
    epoch: of the newest document that any lane has begun, in the source that has come furthest
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    starts: torch.Tensor
    sources: torch.Tensor | None
    documents: list[list[str]]
    num_targets: int
    source_targets: list[int]
    epoch: int


@dataclass
class _Open:
    """A lane's current document: where it comes from, its length, its first token that is not an input yet, and the
    one at which the curriculum cuts it next."""

    drawn: Drawn
    length: int
    begin: int = 0
    cut: int | None = None


@dataclass
class _Part:
    """`count` inputs of a document, from its token `begin` on, at place `place` of a lane; `num_targets` of the tokens
    that follow them are to be learned; `starts` where it does not continue from the state before it."""

    source: int
    document: int
    begin: int
    count: int
    place: int
    num_targets: int
    starts: bool


class Lanes:
    """An endless iterator of (Window, position).

    sources: the documents, and their shares
    num_lanes: lanes of all processes together
    window_tokens: T, a multiple of 16
    seed, shuffle: the order of the documents
    vocab_size: ids that the model has; a larger id in a store raises InputError
    lanes: the lanes of this process, None for all
    curriculum: where to cut documents in the first windows
    position: one that came with a window, on any number of processes; the first window is then the one after it
    Raises InputError if a source has no document with a target, if `window_tokens` is not a multiple of 16, and
    if `position` belongs to other documents, lanes or another order.
    """

    # Nine parameters, each from its setting: together they make two runs see the same documents in the same order.
    def __init__(
        self,
        sources: Sequence[Source],
        *,
        num_lanes: int,
        window_tokens: int,
        seed: int,
        vocab_size: int,
        shuffle: bool = True,
        lanes: Sequence[int] | None = None,
        curriculum: Curriculum | None = None,
        position: dict[str, Any] | None = None,
    ) -> None:
        if window_tokens < 1 or window_tokens % START_SPACING:
            raise InputError(f"a window of {window_tokens} tokens is not a multiple of {START_SPACING}; change it")
        if num_lanes < 1:
            raise InputError(f"{num_lanes} lanes are too few; give at least one")
        self.num_lanes = num_lanes
        self.window_tokens = window_tokens
        self.vocab_size = vocab_size
        self.curriculum = curriculum
        self.lanes = range(num_lanes) if lanes is None else lanes
        assert all(0 <= lane < num_lanes for lane in self.lanes), f"lanes {self.lanes} of {num_lanes}"
        self.mixture = Mixture(sources, seed, shuffle)
        self._stores = [source.store for source in sources]
        limits = self._stores[0].limits  # the same for all: they are settings
        # A position must agree on these; otherwise, "the next window" means nothing.
        self._identity = {
            "num_lanes": num_lanes,
            **{name: limits.get(name) for name in ("document_tokens", "min_tokens", "max_tokens")},
            "seed": seed,
            "shuffle": int(shuffle),
            "stores": [store.fingerprint for store in self._stores],
            "num_documents": [store.num_documents for store in self._stores],
            "num_tokens": [store.num_tokens for store in self._stores],
            "shares": [f"{share:.10g}" for share in self.mixture.shares],
        }
        self._num_windows = 0
        self._open: list[_Open | None] = [None] * num_lanes
        if position is not None:
            self._restore(position)

    def __iter__(self) -> Iterator[tuple[Window, dict[str, Any]]]:
        return self

    def __next__(self) -> tuple[Window, dict[str, Any]]:
        limit = self.curriculum.limit(self._num_windows) if self.curriculum else None
        parts = [self._fill(lane, limit) for lane in range(self.num_lanes)]
        self._num_windows += 1
        source_targets = [0] * len(self._stores)
        for part in (part for lane_parts in parts for part in lane_parts):
            source_targets[part.source] += part.num_targets
        window = self._read([parts[lane] for lane in self.lanes], source_targets)
        return window, self._position()

    def _fill(self, lane: int, limit: int | None) -> list[_Part]:
        """Gives one lane its documents for this window; limit: where to cut those that start in it."""
        parts: list[_Part] = []
        place = 0
        while place < self.window_tokens:
            current = self._open[lane] or self._opened(self.mixture.draw())
            starts = current.begin in (0, current.cut)
            if starts:
                cut = current.begin + limit if limit else current.length
                current.cut = cut if cut < current.length - 1 else None
            left = (current.cut or current.length - 1) - current.begin
            count = min(left, self.window_tokens - place)
            source, _, document = current.drawn
            targets = self._stores[source].count_targets(document, current.begin + 1, current.begin + count + 1)
            parts.append(_Part(source, document, current.begin, count, place, targets, starts))
            # The window, all starts and cuts are multiples of 16, so the padding of a document always fits.
            place += -(-count // START_SPACING) * START_SPACING
            current.begin += count
            self._open[lane] = current if current.begin < current.length - 1 else None
        return parts

    def _opened(self, drawn: Drawn) -> _Open:
        return _Open(drawn, self._stores[drawn.source].length(drawn.document))

    def _read(self, lanes: list[list[_Part]], source_targets: list[int]) -> Window:
        tokens = np.zeros((len(lanes), self.window_tokens), np.int64)
        targets = np.full_like(tokens, MASKED)
        sources = np.zeros_like(tokens) if len(self._stores) > 1 else None
        starts = np.zeros((len(lanes), self.window_tokens // START_SPACING), bool)
        for row, parts in enumerate(lanes):
            for part in parts:
                ids = self._checked_tokens(part)
                here = slice(part.place, part.place + part.count)
                tokens[row, here] = ids[:-1]
                targets[row, here] = np.where(self._mask_of(part), ids[1:], MASKED)
                starts[row, part.place // START_SPACING] = part.starts
                if sources is not None:
                    sources[row, here] = part.source
        return Window(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            starts=torch.from_numpy(starts),
            sources=None if sources is None else torch.from_numpy(sources),
            documents=[[self._name(part) for part in parts] for parts in lanes],
            num_targets=sum(source_targets),
            source_targets=source_targets,
            epoch=self.mixture.epoch,
        )

    def _name(self, part: _Part) -> str:
        number = str(self._stores[part.source].number(part.document))
        return number if len(self._stores) == 1 else f"{self.mixture.sources[part.source].name} {number}"

    def _checked_tokens(self, part: _Part) -> np.ndarray:
        """Returns the inputs of a part and its last target."""
        store = self._stores[part.source]
        ids = store.tokens(part.document, part.begin, part.begin + part.count + 1)
        if ids.max() >= self.vocab_size:
            place = int(np.argmax(ids >= self.vocab_size))
            raise InputError(
                f"{store.path}.bin: token {part.begin + place} of document {store.number(part.document)} is "
                f"{ids[place]}, and the model's vocabulary has {self.vocab_size} ids; prepare it with the model's "
                "tokenizer"
            )
        return ids

    def _mask_of(self, part: _Part) -> np.ndarray:
        """Returns which of the tokens after a part's inputs are to be learned."""
        store = self._stores[part.source]
        mask = store.targets(part.document, part.begin + 1, part.begin + part.count + 1)
        if np.count_nonzero(mask) != part.num_targets:
            raise InputError(
                f"{store.path}.mask: its running counts and its bits disagree in document "
                f"{store.number(part.document)}; copy it again, or make it with `infctx prepare`"
            )
        return mask

    def _position(self) -> dict[str, Any]:
        lanes = [current or _Open(Drawn(0, FREE, FREE), 0) for current in self._open]
        return {
            **self._identity,
            "windows": [self._num_windows],
            "next": list(self.mixture.next),
            "taken": list(self.mixture.taken),
            "sources": [lane.drawn.source for lane in lanes],
            "indices": [lane.drawn.place for lane in lanes],
            "begins": [lane.begin for lane in lanes],
            "cuts": [NO_CUT if lane.cut is None else lane.cut for lane in lanes],
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        position = read_position(saved, self._identity, [store.path for store in self._stores])
        (self._num_windows,) = whole_numbers(position, "windows", 1)
        self.mixture.next, self.mixture.taken = (
            whole_numbers(position, name, len(self._stores)) for name in ("next", "taken")
        )
        if min([self._num_windows, *self.mixture.next, *self.mixture.taken]) < 0:
            raise damaged(f"continues at stream index {self.mixture.next}, after {self.mixture.taken} tokens")
        names = ("sources", "indices", "begins", "cuts")
        lanes = zip(*(whole_numbers(position, name, self.num_lanes) for name in names), strict=True)
        for lane, (source, index, begin, cut) in enumerate(lanes):
            if (index, begin) != (FREE, 0):
                self._open[lane] = self._restored(source, index, begin, None if cut == NO_CUT else cut)

    def _restored(self, source: int, index: int, begin: int, cut: int | None) -> _Open:
        if 0 <= source < len(self._stores) and 0 <= index < self.mixture.next[source]:
            current = self._opened(self.mixture.at(source, index))
            current.begin, current.cut = begin, cut
            inside = 0 <= begin < current.length - 1 and (cut is None or begin <= cut < current.length - 1)
            if inside and not begin % START_SPACING and not (cut or 0) % START_SPACING:
                return current
        raise damaged(f"is at token {begin} of stream index {index}, where no lane can be")
