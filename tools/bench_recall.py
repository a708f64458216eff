"""Shows the use of the exact gradient, and of the delta rule, on two tasks over eight segments.

    python tools/bench_recall.py                     # a fact, with the exact and with the truncated gradient
    python tools/bench_recall.py --task overwrite    # facts that change, with Eagle, Finch and Goose

Documents of the first task are noise except for a mark with one of 16 values in the first segment, and a query as the
last token, whose target is that value.  In those of the second, five keys get values in the first segment, and two of
them new ones in each of the next seven; at the end of each segment, and eight segments later, all are asked for.  Small
models learn from all answers; the tables show how many of the last ones are right on new documents.  Takes minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import infctx
from infctx.model.rwkv import RWKV
from infctx.model.sizes import NAMES

SEGMENT_TOKENS, SEGMENTS, VALUES, BATCH = 16, 8, 16, 32
MARK, QUERY, NOISE = VALUES, VALUES + 1, VALUES + 2
VOCAB_SIZE = NOISE + 16
KEYS, CHANGED, WRITES = 5, 2, 8
SIZES: dict[str, Any] = {"num_layers": 1, "width": 64, "head_size": 32}
STEPS, OVERWRITE_STEPS, SEEDS = 500, 200, 3


class Task(NamedTuple):
    """Makes documents and their targets (B, T); a target is -100 where nothing is asked."""

    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    vocab_size: int
    questions: int
    """The last tokens of a document, whose answers count."""


def main() -> None:
    """Prints the table of a task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("recall", "overwrite"), default="recall")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(recall_table(STEPS, SEEDS) if options.task == "recall" else overwrite_table(OVERWRITE_STEPS, SEEDS))


def recall_table(steps: int, seeds: int) -> str:
    """Returns right answers and steps of several seeds, by the reach of the gradient."""
    lines = ["| gradient | right answers, by seed | steps |", "|---|---:|---:|"]
    for name, gradient_segments in (("exact, over all 8 segments", None), ("truncated at every segment", 1)):
        lines.append(_row(name, [train_task(RECALL, gradient_segments, steps, seed) for seed in range(seeds)]))
    return "\n".join([*lines, f"| guessing | {1 / VALUES:.0%} | |"])


def overwrite_table(steps: int, seeds: int) -> str:
    """Returns right answers and steps of several seeds with the exact gradient, by version."""
    lines = ["| model | right answers, by seed | steps |", "|---|---:|---:|"]
    for version, name in NAMES.items():
        lines.append(_row(name, [train_task(OVERWRITE, None, steps, seed, version) for seed in range(seeds)]))
    return "\n".join([*lines, f"| guessing | {1 / VALUES:.0%} | |"])


def _row(name: str, found: list[tuple[RWKV, float, int]]) -> str:
    right = ", ".join(f"{accuracy:.0%}" for _, accuracy, _ in found)
    return f"| {name} | {right} | {', '.join(str(count) for *_, count in found)} |"


def train_task(
    task: Task, gradient_segments: int | None, steps: int = STEPS, seed: int = 0, version: int = 6
) -> tuple[RWKV, float, int]:
    """Trains a model; returns it, its share of right answers and its steps.  Stops after ten nearly perfect batches."""
    random = torch.Generator().manual_seed(seed)
    model = infctx.build_model(version=version, vocab_size=task.vocab_size, **SIZES, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    losses: list[float] = []
    for _ in range(steps):
        tokens, targets = task.batch(random)
        loss, _ = infctx.window_backward(model, tokens, targets, SEGMENT_TOKENS, gradient_segments)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) >= 10 and sum(losses[-10:]) < 10 * 0.02:
            break
    return model, right_answers(task, model, random), len(losses)


def recall_batch(random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns documents (B, 128): MARK value in the first segment, noise, QUERY at the end with the value as target."""
    length = SEGMENT_TOKENS * SEGMENTS
    tokens = torch.randint(NOISE, VOCAB_SIZE, (BATCH, length), generator=random)
    values = torch.randint(VALUES, (BATCH,), generator=random)
    places = torch.randint(SEGMENT_TOKENS - 1, (BATCH,), generator=random)
    rows = torch.arange(BATCH)
    tokens[rows, places], tokens[rows, places + 1], tokens[:, -1] = MARK, values, QUERY
    targets = torch.full_like(tokens, -100)
    targets[:, -1] = values
    return tokens, targets


def overwrite_batch(random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns documents (B, 256): every key with a value in the first segment, CHANGED of them with new values in each
    of the next, among noise; at the end of each of these segments every key's question; eight segments later again."""
    tokens = torch.randint(NOISE, VOCAB_SIZE, (BATCH, SEGMENT_TOKENS * (WRITES + SEGMENTS)), generator=random)
    targets = torch.full_like(tokens, -100)
    held = tokens.new_empty(BATCH, KEYS)  # the value of each key, written last
    for segment in range(WRITES):
        begin, end = SEGMENT_TOKENS * segment, SEGMENT_TOKENS * (segment + 1)
        keys = _shuffled(KEYS, random)[:, : CHANGED if segment else KEYS]
        values = torch.randint(VALUES, keys.shape, generator=random)
        held.scatter_(1, keys, values)
        places = begin + 2 * _shuffled((SEGMENT_TOKENS - KEYS) // 2, random)[:, : keys.shape[1]]
        tokens.scatter_(1, places, VOCAB_SIZE + keys).scatter_(1, places + 1, values)
        _ask(tokens, targets, held, end, random)
    _ask(tokens, targets, held, tokens.shape[1], random)
    return tokens, targets


def _ask(tokens: Tensor, targets: Tensor, held: Tensor, end: int, random: torch.Generator) -> None:
    """Puts every key's question before `end`, in random order."""
    asked = _shuffled(KEYS, random)
    tokens[:, end - KEYS : end] = VOCAB_SIZE + KEYS + asked
    targets[:, end - KEYS : end] = held.gather(1, asked)


def _shuffled(count: int, random: torch.Generator) -> Tensor:
    return torch.rand(BATCH, count, generator=random).argsort(1)  # (B, count)


RECALL = Task(recall_batch, VOCAB_SIZE, 1)
OVERWRITE = Task(overwrite_batch, VOCAB_SIZE + 2 * KEYS, KEYS)


@torch.no_grad()
def right_answers(task: Task, model: RWKV, random: torch.Generator, batches: int = 16) -> float:
    """Returns the share of the last questions in new documents that are answered with their value."""
    right = []
    for _ in range(batches):
        tokens, targets = task.batch(random)
        answers = model.logits(model(tokens)[0][:, -task.questions :]).argmax(-1)
        right.append(answers == targets[:, -task.questions :])
    return torch.cat(right).double().mean().item()


if __name__ == "__main__":
    main()
