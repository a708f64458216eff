"""Draws grids of cells, each in the color of its value and with its number, one grid below another."""

from __future__ import annotations

import math
from html import escape

from infctx.figures.axes import value_text
from infctx.figures.colors import cell_color
from infctx.figures.figure import Grids, Panel
from infctx.figures.svg import LETTER, MARGIN, WIDTH, document, text

ROW, MOST_ROWS = 24, 12
"""Height of a row; of more rows each is lower, and has no numbers in its cells."""
TITLE = 24


def draw_grids(figure: Grids) -> str:
    """Returns the figure as SVG."""
    parts = [text(MARGIN, 42, f"rows: {figure.rows.text}", "soft")]
    top = 52.0
    for panel in figure.panels:
        drawn, tall = _draw_panel(figure, panel, top)
        parts += drawn
        top += tall
    parts.append(text(WIDTH / 2, top + 2, f"columns: {figure.columns.text}", "soft", "middle"))
    scale, tall = _draw_scale(figure, top + 12)
    return document(figure.title, top + 12 + tall, [*parts, *scale])


def _draw_panel(figure: Grids, panel: Panel, top: float) -> tuple[list[str], float]:
    """Draws a grid; returns it with its height."""
    left = MARGIN + 6 + LETTER * max((len(row) for row in panel.rows), default=1)
    wide = (WIDTH - MARGIN - left) / max(len(panel.columns), 1)
    tall = ROW if len(panel.rows) <= MOST_ROWS else max(6.0, ROW * MOST_ROWS / len(panel.rows))
    parts = [text(MARGIN, top + 15, panel.title)] if panel.title else []
    begin = top + (TITLE if panel.title else 4)
    for number, row in enumerate(panel.rows):
        y = begin + tall * number
        if number % math.ceil(14 / tall) == 0:
            parts.append(text(left - 6, y + tall / 2 + 4, row, "soft", "end"))
        for column, value in enumerate(panel.cells[number]):
            parts.append(_cell(figure, panel, (number, column), value, (left + wide * column, y, wide, tall)))
    end = begin + tall * len(panel.rows)
    every = math.ceil((LETTER * max((len(name) for name in panel.columns), default=1) + 6) / wide)
    for column, name in enumerate(panel.columns):
        if column % every == 0:
            parts.append(text(left + wide * (column + 0.5), end + 15, name, "soft", "middle"))
    return parts, end - top + 26


def _cell(
    figure: Grids,
    panel: Panel,
    place: tuple[int, int],
    value: float | None,
    where: tuple[float, float, float, float],
) -> str:
    x, y, wide, tall = where
    size = f'x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{wide - 1:.1f}" height="{tall - 1:.1f}"'
    if value is None or not math.isfinite(value):
        return f'<rect class="empty" {size}/>'
    color, ink = cell_color(_part(figure, value))
    row, column = place
    said = f"{panel.title}: {figure.rows.label} {panel.rows[row]}, {figure.columns.label} {panel.columns[column]}: "
    said += f"{value_text(value)} {figure.value.unit}"
    shown, number = _short(value), ""
    if tall == ROW and wide >= LETTER * len(shown) + 4:
        middle = f'x="{x + wide / 2:.1f}" y="{y + tall / 2 + 4:.1f}" text-anchor="middle"'
        number = f'<text {middle} style="fill:{ink}">{shown}</text>'
    return f'<g><title>{escape(said.strip())}</title><rect {size} fill="{color}"/>{number}</g>'


def _part(figure: Grids, value: float) -> float:
    """Returns where a value is on the scale of colors, from 0 to 1; on a logarithmic one by its logarithm."""
    low, high = figure.low, figure.high
    if figure.value.scale == "log":
        low, high, value = (math.log(max(number, 1e-300)) for number in (low, high, value))
    return (value - low) / ((high - low) or 1.0)


def _short(value: float) -> str:
    """Returns a number that fits in a cell."""
    if value == int(value) or abs(value) >= 10:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 0.01 else f"{value:.0e}".replace("e-0", "e-")


def _draw_scale(figure: Grids, top: float) -> tuple[list[str], float]:
    """Draws the scale of the colors with its two ends."""
    left, wide, steps = WIDTH / 2 - 60, 120, 24
    parts = [
        f'<rect x="{left + wide * step / steps:.1f}" y="{top + 4:.1f}" width="{wide / steps + 0.5:.1f}" height="10" '
        f'fill="{cell_color(step / (steps - 1))[0]}"/>'
        for step in range(steps)
    ]
    parts.append(text(left - 6, top + 13, value_text(figure.low), "soft", "end"))
    parts.append(text(left + wide + 6, top + 13, value_text(figure.high), "soft"))
    scale = ", logarithmic" if figure.value.scale == "log" else ""
    parts.append(text(WIDTH / 2, top + 30, f"{figure.value.text}{scale}", "soft", "middle"))
    return parts, 40
