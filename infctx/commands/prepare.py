"""infctx prepare"""

from __future__ import annotations

import argparse
from pathlib import Path

from infctx.arguments import count, number, seed
from infctx.documents.document import FORMATS, REPOSITORY, Reading
from infctx.documents.forms import ANSWERS
from infctx.documents.templates import HELP


def describe(parser: argparse.ArgumentParser) -> None:
    """Turn text into a token store."""
    parser.add_argument(
        "inputs",
        nargs="+",
        help=".txt, .md; .jsonl, .json, .csv, .tsv, .parquet with texts, prompts, instructions or chats; also .gz and "
        ".zst; folders, globs, - for stdin, token stores such as data/books/train, hf:OWNER/DATASET",
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
        help="share of the documents, or of the only one, to hold out, such as 0.02 (default: none)",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="what named files, standard input and files of any other suffix hold"
    )
    parser.add_argument("--text-column", metavar="NAME", help="the key or column with the text (default: text)")
    parser.add_argument(
        "--form",
        metavar="NAME",
        help="what the records hold, where their keys do not say: text, prompt (and completion), instruction (input, "
        "output), messages (role, content) or conversations (ShareGPT)",
    )
    parser.add_argument("--template", metavar="NAME", help=HELP)
    parser.add_argument(
        "--learn",
        default=ANSWERS,
        metavar="ROLES",
        help="what a model learns of chats, prompts and instructions: answers (default), all, or roles such as "
        "user,assistant; of other texts it learns everything",
    )
    parser.add_argument(
        "--encoding", metavar="NAME", help="of the files, such as cp1252 (default: UTF-8, or by their byte order mark)"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out files, lines and rows that cannot be read; list them"
    )
    parser.add_argument(
        "--join",
        choices=(REPOSITORY,),
        help="make one document of each folder: its text files under headings, without what .gitignore names",
    )
    parser.add_argument(
        "--from-tokenizer", choices=("world", "bytes"), help="which one made a token store that has no store.json"
    )
    _describe_hub(parser)
    parser.add_argument("--workers", type=count, help="processes that tokenize (default: all cores)")
    parser.add_argument("--seed", type=seed, default=0, help="chooses which documents are held out")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output folder once the new one is complete"
    )


def _describe_hub(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", help="of a dataset on the hub (default: train)")
    parser.add_argument("--config", help="of a dataset on the hub that holds several sets")
    parser.add_argument("--limit", type=count, metavar="DOCUMENTS", help="read only the first of them (default: all)")


def run(options: argparse.Namespace) -> None:
    from infctx.prepare.prepare import prepare

    reading = Reading(
        format=options.format,
        encoding=options.encoding,
        skip_bad=options.skip_bad,
        join=options.join,
        text_column=options.text_column,
        from_tokenizer=options.from_tokenizer,
        form=options.form,
        template=options.template,
        learn=options.learn,
        split=options.split,
        config=options.config,
        limit=options.limit,
    )
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
