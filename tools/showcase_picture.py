"""The showcase's results (tools/showcase.py) in; a table, a picture and what they come to out.

    python tools/showcase_picture.py      draws docs/showcase.svg again, from the results in docs/showcase.json

Results are {"date", "commit", "steps", "runs"}; a run has its version, arm, seed, right, asked, cpu_seconds, and its
losses, each the mean of `steps_of_a_point` steps.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from infctx.data.synthetic_tasks import VALUES
from infctx.model.sizes import NAMES
from infctx.small_texts import counted

ROOT = Path(__file__).parents[1]
RESULTS, PICTURE = ROOT / "docs" / "showcase.json", ROOT / "docs" / "showcase.svg"
PAGES = (ROOT / "README.md", ROOT / "docs" / "evidence.md")
MARKS = ("<!-- made by tools/showcase.py -->\n", "<!-- end -->")
WORDS = {"exact": "exact", "truncated": "truncated at every segment", "no carry": "no carry between segments"}
# From Okabe and Ito's colors, which color-blind readers can distinguish; the dashes differ too.
STROKES = {"exact": ("#0072b2", ""), "truncated": ("#d55e00", "7 4"), "no carry": ("#64748b", "2 3")}
SAID = "Loss by step, for the exact gradient, the truncated one, and no carry"
GUESSING = math.log(VALUES)
MOST = 3.5  # nats: the first steps, which only learn that answers are values, are above the picture
INK, SOFT, PAPER, GRID = "#1f2933", "#64748b", "#ffffff", "#e2e8f0"
WIDTH, TALL, LEFT, TOP, BETWEEN, BOTTOM = 720, 190, 62, 66, 40, 140

STYLE = f"""
  text {{ font-family: ui-sans-serif, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: {INK};
    font-size: 13px; }}
  .bold {{ font-weight: 600; font-size: 15px; }} .soft {{ fill: {SOFT}; }} .right {{ text-anchor: end; }}
  polyline {{ fill: none; stroke-width: 1.8; }}
