"""Worker processes with a pipe each: work in, results out in the order of the work.

When a worker is killed, its pipe closes, which is an error and never a wait. `concurrent.futures.ProcessPoolExecutor`
has a single pipe for all results: a worker killed while it writes leaves half a message there, and the pool waits for
the other half for ever. So does one that starts while the pool breaks (both seen with CPython 3.11.7).
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
    """`count` processes that apply `function` to the work submitted; `close` ends them, whatever they are doing.

    function: one that can be pickled; what it raises is raised by `result`
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
        """Returns the number of results not taken yet."""
        return len(self._busy)

    @property
    def all_busy(self) -> bool:
        """Returns whether a result must be taken before the next `submit`. A worker has at most one job at a time, so
        that the two sides of a pipe never wait for each other to read."""
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
        """Returns the oldest result not taken yet; raises WorkerKilled, or the function's own error."""
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
    """Runs a worker. It ends with its parent, which closes the other side of the pipe."""
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
    """Ctrl-C reaches every process of a terminal; a worker started here never sees it, the main process does later."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # Its start unblocks SIGINT, whatever the mask was (CPython 3.10 to 3.13), so it must be running when that is set.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
