"""Recall: how many keys' values a model still knows after a gap, once written or overwritten.

In: a model.  Out: a row for each gap, number of keys and task.  The documents are those of data/synthetic_tasks, whose
ids are the same in every vocabulary: they ask a model that was trained on that task.  Another one guesses; ask it in
words with `needle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from infctx.data.synthetic_tasks import VALUES, VOCAB_SIZE, Task
from infctx.errors import InputError
from infctx.measures.predictions import most_likely, shown
from infctx.model.rwkv import RWKV

DOCUMENTS = 32
DOCUMENTS_AT_ONCE = 16
GAPS, KEYS = (128, 512, 2048), (1, 4, 16)
HOW_TO_READ = f"the share of right answers; guessing gets {1 / VALUES:.2f}, a model not trained on this task no more"


class Row(NamedTuple):
    """The right answers of those asked for, after a gap; overwritten: keys had other values before.

    gap_tokens: tokens of nothing but noise and questions after the facts
    chance:     the share that guessing gets
    """

    gap_tokens: int
    keys: int
    overwritten: bool
    right: int
    asked: int
    chance: float


def measure_recall(model: RWKV, segment_tokens: int, gaps: Sequence[int], samples: int | None, seed: int) -> list[Row]:
    """Measures recall on new documents after each gap, from `gaps_of`; samples: how many for each row, None for 32.

    Numbers of keys whose questions do not fit into a gap are left out.
    """
    cells = [(gap, keys, name) for name in ("recall", "overwrite") for gap in gaps for keys in KEYS if gap >= 2 * keys]
    rows = []
    for gap, keys, name in shown(cells, len(cells), "recall"):
        task = Task(name, gap, keys)
        right, asked = _ask(model, task, segment_tokens, samples or DOCUMENTS, seed)
        rows.append(Row(gap, keys, name == "overwrite", right, asked, 1 / VALUES))
    return rows


def gaps_of(vocab_size: int, lengths: Sequence[int] | None) -> list[int]:
    """Returns the given lengths, or the usual gaps; raises InputError for one too short, and for a small vocabulary."""
    if vocab_size < VOCAB_SIZE:
        raise InputError(
            f"--what recall: the model has {vocab_size} ids, and the task takes {VOCAB_SIZE}; leave recall out"
        )
    if lengths and min(lengths) < 2 * KEYS[0]:
        raise InputError(f"--lengths: a gap of {min(lengths)} tokens has no room for a question; give 2 or more")
    return list(lengths or GAPS)


def _ask(model: RWKV, task: Task, segment_tokens: int, count: int, seed: int) -> tuple[int, int]:
    """Returns the right answers to the last questions of documents, and the number of the questions."""
    random = np.random.default_rng(seed)
    right = 0
    for begin in range(0, count, DOCUMENTS_AT_ONCE):
        tokens, targets = task.batch(random, min(DOCUMENTS_AT_ONCE, count - begin))
        answers = _answers(model, torch.from_numpy(tokens), task.questions, segment_tokens)
        right += int((answers == torch.from_numpy(targets[:, task.questions])).sum())
    return right, count * task.keys


@torch.no_grad()
def _answers(model: RWKV, tokens: Tensor, places: np.ndarray, segment_tokens: int) -> Tensor:
    """Returns the likeliest tokens after the given places of documents (B, T), int64 (B, places)."""
    device = model.embedding.weight.device
    state, answers = None, []
    at_once = max(1, segment_tokens // len(tokens))  # as many activations as one document has in a segment
    for begin in range(0, tokens.shape[1], at_once):
        piece = tokens[:, begin : begin + at_once]
        hidden, state = model(piece.to(device), state)
        here = torch.from_numpy(places[(places >= begin) & (places < begin + at_once)] - begin)
        if len(here):
            chosen = hidden[:, here.to(device)]  # (B, here, D)
            answers.append(most_likely(model, chosen.flatten(0, 1)).view(len(tokens), -1))
    return torch.cat(answers, dim=1)


def format_recall(rows: Sequence[Row], title: str) -> str:
    """Formats the rows as a table: gaps down, keys across, for values written once and overwritten ones."""
    lines = [f"recall of {title}"]
    for overwritten in (False, True):
        these = {(row.gap_tokens, row.keys): row.right / row.asked for row in rows if row.overwritten == overwritten}
        keys = sorted({key for _, key in these})
        lines.append(_line("overwritten, gap" if overwritten else "gap", [f"{key} keys" for key in keys]))
        for gap in sorted({gap for gap, _ in these}):
            shares = [f"{these[gap, key]:.3f}" if (gap, key) in these else "-" for key in keys]
            lines.append(_line(f"{gap:,}", shares))
    return "\n".join(lines)


def _line(first: str, cells: Sequence[str]) -> str:
    return f"{first:>16} " + " ".join(f"{cell:>9}" for cell in cells)
