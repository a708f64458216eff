"""Writes reports: the folders of runs in; a page, and a folder with each figure as SVG and its numbers as JSON, out."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from infctx.errors import InputError
from infctx.figures.draw import draw_alone
from infctx.figures.figure import Figure
from infctx.files import atomic_file
from infctx.pages.measures import measure_figures
from infctx.pages.page import GENERATOR, page_of
from infctx.pages.run_folder import RunFolder, read_run, read_runs
from infctx.pages.seeds import join_seeds
from infctx.pages.training import training_figures

REPORT = "report.html"
"""The page that a run writes into its folder at its end."""
HEAD_BYTES = 1000

log = logging.getLogger(__name__)


def write_report(
    paths: Sequence[Path],
    output: Path,
    figures_folder: Path | None = None,
    differences_first: bool = False,
    joins_seeds: bool = False,
) -> list[RunFolder]:
    """Writes the report of runs; returns them.

    joins_seeds:    whether figures show runs that differ in their seed alone as one
    figures_folder: for the figures; None: `figures_beside` the page
    Raises InputError for a path that is no run, and for a file at `output` that is not a report.
    """
    _refuse_output(output)
    runs = read_runs(paths)
    groups = figures_of(runs)
    if joins_seeds:
        groups = [(heading, join_seeds(runs, figures)) for heading, figures in groups]
    _write(output, page_of(runs, groups, differences_first))
    folder = figures_folder or figures_beside(output)
    for figure in (figure for _, figures in groups for figure in figures):
        _write(folder / f"{figure.name}.svg", draw_alone(figure))
        _write(folder / f"{figure.name}.json", json.dumps(figure.numbers(), indent=1) + "\n")
    return runs


def figures_beside(output: Path) -> Path:
    """Returns the folder for a page's figures, next to the page."""
    return output.with_name(f"{output.stem}_figures")


def write_own_report(folder: Path) -> Path | None:
    """Writes the report of a run into its folder, as the run's last work; returns the page, None with one line in the
    log if it cannot be written."""
    try:
        runs = [read_run(folder, folder.name)]
        _write(folder / REPORT, page_of(runs, figures_of(runs), differences_first=False))
    except Exception as error:  # whatever it is, the run is worth more
        why = " ".join(str(error).split()) or type(error).__name__
        log.warning("%s: not written (%s); infctx report %s makes it", folder / REPORT, why, folder)
        return None
    return folder / REPORT


def figures_of(runs: Sequence[RunFolder]) -> list[tuple[str, Sequence[Figure]]]:
    """Returns all figures of runs, under their headings."""
    return [("What it remembers", measure_figures(runs)), ("Training", training_figures(runs))]


def _refuse_output(output: Path) -> None:
    if output.is_dir():
        raise InputError(f"{output}: is a folder; name a file, such as {output / REPORT}")
    if output.is_file():
        with output.open("rb") as file:
            if f'content="{GENERATOR}"'.encode() not in file.read(HEAD_BYTES):
                raise InputError(f"{output}: exists, and is no report that infctx wrote; choose another name")


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
