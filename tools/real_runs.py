"""Real runs for tools that compare settings: an infctx command in this process, which saves the start of another."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from infctx.__main__ import main
from infctx.files import atomic_file
from infctx.report.starts import commit_of

ROOT = Path(__file__).parents[1]

Wanted = TypeVar("Wanted")
Result = TypeVar("Result")


def run_infctx(words: Sequence[object], log: Path, made: Path) -> None:
    """Runs an infctx command that makes a file, unless it is there; what the command prints goes into `log`.

    Exits, naming the log, if the command fails or is stopped; a run that was stopped continues the next time.
    """
    if made.exists():
        return
    arguments = [str(word) for word in words]
    log.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    with log.open("w", encoding="utf-8") as printed:
        print(f"infctx {' '.join(arguments)}", file=printed, flush=True)
        handlers, root.handlers = root.handlers, []  # the command makes its own, of this file
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = main(arguments)
        root.handlers = handlers
    if code or not made.exists():
        raise SystemExit(f"{log}: the run did not get to its end; its last lines say why")


def side_by_side(
    do: Callable[[Wanted], Result], wanted: Sequence[Wanted], workers: int
) -> Iterator[tuple[int, Result]]:
    """Does each of `wanted` in one of some processes; yields its place and what came of it, as they end."""
    # New processes, not forks of this one: a fork of a process in which torch has threads may hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        places = {pool.submit(do, one): place for place, one in enumerate(wanted)}
        try:
            for future in as_completed(places):
                yield places[future], future.result()
        except BaseException:  # Ctrl-C too: the runs that are on their way save, and no other begins
            pool.shutdown(cancel_futures=True)
            raise


def write_json(path: Path, content: Any) -> None:
    """Writes a file of JSON completely or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def commit() -> str:
    """Returns the commit of this repository, as short as git makes it."""
    return (commit_of(ROOT, digits=None) or "unknown").removesuffix("-dirty")
