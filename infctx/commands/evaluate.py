"""infctx evaluate"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from infctx.arguments import count
from infctx.commands.options import (
    QUANTIZED,
    describe_adapter,
    describe_device,
    describe_model,
    describe_state,
    load_model,
    model_files,
)
from infctx.errors import InputError


def describe(parser: argparse.ArgumentParser) -> None:
    """Measure the loss on held-out documents, by position."""
    describe_model(parser)
    parser.add_argument("store", type=Path, help="a token store, such as data/books/held_out")
    parser.add_argument("--max-tokens", type=count, default=262144, help="tokens to evaluate (default %(default)s)")
    parser.add_argument(
        "--segment-tokens", type=count, default=1024, help="tokens computed at once (default %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="keep the table as JSON, as a run does")
    describe_state(parser)
    describe_adapter(parser)
    describe_device(parser)


def run(options: argparse.Namespace) -> None:
    from infctx.data.token_store import TokenStore, is_store
    from infctx.evaluate.loss_by_position import choose_documents, evaluate_store, format_table
    from infctx.evaluate.quantized import compare_with_stored
    from infctx.evaluate.record import Evaluation, write_record
    from infctx.formats.model_files import open_base

    if options.output and options.output.exists():
        raise InputError(f"{options.output}: exists; choose another name")
    if is_store(options.model) and not is_store(options.store):
        words = shlex.join(["infctx", "evaluate", str(options.store), str(options.model)])
        raise InputError(f"{options.model}: is a token store, and the model comes first; run {words}")
    store, files = TokenStore(options.store), model_files(options)
    model = load_model(options, files)
    buckets = evaluate_store(model, store, options.segment_tokens, options.max_tokens)
    print(format_table(buckets, str(store.path)))
    if options.dtype in QUANTIZED:
        reading = choose_documents(store, model.sizes.vocab_size, options.segment_tokens, options.max_tokens)
        print(compare_with_stored(model, open_base(files), [reading]))
    if options.output:
        evaluation = Evaluation(None, model.initial_wkv is not None, buckets)
        write_record(options.output, str(store.path), options.max_tokens, [evaluation])
