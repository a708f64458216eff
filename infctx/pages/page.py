"""The page: runs and their figures in; HTML that needs no network, no script and no other file out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape

from infctx.figures.colors import DARK_INK, DARK_PAPER, DARK_RULE, DARK_SOFT, FONT, INK, PAPER, RULE, SOFT, figure_style
from infctx.figures.draw import draw
from infctx.figures.figure import Figure
from infctx.pages.differences import Row, differences_of, first_difference, results_of
from infctx.pages.run_folder import RunFolder
from infctx.report.starts import Start
from infctx.version import __version__

GENERATOR = "infctx report"
"""The page says that it was made by this, so that a new report may replace it."""

STYLE = f"""
:root {{ color-scheme: light dark; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 16px; max-width: 1360px; font: 15px/1.5 {FONT}; color: {INK}; background: {PAPER}; }}
h1 {{ font-size: 24px; margin: 8px 0; overflow-wrap: anywhere; }} h2 {{ font-size: 19px; margin: 28px 0 8px; }}
h3 {{ font-size: 15px; margin: 16px 0 4px; overflow-wrap: anywhere; }}
p, ul {{ margin: 6px 0; }} .soft, figcaption {{ color: {SOFT}; }} figcaption {{ font-size: 13px; padding: 2px 14px; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: 16px; }}
figure {{ margin: 0; border: 1px solid {RULE}; border-radius: 8px; break-inside: avoid; align-self: start; }}
figure svg {{ display: block; width: 100%; height: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; }}
th, td {{ text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid {RULE}; vertical-align: top;
  overflow-wrap: anywhere; }}
th {{ font-weight: 600; }} tbody th {{ font-weight: 400; }}
pre, .wide {{ overflow-x: auto; }}
pre {{ font-size: 12.5px; border: 1px solid {RULE}; border-radius: 8px; padding: 10px; }}
summary {{ cursor: pointer; }}
@media (min-width: 641px) {{ table {{ table-layout: fixed; }} th:first-child {{ width: 28%; }} }}
@media (max-width: 640px) {{
  body {{ padding: 10px; }} pre {{ white-space: pre-wrap; }} thead, td:empty {{ display: none !important; }}
  table {{ min-width: 0 !important; }} tr {{ display: block; padding: 6px 0; }}
  tr, tbody th {{ border-bottom: 0; }} tbody th {{ display: block; padding: 0; font-weight: 600; }}
  td {{ display: flex; gap: 10px; justify-content: space-between; padding: 3px 0; }}
  td::before {{ content: attr(data-of); color: {SOFT}; flex: 0 1 45%; overflow-wrap: anywhere; }}
}}
@media screen and (prefers-color-scheme: dark) {{
  body {{ color: {DARK_INK}; background: {DARK_PAPER}; }} .soft, figcaption {{ color: {DARK_SOFT}; }}
  figure, pre, th, td {{ border-color: {DARK_RULE}; }} td::before {{ color: {DARK_SOFT}; }}
}}
@media print {{
  h2, h3 {{ break-after: avoid; }} body {{ max-width: none; }} pre {{ white-space: pre-wrap; }}
  .figures {{ grid-template-columns: 1fr 1fr; }}
}}
"""
MOST_COLUMNS = 6
"""A table of more runs is wider than the page, and scrolls."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Nothing is loaded, whatever a name in a log may try."""


def page_of(runs: Sequence[RunFolder], groups: Sequence[tuple[str, Sequence[Figure]]], differences_first: bool) -> str:
    """Returns the page; groups: headings, each with its figures."""
    title = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    shown = "".join(_group(heading, figures) for heading, figures in groups if figures)
    results, differences = _table("Results", results_of(runs), runs), _differences(runs)
    parts = [differences, results, shown] if differences_first else [results, shown, differences]
    today = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    body = "\n".join(
        [f"<h1>{escape(title)}</h1>", _notes(runs), *parts, "<h2>Plan, machine and settings</h2>", *map(_details, runs)]
    )
    figures = [figure for _, its in groups for figure in its]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{GENERATOR}">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>infctx: {escape(title)}</title>
<style>{STYLE}{figure_style()}</style>
</head>
<body>
{body}
<p class="soft">Made by infctx {escape(__version__)} on {today}. The numbers of each figure are in this page as
JSON, in script elements of type application/json, and rest under the pointer.</p>
{"".join(map(_numbers, figures))}
</body>
</html>
"""


def _group(heading: str, figures: Sequence[Figure]) -> str:
    shown = "\n".join(
        f'<figure id="{escape(figure.name)}">\n{draw(figure)}\n'
        f"{f'<figcaption>{escape(figure.note)}</figcaption>' if figure.note else ''}</figure>"
        for figure in figures
    )
    return f'<h2>{escape(heading)}</h2>\n<div class="figures">\n{shown}\n</div>\n'


def _numbers(figure: Figure) -> str:
    """Returns a figure's numbers as a script element, which is data and never runs."""
    text = json.dumps(figure.numbers(), separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="numbers-{escape(figure.name)}">{text}</script>\n'


def _notes(runs: Sequence[RunFolder]) -> str:
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    return f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else ""


def _differences(runs: Sequence[RunFolder]) -> str:
    if len(runs) < 2:
        return ""
    rows = differences_of(runs)
    known = sum(bool(run.settings) for run in runs) > 1
    none = "<p>None.</p>" if known else "<p>The settings of the runs are unknown.</p>"
    table = _table("What differs", rows, runs) or f"<h2>What differs</h2>{none}"
    said = f"<p>{escape(first_difference(*runs))}</p>" if len(runs) == 2 else ""
    return table + said


def _table(heading: str, rows: Sequence[Row], runs: Sequence[RunFolder]) -> str:
    if not rows:
        return ""
    names = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    lines = [
        f"<tr><th>{escape(row.name)}</th>"
        + "".join(
            f'<td data-of="{escape(run.name)}">{escape(value)}</td>'
            for run, value in zip(runs, row.values, strict=True)
        )
        + "</tr>"
        for row in rows
    ]
    body = "\n".join(lines)
    wide = f' style="min-width: {180 * len(runs)}px"' if len(runs) > MOST_COLUMNS else ""
    head = f"<thead><tr><th></th>{names}</tr></thead>"
    return f'<h2>{escape(heading)}</h2>\n<div class="wide"><table{wide}>{head}\n<tbody>{body}</tbody></table></div>\n'


def _details(run: RunFolder) -> str:
    """Returns the plan, the environment and all settings of a run."""
    parts = [f"<h3>{escape(str(run.path))}</h3>"]
    if run.starts:
        plan, starts = "\n".join(run.starts[-1].plan), "\n".join(map(_start, run.starts))
        parts.append(f"<pre>{escape(plan)}</pre>" if plan else "")
        parts.append(f"<pre>{escape(starts)}</pre>")
    elif run.path.is_dir():
        parts.append('<p class="soft">It is not known on what machine this run was started.</p>')
    if run.settings:
        lines = [
            f"{section}.{name}={json.dumps(value, default=str)}"
            for section, its in run.settings.items()
            for name, value in its.items()
        ]
        parts.append(f"<details><summary>All settings</summary><pre>{escape(chr(10).join(lines))}</pre></details>")
    return "\n".join(parts)


def _start(start: Start) -> str:
    ranks = f"{start.ranks} ranks, " if start.ranks > 1 else ""
    commit = f", commit {start.commit}" if start.commit else ""
    return (
        f"from step {start.from_step:,}, {start.at}: {ranks}{start.device}, {start.system}, "
        f"infctx {start.infctx}{commit}, torch {start.torch}, Python {start.python}"
    )
