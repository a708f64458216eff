"""Worker processes with a pipe each: work in, results out in the order of the work.

A worker that is killed closes its pipe, which is an error and never a wait.  `concurrent.futures.ProcessPoolExecutor`
has one pipe for the results of all: a worker killed while it writes leaves half a message there, and the other half is
waited for, for ever; the same holds for one that starts while the pool breaks (both seen with CPython 3.11.7).
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any


class WorkerKilled(RuntimeError):
    """A worker process is gone."""


class Workers:
    """`count` processes that apply `function` to what is submitted; `close` ends them, whatever they are doing.

    function: can be pickled; what it raises is raised by `result`.
    """

    def __init__(self, count: int, function: Callable[[Any], Any]) -> None:
        # A fork of a process with threads (a progress bar's, a BLAS library's) can hang, so workers start afresh.
        context = multiprocessing.get_context("spawn")
        self._idle: deque[Connection] = deque()
        self._busy: deque[Connection] = deque()
        self._processes: list[multiprocessing.process.BaseProcess] = []
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                self._idle.append(ours)
                with theirs, _without_ctrl_c():
                    process = context.Process(target=_work, args=(theirs, function), daemon=True)
                    process.start()
                self._processes.append(process)
        except BaseException:
            self.close()
            raise

    @property
    def num_pending(self) -> int:
        """Results that are still to be taken."""
        return len(self._busy)

    @property
    def all_busy(self) -> bool:
        """Whether a result must be taken before `submit`: a worker has no more than one piece of work at a time, so
        that neither side of a pipe waits for the other to read."""
        return not self._idle

    def submit(self, work: Any) -> None:
        """Gives work to a worker; raises WorkerKilled."""
        connection = self._idle.popleft()
        self._busy.append(connection)
        try:
            connection.send(work)
        except OSError as error:
            raise WorkerKilled from error

    def result(self) -> Any:
        """The oldest result that was not taken; raises WorkerKilled, or what the function raised."""
        connection = self._busy.popleft()
        try:
            result = connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerKilled from error
        self._idle.append(connection)
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in (*self._idle, *self._busy):
            connection.close()


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    """The life of a worker: it ends with its parent, whose side of the pipe is closed then."""
    try:
        while True:
            work = connection.recv()
            try:
                result = function(work)
            except Exception as error:
                result = error
            connection.send(result)
    except (EOFError, OSError):
        return


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal; a worker started in here never sees it, the main process later."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # Its start unblocks SIGINT, whatever was before (CPython 3.10 to 3.13): it has to be up when the mask is set.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
