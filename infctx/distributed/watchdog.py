"""Ends all ranks of a run when one dies, and names it in one line.

In: marks from the training thread (step, segment, activity); out, on standard error: a line that names the rank that is
gone, before the process ends, or a warning that names the rank that holds up the others.

Every rank has two daemon threads.  One exchanges beats with the other ranks through a store that rank 0 hosts, and may
hang with it; the other judges the beats and never waits for the first.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from torch.distributed import TCPStore
from tqdm import tqdm

from infctx.distributed.beats import Beat, Exchange, knock, listen
from infctx.environment import LAUNCHER

log = logging.getLogger(__name__)


class Patience(NamedTuple):
    """Times in seconds.

    beat:   between two beats
    silent: without a beat until a rank counts as gone (twice that for its first beat)
    lost:   from the loss of rank 0's store until rank 0 counts as gone
    stall:  without any progress until a warning
    linger: from the verdict to the end of the process, so that the line is printed first
    """

    beat: float = 1.0
    silent: float = 20.0
    lost: float = 5.0
    stall: float = 120.0
    linger: float = 2.0


class Watchdog:
    """Watches all ranks of a run, from a separate thread in each of them.

    rank, world_size: of this process
    store:            from open_watch_store, used by nothing else
    describe_remedy:  returns what the user can do when a rank is gone: a sentence without its period
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: TCPStore,
        describe_remedy: Callable[[], str],
        patience: Patience = Patience(),  # noqa: B008  (a tuple)
    ) -> None:
        beat_seconds, silent_seconds, stall_seconds = patience.beat, patience.silent, patience.stall
        self.rank, self.describe_remedy = rank, describe_remedy
        self.others = [other for other in range(world_size) if other != rank]
        self.beat_seconds, self.linger_seconds = beat_seconds, patience.linger
        self.silent_seconds, self.lost_seconds, self.stall_seconds = silent_seconds, patience.lost, stall_seconds
        self._launcher = os.environ.get(LAUNCHER)
        self._listener = listen(store)
        address = self._listener.getsockname()[:2] if self._listener else None
        mine = Beat(host=socket.gethostname(), address=address)
        self._exchange = Exchange(store, rank, self.others, mine, beat_seconds)
        self._clock = 0.0  # runs only while the judge does: after a suspension the others are not silent
        self._news = dict.fromkeys(self.others, (0, silent_seconds))  # count and time of the last beat
        self._answers = (0, 0.0)  # from the store: count and time of the last one
        self._progress: tuple[object, float] = (None, 0.0)
        self._next_warning = stall_seconds
        self._trouble = ""
        self._wake, self._ended = threading.Event(), threading.Event()
        self._judge = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch; every rank must start within a few seconds of the others."""
        self._exchange.thread.start()
        self._judge.start()

    def mark(self, step: int, segment: int | None, doing: str) -> None:
        """Records where the training thread is; all ranks mark a step in the same order."""
        mine = self._exchange.mine
        marks = mine.marks + 1 if mine.step == step else 1
        self._exchange.update(step=step, segment=segment, doing=doing, marks=marks)

    def leave(self, reason: str | None) -> bool:
        """Leaves the watch; returns whether another rank has reported why the run ends, so that this one need not.

        reason: None if done; for a failure its message, which another rank then prints
        """
        if self._exchange.mine.left:
            return False
        self._exchange.update(left=True, reason=None if reason is None else " ".join(reason.split()))
        self._wake.set()
        deadline, reported = time.monotonic() + self.linger_seconds + 3 * self.beat_seconds, False
        while time.monotonic() < deadline and self._exchange.thread.is_alive():
            self._exchange.wake.set()
            time.sleep(0.05)
            beats = [self._exchange.beats.get(other, Beat()) for other in self.others]
            reported = any(beat.reported for beat in beats)
            if not self._exchange.written.left:
                continue
            if reason is None or all(beat.left for beat in beats):
                break
            if reported and (self.rank or all(beat.left or beat.verdict for beat in beats)):  # all have read the store
                break
        return reported

    def close(self) -> None:
        """Stops watching.  After leave(None) rank 0, which hosts the store, waits until every rank has left."""
        if not self._exchange.mine.left:
            self._ended.set()
        self._wake.set()
        if self._judge.is_alive():
            self._judge.join()
        self._exchange.stop()
        if self._listener:
            self._listener.close()

    def await_verdict(self, seconds: float) -> None:
        """Waits, after a collective raised, for the watchdog to find the rank that is gone and end the process.

        Returns if no rank is gone.
        """
        self._ended.wait(seconds)
        if self._exchange.mine.verdict:
            self._ended.wait()  # never set now: the process is about to end

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.is_set():
            self._wake.wait(self.beat_seconds)
            self._wake.clear()
            now = time.monotonic()
            self._clock += min(now - before, 2 * self.beat_seconds)
            before = now
            try:
                if self._launcher and self._launcher != str(os.getppid()):
                    os._exit(1)  # nobody is left to report to
                if self._is_over():
                    break
                if gone := self._find_gone():
                    self._end(gone)
                self._warn_of_stall()
            except Exception as trouble:  # the watchdog must survive when things go wrong
                if repr(trouble) != self._trouble:
                    self._trouble = repr(trouble)
                    log.exception("rank %d: error in the watchdog, which keeps running", self.rank)
        self._ended.set()

    def _is_over(self) -> bool:
        """Returns whether there is nothing left to watch: this rank has left and others do not need its store."""
        mine = self._exchange.mine
        if mine.left:
            return self.rank > 0 or mine.reason is not None or all(self._is_done(other) for other in self.others)
        return self._is_done(0) and self._is_lost()

    def _is_done(self, rank: int) -> bool:
        beat = self._exchange.beats.get(rank, Beat())
        return beat.left and beat.reason is None

    def _find_gone(self) -> tuple[int, ...]:
        """Returns the ranks that died or failed, the first of them first."""
        answers, beats = self._exchange.answers, self._exchange.beats
        for beat in beats.values():
            if beat.verdict:
                return tuple(beat.verdict)
        failed = tuple(rank for rank in sorted(beats) if beats[rank].reason is not None)
        if failed or self._is_lost():
            return failed or (0,)
        if answers == self._answers[0]:  # no new beats
            return ()
        self._answers = (answers, self._clock)
        for rank, beat in beats.items():
            if beat.count != self._news[rank][0]:
                self._news[rank] = (beat.count, self._clock)
        silence = {rank: self._clock - came for rank, (_, came) in self._news.items() if not self._is_done(rank)}
        limit, missed = self.silent_seconds, 3 * self.beat_seconds
        late = [rank for rank, seconds in silence.items() if seconds > missed]
        if any(silence[rank] > limit for rank in late):
            gone = [rank for rank in late if silence[rank] > limit - missed]
        else:  # a process on this machine that has ended is gone right away
            here = [rank for rank in late if rank in beats and beats[rank].host == self._exchange.mine.host]
            gone = [rank for rank in here if isinstance(knock(beats[rank].address), ConnectionRefusedError)]
        return tuple(sorted(gone, key=lambda rank: (-silence[rank], rank)))

    def _is_lost(self) -> bool:
        """Returns whether rank 0's store is lost: disconnected, or silent for too long."""
        patience = self.lost_seconds if self._exchange.broken else self.silent_seconds
        return self.rank > 0 and self._clock - self._answers[1] > patience

    def _end(self, gone: tuple[int, ...]) -> None:
        """Reports which ranks are gone, if that is this rank's job, and ends the process."""
        last_resort = threading.Timer(3 * self.linger_seconds + 10, os._exit, (1,))  # a terminal may hang
        last_resort.daemon = True
        last_resort.start()
        try:
            self._exchange.update(verdict=gone)
            self._exchange.wake.set()
            if self.rank not in gone and self._is_reporter(gone):
                tqdm.write(f"infctx: {self._obituary(gone)}. {self._ask_remedy()}\n", file=sys.stderr, end="")
                self._exchange.update(reported=True)
            waits = self.rank == 0 or self._is_lost()  # so that others can read the store or knock
            self._exchange.wake.set()
            time.sleep(self.linger_seconds + (3 * self.beat_seconds if waits else 0))
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            os._exit(1)

    def _is_reporter(self, gone: tuple[int, ...]) -> bool:
        """Returns whether this is the lowest rank alive.  Without rank 0's store, only knocking can show that."""
        beats = self._exchange.beats  # a rank 0 that is done still watches
        silent = {*gone, *(rank for rank, beat in beats.items() if beat.left and (rank or beat.reason is not None))}
        lower = [beats.get(rank, Beat()) for rank in range(self.rank) if rank not in silent]
        if not self._is_lost():
            return not lower
        dead_hosts = set()
        for beat in reversed(lower):
            answer = knock(beat.address) if beat.host not in dead_hosts else TimeoutError()
            if answer is None:
                return False
            if not isinstance(answer, ConnectionRefusedError):
                dead_hosts.add(beat.host)
        return True

    def _obituary(self, gone: tuple[int, ...]) -> str:
        first, *more = gone
        beat = self._exchange.beats.get(first)
        if beat is None:
            text = f"rank {first} is gone: it never reported"
        elif beat.reason is not None:
            text = f"rank {first} ({beat.host}) failed {beat.place}: {beat.reason.rstrip('.')}"
        else:
            text = f"rank {first} ({beat.host}) is gone: last seen {beat.place}"
        return text + (f"; with it: rank {', '.join(map(str, more))}" if more else "")

    def _ask_remedy(self) -> str:
        answers = ["The run ends here"]  # printed alone if the run's file system is gone too
        asking = threading.Thread(target=lambda: answers.append(self.describe_remedy()), daemon=True)
        asking.start()
        asking.join(self.linger_seconds / 2)
        return answers[-1]

    def _warn_of_stall(self) -> None:
        """Logs, on the lowest rank, which rank is furthest behind when no rank has progressed for long."""
        beats = self._exchange.beats | {self.rank: self._exchange.mine}
        beats = {rank: beat for rank, beat in sorted(beats.items()) if not beat.left}
        order = {rank: (-1 if beat.step is None else beat.step, beat.marks) for rank, beat in beats.items()}
        if order != self._progress[0]:
            self._progress, self._next_warning = (order, self._clock), self.stall_seconds
        quiet = self._clock - self._progress[1]
        if quiet < self._next_warning or not beats:
            return
        self._next_warning *= 2
        if self.rank == min(beats):
            log.warning("no progress for %s; %s", _duration(quiet), _describe_places(beats, order))


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 119.5 else f"{seconds:.0f} seconds"


def _describe_places(beats: dict[int, Beat], order: dict[int, tuple[int, int]]) -> str:
    behind = [rank for rank in beats if order[rank] == min(order.values())]
    ahead = sorted(beats.keys() - set(behind), key=order.__getitem__)
    last = beats[behind[0]].place
    if not ahead:
        return f"every rank is {last}"
    who = f"ranks {', '.join(map(str, behind))} are" if behind[1:] else f"rank {behind[0]} ({beats[behind[0]].host}) is"
    near, far = (replace(beats[ahead[end]], doing="").place for end in (0, -1))
    others = f"the others are {near}" if near == far else f"the others are {near} to {far.removeprefix('in ')}"
    return f"{who} furthest behind: {last.removeprefix('in ')}; {others}"
