"""The parts that all figures are made of, as SVG: text, the frame with its axes, levels and the legend.

Sizes are in units of the viewBox, which is WIDTH wide: on a phone a unit is a little less than a pixel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from infctx.figures.axes import Placed, place_axis
from infctx.figures.colors import dash, marker, style_classes
from infctx.figures.figure import Axis, Level

WIDTH = 420
MARGIN = 14
LETTER = 6.5
"""Width of a letter of 12 pixels, on average; figures do not know the fonts of their readers."""
TOP = 58
PLOT_HEIGHT = 190
BELOW_PLOT = 44
LEGEND_ROW = 20
LONGEST_NAME = 44


class Box(NamedTuple):
    """The plot inside a figure."""

    left: float
    right: float
    top: float
    bottom: float


def document(title: str, height: float, parts: Iterable[str]) -> str:
    """Returns a figure as an SVG element."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="figure" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">'
    )
    ground = f'<rect class="paper" width="{WIDTH}" height="{height:.0f}" rx="6"/>'
    return "\n".join([head, ground, text(MARGIN, 22, title, "title"), *parts, "</svg>"])


def frame(x: Placed | None, y: Placed, box: Box, x_text: str = "") -> list[str]:
    """Draws both axes with their ticks and names; x: None for a figure with groups instead of numbers."""
    parts = [text(MARGIN, 42, y.axis.text, "soft")]
    for tick in y.ticks:
        place = y.at(tick)
        parts.append(line(box.left, place, box.right, place, "rule"))
        parts.append(text(box.left - 6, place + 4, y.label(tick), "soft", "end"))
    parts.append(line(box.left, box.bottom, box.right, box.bottom, "axis"))
    for tick in x.ticks if x else ():
        assert x is not None
        place, label = x.at(tick), x.label(tick)
        parts.append(line(place, box.bottom, place, box.bottom + 4, "axis"))
        over = place + LETTER * len(label) / 2 > WIDTH - 4
        parts.append(text(min(place, WIDTH - 4) if over else place, box.bottom + 17, label, "soft", _anchor(over)))
    name = x.axis.text if x else x_text
    return [*parts, text((box.left + box.right) / 2, box.bottom + 35, name, "soft", "middle")]


def _anchor(over: bool) -> str:
    return "end" if over else "middle"


def plot_box(labels: Sequence[str], right: float = MARGIN + 6) -> Box:
    """Returns the place of a plot whose vertical axis has these labels."""
    left = MARGIN + 6 + LETTER * max((len(label) for label in labels), default=1)
    return Box(left, WIDTH - right, TOP, TOP + PLOT_HEIGHT)


def vertical_axis(axis: Axis, values: Iterable[float]) -> Placed:
    return place_axis(axis, values, TOP + PLOT_HEIGHT, TOP, 5)


def draw_levels(levels: Sequence[Level], y: Placed, box: Box) -> list[str]:
    """Draws levels to compare with; the legend has their names."""
    return [line(box.left, y.at(level.value), box.right, y.at(level.value), "level") for level in levels]


def legend(
    entries: Sequence[tuple[str, int]], levels: Sequence[Level], top: float, is_area: bool = False
) -> tuple[list[str], float]:
    """Draws the names of the styles and of the levels from `top` on; returns it with its height."""
    parts, x, row = [], float(MARGIN), 0
    for name, style in [*entries, *((level.name, None) for level in levels)]:
        shown = short_name(name)
        wide = 34 + LETTER * len(shown) + 14
        if x > MARGIN and x + wide > WIDTH:
            x, row = float(MARGIN), row + 1
        y = top + row * LEGEND_ROW
        if style is None:
            parts.append(line(x, y + 9, x + 28, y + 9, "level"))
        else:
            parts.append(_sample(x, y, style, is_area))
        parts.append(text(x + 34, y + 13, shown, title=name if shown != name else ""))
        x += wide
    return parts, (row + 1) * LEGEND_ROW if parts else 0


def _sample(x: float, y: float, style: int, is_area: bool) -> str:
    """Draws what a style looks like."""
    stroke, fill = style_classes(style)
    if is_area:
        return f'<rect class="{fill}" x="{x + 8:.1f}" y="{y + 3:.1f}" width="16" height="11" rx="2"/>'
    dashes = f' stroke-dasharray="{dash(style)}"' if dash(style) else ""
    return f'<path class="line {stroke}"{dashes} d="M{x:.1f} {y + 9:.1f}h28"/>{draw_marker(x + 14, y + 9, style)}'


def draw_marker(x: float, y: float, style: int, title: str = "") -> str:
    """Draws the marker of a style."""
    shapes = {
        "circle": f"M{x - 3.5:.1f} {y:.1f}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
        "square": f"M{x - 3.2:.1f} {y - 3.2:.1f}h6.4v6.4h-6.4z",
        "triangle": f"M{x:.1f} {y - 4.4:.1f}l4.2 7.4h-8.4z",
        "diamond": f"M{x:.1f} {y - 4.8:.1f}l4.8 4.8l-4.8 4.8l-4.8 -4.8z",
        "cross": f"M{x - 4:.1f} {y - 1.4:.1f}h2.6v-2.6h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6z",
    }
    named = f"<title>{escape(title)}</title>" if title else ""
    return f'<path class="{style_classes(style)[1]}" d="{shapes[marker(style)]}">{named}</path>'


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "", title: str = "") -> str:
    classes = f' class="{kind}"' if kind else ""
    anchored = f' text-anchor="{anchor}"' if anchor else ""
    named = f"<title>{escape(title)}</title>" if title else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{classes}{anchored}>{escape(words)}{named}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def short_name(name: str, most: int = LONGEST_NAME) -> str:
    """Returns a name that fits; the end of a path says more than its beginning."""
    return name if len(name) <= most else f"...{name[3 - most :]}"
