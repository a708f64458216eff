"""Runs that differ in their seed alone, as one: figures of all runs in; figures with their means and ranges out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace

from infctx.errors import InputError
from infctx.figures.figure import Bar, Bars, Figure, Grids, Lines, Panel, Series
from infctx.pages.run_folder import RunFolder

SEPARATORS = "-_./ "
MOST_BARS = 24
"""The range of more points is a band, not bars."""
RANGES = "Of several seeds, the line is the mean, and around it is the range from the smallest to the largest."


def join_seeds(runs: Sequence[RunFolder], figures: Sequence[Figure]) -> list[Figure]:
    """Returns figures in which runs of the same settings, but for run.seed and run.folder, are one; raises InputError
    if there are none."""
    groups = seed_groups(runs)
    if all(len(names) == 1 for names in groups.values()):
        raise InputError("--join-seeds: no two of these runs differ in run.seed alone; leave it out")
    joined: list[Figure] = []
    for figure in figures:
        if isinstance(figure, Lines):
            joined.append(_join_lines(figure, groups))
        else:
            joined.append(_join_bars(figure, groups) if isinstance(figure, Bars) else _join_grids(figure, groups))
    return joined


def seed_groups(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    """Returns the names of the runs of each group, by a name for it."""
    found: dict[str, list[str]] = {}
    for run in runs:
        settings = {
            f"{section}.{name}": value
            for section, its in run.settings.items()
            for name, value in its.items()
            if (section, name) not in (("run", "seed"), ("run", "folder"))
        }
        key = json.dumps(settings, sort_keys=True, default=str) if settings else run.name
        found.setdefault(key, []).append(run.name)
    return {_group_name(names): names for names in found.values()}


def _group_name(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    common = os.path.commonprefix(list(names)).rstrip(SEPARATORS).removesuffix("seed").rstrip(SEPARATORS)
    return f"{common or names[0]} ({len(names)} seeds)"


def _join_lines(figure: Lines, groups: dict[str, list[str]]) -> Lines:
    """Joins the lines that have the names of runs; others, such as those of sources, stay."""
    by_name = {series.name: series for series in figure.series}
    if len(by_name) < len(figure.series) or not by_name.keys() <= {name for names in groups.values() for name in names}:
        return figure
    joined = []
    for style, (group, names) in enumerate(groups.items()):
        parts = [by_name[name].finite() for name in names if name in by_name]
        if len(parts) < 2:
            joined += [part._replace(style=style) for part in parts]
            continue
        tables = [dict(zip(part.x, part.y, strict=True)) for part in parts]
        x = [place for place in parts[0].x if all(place in table for table in tables)]
        values = [[table[place] for table in tables] for place in x]
        labels = dict(zip(parts[0].x, parts[0].places, strict=True)) if parts[0].places else None
        low, high = [min(each) for each in values], [max(each) for each in values]
        places = [labels[place] for place in x] if labels else None
        joined.append(Series(group, x, list(map(_mean, values)), style, low, high, len(x) > MOST_BARS, places))
    return replace(figure, series=joined, ranges=RANGES)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _join_bars(figure: Bars, groups: dict[str, list[str]]) -> Bars:
    by_name = {bar.name: bar for bar in figure.bars}
    bars = []
    for style, (group, names) in enumerate(groups.items()):
        parts = [by_name.pop(name) for name in names if name in by_name]
        dots = [
            [value for value in each if value is not None] for each in zip(*(bar.values for bar in parts), strict=True)
        ]
        if parts:
            several = len(parts) > 1
            bars.append(Bar(group, [_mean(each) if each else None for each in dots], style, dots if several else ()))
    return replace(figure, bars=[*bars, *by_name.values()], note=f"{figure.note} Each dot is a seed.".strip())


def _join_grids(figure: Grids, groups: dict[str, list[str]]) -> Grids:
    """Joins the grids whose titles begin with the name of a run."""
    group_of = {name: group for group, names in groups.items() for name in names}
    found: dict[str, list[Panel]] = {}
    for panel in figure.panels:
        name, comma, rest = panel.title.partition(", ")
        found.setdefault(f"{group_of.get(name, name)}{comma}{rest}", []).append(panel)
    panels = []
    for title, parts in found.items():
        alike = all((part.rows, part.columns) == (parts[0].rows, parts[0].columns) for part in parts)
        panels += [Panel(title, parts[0].rows, parts[0].columns, _mean_cells(parts))] if alike else parts
    return replace(figure, panels=panels)


def _mean_cells(panels: Sequence[Panel]) -> list[list[float | None]]:
    cells = []
    for rows in zip(*(panel.cells for panel in panels), strict=True):
        known = [[value for value in values if value is not None] for values in zip(*rows, strict=True)]
        cells.append([_mean(values) if values else None for values in known])
    return cells
