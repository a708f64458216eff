"""Draws lines over an axis, with the range of each point, its marker, and its numbers where a pointer rests."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import pairwise

from infctx.figures.axes import Placed, place_axis, value_text
from infctx.figures.colors import dash, style_classes
from infctx.figures.figure import Lines, Series
from infctx.figures.svg import (
    BELOW_PLOT,
    LETTER,
    MARGIN,
    document,
    draw_levels,
    draw_marker,
    frame,
    legend,
    plot_box,
    text,
    vertical_axis,
)

MOST_MARKED = 24
"""A line of more points has markers only at some of them, and a hidden spot with the numbers at some more."""
FEW_MARKERS, ALL_SPOTS, FEWEST_SPOTS = 5, 96, 8
MOST_DIRECT, LONGEST_DIRECT, LEAST_APART = 4, 14, 14
"""So few lines, of such short names, whose ends are so far from each other, also have their names at their ends."""


def draw_lines(figure: Lines) -> str:
    """Returns the figure as SVG."""
    series = [one for one in map(Series.finite, figure.series) if one.x]
    values = [value for one in series for part in (one.y, one.low, one.high) for value in part or ()]
    y = vertical_axis(figure.y, [*values, *(level.value for level in figure.levels)])
    direct = _fit_at_ends(series, y)
    beside = 10 + LETTER * max(len(one.name) for one in series) if direct else MARGIN + 6
    box = plot_box([y.label(tick) for tick in y.ticks], beside)
    x = place_axis(figure.x, [place for one in series for place in one.x], box.left, box.right, 6)
    parts = [*frame(x, y, box), *draw_levels(figure.levels, y, box)]
    for one in series:
        parts += _draw_series(one, figure, x, y, max(ALL_SPOTS // len(series), FEWEST_SPOTS))
    parts += _names_at_ends(series, x, y) if direct else []
    entries = [(one.name, one.style) for one in series] if len(series) > 1 else []
    names, tall = legend(entries, figure.levels, box.bottom + BELOW_PLOT)
    return document(figure.title, box.bottom + BELOW_PLOT + tall + 6, [*parts, *names])


def _fit_at_ends(series: list[Series], y: Placed) -> bool:
    """Returns whether the names of the lines fit at their ends: all at the right, none upon another."""
    if not 1 < len(series) <= MOST_DIRECT or any(len(one.name) > LONGEST_DIRECT for one in series):
        return False
    ends = sorted(y.at(one.y[-1]) for one in series)
    apart = all(later - earlier >= LEAST_APART for earlier, later in pairwise(ends))
    return apart and len({one.x[-1] for one in series}) == 1


def _draw_series(one: Series, figure: Lines, x: Placed, y: Placed, spots: int) -> Iterator[str]:
    stroke, fill = style_classes(one.style)
    places = [(x.at(at), y.at(value)) for at, value in zip(one.x, one.y, strict=True)]
    if one.low is not None and one.high is not None:
        ends = [(y.at(low), y.at(high)) for low, high in zip(one.low, one.high, strict=True)]
        if one.is_band:
            around = [(at, high) for (at, _), (_, high) in zip(places, ends, strict=True)]
            around += [(at, low) for (at, _), (low, _) in reversed(list(zip(places, ends, strict=True)))]
            yield f'<path class="band {fill}" d="{_path(around)}z"/>'
        else:
            bars = "".join(
                f"M{at:.1f} {low:.1f}V{high:.1f}M{at - 3:.1f} {low:.1f}h6M{at - 3:.1f} {high:.1f}h6"
                for (at, _), (low, high) in zip(places, ends, strict=True)
            )
            yield f'<path class="error {stroke}" d="{bars}"/>'
    dashes = f' stroke-dasharray="{dash(one.style)}"' if dash(one.style) else ""
    yield f'<path class="line {stroke}"{dashes} d="{_path(places)}"/>'
    count = len(places)
    marked = set(range(count)) if count <= MOST_MARKED else set(_some(count, FEW_MARKERS))
    for number in sorted(marked | set(_some(count, spots))):
        at, value = places[number]
        said = f"{one.name}: {_describe(one, number, figure)}"
        if number in marked:
            yield draw_marker(at, value, one.style, said)
        else:
            yield f'<circle class="hit" cx="{at:.1f}" cy="{value:.1f}" r="5"><title>{escape(said)}</title></circle>'


def _path(places: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _some(count: int, most: int) -> list[int]:
    """Returns at most this many of the numbers below count, evenly spaced, the last one among them."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


def _describe(one: Series, number: int, figure: Lines) -> str:
    where = one.places[number] if one.places else f"{figure.x.label} {value_text(one.x[number])}"
    words = f"{value_text(one.y[number])} {figure.y.unit}".strip()
    if one.low is None or one.high is None:
        return f"{where}, {words}"
    low, high = one.low[number], one.high[number]
    if low == high:
        return f"{where}, {words}"
    return f"{where}, {words} ({value_text(low)} to {value_text(high)})"


def _names_at_ends(series: list[Series], x: Placed, y: Placed) -> list[str]:
    """Draws the name of each line at its end."""
    return [text(x.at(one.x[-1]) + 8, y.at(one.y[-1]) + 4, one.name) for one in series]
