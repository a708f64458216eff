"""metrics.csv of a run: a row for each step, a column for each number; continued when the run resumes.

Held-out losses fill their columns in the row of their step.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from infctx.files import atomic_file

METRICS_CSV = "metrics.csv"
STEP = "step"


class CsvLog:
    """Writes rows as their numbers come; what `log` was given is in the file when it returns.

    columns:   in the order in which they came
    last, row: the last row, and where it begins in the file: more numbers of its step may come
    """

    def __init__(self, path: Path, first_step: int) -> None:
        """Continues the file at first_step: later rows, which a killed run wrote, are dropped."""
        self.path = path
        self.columns, rows = _read(path, first_step) if first_step > 1 else ([STEP], [])
        self.row: dict[str, str] = rows.pop() if rows else {}
        self.file, self.last = self._write_all(rows)
        self._write_row()

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Writes numbers into the row of a step: the last one, or a new one."""
        if self.row.get(STEP) != str(step):
            self.last = self.file.seek(0, os.SEEK_END)
            self.row = {STEP: str(step)}
        self.row |= {name: repr(value) for name, value in scalars.items()}
        new = [name for name in scalars if name not in self.columns]
        if new:
            self.columns += new
            self.file.close()
            self.file, self.last = self._write_all(_read(self.path, step)[1])
        self._write_row()

    def close(self) -> None:
        self.file.close()

    def _write_all(self, rows: list[dict[str, str]]) -> tuple[IO[bytes], int]:
        """Writes the names of the columns and these rows; returns the file, and its size."""
        names = dict(zip(self.columns, self.columns, strict=True))
        with atomic_file(self.path) as temporary:
            temporary.write_text("".join(self._line(row) for row in [names, *rows]), encoding="utf-8")
        file = self.path.open("r+b")
        return file, file.seek(0, os.SEEK_END)

    def _write_row(self) -> None:
        """Writes the last row over what it was before."""
        self.file.seek(self.last)
        if self.row:
            self.file.write(self._line(self.row).encode())
        self.file.truncate()
        self.file.flush()

    def _line(self, row: Mapping[str, str]) -> str:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([row.get(name, "") for name in self.columns])
        return line.getvalue()


def _read(path: Path, before: int) -> tuple[list[str], list[dict[str, str]]]:
    """Returns the columns, and the whole rows of steps below `before`; none of a file that is not ours."""
    text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "") if path.is_file() else ""
    try:
        columns, *lines = list(csv.reader(io.StringIO(text)))
    except (csv.Error, ValueError):  # damaged, or empty
        return [STEP], []
    if columns[:1] != [STEP] or len(set(columns)) < len(columns):
        return [STEP], []
    rows = [dict(zip(columns, line, strict=True)) for line in lines if len(line) == len(columns)]
    steps = [row[STEP] if row[STEP].isascii() and row[STEP].isdigit() and len(row[STEP]) < 19 else "" for row in rows]
    return columns, [row for row, step in zip(rows, steps, strict=True) if step and int(step) < before]
