"""Shows the use of the exact gradient: a fact in the first segment, queried in the last of eight segments.

    python tools/bench_recall.py

Documents are noise except for a mark with one of 16 values in the first segment, and a query as the last token, whose
target is that value.  A small Finch is trained on them, with the exact gradient of the window and with one truncated at
every segment.  The table shows how many answers are right on new documents.  Takes a few minutes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import infctx
from infctx.model.rwkv import RWKV

SEGMENT_TOKENS, SEGMENTS, VALUES, BATCH = 16, 8, 16, 32
MARK, QUERY, NOISE = VALUES, VALUES + 1, VALUES + 2
VOCAB_SIZE = NOISE + 16
SIZES: dict[str, Any] = {"num_layers": 1, "width": 64, "head_size": 32, "vocab_size": VOCAB_SIZE}
STEPS, SEEDS = 500, 3


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    print(recall_table(STEPS, SEEDS))


def recall_table(steps: int, seeds: int) -> str:
    """Returns right answers and steps of several seeds, by the reach of the gradient."""
    lines = ["| gradient | right answers, by seed | steps |", "|---|---:|---:|"]
    for name, gradient_segments in (("exact, over all 8 segments", None), ("truncated at every segment", 1)):
        found = [train_recall(gradient_segments, steps, seed) for seed in range(seeds)]
        right = ", ".join(f"{accuracy:.0%}" for _, accuracy, _ in found)
        taken = ", ".join(str(count) for *_, count in found)
        lines.append(f"| {name} | {right} | {taken} |")
    return "\n".join([*lines, f"| guessing | {1 / VALUES:.0%} | |"])


def train_recall(
    gradient_segments: int | None, steps: int = STEPS, seed: int = 0, version: int = 6
) -> tuple[RWKV, float, int]:
    """Trains a model; returns it, its share of right answers and its steps.  Stops after ten nearly perfect batches."""
    random = torch.Generator().manual_seed(seed)
    model = infctx.build_model(version=version, **SIZES, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    losses: list[float] = []
    for _ in range(steps):
        tokens, targets = recall_batch(random)
        loss, _ = infctx.window_backward(model, tokens, targets, SEGMENT_TOKENS, gradient_segments)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) >= 10 and sum(losses[-10:]) < 10 * 0.02:
            break
    return model, right_answers(model, random), len(losses)


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


@torch.no_grad()
def right_answers(model: RWKV, random: torch.Generator, batches: int = 16) -> float:
    """Returns the share of new documents whose query is answered with their value."""
    right = 0.0
    for _ in range(batches):
        tokens, targets = recall_batch(random)
        hidden, _ = model(tokens)
        right += (model.logits(hidden[:, -1:]).argmax(-1)[:, 0] == targets[:, -1]).sum().item()
    return right / (batches * BATCH)


if __name__ == "__main__":
    main()
