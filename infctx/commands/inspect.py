"""infctx inspect"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from infctx.arguments import count, whole


def describe(parser: argparse.ArgumentParser) -> None:
    """Show what is in a token store, and what a model learns of it."""
    parser.add_argument("store", type=Path, help="a token store, such as data/books/train")
    parser.add_argument(
        "--document", type=whole, metavar="N", help="show document N (from 0), with what is learned in color"
    )
    parser.add_argument(
        "--first", type=whole, default=2000, metavar="TOKENS", help="tokens of it to show (default %(default)s; 0: all)"
    )
    parser.add_argument(
        "--window-tokens", type=count, nargs="+", metavar="TOKENS", help="windows to compare the documents with"
    )
    parser.add_argument("--tokenizer", choices=("world", "bytes"), help="for a store that does not name its own")


def run(options: argparse.Namespace) -> None:
    from infctx.data.token_store import TokenStore
    from infctx.prepare.inspect import WINDOWS, describe_store, show_document

    store = TokenStore(options.store)
    if options.document is None:
        print(describe_store(store, options.window_tokens or WINDOWS))
        return
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(show_document(store, options.document, options.first, options.tokenizer, color))
