"""Draws one window, docs/window.svg: segments, the states that cross the seams, and the gradient on its way back.

python tools/window_picture.py
"""

from __future__ import annotations

from pathlib import Path

PICTURE = Path(__file__).parents[1] / "docs" / "window.svg"
WIDTH, HEIGHT = 960, 372
LEFT, SEGMENT, GAP, SEGMENTS = 118, 150, 42, 4
TOP, TALL = 132, 92
INK, SOFT, PAPER = "#1f2933", "#64748b", "#ffffff"
FORWARD, BACKWARD = "#2563eb", "#d9480f"
DOCUMENTS = ("#dbeafe", "#dcfce7")
FIRST_DOCUMENT_ENDS = 0.3  # of the first segment

STYLE = f"""
  text {{ font-family: ui-sans-serif, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: {INK}; }}
  .label {{ font-size: 15px; }} .small {{ font-size: 13px; fill: {SOFT}; }} .bold {{ font-weight: 600; }}
"""


def draw() -> str:
    """Returns the picture as SVG."""
    middle = TOP + TALL / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="One window: the state goes forward over the seams, the gradient comes back over them">',
        f"<style>{STYLE}</style>",
        _arrowhead("forward", FORWARD),
        _arrowhead("backward", BACKWARD),
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{PAPER}"/>',
        _text(LEFT, 34, "One window of one lane: one optimizer step", "label bold"),
        *(_segment(number) for number in range(SEGMENTS)),
        *(_seam(number, middle) for number in range(SEGMENTS - 1)),
        _line(LEFT - 92, middle, LEFT - 4, "forward"),
        _line(_right(SEGMENTS - 1) + 4, middle, _right(SEGMENTS - 1) + 82, "forward"),
        _text(LEFT - 48, middle + 28, "carried in", "small", "middle"),
        _text(_right(SEGMENTS - 1) + 52, middle + 28, "carried on", "small", "middle"),
        _text(_right(SEGMENTS - 1) + 52, middle + 46, "(no gradient)", "small", "middle"),
        *_passes(),
    ]
    return "\n".join([*parts, "</svg>", ""])


def _left(number: int) -> float:
    return LEFT + number * (SEGMENT + GAP)


def _right(number: int) -> float:
    return _left(number) + SEGMENT


def _segment(number: int) -> str:
    """Draws a segment with its name, and its documents below."""
    x, cut = _left(number), 0 if number else SEGMENT * FIRST_DOCUMENT_ENDS
    band, tall = TOP + 34, TALL - 34
    parts = [
        f'<rect x="{x + cut}" y="{band}" width="{SEGMENT - cut}" height="{tall}" fill="{DOCUMENTS[1]}"/>',
        f'<rect x="{x}" y="{TOP}" width="{SEGMENT}" height="{TALL}" fill="none" stroke="{INK}"/>',
        _text(x + SEGMENT / 2, TOP + 23, f"segment {number + 1}", "label bold", "middle"),
    ]
    if number:
        return "\n".join([*parts, _text(x + SEGMENT / 2, band + 34, "document B", "small", "middle")])
    first = f'<rect x="{x}" y="{band}" width="{cut}" height="{tall}" fill="{DOCUMENTS[0]}"/>'
    names = [_text(x + cut / 2, band + 34, "A", "small", "middle")]
    names += [_text(x + (cut + SEGMENT) / 2, band + 26, "B, from the", "small", "middle")]
    names += [_text(x + (cut + SEGMENT) / 2, band + 43, "initial state", "small", "middle")]
    return "\n".join([first, *parts, *names])


def _seam(number: int, middle: float) -> str:
    """Draws the state and the gradient that cross a seam."""
    left, right = _right(number) + 4, _left(number + 1) - 4
    name = _text((left + right) / 2, TOP + 10, "seam", "small", "middle")
    return "\n".join([name, _line(left, middle, right, "forward"), _line(right, middle + 26, left, "backward")])


def _passes() -> list[str]:
    """Draws the names of the two passes, above and below, each with a long arrow in its direction."""
    begin, end = LEFT, _right(SEGMENTS - 1)
    above, below = TOP - 36, TOP + TALL + 42
    return [
        _text(begin, above - 22, "1  forward, without gradients: only the state at each seam is kept", "label"),
        _line(begin, above, end, "forward"),
        _line(end, below, begin, "backward"),
        _text(begin, below + 28, "2  backward, the last segment first: each is computed again from its seam;", "label"),
        _text(
            begin + 18,
            below + 50,
            "its activations are freed, and the gradient of its state is passed to the segment before",
            "label",
        ),
        _text(
            begin,
            below + 84,
            "blue: the state, one matrix a head and two vectors a layer   ·   orange: its gradient",
            "small",
        ),
    ]


def _line(x1: float, y: float, x2: float, way: str) -> str:
    color = {"forward": FORWARD, "backward": BACKWARD}[way]
    return f'<line x1="{x1}" y1="{y}" x2="{x2}" y2="{y}" stroke="{color}" stroke-width="2.5" marker-end="url(#{way})"/>'


def _arrowhead(name: str, color: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="5" markerHeight="5" orient="auto">'
        f'<path d="M0,0 L10,5 L0,10 Z" fill="{color}"/></marker>'
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{text}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(f"wrote {PICTURE}")
