"""The progress line of a run: a bar with the time left in a terminal, now and then a line elsewhere."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

from tqdm import tqdm

MOST_COLUMNS = 100
"""Longest progress line."""


class Part(NamedTuple):
    """A part of the line.  If the line is too long, the parts of the lowest rank are left out first."""

    text: str
    rank: int


class ProgressLine:
    """Shows the progress of a run on standard error.

    total: steps of the run; done: steps before this start; every: steps between lines where there is no terminal
    """

    def __init__(self, total: int, done: int, every: int) -> None:
        self.total, self.first, self.every = total, done + 1, every
        self.columns = _columns()
        self.bar = tqdm(
            total=total,
            initial=done,
            disable=not self.columns,
            bar_format="{desc}  |{bar}|",
            ncols=self.columns,
            delay=0.01,
        )

    def show(self, step: int, parts: list[Part]) -> None:
        """Shows the line of a step."""
        line = fit_line(parts, self.columns or MOST_COLUMNS)
        self.bar.set_description_str(line, refresh=False)
        self.bar.update()
        if self.bar.disable and (step % self.every == 0 or step in (self.first, self.total)):
            print(line, file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Prints a separate line, above the bar."""
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()

    def end(self, line: str = "") -> None:
        """Ends the bar; the line, if any, comes below it."""
        self.bar.close()
        if line:
            print(line, file=sys.stderr, flush=True)


def fit_line(parts: list[Part], columns: int) -> str:
    """Returns the parts as a line that fits in `columns`, if need be without those of the lowest ranks."""
    kept = list(parts)
    while True:
        line = "  ".join(part.text for part in kept)
        if len(line) <= columns or len(kept) == 1:
            return line
        kept.remove(min(kept, key=lambda part: part.rank))


def duration(seconds: float) -> str:
    """Formats seconds like 2:31 or 1:02:31."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _columns() -> int:
    """Returns the width of the progress line: the terminal's, but at most MOST_COLUMNS; 0 for no terminal."""
    found = os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 0
    return min(found, MOST_COLUMNS)
