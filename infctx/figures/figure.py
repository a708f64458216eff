"""What a figure shows, before it is drawn: lines, bars or grids with their axes; and the same as numbers for JSON.

Every figure has a name (of its files), a title, and a note below it: where the numbers come from, how they were
thinned.  `draw` (figures/draw) makes SVG of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

DIGITS = 6
"""Significant digits of the numbers in a page."""

Scale = Literal["linear", "log", "tokens"]
"""tokens: logarithmic, with ticks at powers of two, such as 4k for 4,096."""


class Axis(NamedTuple):
    """label, unit: what is shown; include: numbers that the axis reaches in any case; most: where it ends at most."""

    label: str
    unit: str = ""
    scale: Scale = "linear"
    include: tuple[float, ...] = ()
    most: float = math.inf

    @property
    def text(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label


class Series(NamedTuple):
    """A line.  low, high: around each point, the range of what it is the mean of (a band) or its standard error (bars).

    style: number of its color, dash and marker; places: what to call each point where x says too little
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    is_band: bool = False
    places: Sequence[str] | None = None

    def finite(self) -> Series:
        """Returns the points that are numbers; an error that is none is 0."""
        kept = [n for n, point in enumerate(zip(self.x, self.y, strict=True)) if all(map(math.isfinite, point))]
        low, high = (
            None if part is None else [part[n] if math.isfinite(part[n]) else self.y[n] for n in kept]
            for part in (self.low, self.high)
        )
        x, y = ([part[n] for n in kept] for part in (self.x, self.y))
        places = self.places and [self.places[n] for n in kept]
        return Series(self.name, x, y, self.style, low, high, self.is_band, places)


class Level(NamedTuple):
    """A level to compare with, drawn across the figure: guessing, a limit, zero."""

    value: float
    name: str


@dataclass(frozen=True)
class Lines:
    """One or more lines over one axis.  ranges: a sentence on what is around their points."""

    name: str
    title: str
    x: Axis
    y: Axis
    series: list[Series]
    levels: list[Level] = field(default_factory=list)
    about: str = ""
    ranges: str = ""

    @property
    def note(self) -> str:
        return f"{self.about} {self.ranges}".strip()

    def numbers(self) -> dict[str, Any]:
        series = []
        for one in self.series:
            entry = {"name": one.name, "x": rounded(one.x), "y": rounded(one.y)}
            if one.low is not None and one.high is not None:
                entry |= {"low": rounded(one.low), "high": rounded(one.high)}
            series.append(entry)
        levels = [level._asdict() for level in self.levels]
        return _head(self) | {"x": self.x.text, "y": self.y.text, "series": series, "levels": levels}


class Bar(NamedTuple):
    """The bars of one name, one in each group.

    values: None where there is none; dots: the results that each is the mean of, such as those of seeds
    """

    name: str
    values: Sequence[float | None]
    style: int = 0
    dots: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Bars:
    """Bars side by side in groups."""

    name: str
    title: str
    y: Axis
    groups: list[str]
    bars: list[Bar]
    levels: list[Level] = field(default_factory=list)
    note: str = ""

    def numbers(self) -> dict[str, Any]:
        bars = [
            {"name": bar.name, "values": rounded(bar.values), "dots": [rounded(dots) for dots in bar.dots]}
            for bar in self.bars
        ]
        levels = [level._asdict() for level in self.levels]
        return _head(self) | {"y": self.y.text, "groups": self.groups, "bars": bars, "levels": levels}


class Panel(NamedTuple):
    """A grid of cells, row by row; None where nothing was measured."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Grids:
    """Grids with the same axes, each cell in the color of its value and with its number.

    rows, columns: what they are; value: what a cell is; low, high: the values of the first and the last color
    """

    name: str
    title: str
    rows: Axis
    columns: Axis
    value: Axis
    panels: list[Panel]
    low: float = 0.0
    high: float = 1.0
    note: str = ""

    def numbers(self) -> dict[str, Any]:
        panels = [panel._asdict() | {"cells": [rounded(row) for row in panel.cells]} for panel in self.panels]
        axes = {"rows": self.rows.text, "columns": self.columns.text, "value": self.value.text}
        return _head(self) | axes | {"panels": panels}


Figure = Lines | Bars | Grids


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """Returns numbers with DIGITS significant digits, whole ones as they are; None for what is no number."""
    return [None if value is None or not math.isfinite(value) else _round(value) for value in values]


def _round(value: float) -> float:
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.{DIGITS}g}")


def _head(figure: Figure) -> dict[str, Any]:
    return {"name": figure.name, "title": figure.title, "note": figure.note}
