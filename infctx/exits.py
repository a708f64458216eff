"""Turns a command's failure into a short message on standard error and an exit code."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from collections.abc import Callable

from infctx.environment import rank_number
from infctx.errors import InputError, TrainingFailed

EXIT_INPUT, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130
LATER_RANKS_SECONDS = 2
REMEDIES = {
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "there is a file where a folder should be; choose another place",
    errno.EEXIST: "there is a file where a folder should be; choose another place",
    errno.ENOENT: "choose another place",
    errno.EACCES: "choose a place that you may use",
    errno.EROFS: "choose a place that can be written",
    errno.ENOSPC: "make room, or choose another place",
}
LESS_MEMORY = "use fewer window.segment_tokens or lanes_per_pass, or model.recompute_blocks: true"


def run_command(command: Callable[[], int | None]) -> int:
    """Runs a command; returns its exit code: 0, 2 for a user's mistake, 1 for a run that failed on its own.

    Problems that the user can fix become a short message; any other exception is our bug and keeps its traceback.
    """
    try:
        return command() or 0
    except InputError as error:
        return fail(error, EXIT_INPUT)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        remedy = REMEDIES.get(error.errno or 0)
        return fail(f"{place}{error.strerror or error}{f'; {remedy}' if remedy else ''}", EXIT_INPUT)
    except MemoryError as error:
        return fail(f"out of memory: {error}; {LESS_MEMORY}", EXIT_INPUT)
    except KeyboardInterrupt:
        return fail("interrupted", EXIT_INTERRUPTED)
    except TrainingFailed as error:
        return fail(error, EXIT_FAILED)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            return fail(f"out of memory: {str(error).splitlines()[0]}; {LESS_MEMORY}", EXIT_INPUT)
        raise


def fail(problem: object, code: int) -> int:
    """Prints a problem and returns the code; a rank ends its process instead.

    The message is one line, plus one for each detail of an InputError or TrainingFailed.
    """
    if "INFCTX_DEBUG" in os.environ:
        logging.getLogger("infctx").exception("INFCTX_DEBUG is set, so here is where it came from")
    rank = rank_number()
    if rank:  # rank 0 usually reports the same problem first, and then the launcher ends all ranks
        time.sleep(LATER_RANKS_SECONDS)
    lines = problem.lines if isinstance(problem, InputError | TrainingFailed) else [" ".join(str(problem).split())]
    print("\n".join([f"infctx: {f'rank {rank}: ' if rank else ''}{lines[0]}", *lines[1:]]), file=sys.stderr)
    if "LOCAL_RANK" in os.environ:  # skip cleanup, which would wait for the other ranks
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
