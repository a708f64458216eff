"""Shows whether a change changed the results of runs: every digit of their step logs, every byte they learn.

    python tools/compare_runs.py --commit HEAD~3      short runs with that commit's code, and with the code here
    python tools/compare_runs.py --run FOLDER         only runs the code here, about five minutes
    python tools/compare_runs.py FOLDER FOLDER        compares results: two runs, or two folders of runs

The runs are finch-tiny, eagle-tiny and finch-tiny-tune-state, 20 steps in one process and 10 on two ranks, with ddp,
with zero2 and with time_ranks 2.  They need the documents of `make train` and `make tune` (data/python, data/cpp).
Exit code 0: all are equal; 1: some differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = ("finch-tiny", "eagle-tiny", "finch-tiny-tune-state")
TWO_RANKS = {
    "ddp": ["distributed.strategy=ddp", "window.lanes=2"],
    "zero2": ["distributed.strategy=zero2", "window.lanes=2"],
    "time": ["distributed.time_ranks=2"],
}
MEASURED = {"seconds", "tokens_per_second", "peak_memory_gb", "slowest_rank", "slowest_rank_lag"}
"""Entries of a step log that depend on the machine, not on the code."""
LEARNED = ("model.pth", "state.safetensors", "adapter.safetensors")


class Case(NamedTuple):
    """One run: its name, its configuration, and the overrides."""

    name: str
    config: str
    overrides: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="two runs, or two folders of runs")
    parser.add_argument("--commit", help="compares the code here with that of a commit")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="makes the runs of the code here in this folder")
    parser.add_argument("--only", default="", metavar="WORD", help="runs whose name has this word")
    options = parser.parse_args()
    if options.run:
        make_runs(REPOSITORY, options.run.resolve(), options.only)
        return 0
    if options.commit:
        with tempfile.TemporaryDirectory() as folder:
            return compare_with_commit(options.commit, Path(folder), options.only)
    if len(options.folders) != 2:
        parser.error("name two folders, or --commit, or --run")
    return compare(*options.folders)


def cases() -> Iterator[Case]:
    for config in CONFIGS:
        yield Case(config, config, ["optimizer.steps=20"])
    for config in CONFIGS:
        for name, overrides in TWO_RANKS.items():
            yield Case(f"{config}-{name}", config, ["optimizer.steps=10", "distributed.devices=2", *overrides])


def compare_with_commit(commit: str, folder: Path, only: str) -> int:
    tree = folder / "tree"
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
    try:
        make_runs(tree, folder / "before", only)
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    make_runs(REPOSITORY, folder / "after", only)
    return compare(folder / "before", folder / "after")


def make_runs(tree: Path, folder: Path, only: str = "") -> None:
    """Runs every case with the code of a tree; a tuned run starts from the weights of the trained one next to it."""
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder}: is not empty, and runs there would resume instead of starting anew; name another folder")
    wanted = [case for case in cases() if only in case.name]
    if any("tune" in case.config for case in wanted) and "finch-tiny" not in {case.name for case in wanted}:
        wanted.insert(0, next(cases()))  # its weights are needed for tuning
    for case in wanted:
        print(f"{tree}: {case.name}", file=sys.stderr, flush=True)
        tunes = "tune" in case.config
        data = REPOSITORY / "data" / ("cpp" if tunes else "python")
        weights = [f"model.weights={folder / 'finch-tiny' / 'model.pth'}"] if tunes else []
        words = [
            f"data.store={data / 'train'}",
            f"data.held_out={data / 'held_out'}",
            f"run.folder={folder / case.name}",
        ]
        words += ["run.device=cpu", "run.evaluate_tokens=0", *weights, *case.overrides]
        command = [sys.executable, "-m", "infctx", "tune" if tunes else "train", f"configs/{case.config}.yaml", *words]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{case.name}: exit code {done.returncode}\n{done.stderr[-2000:]}")


def compare(before: Path, after: Path) -> int:
    """Prints one line per run; returns the exit code."""
    if (before / "steps.jsonl").is_file():
        pairs = [(before.name, before, after)]
    else:
        names = sorted({path.parent.name for side in (before, after) for path in side.glob("*/steps.jsonl")})
        pairs = [(name, before / name, after / name) for name in names]
    if not pairs:
        sys.exit(f"{before}: no runs in it, nothing with a steps.jsonl")
    outcomes = [find_difference(one, other) for _, one, other in pairs]
    for (name, one, _), difference in zip(pairs, outcomes, strict=True):
        equal = (
            "" if difference else f"{len(read_steps(one))} steps equal in every digit; what was learned, in every byte"
        )
        print(f"{name:<28} {difference or equal}")
    differing = sum(outcome is not None for outcome in outcomes)
    print(f"{len(pairs) - differing} of {len(pairs)} runs are equal")
    return 1 if differing else 0


def find_difference(before: Path, after: Path) -> str | None:
    """Describes the first difference of two runs' folders; None if there is none."""
    for side in (before, after):
        if not (side / "steps.jsonl").is_file():
            return f"there is no {side / 'steps.jsonl'}"
    one, other = read_steps(before), read_steps(after)
    if len(one) != len(other):
        return f"{len(one)} steps and {len(other)}"
    for mine, its in zip(one, other, strict=True):
        for name in sorted((mine.keys() | its.keys()) - MEASURED):
            if mine.get(name) != its.get(name):
                return f"step {mine['step']}: {name} {mine.get(name)!r} and {its.get(name)!r}"
    learned = [name for name in LEARNED if (before / name).is_file()]
    for name in learned:
        if not (after / name).is_file() or (before / name).read_bytes() != (after / name).read_bytes():
            return f"{name} differs"
    return None if learned else f"nothing that was learned is in {before}"


def read_steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "steps.jsonl").read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
