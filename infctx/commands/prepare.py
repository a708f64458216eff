"""infctx prepare"""

from __future__ import annotations

import argparse
from pathlib import Path

from infctx.arguments import count, number, seed


def describe(parser: argparse.ArgumentParser) -> None:
    """Turn text into a token store."""
    parser.add_argument(
        "inputs", nargs="+", help=".txt, .md, .jsonl (key text), also .gz and .zst; folders, globs, - for stdin"
    )
    parser.add_argument("--output", required=True, type=Path, help="new folder for the stores train and held_out")
    parser.add_argument(
        "--tokenizer",
        choices=("world", "bytes"),
        default="world",
        help="world for the published models, bytes for small ones (default %(default)s)",
    )
    parser.add_argument(
        "--held-out",
        type=number,
        default=0.0,
        metavar="FRACTION",
        help="share of the documents to hold out, such as 0.02 (default: none)",
    )
    parser.add_argument(
        "--format", choices=("text", "jsonl"), help="what standard input and files of any other suffix hold"
    )
    parser.add_argument("--text-column", metavar="NAME", help="the key or column with the text (default: text)")
    parser.add_argument("--workers", type=count, help="processes (default: all cores)")
    parser.add_argument("--seed", type=seed, default=0, help="chooses which documents are held out")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output folder once the new one is complete"
    )


def run(options: argparse.Namespace) -> None:
    from infctx.documents.document import Reading
    from infctx.prepare.prepare import prepare

    reading = Reading(format=options.format, text_column=options.text_column)
    summary = prepare(
        options.inputs,
        options.output,
        tokenizer=options.tokenizer,
        held_out=options.held_out,
        reading=reading,
        workers=options.workers,
        seed=options.seed,
        overwrite=options.overwrite,
    )
    print(summary)
