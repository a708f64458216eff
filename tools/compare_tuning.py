"""Compares runs that tuned one model: how much each learned, and the held-out loss before and after, side by side.

    python tools/compare_tuning.py runs/finch-tiny-tune-state runs/finch-tiny-tune-adapter

`make tune` ends with it.  It reads what the runs have measured; a run that measured nothing has an empty row.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from infctx.evaluate.loss_by_position import Bucket, format_value, total, unit_of
from infctx.evaluate.record import HELD_OUT, Evaluation, read_record
from infctx.formats.checkpoint_folder import ADAPTER_FILE, STATE_FILE
from infctx.formats.tensor_file import read_shapes
from infctx.report.progress import duration
from infctx.report.step_log import STEP_LOG, read_step_log
from infctx.small_texts import read_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    print(table(parser.parse_args().runs))


def table(runs: list[Path]) -> str:
    """Returns a row for the model before, and one for each run."""
    evaluations = {run: _evaluations(run) for run in runs}
    before = next((found[0] for found in evaluations.values() if len(found) > 1), None)
    buckets = [] if before is None else before.buckets
    skipped = len(os.path.commonprefix([run.name for run in runs])) if len(runs) > 1 else 0
    places = [f"{bucket.begin:,} - {bucket.end - 1:,}" for bucket in buckets]
    rows = [["learned", "numbers", "time", *places, "all"], ["before", "", "", *_losses(before)]]
    for run, found in evaluations.items():
        steps = read_step_log(run) if (run / STEP_LOG).is_file() else []
        took = duration(steps[-1]["seconds"]) if steps and "seconds" in steps[-1] else ""
        rows.append([run.name[skipped:], _learned(run), took, *_losses(found[-1] if len(found) > 1 else None)])
    rows = [row + [""] * (len(rows[0]) - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    what = f"held-out loss in {unit_of(total(buckets))}, by position in the document" if buckets else "not measured"
    return "\n".join([what, *("   ".join(line).rstrip() for line in lines)])


def _evaluations(run: Path) -> list[Evaluation]:
    """Returns what a run measured, the model before it first."""
    path = run / HELD_OUT
    if not path.is_file():
        return []
    content = read_json(path)
    return read_record(path, content["store"], content["tokens"])


def _losses(evaluation: Evaluation | None) -> list[str]:
    buckets: list[Bucket] = evaluation.buckets if evaluation else []
    return [format_value(bucket) for bucket in [*buckets, total(buckets)]] if buckets else []


def _learned(run: Path) -> str:
    """Returns how many numbers a run has learned."""
    files = [run / name for name in (ADAPTER_FILE, STATE_FILE) if (run / name).is_file()]
    return f"{sum(math.prod(shape) for file in files for shape in read_shapes(file).values()):,}" if files else ""


if __name__ == "__main__":
    main()
