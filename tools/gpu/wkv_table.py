"""Writes the Markdown of `tools/gpu/bench_wkv.py`: results, machine and bars."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch

from infctx.cuda.wkv_layout import Layout
from infctx.cuda.wkv_time import Processors, find_layout

HEAD_SIZE = 64
BAR_SHAPE = (1, 4096, 40)
FORWARD_BAR_US = 120
BACKWARD_BAR_US = 300
TIMES_FLA_BAR = 4
MISSING = "-"
NOT_RUN = "not run"
Cell = float | str | None


@dataclass
class Row:
    """Times in us, errors as relative RMS; a cell may be a word instead, and None until it is measured."""

    batch: int
    tokens: int
    heads: int
    forward: Cell = None
    training: Cell = None
    backward: Cell = None
    chunked: Cell = None
    fla: Cell = None
    y_error: Cell = None
    dr_error: Cell = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.batch, self.tokens, self.heads


@dataclass
class Report:
    """The content of the Markdown; copy_rate: bytes per second, read and written, of a copy on the device."""

    facts: dict[str, str]
    copy_rate: float
    processors: Processors
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


COLUMNS = ("B", "T", "H", "forward us", "forward to train us", "backward us", "of roofline: forward, backward") + (
    "chunked us",
    "fla us",
    "fla / ours",
    "bytes: forward, to train, backward",
    "error y",
    "error dr",
)


def markdown(report: Report) -> str:
    lines = [f"# WKV kernels on {report.facts['device']}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in report.facts.items()]
    lines += [f"| copy on the device | {report.copy_rate / 1e12:.2f} TB/s, read and written |", ""]
    lines += [f"Heads of {HEAD_SIZE}; r k v y in bf16, w in fp32. How to read it: [README.md](README.md).", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [table_row(row, report) for row in report.rows]
    lines += ["", *bars(report), *(f"- {note}" for note in report.notes)]
    return "\n".join(lines) + "\n"


def table_row(row: Row, report: Report) -> str:
    forward, backward = (layout_of(row, report, direction) for direction in ("forward", "backward"))
    traffic = (forward.forward_bytes(keep=False), forward.forward_bytes(), backward.backward_bytes())
    shares = [
        shown(roofline_us(row, report, by_token_head) / time if isinstance(time, float) else time, "{:.0%}")
        for by_token_head, time in ((traffic[0], row.forward), (traffic[2], row.backward))
    ]
    times = (row.forward, row.training, row.backward)
    cells = [str(size) for size in row.shape] + [shown(time, "{:,.1f}") for time in times] + [", ".join(shares)]
    cells += [shown(row.chunked, "{:,.0f}"), shown(row.fla, "{:,.0f}"), shown(times_fla(row), "{:.1f}")]
    cells += [", ".join(f"{by_token_head:,.0f}" for by_token_head in traffic)]
    cells += [shown(row.y_error, "{:.1e}"), shown(row.dr_error, "{:.1e}")]
    return f"| {' | '.join(cells)} |"


def shown(cell: Cell, form: str) -> str:
    if cell is None:
        return NOT_RUN
    return cell if isinstance(cell, str) else form.format(cell)


def layout_of(row: Row, report: Report, direction: str) -> Layout:
    return find_layout((*row.shape, HEAD_SIZE), torch.bfloat16, report.processors, direction)


def roofline_us(row: Row, report: Report, bytes_by_token_head: float) -> float:
    """Returns the time for the bytes of all tokens and heads at the speed of a copy."""
    return 1e6 * bytes_by_token_head * row.batch * row.tokens * row.heads / report.copy_rate


def times_fla(row: Row) -> Cell:
    """Returns fla's time over ours, forward and backward together."""
    if isinstance(row.fla, float) and isinstance(row.training, float) and isinstance(row.backward, float):
        return row.fla / (row.training + row.backward)
    return row.fla if isinstance(row.fla, str) else MISSING


def bars(report: Report) -> list[str]:
    """Returns a line for each bar of an H100 at B=1 T=4096 H=40, whatever the device is."""
    row = next((row for row in report.rows if row.shape == BAR_SHAPE), Row(*BAR_SHAPE))
    where = "B={} T={} H={}".format(*BAR_SHAPE)
    figures = (
        ("forward", row.forward, FORWARD_BAR_US, "at most {:g} us", lambda found, bar: found <= bar),
        ("backward", row.backward, BACKWARD_BAR_US, "at most {:g} us", lambda found, bar: found <= bar),
        ("fla's time over ours", times_fla(row), TIMES_FLA_BAR, "at least {:g}", lambda found, bar: found >= bar),
    )
    lines = []
    for name, found, bar, form, is_met in figures:
        verdict = "not measured"
        if isinstance(found, float):
            verdict = f"{found:.1f}, {'met' if is_met(found, bar) else 'missed'}"
        lines.append(f"- bar on an H100, {where}, {name} {form.format(bar)}: {verdict}")
    return lines


def find_facts(commit: str | None) -> dict[str, str]:
    """Returns facts about the current device and the software."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    memory = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} processors"
    return {
        "device": properties.name,
        "memory": f"{memory}, capability {properties.major}.{properties.minor}",
        "driver": find_driver(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
        "commit": commit or find_commit(),
    }


def find_driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (_answer(command) or "unknown").splitlines()[0]


def find_commit() -> str:
    """Returns the checkout's commit, with -dirty if it has changes; unknown without git or outside a checkout."""
    folder = str(Path(__file__).resolve().parent)
    commit = _answer(["git", "-C", folder, "rev-parse", "--short", "HEAD"]) if shutil.which("git") else ""
    if not commit:
        return "unknown"
    return commit + "-dirty" * bool(_answer(["git", "-C", folder, "status", "--porcelain", "--untracked-files=no"]))


def _answer(command: list[str]) -> str:
    """Returns a program's output; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
