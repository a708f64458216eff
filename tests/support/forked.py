"""Processes that start with torch and infctx already imported, which saves seconds for each.

They are forked from a server that has imported everything and done nothing else.  `Forked` has the part of
`subprocess.Popen` that tests use.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import wait
from multiprocessing.reduction import DupFd

os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported, for all ranks
# read when torch is imported: if a rank dies, only our line is printed
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

IMPORTED = ["infctx.train.loop", "infctx.__main__", "infctx.formats.export", "deepspeed"]


def fork_server():
    """Returns the server, as a context of multiprocessing."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    return multiprocessing.get_context("forkserver")


class Forked:
    """A process that runs function(*arguments), which must be importable, with text pipes and an environment."""

    def __init__(self, function, *arguments, env=None, cwd=None):
        ends = [os.pipe() for _ in range(3)]
        (theirs_in, ours_in), (ours_out, theirs_out), (ours_err, theirs_err) = ends
        fds = [DupFd(fd) for fd in (theirs_in, theirs_out, theirs_err)]
        settings = (fds, dict(os.environ if env is None else env), cwd)
        self.process = fork_server().Process(target=_run, args=(settings, function, arguments))
        self.process.start()
        self.pid = self.process.pid
        self.stdin, self.stdout, self.stderr = os.fdopen(ours_in, "w"), os.fdopen(ours_out), os.fdopen(ours_err)
        # The child gets its ends a moment later; only then may ours be closed, or nobody would ever see end of file.
        if ours_out in wait([ours_out, self.process.sentinel]):  # or it died before
            os.read(ours_out, 1)
        for fd in (theirs_in, theirs_out, theirs_err):
            os.close(fd)

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("forked", timeout)
        return self.process.exitcode

    def send_signal(self, number):
        if self.process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """Returns all of standard output and standard error, once both have ended."""
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        found = {}

        def read(name):
            stream = getattr(self, name)
            found[name] = "" if stream.closed else stream.read()
            stream.close()

        readers = [threading.Thread(target=read, args=(name,), daemon=True) for name in ("stdout", "stderr")]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout)
        if any(reader.is_alive() for reader in readers):
            raise subprocess.TimeoutExpired("forked", timeout)
        self.wait(timeout)
        return found["stdout"], found["stderr"]


def run_infctx(arguments):
    """Runs `python -m infctx`, forked."""
    from infctx.__main__ import main

    sys.argv = ["infctx", *arguments]
    sys.exit(main(arguments))


def run_script(text):
    """Runs a few lines of Python like `python file`."""
    exec(compile(text, "script", "exec"), {"__name__": "__main__"})


def _run(settings, function, arguments):
    fds, environment, cwd = settings
    for place, fd in enumerate(fds):
        mine = fd.detach()
        os.dup2(mine, place)
        os.close(mine)
    os.environ.clear()
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.write(1, b"\n")  # both ends are here
    if "OMP_NUM_THREADS" in environment:
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    function(*arguments)
