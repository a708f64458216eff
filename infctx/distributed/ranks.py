"""Ranks: the processes of a run, the lanes and slice of time of each, and how they exchange values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from infctx.errors import InputError
from infctx.recurrence.time_parallel import TimeRanks

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process's rank.  Ranks p, p + 1, ... of one group of `time_ranks` share the time of the same lanes."""

    rank: int = 0
    world_size: int = 1
    time_ranks: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def time_rank(self) -> int:
        """Number of this rank's slice of every segment."""
        return self.rank % self.time_ranks

    @property
    def data_rank(self) -> int:
        """Number of this rank's share of the lanes."""
        return self.rank // self.time_ranks

    @property
    def data_ranks(self) -> int:
        return self.world_size // self.time_ranks

    def lanes(self, num_lanes: int) -> range:
        """Returns this rank's lanes, out of the lanes of all ranks."""
        share = num_lanes // self.data_ranks
        return range(self.data_rank * share, (self.data_rank + 1) * share)

    def join_time(self) -> TimeRanks | None:
        """Returns the group that shares this rank's time, None if it has all of it; every rank must call it."""
        if self.time_ranks == 1:
            return None
        begins = range(0, self.world_size, self.time_ranks)
        groups = [dist.new_group(list(range(begin, begin + self.time_ranks))) for begin in begins]
        return TimeRanks(groups[self.data_rank])

    def gather_numbers(self, numbers: list[float], device: torch.device) -> Tensor:
        """Returns every rank's numbers, (world size, count) in fp64 on the CPU; the same bits on every rank."""
        mine = torch.tensor(numbers, dtype=torch.float64, device=device)
        if self.world_size == 1:
            return mine[None].cpu()
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine)
        return torch.stack(everyone).cpu()

    def gather(self, thing: Any) -> list[Any]:
        """Returns every rank's object; it must pickle."""
        if self.world_size == 1:
            return [thing]
        things: list[Any] = [None] * self.world_size
        dist.all_gather_object(things, thing)
        return things

    def from_first(self, work: Callable[[], Result]) -> Result:
        """Returns the result of work on rank 0; its InputError or OSError is raised on every rank."""
        if self.world_size == 1:
            return work()
        outcome: list[Any] = [_attempt(work) if self.is_first else None]
        dist.broadcast_object_list(outcome)
        return _unwrap(outcome)[0]

    def together(self, work: Callable[[], Result]) -> list[Result]:
        """Returns every rank's result of its work; an InputError or OSError on one is raised on every rank."""
        return _unwrap(self.gather(_attempt(work))) if self.world_size > 1 else [work()]


def refuse_other_settings(ranks: Ranks, settings: str) -> None:
    """Raises InputError on every rank if one of them was started with different settings than rank 0."""
    first, *others = ranks.gather(settings)
    for rank, its in enumerate(others, start=1):
        for mine, different in zip(first.splitlines(), its.splitlines(), strict=False):
            if mine != different:
                raise InputError(
                    f"rank {rank} was started with different settings than rank 0: {different.strip()}, not "
                    f"{mine.strip()}; start every node with the same file and overrides"
                )


def _attempt(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except InputError as error:
        return None, error
    except OSError as error:
        return None, OSError(error.errno, error.strerror, error.filename)


def _unwrap(outcomes: list[tuple[Any, Exception | None]]) -> list[Any]:
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]
