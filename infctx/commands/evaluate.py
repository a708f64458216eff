"""infctx evaluate"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from infctx.arguments import count, counts, seed
from infctx.commands.options import (
    MODEL,
    QUANTIZED,
    describe_adapter,
    describe_device,
    describe_state,
    load_model,
    model_files,
)
from infctx.errors import InputError
from infctx.measures import MEASURES
from infctx.small_texts import quoted

if TYPE_CHECKING:
    from infctx.formats.model_files import ModelFiles


def describe(parser: argparse.ArgumentParser) -> None:
    """Measure what models remember of held-out documents: loss by position, reach, forgetting, recall, needles."""
    parser.add_argument("model", type=Path, nargs="+", help=f"{MODEL}; several are compared with the first")
    parser.add_argument("store", type=Path, help="a token store, such as data/books/held_out")
    parser.add_argument(
        "--what",
        type=names_of_measures,
        default=["positions"],
        metavar="NAME,NAME",
        help=f"what to measure: {', '.join(MEASURES)} (default positions); docs/evaluate.md says what each shows",
    )
    parser.add_argument(
        "--max-tokens", type=count, default=262144, help="tokens of documents to read (default %(default)s)"
    )
    parser.add_argument(
        "--segment-tokens", type=count, default=1024, help="tokens computed at once (default %(default)s)"
    )
    parser.add_argument(
        "--lengths",
        type=counts,
        metavar="N,N",
        help="distances of forgetting, gaps of recall, prompts of needle, in tokens, such as 1k,4k,128k; recall is for "
        "models trained on its task (tools/synthetic_documents.py), whose ids are the same in any vocabulary",
    )
    parser.add_argument("--samples", type=count, help="texts, documents or prompts for each number, except positions")
    parser.add_argument("--seed", type=seed, default=0, help="of what is drawn at random (default %(default)s)")
    parser.add_argument(
        "--without-carry",
        action="store_true",
        help="compare the loss of each model with its own if it forgets everything at each segment",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="keep the numbers as JSON")
    describe_state(parser)
    describe_adapter(parser)
    describe_device(parser)


def run(options: argparse.Namespace) -> None:
    from infctx.data.token_store import TokenStore, is_store
    from infctx.evaluate.quantized import compare_with_stored
    from infctx.formats.model_files import open_base
    from infctx.measures.evaluation import Evaluation, Options

    if options.output and options.output.exists():
        raise InputError(f"{options.output}: exists; choose another name")
    if is_store(options.model[0]) and not is_store(options.store):
        words = shlex.join(["infctx", "evaluate", *map(str, [*options.model[1:], options.store, options.model[0]])])
        raise InputError(f"{options.model[0]}: is a token store, and the model comes first; run {words}")
    for option in ("adapter", "state"):
        if len(options.model) > 1 and getattr(options, option) is not None:
            raise InputError(f"--{option}: is for one model; name a run that learned it as a model, or evaluate each")
    store = TokenStore(options.store)
    files = [model_files(options, path) for path in options.model]
    evaluation = Evaluation(store, _vocab_size(options.model, files), Options(**_chosen(options)))
    for path, its_files in zip(options.model, files, strict=True):
        model = load_model(options, its_files)
        for table in evaluation.measure(model, str(path)):
            print(f"{table}\n", flush=True)
        if options.dtype in QUANTIZED and "positions" in options.what:
            print(compare_with_stored(model, open_base(its_files), [evaluation.reading]))
        del model  # before the next one is loaded
    if options.output:
        evaluation.write(options.output)


def names_of_measures(text: str) -> list[str]:
    """Reads the names of measures between commas."""
    found = [part.strip() for part in text.split(",")]
    for name in found:
        if name not in MEASURES:
            raise argparse.ArgumentTypeError(f"{quoted(name, 40)}: take {', '.join(MEASURES[:-1])} or {MEASURES[-1]}")
    return found


def _chosen(options: argparse.Namespace) -> dict:
    wanted = ("what", "max_tokens", "segment_tokens", "lengths", "samples", "seed", "without_carry")
    return {name: getattr(options, name) for name in wanted}


def _vocab_size(paths: list[Path], files: list[ModelFiles]) -> int:
    """Returns the vocabulary of the models; raises InputError if they do not have the same."""
    from infctx.formats.weights import open_weights

    first, *others = (open_weights(its_files.weights).sizes.vocab_size for its_files in files)
    for path, other in zip(paths[1:], others, strict=True):
        if other != first:
            problem = f"{path}: has {other:,} ids, and {paths[0]} has {first:,}"
            raise InputError(f"{problem}; compare models of one vocabulary")
    return first
