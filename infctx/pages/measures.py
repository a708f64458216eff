"""Figures of what models remember: the rows of evaluations in; curves, bars and grids out.

Loss by position, reach, the forgetting curve, recall, needles, and the size of states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from infctx.figures.axes import tokens_text
from infctx.figures.figure import Axis, Bar, Bars, Figure, Grids, Level, Lines, Panel, Series
from infctx.pages.measured import HeldOutLoss, Measures, Position, Recall
from infctx.pages.run_folder import RunFolder

TOKENS = "tokens; 1k is 1,024"
PERCENT = Axis("right answers", "%", include=(0.0, 100.0), most=100.0)
WIDE_RANGE = 30
"""States whose sizes span more than this factor are shown on a logarithmic scale."""
MOST_LAYERS = 7
"""Of more layers the lines look alike, so they become grids."""


class Model(NamedTuple):
    """A model under the name that the figures use, in the style of its run."""

    name: str
    style: int
    measures: Measures


def measure_figures(runs: Sequence[RunFolder]) -> list[Figure]:
    """Returns the figures that the runs have numbers for."""
    models = models_of(runs)
    figures: list[Figure] = []
    if len({model.name for model in models if model.measures.positions} & {run.name for run in runs}) < len(runs):
        figures.append(_own_positions(runs))
    figures += [_positions(models), _differences(models), _reach(models), *_forgetting(models), *_recall(models)]
    figures += [*_needle(models), *_states(models)]
    return [figure for figure in figures if not isinstance(figure, Lines) or figure.series]


def models_of(runs: Sequence[RunFolder]) -> list[Model]:
    """Returns the models that were measured, each once; one that is a run has the run's name and style."""
    found: dict[str, Model] = {}
    places = {run.path.resolve(): number for number, run in enumerate(runs)}
    for own, run in enumerate(runs):
        for measures in run.measures:
            is_own = len(run.measures) == 1 and run.path.is_dir()
            number = own if is_own else places.get(Path(measures.name).resolve())
            name = measures.name if number is None else runs[number].name
            style = len(runs) + len(found) if number is None else number
            found.setdefault(name, Model(name, style, measures))
    return list(found.values())


def _own_positions(runs: Sequence[RunFolder]) -> Lines:
    """Returns the loss by position as the runs themselves measured it: after the last step, and before the first."""
    shown = [
        (run, number, each)
        for number, run in enumerate(runs)
        for each in (_first_and_last(run.held_out) if len(runs) == 1 else _last(run.held_out))
    ]
    in_bits = all(bucket.bits_per_byte for _, _, each in shown for bucket in each.buckets)
    series: list[Series] = []
    for run, number, each in shown:
        style = len(series) if len(runs) == 1 else number
        series.append(_by_position(_called(run, each, len(runs) == 1), style, each.buckets, in_bits))
    note = "Each point is the mean of a range of positions, drawn at its middle."
    y = Axis("loss", "bits per byte" if in_bits else "nats per token")
    x = Axis("position in the document", TOKENS, "tokens")
    return Lines("held_out_by_position", "Held-out loss by position", x, y, series, about=note)


def _called(run: RunFolder, each: HeldOutLoss, is_alone: bool) -> str:
    if not is_alone:
        return run.name
    at = "before training" if each.step == 0 else f"after step {each.step:,}" if each.step else "measured"
    tunes = len({other.with_state for other in run.held_out}) > 1
    return f"{at}, {'with' if each.with_state else 'without'} the state" if tunes else at


def _last(evaluations: Sequence[HeldOutLoss]) -> list[HeldOutLoss]:
    """Returns the newest evaluation, with the state if there is one."""
    return [max(evaluations, key=lambda each: (each.step or 0, each.with_state))] if evaluations else []


