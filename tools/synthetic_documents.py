"""Writes a task that only memory solves as token stores, to train on with `infctx train`.

    python tools/synthetic_documents.py recall --output data/recall            # a fact, eight segments of 16 later
    python tools/synthetic_documents.py recall --keys 8 --gap-tokens 4096 --output data/far
    python tools/synthetic_documents.py overwrite --keys 5 --output data/overwrite
    python tools/synthetic_documents.py copy --keys 12 --output data/copy
    python tools/synthetic_documents.py counting --output data/counting

infctx/data/synthetic_tasks.py says what the tasks are.  OUTPUT gets the stores `train` and `held_out`, whose masks
leave only the answers to be learned, and task.json, with the vocab_size that a model needs.  configs/recall-tiny.yaml
trains on the first of these.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from infctx.arguments import count
from infctx.conventions import MASKED
from infctx.data.store_writer import TokenStoreWriter
from infctx.data.synthetic_tasks import NAMES, VOCAB_SIZE, Task
from infctx.errors import InputError
from infctx.exits import run_command
from infctx.files import atomic_folder

TASK_FILE = "task.json"
SPLITS = ("train", "held_out")


def main() -> int:
    """Writes the stores that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=NAMES)
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument("--gap-tokens", type=count, default=128, help="tokens after the facts (default %(default)s)")
    parser.add_argument("--keys", type=count, default=1, help="how much there is to remember (default %(default)s)")
    parser.add_argument("--documents", type=count, default=10000, help="to train on (default %(default)s)")
    parser.add_argument("--held-out", type=count, default=500, help="others, to measure on (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other documents (default %(default)s)")
    options = parser.parse_args()

    def write() -> None:
        task = Task(options.task, options.gap_tokens, options.keys)
        write_stores(task, options.output, (options.documents, options.held_out), options.seed)
        print(f"{options.output}: {options.documents:,} documents of {task.num_tokens + 1:,} tokens to train on, and")
        print(f"{options.held_out:,} held out; a model needs model.vocab_size: {VOCAB_SIZE}")

    return run_command(write)


def write_stores(task: Task, output: Path, num_documents: tuple[int, int], seed: int) -> None:
    """Writes the stores of a task, train and held_out, and task.json; InputError if the folder exists.

    num_documents: of train, and of held_out
    """
    if output.exists():
        raise InputError(f"{output}: exists already; choose another name, or remove it")
    with atomic_folder(output) as folder:
        for split, (name, number) in enumerate(zip(SPLITS, num_documents, strict=True)):
            with TokenStoreWriter(folder / name) as writer:
                for tokens, targets in itertools.islice(task.documents([seed, split]), number):
                    _write_document(writer, tokens, targets)
        about = asdict(task) | {"vocab_size": VOCAB_SIZE, "seed": seed}
        (folder / TASK_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _write_document(writer: TokenStoreWriter, tokens: np.ndarray, targets: np.ndarray) -> None:
    """Writes a document: a token is to be learned if it is the target of the one before it; its end is not."""
    learned = np.concatenate([[False], targets[:-1] != MASKED])
    for run in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(learned)) + 1):
        writer.extend(tokens[run], bool(learned[run[0]]))
    writer.end_document(is_target=False)


if __name__ == "__main__":
    sys.exit(main())
