"""infctx report and compare"""

from __future__ import annotations

import argparse
from pathlib import Path

from infctx.errors import InputError


def describe_report(parser: argparse.ArgumentParser) -> None:
    """Make one page of runs: curves, what they remember, settings that differ."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run's folder, also of one that is still going; or a file that infctx evaluate --output wrote",
    )
    parser.add_argument(
        "--join-seeds", action="store_true", help="show runs that differ in run.seed alone as one, with their range"
    )
    _describe_output(parser, "report.html")


def describe_compare(parser: argparse.ArgumentParser) -> None:
    """Make one page of two runs, with what differs between them first."""
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="a run's folder")
    _describe_output(parser, "compare.html")


def _describe_output(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path(default), metavar="FILE.html", help="the page (default %(default)s)"
    )
    parser.add_argument(
        "--figures",
        type=Path,
        metavar="FOLDER",
        help="folder for each figure as SVG, and its numbers as JSON (default: next to the page, with its name and "
        "_figures)",
    )


def report(options: argparse.Namespace) -> None:
    _write(options, differences_first=False, joins_seeds=options.join_seeds)


def compare(options: argparse.Namespace) -> None:
    from infctx.pages.differences import differences_of, first_difference, results_of
    from infctx.small_texts import aligned

    runs = _write(options, differences_first=True)
    names = ["", *(run.name for run in runs)]
    rows = [[row.name, *row.values] for row in [*differences_of(runs), *results_of(runs)]]
    print("\n".join([*aligned([names, *rows], "<" * len(names)), first_difference(*runs)]))


def _write(options: argparse.Namespace, differences_first: bool, joins_seeds: bool = False):  # noqa: ANN202  (the type would load pydantic)
    from infctx.pages.write import figures_beside, write_report

    if options.output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--output: {options.output} is no page; give it a name that ends in .html")
    figures = options.figures or figures_beside(options.output)
    runs = write_report(options.runs, options.output, figures, differences_first, joins_seeds)
    print(f"wrote {options.output}, and its figures in {figures}")
    return runs