def _first_and_last(evaluations: Sequence[HeldOutLoss]) -> list[HeldOutLoss]:
    steps = {each.step or 0 for each in evaluations}
    ends = {min(steps, default=0), max(steps, default=0)}
    kept = {(each.step or 0, each.with_state): each for each in evaluations if (each.step or 0) in ends}
    return [kept[key] for key in sorted(kept)]


def _by_position(name: str, style: int, rows: Sequence[Position], in_bits: bool) -> Series:
    values = [(row.bits_per_byte if in_bits else row.nats_per_token) or math.nan for row in rows]
    # The standard error is of nats per token; as a part of the loss it is the same in other units.
    errors = [
        value * (row.standard_error or 0) / (row.nats_per_token or 1) for value, row in zip(values, rows, strict=True)
    ]
    places = [f"tokens {row.begin:,} to {row.end - 1:,}" for row in rows]
    return with_errors(name, style, [(row.begin + row.end - 1) / 2 for row in rows], values, errors, places)


# The parts of a line with its errors are all of the same length and come as they are.
def with_errors(
    name: str,
    style: int,
    x: Sequence[float],
    y: Sequence[float],
    errors: Sequence[float | None],
    places: Sequence[str] | None = None,
    most: float = math.inf,
) -> Series:
    """Returns a line with a bar of one standard error up and down at each point, if there are any."""
    if not any(errors):
        return Series(name, x, y, style, places=places)
    low = [value - (error or 0) for value, error in zip(y, errors, strict=True)]
    high = [min(value + (error or 0), most) for value, error in zip(y, errors, strict=True)]
    return Series(name, x, y, style, low, high, places=places)


def _said_of_errors(series: Sequence[Series]) -> str:
    return "Bars are standard errors." if any(one.low is not None for one in series) else ""


def _positions(models: Sequence[Model]) -> Lines:
    shown = [model for model in models if model.measures.positions]
    in_bits = all(row.bits_per_byte for model in shown for row in model.measures.positions)
    series = [_by_position(model.name, model.style, model.measures.positions, in_bits) for model in shown]
    y = Axis("loss", "bits per byte" if in_bits else "nats per token")
    note = "Each point is the mean of a range of positions, drawn at its middle."
    x = Axis("position in the document", TOKENS, "tokens")
    return Lines("positions", "Loss by position", x, y, series, about=note, ranges=_said_of_errors(series))


def _differences(models: Sequence[Model]) -> Lines:
    """Returns how much better or worse than the first model the others are at each position."""
    series = []
    for model in models:
        rows = [row for row in model.measures.positions if row.difference is not None]
        places = [f"tokens {row.begin:,} to {row.end - 1:,}" for row in rows]
        middle = [(row.begin + row.end - 1) / 2 for row in rows]
        values = [row.difference or 0.0 for row in rows]
        errors = [row.difference_error for row in rows]
        series += [with_errors(model.name, model.style, middle, values, errors, places)] if rows else []
    note = "On the same tokens; below zero is better."
    x, y = Axis("position in the document", TOKENS, "tokens"), Axis("difference", "nats per token", include=(0.0,))
    title = "Loss by position, less what it is compared with"
    return Lines("differences", title, x, y, series, [Level(0.0, "no difference")], note, _said_of_errors(series))


def _reach(models: Sequence[Model]) -> Lines:
    series = []
    for model in models:
        rows = model.measures.reach
        x, y = [float(row.tokens) for row in rows], [row.distance for row in rows]
        errors = [row.standard_error for row in rows]
        series += [with_errors(model.name, model.style, x, y, errors)] if rows else []
    note = "How far the predictions move when only the last tokens are read."
    axis = Axis("tokens read", TOKENS, "tokens")
    distance = Axis("distance", include=(0.0,))
    return Lines(
        "reach", "Reach: what the distant past changes", axis, distance, series, [], note, _said_of_errors(series)
    )


