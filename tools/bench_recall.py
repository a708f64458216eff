"""Shows the use of the exact gradient, and of the delta rule, on two tasks over eight segments.

    python tools/bench_recall.py                     # a fact, with the exact and with the truncated gradient
    python tools/bench_recall.py --task overwrite    # facts that change, with Eagle, Finch and Goose

The tasks are those of infctx/data/synthetic_tasks.py.  A document of the first is noise except for a mark with one of
16 values in the first segment, and a question at the end.  In one of the second, five keys get values in the first
segment, and two of them new ones in each of the next seven, which end with questions; eight segments later, all are
asked for.  Small models learn from all answers; the tables show how many of the last ones are right on new documents.
Takes minutes.  `make showcase` does the first with whole runs.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor

import infctx
from infctx.data.synthetic_tasks import VALUES, VOCAB_SIZE, Task
from infctx.model.rwkv import RWKV
from infctx.model.sizes import NAMES

SEGMENT_TOKENS, BATCH = 16, 32
RECALL, OVERWRITE = Task("recall", 7 * SEGMENT_TOKENS), Task("overwrite", 8 * SEGMENT_TOKENS, keys=5)
SIZES: dict[str, Any] = {"num_layers": 1, "width": 64, "head_size": 32, "vocab_size": VOCAB_SIZE}
STEPS, OVERWRITE_STEPS, SEEDS = 500, 200, 3


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
    random = np.random.default_rng(seed)
    model = infctx.build_model(version=version, **SIZES, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.99), weight_decay=0)  # as in a run
    losses: list[float] = []
    for _ in range(steps):
        loss, _ = infctx.window_backward(model, *batch(task, random), SEGMENT_TOKENS, gradient_segments)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) >= 10 and sum(losses[-10:]) < 10 * 0.02:
            break
    return model, right_answers(task, model, random), len(losses)


def batch(task: Task, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Returns documents and their targets, (BATCH, T) each."""
    tokens, targets = task.batch(random, BATCH)
    return torch.from_numpy(tokens), torch.from_numpy(targets)


@torch.no_grad()
def right_answers(task: Task, model: RWKV, random: np.random.Generator, batches: int = 16) -> float:
    """Returns the share of the last questions in new documents that are answered with their value."""
    right = []
    for _ in range(batches):
        tokens, targets = batch(task, random)
        answers = model.logits(model(tokens)[0][:, task.questions]).argmax(-1)
        right.append(answers == targets[:, task.questions])
    return torch.cat(right).double().mean().item()


if __name__ == "__main__":
    main()
