"""The results of a benchmark as Markdown and as JSON.

In: what each case took; out: a table with a column for each thing that differs between its rows, and a line above it
for what does not.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infctx.bench.cases import Case
from infctx.bench.measure import Measured
from infctx.errors import InputError
from infctx.files import atomic_file

MARKS = ("<!-- infctx bench -->", "<!-- end of infctx bench -->")
"""In a page, the table comes between these lines, and the rest of the page stays."""

FACTS: dict[str, Callable[[Case], str]] = {
    "model": lambda case: case.model,
    "vocabulary": lambda case: f"{case.vocab_size:,}",
    "window": lambda case: f"{case.window_tokens:,}",
    "segment": lambda case: f"{case.segment_tokens:,}",
    "precision": lambda case: case.precision,
    "threads": lambda case: str(case.threads),
    "mode": lambda case: case.mode,
}
Groups = Sequence[Sequence[tuple[Measured, ...]]]


def markdown(groups: Groups, command: str, commit: str | None, against: str | None) -> str:
    """Formats the table of all groups, with the command, the date, the commit and the machine under it."""
    cases = [results[0].case for group in groups for results in group]
    differing = [name for name, fact in FACTS.items() if len({fact(case) for case in cases}) > 1 or name == "mode"]
    same = [f"{name} {FACTS[name](cases[0])}" for name in FACTS if name not in differing]
    is_cpu = cases[0].device == "cpu"
    head = [*differing, "tokens/s", *["tokens/CPU-s"] * is_cpu, "of a matrix product", "time", "peak memory"]
    head += [f"speed against {against}"] * bool(against)
    lines = [f"On {machine(cases[0].device)}; {', '.join(same)}.", ""] if same else []
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(differing) + "---:|" * (len(head) - len(differing))]
    rows = (_row(results, group, differing, is_cpu) for group in groups for results in group)
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    when = time.strftime("%Y-%m-%d")
    source = f"`{command}`, {when}" + f", commit {commit}" * (commit is not None)
    lines += ["", *textwrap.wrap(f"{source}. {NOTES}", 120, break_long_words=False, break_on_hyphens=False)]
    return "\n".join(lines) + "\n"


NOTES = (
    "Medians over rounds; in brackets, the middle half of them. A share of a matrix product counts the FLOPs that a "
    "gradient needs once, and compares with a plain product that the same process computes before and after each step. "
    "Time is that of the first mode in each group, round by round. Peak memory is that of the whole process."
)


def _row(
    results: tuple[Measured, ...], group: Sequence[tuple[Measured, ...]], differing: list[str], is_cpu: bool
) -> list[str]:
    measured, *others = results
    case, steps = measured.case, measured.steps
    row = [FACTS[name](case) for name in differing]
    if not steps:
        return [*row, measured.problem, *[""] * (3 + is_cpu + len(others))]
    row.append(f"{case.window_tokens / statistics.median(step.seconds for step in steps):,.0f}")
    if is_cpu:
        row.append(f"{case.window_tokens / statistics.median(step.work_seconds for step in steps):,.0f}")
    row.append("" if case.mode == "op" else spread([step.of_product for step in steps]))
    first = group[0][0]
    row.append("1" if measured is first else spread(_ratios(measured, first)))
    row.append(f"{steps[-1].peak_bytes / 1e9:.2f} GB")
    return [*row, *(other.problem or spread(_ratios(other, measured)) for other in others)]


def _ratios(one: Measured, other: Measured) -> list[float]:
    return [a.work_seconds / b.work_seconds for a, b in zip(one.steps, other.steps, strict=False)]


def spread(values: Sequence[float]) -> str:
    """Formats a median, and the middle half of the values if there are several."""
    if not values:
        return ""
    ordered, quarter = sorted(values), len(values) // 4
    middle = f"{statistics.median(ordered):.2f}"
    return middle if len(values) == 1 else f"{middle} ({ordered[quarter]:.2f} to {ordered[-1 - quarter]:.2f})"


def as_json(groups: Groups, command: str, commit: str | None, against: str | None) -> dict[str, Any]:
    """Returns all that was measured: each case with its rounds."""
    rows = []
    for group in groups:
        for results in group:
            for name, measured in zip((commit, against), results, strict=False):
                case = measured.case._asdict() | {"model": measured.case.model}
                steps = [step._asdict() for step in measured.steps]
                rows.append({"case": case, "commit": name, "steps": steps, "problem": measured.problem or None})
    device = groups[0][0][0].case.device
    return {"command": command, "date": time.strftime("%Y-%m-%d"), "machine": machine(device), "rows": rows}


def machine(device: str) -> str:
    """Names the processor."""
    if device == "cuda":
        import torch

        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    found = re.search(r"model name\s*:\s*(.*)", _cpu_facts())
    return (found[1] if found else platform.processor() or platform.machine()).strip()


def _cpu_facts() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def check_output(path: Path) -> None:
    """Raises InputError if the file exists and is no page with a place for the table."""
    if path.suffix != ".md":
        raise InputError(f"{path}: the table is Markdown; name a file that ends in .md")
    if path.exists() and not _place(path.read_text(encoding="utf-8")):
        raise InputError(f"{path}: exists, and has no lines {MARKS[0]} and {MARKS[1]} to write between; name another")


def write(path: Path, table: str, numbers: dict[str, Any]) -> None:
    """Writes the table into its place in a page, or into a new file, and the numbers next to it as .json."""
    text = table
    if path.exists():
        page = path.read_text(encoding="utf-8")
        begin, end = _place(page) or (0, len(page))
        text = f"{page[:begin]}\n{table}{page[end:]}"
    for file, content in ((path, text), (path.with_suffix(".json"), json.dumps(numbers, indent=1) + "\n")):
        with atomic_file(file) as temporary:
            temporary.write_text(content, encoding="utf-8")


def _place(page: str) -> tuple[int, int] | None:
    begin, end = page.find(MARKS[0] + "\n"), page.find(MARKS[1])
    return (begin + len(MARKS[0]) + 1, end) if 0 <= begin < end else None