def _forgetting(models: Sequence[Model]) -> Iterator[Lines]:
    series = []
    for model in models:
        rows = model.measures.forgetting
        errors = [100 * (row.standard_error or 0) for row in rows]
        x, y = [float(row.distance) for row in rows], [100 * row.difference for row in rows]
        series += [with_errors(model.name, model.style, x, y, errors)] if rows else []
    axis = Axis("distance", TOKENS, "tokens")
    y_axis = Axis("copy less new text", "percentage points", include=(0.0,))
    note = "Accuracy on text that was there before, less that on new text, by the distance between the two."
    level = Level(0.0, "nothing remembered")
    yield Lines("forgetting", "Forgetting curve", axis, y_axis, series, [level], note, _said_of_errors(series))


def _recall(models: Sequence[Model]) -> Iterator[Figure]:
    """Yields right answers about keys: bars for one gap, curves over several, grids where keys differ too."""
    shown = [model for model in models if model.measures.recall]
    rows = [row for model in shown for row in model.measures.recall]
    if not rows:
        return
    kinds = sorted({(row.keys, row.overwritten) for row in rows})
    gaps = sorted({row.gap_tokens for row in rows})
    chances = {row.chance for row in rows if row.chance is not None}
    levels = [Level(100 * chances.pop(), "guessing")] if len(chances) == 1 else []
    title = "Recall by the distance of the key"
    if len(gaps) == 1:
        bars = [
            Bar(model.name, [_share(model.measures.recall, kind, gaps[0]) for kind in kinds], model.style)
            for model in shown
        ]
        groups = [_kind_name(*kind) for kind in kinds]
        note = f"The key was set {gaps[0]:,} tokens before."
        yield Bars("recall", "Recall", PERCENT, groups, bars, levels, note)
    elif len(kinds) == 1:
        series = [_recall_line(model) for model in shown]
        axis = Axis("tokens since the key", "1k is 1,024", "tokens")
        note = f"{_kind_name(*kinds[0])}."
        yield Lines("recall", title, axis, PERCENT, series, levels, note, _said_of_errors(series))
    else:
        panels = []
        for model in shown:
            for overwritten in sorted({row.overwritten for row in model.measures.recall}):
                keys = sorted({row.keys for row in model.measures.recall if row.overwritten == overwritten})
                cells = [[_share(model.measures.recall, (key, overwritten), gap) for gap in gaps] for key in keys]
                name = (
                    f"{model.name}, {'overwritten' if overwritten else 'kept'}"
                    if any(row.overwritten for row in rows)
                    else model.name
                )
                panels.append(Panel(name, [str(key) for key in keys], [tokens_text(gap) for gap in gaps], cells))
        note = f"Guessing: {levels[0].value:.0f} %." if levels else ""
        columns = Axis("tokens since the key", "1k is 1,024")
        yield Grids("recall", title, Axis("keys"), columns, Axis("right answers", "%"), panels, 0, 100, note)


def _recall_line(model: Model) -> Series:
    rows = sorted(model.measures.recall, key=lambda row: row.gap_tokens)
    values = [100 * row.right / row.asked for row in rows]
    errors = [math.sqrt(value * (100 - value) / row.asked) for value, row in zip(values, rows, strict=True)]
    return with_errors(model.name, model.style, [float(row.gap_tokens) for row in rows], values, errors, most=100.0)


def _share(rows: Sequence[Recall], kind: tuple[int, bool], gap: int) -> float | None:
    found = [row for row in rows if (row.keys, row.overwritten) == kind and row.gap_tokens == gap]
    asked = sum(row.asked for row in found)
    return 100 * sum(row.right for row in found) / asked if asked else None


def _kind_name(keys: int, overwritten: bool) -> str:
    return f"{keys} {'key' if keys == 1 else 'keys'}{', overwritten' if overwritten else ''}"


