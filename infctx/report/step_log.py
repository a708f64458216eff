"""The step log of a run, steps.jsonl: one JSON object for each step, continued when the run resumes."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from infctx.files import atomic_file
from infctx.small_texts import parse_json

STEP_LOG = "steps.jsonl"


def read_step_log(folder: Path) -> list[dict[str, Any]]:
    """Returns a dict per step: step, tokens (seen so far), seconds (of training so far, resumes included), loss,
    learning_rate, gradient_norm, tokens_per_second, peak_memory_gb, and loss_by_source/NAME for each of several
    sources.  Before 0.2 there were no tokens and seconds."""
    return [parse_json(line) for line in (folder / STEP_LOG).read_text(encoding="utf-8").splitlines()]


def reopen_step_log(path: Path, first_step: int) -> tuple[IO[str], float]:
    """Drops entries that a killed run wrote after the checkpoint that this one resumes from.

    Returns the log, open for appending, and the seconds of training so far.
    """
    kept, seconds = [], 0.0
    if path.exists() and first_step > 1:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = parse_json(line)
                if entry["step"] < first_step and isinstance(entry["loss"], float):
                    kept.append(line + "\n")
                    seconds = float(entry.get("seconds", 0.0))  # older logs do not have them
            except (ValueError, KeyError, TypeError, OverflowError):
                continue  # a line that the kill cut off
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
    return path.open("a", encoding="utf-8"), seconds
