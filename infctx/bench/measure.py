"""Runs the cases of a group in turn, each in a process that stays, and collects what they take.

In: a group of cases, and the trees of infctx to measure; out: the rounds of each case and tree.  In each round, every
process makes one step, so that a machine whose speed drifts is equally slow for all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from infctx.bench.cases import Case

WORKER = Path(__file__).with_name("worker.py")


class Step(NamedTuple):
    """One step of a case.

    seconds:      of the clock
    work_seconds: of the CPU's cores; on a GPU of the clock
    flops:        useful ones: what the exact gradient computes twice does not count
    of_product:   flops per work second, as a share of those of a plain matrix product right before and after it
    peak_bytes:   the most that the process held so far
    """

    seconds: float
    work_seconds: float
    flops: float
    of_product: float
    peak_bytes: int


class Measured(NamedTuple):
    """A case in one tree: its steps, by round; or why there are none."""

    case: Case
    steps: list[Step]
    problem: str = ""


def measure_group(
    group: Sequence[Case], trees: Sequence[Path], rounds: int, deadline: float
) -> list[tuple[Measured, ...]]:
    """Measures the cases, each in every tree; returns their results, those of the trees together.

    rounds:   each makes so much as one even if it takes longer than that
    deadline: no further round starts after this time of `time.monotonic`
    A GPU holds one process at a time, so there the cases follow each other instead of taking turns.
    """
    if group[0].device == "cuda" and len(group) > 1:
        return [pair for case in group for pair in measure_group([case], trees, rounds, deadline)]
    with contextlib.ExitStack() as stack:
        workers = [[stack.enter_context(Worker(case, tree)) for tree in trees] for case in group]
        for number in range(rounds):
            if number and time.monotonic() > deadline:
                break
            for of_case in workers:
                # The first of the two is not always the same one.
                for worker in of_case if number % 2 == 0 else reversed(of_case):
                    worker.step()
        return [tuple(Measured(worker.case, worker.steps, worker.problem) for worker in pair) for pair in workers]


class Worker(contextlib.AbstractContextManager["Worker"]):
    """A process that measures a case in a tree of infctx."""

    def __init__(self, case: Case, tree: Path) -> None:
        self.case, self.steps, self.problem = case, list[Step](), ""
        content = case._asdict() | {"recompute_blocks": case.recomputes_blocks}
        threads = str(case.threads)
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(content)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        if case.device == "cpu" and hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))[: case.threads]
            os.sched_setaffinity(self.process.pid, cores)
        self._read()

    def step(self) -> None:
        """Makes a step, unless the process has given up."""
        if self.problem:
            return
        assert self.process.stdin is not None  # a pipe
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        content = self._read()
        if content:
            seconds, flops = content["work_seconds"], content["flops"]
            share = flops / seconds * content["product_seconds_per_flop"]
            self.steps.append(Step(content["seconds"], seconds, flops, share, content["peak"]))

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None  # a pipe
        content = _last_line(self.process.stdout)
        self.problem = content.get("error", "")
        return {} if self.problem else content


def _last_line(lines: Iterator[str]) -> dict[str, Any]:
    """Reads the next answer; libraries may print lines before it."""
    for line in lines:
        if line.startswith("{"):
            return json.loads(line)
    return {"error": "its process ended; its messages are above"}
