"""Draws bars side by side in groups, with a dot for each result that they are the mean of, such as those of seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from infctx.figures.axes import Placed, value_text
from infctx.figures.colors import style_classes
from infctx.figures.figure import Bars
from infctx.figures.svg import BELOW_PLOT, LETTER, document, draw_levels, frame, legend, plot_box, text, vertical_axis

FILLED = 0.8
"""The part of a group's place that its bars take."""


def draw_bars(figure: Bars) -> str:
    """Returns the figure as SVG."""
    values = [value for bar in figure.bars for value in bar.values if value is not None]
    dots = [dot for bar in figure.bars for group in bar.dots for dot in group]
    y = vertical_axis(figure.y._replace(include=(0.0, *figure.y.include)), [*values, *dots])
    box = plot_box([y.label(tick) for tick in y.ticks])
    place = (box.right - box.left) / max(len(figure.groups), 1)
    parts = frame(None, y, box)
    for number, name in enumerate(figure.groups):
        most = max(3, int(place / LETTER))
        shown = name if len(name) <= most else f"{name[: most - 2]}.."
        middle = box.left + place * (number + 0.5)
        parts.append(text(middle, box.bottom + 17, shown, "soft", "middle", name if shown != name else ""))
        parts += _draw_group(figure, number, y, middle - place * FILLED / 2, place * FILLED)
    parts += draw_levels(figure.levels, y, box)
    top = box.bottom + BELOW_PLOT - 16
    names, tall = legend([(bar.name, bar.style) for bar in figure.bars], figure.levels, top, is_area=True)
    return document(figure.title, top + tall + 6, [*parts, *names])


def _draw_group(figure: Bars, group: int, y: Placed, left: float, width: float) -> Iterator[str]:
    wide = width / max(len(figure.bars), 1)
    for number, bar in enumerate(figure.bars):
        value = bar.values[group]
        x = left + wide * number
        if value is None or not math.isfinite(value):
            continue
        top, zero = y.at(value), y.at(0)
        said = f"{figure.groups[group]}, {bar.name}: {value_text(value)} {figure.y.unit}".strip()
        yield (
            f'<rect class="{style_classes(bar.style)[1]}" x="{x + 1:.1f}" y="{top:.1f}" width="{max(wide - 2, 1):.1f}" '
            f'height="{max(zero - top, 1):.1f}" rx="1.5"><title>{escape(said)}</title></rect>'
        )
        dots = bar.dots[group] if bar.dots else ()
        if wide >= 20 and top - 16 > 40:
            highest = min([top, *(y.at(dot) for dot in dots)])
            yield text(x + wide / 2, highest - 6, _short(value), "soft", "middle")
        for place, dot in enumerate(dots):
            at = x + wide * (place + 1) / (len(dots) + 1)
            named = f"<title>{value_text(dot)}</title>"
            yield f'<circle class="dot" cx="{at:.1f}" cy="{y.at(dot):.1f}" r="2.5">{named}</circle>'


def _short(value: float) -> str:
    """Returns a number with three digits, which fit on a bar."""
    return f"{value:.1f}".removesuffix(".0") if 1 <= abs(value) < 1000 else value_text(float(f"{value:.2g}"))