"""


def main() -> None:
    PICTURE.write_text(draw(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


def publish(results: dict[str, Any]) -> None:
    """Writes the results and the picture into docs/, and the table between the marks of the pages."""
    RESULTS.write_text(json.dumps(results) + "\n", encoding="utf-8")
    main()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(with_block(text, block_of(results, page)), encoding="utf-8")


def block_of(results: dict[str, Any], page: Path) -> str:
    """Returns what stands in a page: the picture, the table of right answers, and where they come from."""
    picture = PICTURE.relative_to(page.parent).as_posix()
    seeds = len({run["seed"] for run in results["runs"]})
    return (
        f"![{SAID}]({picture})\n\n{table(results)}\n\n"
        f"Right answers about new documents, by seed, after {results['steps']} steps ({counted(seeds, 'seed')}, "
        f"{results['date']}, commit {results['commit']}).\n"
    )


def with_block(text: str, block: str) -> str:
    """Returns a page with this block between its marks."""
    found = re.search(f"{re.escape(MARKS[0])}(.*?){re.escape(MARKS[1])}", text, re.S)
    assert found, f"a page has lost its marks: {MARKS[0]}"
    return f"{text[: found.start(1)]}{block}{text[found.end(1) :]}"


def table(results: dict[str, Any]) -> str:
    """Returns Markdown: right answers of every seed, by the gradient and the model."""
    versions = _versions(results)
    lines = [f"| gradient | {' | '.join(NAMES[version] for version in versions)} |", "|---|" + "---:|" * len(versions)]
    for arm in _arms(results):
        cells = [_percentages(results, version, arm) for version in versions]
        lines.append(f"| {WORDS[arm]} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"| guessing | {' | '.join([f'{1 / VALUES:.0%}'] * len(versions))} |"])


def describe(results: dict[str, Any]) -> str:
    """Returns what it took, and which runs are not as the showcase promises."""
    runs = results["runs"]
    others = [f"{NAMES[run['version']]}, {run['arm']}, seed {run['seed']}" for run in runs if not as_promised(run)]
    took = (
        f"{len(runs)} runs of {results['steps']} steps took {sum(run['cpu_seconds'] for run in runs):,.0f} CPU seconds"
    )
    promise = "exact at least 95% right, truncated and no carry at most 15%"
    return f"{took}\n{promise}: {'not ' + '; not '.join(others) if others else 'every run'}"


def as_promised(run: dict[str, Any]) -> bool:
    """Returns whether a run came out as the showcase says it does."""
    right = run["right"] / run["asked"]
    return right >= 0.95 if run["arm"] == "exact" else right <= 0.15


def draw(results: dict[str, Any]) -> str:
    """Returns the picture as SVG: the loss of every run by its steps, one panel for each model."""
    versions = _versions(results)
    wide = (WIDTH - LEFT - 24 - BETWEEN * (len(versions) - 1)) // len(versions)  # of a panel
    height = TOP + TALL + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{SAID}">',
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="{PAPER}"/>',
        _text(LEFT, 26, "To recall a fact, eight segments later", "bold"),
        f'<text transform="translate(18 {TOP + TALL / 2:.0f}) rotate(-90)" text-anchor="middle" class="soft">'
        "loss, nats per answer</text>",
    ]
    for place, version in enumerate(versions):
        parts += _panel(results, version, (LEFT + place * (wide + BETWEEN), wide), place == 0)
    parts += _legend(results, TOP + TALL + 62)
    made = f"made by make showcase, {results['date']}, commit {results['commit']}"
    parts.append(_text(WIDTH - 16, height - 10, made, "soft right"))
    return "\n".join([*parts, "</svg>", ""])


def _panel(results: dict[str, Any], version: int, place: tuple[int, int], has_numbers: bool) -> list[str]:
    """Returns the losses of a model's runs over their axes; place: where it begins, and how wide it is."""
    (left, wide), bottom, steps = place, TOP + TALL, results["steps"]
    parts = [_text(left, TOP - 12, NAMES[version], "bold")]
    for nats in range(4):
        y = _height(nats)
        parts.append(f'<path d="M{left} {y:.1f}h{wide}" stroke="{GRID}"/>')
        if has_numbers:
            parts.append(_text(left - 8, y + 4, str(nats), "soft right"))
    parts.append(f'<path d="M{left} {_height(GUESSING):.1f}h{wide}" stroke="{INK}" stroke-dasharray="1 3"/>')
    parts.append(_text(left + 4, _height(GUESSING) + 16, "guessing", "soft"))
    for step in (0, steps // 2, steps):
        anchor = "middle" if 0 < step < steps else "end" if step else "start"
        x = left + wide * step / steps
        parts.append(f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="{anchor}" class="soft">{step}</text>')
    parts.append(f'<text x="{left + wide / 2:.0f}" y="{bottom + 34}" text-anchor="middle" class="soft">steps</text>')
    for run in (run for run in results["runs"] if run["version"] == version):
        color, dashes = STROKES[run["arm"]]
        every = run["steps_of_a_point"]
        points = " ".join(
            f"{left + wide * min((i + 0.5) * every, steps) / steps:.1f},{_height(loss):.1f}"
            for i, loss in enumerate(run["losses"])
        )
        parts.append(f'<polyline points="{points}" stroke="{color}" stroke-dasharray="{dashes}"/>')
    return parts


def _legend(results: dict[str, Any], y: float) -> list[str]:
    """Returns a line for each way to train: its stroke, its name, and the right answers of each model."""
    parts = []
    for place, arm in enumerate(_arms(results)):
        color, dashes = STROKES[arm]
        here = y + 19 * place
        right = "; ".join(f"{NAMES[version]} {_percentages(results, version, arm)}" for version in _versions(results))
        parts.append(
            f'<path d="M{LEFT} {here - 4:.0f}h30" stroke="{color}" stroke-width="2.5" stroke-dasharray="{dashes}"/>'
        )
        parts.append(_text(LEFT + 38, here, f"{arm}: right answers {right}"))
    return parts


def _height(nats: float) -> float:
    return TOP + TALL * (1 - min(nats, MOST) / MOST)


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}">{text}</text>'


def _versions(results: dict[str, Any]) -> list[int]:
    return list(dict.fromkeys(run["version"] for run in results["runs"]))


def _arms(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["arm"] for run in results["runs"]))


def _percentages(results: dict[str, Any], version: int, arm: str) -> str:
    runs = [run for run in results["runs"] if (run["version"], run["arm"]) == (version, arm)]
    return ", ".join(f"{run['right'] / run['asked']:.0%}" for run in runs)


if __name__ == "__main__":
    main()
