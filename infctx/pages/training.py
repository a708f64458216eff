"""Figures of training: the step logs and held-out losses of runs in; curves over steps out.

A long log is thinned to as many points as a figure can show.  Each point is then the mean of equally many steps, and a
pale band around the line goes from the smallest to the largest of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from infctx.figures.figure import Axis, Level, Lines, Scale, Series
from infctx.pages.measured import whole_loss
from infctx.pages.run_folder import RunFolder
from infctx.small_texts import counted

MOST_POINTS, ALL_POINTS = 250, 1500
"""Of a line; and of all lines of a figure together, so that a page of many runs stays small."""
FEWEST_POINTS = 60
WIDE_RANGE = 30
"""Numbers that span more than this factor are shown on a logarithmic axis."""
BY_SOURCE = "loss_by_source/"
MOST_LINES = 14


class Column(NamedTuple):
    """A figure of one column of the step log."""

    name: str
    title: str
    label: str
    unit: str
    from_zero: bool = False
    may_be_log: bool = False


COLUMNS = (
    Column("loss", "Training loss", "loss", "nats per token"),
    Column("gradient_norm", "Gradient norm before clipping", "gradient norm", "", may_be_log=True),
    Column("learning_rate", "Learning rate", "learning rate", "", from_zero=True),
    Column("tokens_per_second", "Speed", "speed", "tokens per second", from_zero=True),
    Column("peak_memory_gb", "Peak memory of the first rank", "memory", "GB", from_zero=True),
)
STEPS = Axis("step")


def training_figures(runs: Sequence[RunFolder]) -> list[Lines]:
    """Returns the curves that the runs have numbers for."""
    figures: list[Lines | None] = [_column_figure(column, runs) for column in COLUMNS]
    figures.insert(1, held_out_figure(runs))
    figures.insert(2, _source_figure(runs))
    if len({_step_tokens(run) for run in runs if run.steps["step"]}) > 1:
        figures.insert(1, _by_tokens(runs))
    return [figure for figure in figures if figure and figure.series]


def _column_figure(column: Column, runs: Sequence[RunFolder]) -> Lines:
    series, most = [], 1
    for number, run in enumerate(runs):
        if column.name in run.steps:
            one, each = thin(run.name, run.steps["step"], run.steps[column.name], number, points_of_each(len(runs)))
            series += [one] if one.x else []
            most = max(most, each)
    values = [value for one in series for part in (one.y, one.low, one.high) for value in part or () if value > 0]
    wide = column.may_be_log and values and max(values) > WIDE_RANGE * min(values)
    scale: Scale = "log" if wide else "linear"
    axis = Axis(column.label, column.unit, scale, (0.0,) if column.from_zero else ())
    levels = []
    if column.name == "gradient_norm":
        limits = [run.setting("optimizer", "clip_norm") for run in runs]
        if isinstance(limits[0], float | int) and all(limit == limits[0] for limit in limits):
            levels = [Level(float(limits[0]), f"clipped above {limits[0]:g}")]
    return Lines(column.name, column.title, STEPS, axis, series, levels, *thinned_note(most))


def points_of_each(lines: int) -> int:
    return max(FEWEST_POINTS, min(MOST_POINTS, ALL_POINTS // max(lines, 1)))


def thin(name: str, places: Sequence[float], values: Sequence[float], style: int, most: int) -> tuple[Series, int]:
    """Returns a line of at most `most` points, and of how many numbers each is the mean; without what is no number."""
    known = [(x, y) for x, y in zip(places, values, strict=True) if math.isfinite(x) and math.isfinite(y)]
    each = -(-len(known) // most) or 1
    if each == 1:
        return Series(name, [x for x, _ in known], [y for _, y in known], style), 1
    groups = [known[begin : begin + each] for begin in range(0, len(known), each)]
    x = [group[-1][0] for group in groups]
    y = [math.fsum(value for _, value in group) / len(group) for group in groups]
    low = [min(value for _, value in group) for group in groups]
    high = [max(value for _, value in group) for group in groups]
    return Series(name, x, y, style, low, high, is_band=True), each


def thinned_note(each: int) -> tuple[str, str]:
    """Returns what a point is the mean of, and what is around it."""
    if each == 1:
        return "", ""
    return f"Each point is the mean of up to {counted(each, 'step')}.", "The band is from the smallest to the largest."


def _step_tokens(run: RunFolder) -> float:
    """Returns the tokens of a step, the same for all steps of a run."""
    tokens = run.steps.get("tokens", [])
    return tokens[-1] / max(run.last_step, 1) if tokens and math.isfinite(tokens[-1]) else math.nan


def _by_tokens(runs: Sequence[RunFolder]) -> Lines:
    """Compares runs whose steps have different numbers of tokens."""
    most, series = points_of_each(len(runs)), []
    for number, run in enumerate(runs):
        if "tokens" in run.steps and "loss" in run.steps:
            millions = [tokens / 1e6 for tokens in run.steps["tokens"]]
            series.append(thin(run.name, millions, run.steps["loss"], number, most)[0])
    axis = Axis("loss", "nats per token")
    note = "The runs have different numbers of tokens in a step."
    return Lines("loss_by_tokens", "Training loss by tokens", Axis("tokens", "millions"), axis, series, about=note)


def held_out_figure(runs: Sequence[RunFolder]) -> Lines:
    """Returns the held-out loss over the steps of training, where it was measured at two of them."""
    in_bits = all(
        whole_loss(each.buckets)[1] is not None for run in runs for each in run.held_out if each.step is not None
    )
    series = []
    for number, run in enumerate(runs):
        for with_state in (False, True):
            found = [each for each in run.held_out if each.step is not None and each.with_state == with_state]
            values = [whole_loss(each.buckets)[1 if in_bits else 0] or math.nan for each in found]
            if len(found) > 1:
                series.append(Series(run.name, [float(each.step or 0) for each in found], values, number))
    unit = "bits per byte" if in_bits else "nats per token"
    return Lines("held_out", "Held-out loss", STEPS, Axis("loss", unit), series)


def _source_figure(runs: Sequence[RunFolder]) -> Lines | None:
    """Returns the training loss of each source, for runs on several."""
    found = [(run, name) for run in runs for name in run.steps if name.startswith(BY_SOURCE)]
    series, most = [], 1
    for number, (run, name) in enumerate(found[:MOST_LINES]):
        source = name.removeprefix(BY_SOURCE)
        called = f"{run.name}: {source}" if len(runs) > 1 else source
        one, each = thin(called, run.steps["step"], run.steps[name], number, points_of_each(len(found)))
        series.append(one)
        most = max(most, each)
    note, ranges = thinned_note(most)
    if len(found) > MOST_LINES:
        note = f"{note} The first {MOST_LINES} of {len(found)} sources are shown.".strip()
    axis = Axis("loss", "nats per token")
    return Lines("loss_by_source", "Training loss by source", STEPS, axis, series, about=note, ranges=ranges)
