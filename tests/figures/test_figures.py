"""Figures: round ticks, places on axes, and SVG that says every number."""

import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree

import pytest

from infctx.figures.axes import place_axis, tokens_text, value_text
from infctx.figures.colors import CIVIDIS, DARK, LIGHT, cell_color, dash, marker
from infctx.figures.draw import draw_alone
from infctx.figures.figure import Axis, Bar, Bars, Grids, Level, Lines, Panel, Series, rounded

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def titles(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}title")]


@pytest.mark.parametrize("scale", ["linear", "log", "tokens"])
def test_ticks_are_round_few_and_around_all_numbers(scale):
    draw = random.Random(7)
    for _ in range(300):
        size = 10 ** draw.uniform(-7, 9) if scale != "tokens" else 10 ** draw.uniform(1, 6)
        values = [size * draw.uniform(0.5, 3) ** draw.choice((1, 4)) for _ in range(draw.choice((1, 2, 9)))]
        axis = place_axis(Axis("any", scale=scale), values, 300, 20, 5)
        assert axis.low <= min(values) and max(values) <= axis.high
        assert 2 <= len(axis.ticks) <= 8 or scale == "log"
        assert 1 <= len(axis.ticks) <= 9
        labels = [axis.label(tick) for tick in axis.ticks]
        assert len(set(labels)) == len(labels) and max(map(len, labels)) <= 9, labels
        assert all(20 - 1e-6 <= axis.at(value) <= 300 + 1e-6 for value in values)
        for tick, label in zip(axis.ticks, labels, strict=True):  # a label is its number, in full
            unit = {"k": 1 << 10 if scale == "tokens" else 1e3, "M": 1 << 20 if scale == "tokens" else 1e6}
            number = float(label.rstrip("kM").replace(",", "")) * unit.get(label[-1], 1)
            assert math.isclose(number, tick, rel_tol=1e-6)
        if scale == "linear":
            step = axis.ticks[1] - axis.ticks[0]
            assert f"{step:.3e}"[:5] in ("1.000", "2.000", "2.500", "5.000")
        else:
            assert {f"{tick:.3e}"[:5] for tick in axis.ticks} <= {"1.000", "2.000", "5.000"} or scale == "tokens"
            assert all(math.log2(tick).is_integer() for tick in axis.ticks) or scale == "log"


@pytest.mark.parametrize(
    "values",
    [[5.00000001, 5.00000009], [0.001] * 3, [0.0, 0.0], [1e-12, 1.0], [-3.0, 1e6], [1e300, 1.0], [7, 7 + 1e-14]],
)
def test_narrow_and_wide_ranges_have_labels_that_differ(values):
    axis = place_axis(Axis("any"), values, 300, 20, 5)
    labels = [axis.label(tick) for tick in axis.ticks]
    assert 2 <= len(labels) == len(set(labels)), labels
    assert axis.low <= min(values) and max(values) <= axis.high


def test_an_axis_goes_from_one_end_to_the_other():
    axis = place_axis(Axis("step"), [0, 100], 50, 400, 5)
    assert (axis.ticks, axis.at(0), axis.at(50), axis.at(100)) == ([0, 20, 40, 60, 80, 100], 50, 225, 400)
    tokens = place_axis(Axis("position", scale="tokens"), [256, 65536], 0, 8, 4)
    assert [tokens.label(tick) for tick in tokens.ticks] == ["1k", "8k", "64k"] and tokens.at(4096) == pytest.approx(4)
    assert place_axis(Axis("share", most=100.0, include=(0.0, 100.0)), [37], 1, 0, 5).high == 100


def test_numbers_for_people():
    assert [tokens_text(number) for number in (1, 512, 1024, 1536, 131072, 1 << 20)] == [
        "1", "512", "1k", "1,536", "128k", "1M",
    ]  # fmt: skip
    assert [value_text(number) for number in (0.0, 1.23456, 1234567, 1234.5, math.inf)] == [
        "0", "1.235", "1,234,567", "1,234", "inf",
    ]  # fmt: skip
    assert rounded([1.23456789, 3.0, math.nan, None]) == [1.23457, 3, None, None]


def test_styles_never_look_alike_before_many_lines():
    looks = {(style % len(LIGHT), dash(style), marker(style)) for style in range(35)}
    assert len(looks) == 35
    assert len(set(LIGHT)) == len(set(DARK)) == 7
    assert cell_color(0)[0] == "#{:02x}{:02x}{:02x}".format(*CIVIDIS[0]) and cell_color(0)[1] == "#ffffff"
    assert cell_color(2)[0] == cell_color(1)[0] and cell_color(1)[1] == "#000000"


