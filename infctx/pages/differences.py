"""What differs between runs: their settings, where their losses part, and how each of them ended."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from infctx.figures.axes import value_text
from infctx.pages.measured import HeldOutLoss, whole_loss
from infctx.pages.run_folder import RunFolder
from infctx.report.progress import duration

PLACES = {("run", "folder")}
"""Settings that say where a run is; they always differ."""
MACHINE = ("infctx", "commit", "torch", "python", "system", "device", "ranks")
ABSENT = "(not set)"


class Row(NamedTuple):
    """A name, and what each run has under it."""

    name: str
    values: list[str]


def differences_of(runs: Sequence[RunFolder]) -> list[Row]:
    """Returns the settings in which the runs differ, and what differs in their code and machines.

    A run whose settings, or whose machine, are unknown differs in none of them.
    """
    return [*_settings_that_differ(runs), *_machines_that_differ(runs)]


def _settings_that_differ(runs: Sequence[RunFolder]) -> list[Row]:
    known = [run for run in runs if run.settings]
    if len(known) < 2:
        return []
    names = dict.fromkeys((section, name) for run in known for section, its in run.settings.items() for name in its)
    rows = []
    for section, name in names:
        values = [_shown(run.settings.get(section, {}), name) if run.settings else "unknown" for run in runs]
        if len({value for value, run in zip(values, runs, strict=True) if run.settings}) > 1:
            rows += [Row(f"{section}.{name}", values)] if (section, name) not in PLACES else []
    return rows


def _machines_that_differ(runs: Sequence[RunFolder]) -> list[Row]:
    rows = []
    for name in MACHINE:
        values = [str(getattr(run.starts[-1], name) or "") if run.starts else "unknown" for run in runs]
        if len({value for value, run in zip(values, runs, strict=True) if run.starts}) > 1:
            rows.append(Row(name, values))
    return rows


def _shown(section: dict[str, Any], name: str) -> str:
    if name not in section:
        return ABSENT
    value = section[name]
    return value if isinstance(value, str) else json.dumps(value, default=str)


def results_of(runs: Sequence[RunFolder]) -> list[Row]:
    """Returns how each run stands: steps, loss, held-out loss, tokens, time, speed and memory."""
    rows = [
        Row("steps", [_steps(run) for run in runs]),
        Row("training loss, last tenth of the steps", [_nats(last_tenth(run, "loss")) for run in runs]),
        Row("held-out loss, last", [_held_out(newest(run.held_out)) for run in runs]),
        Row("held-out loss, best", [_held_out(best(run.held_out)) for run in runs]),
        Row("tokens", [_last(run, "tokens", value_text) for run in runs]),
        Row("time", [_last(run, "seconds", duration) for run in runs]),
        Row("tokens per second, median", [_median(run, "tokens_per_second") for run in runs]),
        Row("peak memory of the first rank", [_peak(run) for run in runs]),
        Row("last step written", [f"{run.logged:%Y-%m-%d %H:%M} UTC" if run.logged else "" for run in runs]),
    ]
    return [row for row in rows if any(row.values)]


def first_difference(one: RunFolder, other: RunFolder) -> str:
    """Returns a line that says where the losses of two runs part."""
    pairs = {step: loss for step, loss in zip(one.steps["step"], one.steps.get("loss", []), strict=False)}
    both = [
        (int(step), pairs[step], loss)
        for step, loss in zip(other.steps["step"], other.steps.get("loss", []), strict=False)
        if step in pairs
    ]
    if not both:
        return "The runs have no step in common."
    for step, mine, its in both:
        if mine != its:
            return f"The losses differ from step {step:,} on: {mine!r} and {its!r} nats per token."
    return f"The losses of all {len(both):,} steps that both have are equal in every digit."


def last_tenth(run: RunFolder, name: str) -> float:
    """Returns the mean of a column over the last tenth of the steps; nan without numbers."""
    values = [value for value in run.steps.get(name, []) if math.isfinite(value)]
    kept = values[-max(1, len(values) // 10) :]
    return math.fsum(kept) / len(kept) if kept else math.nan


def newest(evaluations: Sequence[HeldOutLoss]) -> HeldOutLoss | None:
    return max(evaluations, key=lambda each: (each.step or 0, each.with_state), default=None)


def best(evaluations: Sequence[HeldOutLoss]) -> HeldOutLoss | None:
    """Returns the evaluation with the lowest loss; None if there is only one."""
    return min(evaluations, key=lambda each: whole_loss(each.buckets)[0]) if len(evaluations) > 1 else None


def _steps(run: RunFolder) -> str:
    if not run.steps["step"]:
        return ""
    asked = run.setting("optimizer", "steps")
    if not isinstance(asked, int):
        return f"{run.last_step:,}"
    return f"{run.last_step:,} of {asked:,}{'' if run.last_step >= asked else ' so far'}"


def _nats(value: float) -> str:
    return f"{value:.4f} nats per token" if math.isfinite(value) else ""


def _held_out(found: HeldOutLoss | None) -> str:
    if found is None:
        return ""
    nats, bits = whole_loss(found.buckets)
    value = f"{nats:.4f} nats per token" if bits is None else f"{bits:.4f} bits per byte"
    return value if found.step is None else f"{value}, step {found.step:,}"


def _last(run: RunFolder, name: str, written: Any) -> str:
    values = run.steps.get(name, [])
    return written(values[-1]) if values and math.isfinite(values[-1]) else ""


def _median(run: RunFolder, name: str) -> str:
    values = sorted(value for value in run.steps.get(name, []) if math.isfinite(value))
    return f"{values[len(values) // 2]:,.0f}" if values else ""


def _peak(run: RunFolder) -> str:
    values = [value for value in run.steps.get("peak_memory_gb", []) if math.isfinite(value)]
    return f"{max(values):.2f} GB" if values else ""