# A caller names every part of the figure; a table of results has no other home.
def recall_by_method(
    right: Mapping[str, Mapping[str, Sequence[float]]],
    chance: float,
    title: str,
    note: str = "",
    name: str = "recall_by_method",
) -> Bars:
    """Returns bars of right answers, from 0 to 1, of several results each: group (such as a version) -> method -> one
    for each seed.  A bar is the mean of the seeds; each seed is a dot.  chance: right answers of guessing."""
    methods = list(dict.fromkeys(method for group in right.values() for method in group))
    bars = []
    for style, method in enumerate(methods):
        dots = [[100 * share for share in group.get(method, ())] for group in right.values()]
        bars.append(Bar(method, [math.fsum(each) / len(each) if each else None for each in dots], style, dots))
    return Bars(name, title, PERCENT, list(right), bars, [Level(100 * chance, "guessing")], note)


def _needle(models: Sequence[Model]) -> Iterator[Grids]:
    panels = []
    for model in models:
        rows = model.measures.needle
        for task in dict.fromkeys(row.task for row in rows):
            shares = {(row.depth, row.length): 100 * row.right / row.asked for row in rows if row.task == task}
            depths, lengths = sorted({depth for depth, _ in shares}), sorted({length for _, length in shares})
            cells = [[shares.get((depth, length)) for length in lengths] for depth in depths]
            names = [tokens_text(length) for length in lengths]
            panels.append(Panel(f"{model.name}, {task}", [f"{depth:.0%}" for depth in depths], names, cells))
    if panels:
        rows_axis, columns = Axis("depth of the needle in the text"), Axis("length of the text", TOKENS)
        yield Grids("needle", "Needles found", rows_axis, columns, Axis("right answers", "%"), panels, 0, 100)


def _states(models: Sequence[Model]) -> Iterator[Figure]:
    """Yields the norm, saturation and effective rank of the states: curves of few layers, grids of many."""
    kinds: tuple[tuple[str, str, Callable[..., float | None]], ...] = (
        ("state_norm", "Norm of the state", lambda row: row.norm),
        ("state_saturation", "Saturated part of the state", lambda row: row.saturation),
        ("state_rank", "Effective rank of the state", lambda row: row.effective_rank),
    )
    axis = Axis("position in the document", TOKENS, "tokens")
    for name, title, value_of in kinds:
        tables = [(model, _by_layer(model.measures, value_of)) for model in models]
        tables = [(model, table) for model, table in tables if table]
        if not tables:
            continue
        cells = [value for _, table in tables for values in table.values() for value in values.values()]
        shown = Axis(title.lower(), scale="log" if max(cells) > WIDE_RANGE * min(cells) > 0 else "linear")
        if sum(len(table) for _, table in tables) <= MOST_LAYERS:
            lines = [(model, layer, values) for model, table in tables for layer, values in sorted(table.items())]
            series = [
                Series(
                    f"{model.name}: layer {layer}" if len(tables) > 1 else f"layer {layer}",
                    list(values),
                    list(values.values()),
                    style,
                )
                for style, (model, layer, values) in enumerate(lines)
            ]
            yield Lines(name, title, axis, shown, series)
            continue
        panels = [_state_panel(model.name, table) for model, table in tables]
        yield Grids(name, title, Axis("layer"), axis, shown, panels, min(cells), max(cells))


def _by_layer(measures: Measures, value_of: Callable[..., float | None]) -> dict[int, dict[float, float]]:
    table: dict[int, dict[float, float]] = {}
    for row in sorted(measures.states, key=lambda row: (row.layer, row.position)):
        value = value_of(row)
        if value is not None and math.isfinite(value):
            table.setdefault(row.layer, {})[float(row.position)] = value
    return table


def _state_panel(name: str, table: Mapping[int, Mapping[float, float]]) -> Panel:
    places = sorted({place for values in table.values() for place in values})
    cells = [[table[layer].get(place) for place in places] for layer in sorted(table)]
    return Panel(name, [str(layer) for layer in sorted(table)], [tokens_text(place) for place in places], cells)