def test_lines_say_their_axes_names_and_numbers():
    a, b = "a & b", "<script>"
    series = [
        Series(a, [256, 1024, 4096], [3.0, 2.5, 2.25], 0, [2.9, 2.4, 2.2], [3.1, 2.6, 2.3]),
        Series(b, [256, 1024, 4096], [3.5, 3.25, 3.0], 1),
    ]
    x, y = Axis("position", "tokens", "tokens"), Axis("loss", "bits per byte")
    figure = Lines("loss", "Loss <by> position", x, y, series, [Level(2.0, "the best known")], "A note.")
    svg = draw_alone(figure)
    shown = texts(svg)
    assert {"Loss <by> position", "loss (bits per byte)", "position (tokens)", a, b, "the best known"} <= set(shown)
    assert shown.count(a) == 2  # in the legend and at the end of its line
    assert f"{a}: position 1,024, 2.5 bits per byte (2.4 to 2.6)" in titles(svg)
    assert "<script>" not in svg and "prefers-color-scheme: dark" in svg
    numbers = json.loads(json.dumps(figure.numbers()))
    assert numbers["series"][1] == {"name": b, "x": [256, 1024, 4096], "y": [3.5, 3.25, 3]}
    assert numbers["series"][0]["low"] == [2.9, 2.4, 2.2] and numbers["note"] == "A note."


def test_what_is_no_number_is_left_out():
    nan = math.nan
    band = Series("a", [1, 2, nan, 4], [nan, 2, 3, 4], 0, [1, nan, 1, 1], [1, math.inf, 3, 5], places=list("pqrs"))
    assert band.finite() == ("a", [2, 4], [2, 4], 0, [2, 1], [2, 5], False, ["q", "s"])
    figures = [
        Lines("l", "L", Axis("x"), Axis("y"), [band, Series("b", [1], [nan], 1)]),
        Bars("b", "B", Axis("y"), ["g"], [Bar("a", [nan]), Bar("b", [1.0])]),
        Grids("g", "G", Axis("r"), Axis("c"), Axis("v"), [Panel("", ["r"], ["c", "d"], [[nan, 1.0]])]),
    ]
    for figure in figures:
        assert not re.search(r"\b(nan|inf)\b", draw_alone(figure))
        json.dumps(figure.numbers(), allow_nan=False)
    assert "b" not in texts(draw_alone(figures[0]))


def test_many_points_have_few_markers_and_bands():
    steps = list(range(1, 401))
    band = Series("run", steps, [1 / step for step in steps], 0, [0.0] * 400, [1.0] * 400, is_band=True)
    svg = draw_alone(Lines("loss", "Loss", Axis("step"), Axis("loss"), [band]))
    root = ElementTree.fromstring(svg)
    assert len([element for element in root.iter(f"{SVG}path") if element.get("class") == "band f0"]) == 1
    assert len(titles(svg)) <= 100 and any("step 400" in title for title in titles(svg))
    assert "run" not in texts(svg)  # one line needs no legend


def test_bars_and_grids_say_every_number():
    bars = [Bar("exact", [97.5, None], 0, [[95.0, 100.0], []]), Bar("truncated", [6.25, 7.0], 1)]
    percent = Axis("right answers", "%", include=(0.0, 100.0), most=100.0)
    figure = Bars("recall", "Recall", percent, ["Finch", "Goose"], bars, [Level(6.25, "guessing")])
    svg = draw_alone(figure)
    assert {"Finch, exact: 97.5 %", "Goose, truncated: 7 %", "95", "100"} <= set(titles(svg))
    assert {"Finch", "Goose", "exact", "truncated", "guessing"} <= set(texts(svg))
    assert figure.numbers()["bars"][0] == {"name": "exact", "values": [97.5, None], "dots": [[95, 100], []]}

    panel = Panel("goose", ["0%", "50%"], ["1k", "2k", "4k"], [[100, 90, None], [80, 70, 60]])
    grid = Grids("needle", "Needles", Axis("depth"), Axis("length"), Axis("right", "%"), [panel], 0, 100)
    svg = draw_alone(grid)
    assert "goose: depth 50%, length 4k: 60 %" in titles(svg) and len(titles(svg)) == 5
    assert {"100", "90", "80", "70", "60", "1k", "4k", "0%", "50%"} <= set(texts(svg))
    assert grid.numbers()["panels"][0]["cells"] == [[100, 90, None], [80, 70, 60]]

    norms = [Panel("", ["0"], ["1k", "2k", "4k"], [[1.0, 100.0, 10_000.0]])]
    svg = draw_alone(Grids("n", "Norm", Axis("r"), Axis("c"), Axis("norm", scale="log"), norms, 1.0, 10_000.0))
    assert all(cell_color(part)[0] in svg for part in (0, 0.5, 1)) and "norm, logarithmic" in texts(svg)
