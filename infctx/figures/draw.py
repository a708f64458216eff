"""A figure in; its SVG out: for a page, or for a separate file."""

from __future__ import annotations

from infctx.figures.bars import draw_bars
from infctx.figures.colors import figure_style
from infctx.figures.figure import Bars, Figure, Lines
from infctx.figures.grids import draw_grids
from infctx.figures.lines import draw_lines


def draw(figure: Figure) -> str:
    """Returns the figure as an SVG element of a page that has `figure_style`."""
    if isinstance(figure, Lines):
        return draw_lines(figure)
    return draw_bars(figure) if isinstance(figure, Bars) else draw_grids(figure)


def draw_alone(figure: Figure) -> str:
    """Returns the figure as an SVG file, light or dark as its reader's screen is."""
    head, end, rest = draw(figure).partition(">")
    width, height = head.partition('viewBox="0 0 ')[2].partition('"')[0].split()
    return f'{head} width="{width}" height="{height}"{end}\n<style>{figure_style()}</style>{rest}\n'
