"""The held-out loss of a model that ranks train, measured by all of them together between two steps.

In: an engine, and what to read of each source.  Out, on every rank, the same bits: each document's loss.  Documents are
dealt to the ranks.  Nothing of the run changes: not the carried state, the gradients or the random generators.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from infctx.distributed.engine import Engine
from infctx.errors import InputError
from infctx.evaluate.loss_by_position import DocumentLoss, Reading, measure_documents
from infctx.model.loss import Segment
from infctx.model.state import State


def evaluate_together(engine: Engine, readings: Mapping[str, Reading]) -> dict[str, list[DocumentLoss]]:
    """Measures the losses of the documents of each source, in their order; every rank must call it.

    Raises on every rank the InputError or OSError that one met.
    """
    device = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(device), torch.no_grad(), engine.model.alone():
        by_rank = engine.ranks.together(_Share(engine, readings).measure)
    found = {name: {number: loss for share in by_rank for number, loss in share[name]} for name in readings}
    return {name: [found[name][number] for number in reading.tokens] for name, reading in readings.items()}


class _Share:
    """This rank's share of the documents."""

    def __init__(self, engine: Engine, readings: Mapping[str, Reading]) -> None:
        self.engine = engine
        mine, self.segments_left = _deal(readings, engine.ranks.rank, engine.ranks.world_size)
        self.readings = {
            name: reading.only(document for source, document in mine if source == name)
            for name, reading in readings.items()
        }

    def measure(self) -> dict[str, list[tuple[int, DocumentLoss]]]:
        """Returns the documents of each source with their losses."""
        shows = self.engine.ranks.is_first
        try:
            found = {
                name: measure_documents(reading, self._run, self.engine.device, self._mark, shows)
                for name, reading in self.readings.items()
            }
        except (InputError, OSError):
            self._run_rest()
            raise
        self._run_rest()
        return found

    def _run(self, tokens: Tensor, targets: Tensor, state: State | None) -> tuple[Tensor, State]:
        self.segments_left -= 1
        losses, state, _ = self.engine.segment_loss(Segment(tokens, targets), state, each_token=True)
        return losses, state

    def _run_rest(self) -> None:
        """Runs as many segments as the other ranks, if each of them gathers the weights from all ranks at once."""
        token = torch.ones((1, 1), dtype=torch.int64, device=self.engine.device)
        while self.segments_left and not self.engine.holds_whole_weights:
            self._run(token, token, None)

    def _mark(self) -> None:
        self.engine.mark("held-out loss")


def _deal(readings: Mapping[str, Reading], rank: int, count: int) -> tuple[list[tuple[str, int]], int]:
    """Deals documents, the longest first, each to the rank with the fewest segments so far.

    Returns the (source, document) of a rank, in order, and the largest number of segments of any rank.
    """
    mine, loads = [], [0] * count
    lengths = [
        (reading.num_segments(document), name, document)
        for name, reading in readings.items()
        for document in reading.tokens
    ]
    for segments, name, document in sorted(lengths, reverse=True):
        least = loads.index(min(loads))
        loads[least] += segments
        if least == rank:
            mine.append((name, document))
    return sorted(mine), max(loads)
