"""The looks of figures, light and dark: colors that color-blind readers can distinguish, dashes and markers of lines.

Sources: M. Okabe, K. Ito, "Color Universal Design" (2002), the colors of lines; J. R. Nunez, C. R. Anderton,
R. S. Renslow, PLOS ONE 13(7), 2018, cividis, the colors of grids.
"""

from __future__ import annotations

LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Blue, vermillion, bluish green, reddish purple, orange, sky blue, black."""
DARK = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#FFFFFF")
"""The same set on a dark ground: sky blue, orange, bluish green, reddish purple, yellow, vermillion, white."""
DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")
MARKERS = ("circle", "square", "triangle", "diamond", "cross")

CIVIDIS = ((0, 34, 78), (67, 78, 108), (125, 124, 120), (188, 175, 111), (254, 232, 56))
"""Red, green and blue at 0, 1/4, 1/2, 3/4 and 1."""

INK, SOFT, RULE, PAPER = "#1f2933", "#52606d", "#d9dee4", "#ffffff"
DARK_INK, DARK_SOFT, DARK_RULE, DARK_PAPER = "#e6e9ed", "#a8b3bf", "#343b44", "#15191e"

FONT = 'system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif'


def figure_style() -> str:
    """Returns the CSS of every figure.  Without a screen, such as in print, it is the light one."""
    return f"""
.figure {{ font-family: {FONT}; }}
.figure text {{ font-size: 12px; }}
.figure .title {{ font-size: 14px; font-weight: 600; }}
.figure .band {{ stroke: none; opacity: .2; }}
.figure .line {{ fill: none; stroke-width: 1.8; stroke-linejoin: round; }}
.figure .error {{ stroke-width: 1.2; }}
.figure .level {{ stroke-width: 1.2; stroke-dasharray: 5 4; }}
.figure .hit {{ fill: transparent; stroke: none; }}
.figure .empty {{ fill: none; stroke-dasharray: 3 3; }}
{_colors(LIGHT, INK, SOFT, RULE, PAPER)}
@media screen and (prefers-color-scheme: dark) {{
{_colors(DARK, DARK_INK, DARK_SOFT, DARK_RULE, DARK_PAPER)}
}}"""


def _colors(lines: tuple[str, ...], ink: str, soft: str, rule: str, paper: str) -> str:
    rules = [
        f".figure text {{ fill: {ink}; }} .figure text.soft {{ fill: {soft}; }} .figure .paper {{ fill: {paper}; }}",
        f".figure .rule {{ stroke: {rule}; }} .figure .axis, .figure .level {{ stroke: {soft}; }}",
        f".figure .empty {{ stroke: {rule}; }} .figure .dot {{ fill: {paper}; stroke: {ink}; }}",
    ]
    for number, color in enumerate(lines):
        rules.append(f".figure .c{number} {{ stroke: {color}; }} .figure .f{number} {{ fill: {color}; }}")
    return "\n".join(rules)


def style_classes(style: int) -> tuple[str, str]:
    """Returns the classes that give the color of a style to a stroke, and to an area."""
    number = style % len(LIGHT)
    return f"c{number}", f"f{number}"


def dash(style: int) -> str:
    """Returns the dashes of a style; a color that comes again has others than before."""
    return DASHES[(style + style // len(LIGHT)) % len(DASHES)]


def marker(style: int) -> str:
    return MARKERS[(style + style // len(LIGHT)) % len(MARKERS)]


def cell_color(part: float) -> tuple[str, str]:
    """Returns the color of a part from 0 to 1 of the scale, and that of a text on it."""
    part = min(max(part, 0.0), 1.0) * (len(CIVIDIS) - 1)
    lower = min(int(part), len(CIVIDIS) - 2)
    mixed = [
        round(one + (other - one) * (part - lower))
        for one, other in zip(CIVIDIS[lower], CIVIDIS[lower + 1], strict=True)
    ]
    text = "#ffffff" if 0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2] < 118 else "#000000"
    return "#{:02x}{:02x}{:02x}".format(*mixed), text
