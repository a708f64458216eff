"""Starts `infctx train` on several devices of one machine, one process each, and waits for them to end.

In: the command line; out: its exit code.  The ranks find each other through torchrun's environment variables and watch
each other (distributed/watchdog); `launch` describes the rest.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from infctx.environment import LAUNCHER

if TYPE_CHECKING:
    from infctx.settings.config import Config

POLL_SECONDS = 0.1
UNKILLABLE_SECONDS = 10.0


def launch(
    arguments: Sequence[str],
    count: int,
    *,
    program: Sequence[str] = (sys.executable, "-m", "infctx"),
    soon_seconds: float = 1.0,
    watch_seconds: float = 50.0,
) -> int:
    """Runs `program` with `arguments` in `count` processes; returns the exit code for all of them.

    SIGINT and SIGTERM reach every rank once, as SIGTERM: it finishes its step, saves and exits with 0.  A second signal
    kills.  A rank that exits with another code has reported why, and the others are killed after `soon_seconds`.  If a
    signal killed a rank, the watchdogs of the others name it; they are killed after `watch_seconds`.
    """
    with _signals() as received:
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            environment = _environment(count)
            for rank in range(count):
                ranks.append(_start([*program, *arguments], environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
            ended = _wait(ranks, received, soon_seconds, watch_seconds)
        finally:
            _kill(ranks)
    return _conclude(ended, count, received)


def refuse_before_launch(config: Config) -> None:
    """Makes the plan in a separate process, so that torch and GPU memory are released before the ranks start."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(_refuse, config).result()


def _refuse(config: Config) -> None:
    from infctx.plan.plan import make_plan

    make_plan(config)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A context that collects SIGINT and SIGTERM in a list."""
    received: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(count: int) -> dict[str, str]:
    """Returns the environment variables that all ranks share."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "NODE_RANK": "0"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), LAUNCHER: str(os.getpid())}
    return os.environ | sizes | place


def _start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts a rank in a new session, so that signals from the terminal reach only the launcher."""
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]], received: Sequence[int], soon_seconds: float, watch_seconds: float
) -> dict[int, int]:
    """Returns the exit codes of the ranks that ended by themselves, in that order; the others must be killed."""
    ended: dict[int, int] = {}
    forwarded, deadline = False, float("inf")
    while True:
        if received and not forwarded:
            forwarded = True
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)
        ended |= {number: rank.returncode for number, rank in enumerate(ranks) if rank.poll() is not None}
        now = time.monotonic()
        if any(ended.values()):
            reported = any(code > 0 for code in ended.values())
            deadline = min(deadline, now + (soon_seconds if reported or received else watch_seconds))
        if len(ended) == len(ranks) or now >= deadline or len(received) > 1:
            return ended
        time.sleep(POLL_SECONDS)


def _kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kills the ranks that still run, and the processes that they started."""
    running = [rank for rank in ranks if rank.poll() is None]
    for rank in running:
        with suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
    deadline = time.monotonic() + UNKILLABLE_SECONDS
    for rank in running:
        with suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, deadline - time.monotonic()))


def _conclude(ended: dict[int, int], count: int, received: Sequence[int]) -> int:
    """Returns the exit code of the run; prints why it ended if no rank could."""
    reported = [code for code in ended.values() if code > 0]
    by_signal = {number: -code for number, code in ended.items() if code < 0}
    if not reported and not by_signal and len(ended) == count:
        return 0
    if received and (len(received) > 1 or not reported):
        print("infctx: interrupted", file=sys.stderr)
        return 128 + received[-1]
    if reported:
        return 1 if by_signal else reported[0]
    number, cause = next(iter(by_signal.items()))
    why = " (usually because memory ran out)" if cause == signal.SIGKILL else ""
    print(
        f"infctx: rank {number} was killed by {signal.Signals(cause).name}{why}; run the same command again to resume "
        "from the last complete checkpoint, if there is one",
        file=sys.stderr,
    )
    return 1
