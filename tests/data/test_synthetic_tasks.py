"""Synthetic tasks: another reader finds every answer, and nothing but memory does."""

import itertools
import json

import numpy as np
import pytest

from infctx.conventions import MASKED
from infctx.data import synthetic_tasks
from infctx.data.lanes import Lanes
from infctx.data.mixture import Source
from infctx.data.synthetic_tasks import (
    ASK,
    FIRST_NOISE,
    FIRST_VALUE,
    MOST_KEYS,
    NAMES,
    VALUES,
    VOCAB_SIZE,
    WRITE,
    Task,
)
from infctx.data.token_store import TokenStore
from infctx.errors import InputError

import synthetic_documents
from synthetic_documents import SPLITS, TASK_FILE, write_stores

TASKS = [
    Task("recall"),
    Task("recall", 41, 8),
    Task("recall", 64, 32),
    Task("overwrite", 131, 5),
    Task("overwrite", 2, 1),
    Task("copy", 33, 7),
    Task("copy", 33, 32),
    Task("counting", 2),
    Task("counting", 50, 3),
]


def read(task, tokens):
    """Yields the place and the right answer of every question, by reading a document from left to right."""
    held, copied = dict.fromkeys(range(task.keys), FIRST_VALUE), []
    for place, token in enumerate(tokens[:-1]):
        if ASK <= token < ASK + MOST_KEYS:
            if task.name == "copy":
                yield from ((place + i, value) for i, value in enumerate(copied))
            else:
                yield place, held[token - ASK]
        elif WRITE <= token < ASK:
            if task.name == "counting":
                held[token - WRITE] += 1
            else:
                held[token - WRITE] = tokens[place + 1]
                copied = tokens[place + 1 : place + 1 + task.keys]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_answers_are_what_another_reader_finds(task):
    tokens, targets = task.batch(np.random.default_rng(3), 40)
    assert tokens.shape == targets.shape == (40, task.num_tokens)
    assert tokens.min() >= 1 and tokens.max() < VOCAB_SIZE
    for document, asked in zip(tokens.tolist(), targets.tolist(), strict=True):
        found = dict(read(task, document))
        assert asked == [found.get(place, MASKED) for place in range(task.num_tokens)]
        assert sorted(found)[-task.keys :] == task.questions.tolist()
        keys = {document[place] - ASK for place in task.questions}
        assert task.name == "copy" or keys == set(range(task.keys))


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_answers_cannot_be_guessed(task):
    """All values are as likely, whatever the place; and the gap, questions left out, is noise."""
    tokens, targets = task.batch(np.random.default_rng(4), 4000)
    for place in task.questions:
        shares = np.bincount(targets[:, place] - FIRST_VALUE, minlength=VALUES) / len(tokens)
        assert shares.shape == (VALUES,) and abs(shares - 1 / VALUES).max() < 0.025  # over 6 standard errors
    gap = tokens[:, -task.gap_tokens : task.questions[0]]
    assert not gap.size or (gap.min() >= FIRST_NOISE and gap.max() < WRITE)


def test_values_are_replaced():
    """In `overwrite`, the values that a question asks for were written in all spans, not only in the first or last."""
    task = Task("overwrite", 128, 5)
    tokens, _ = task.batch(np.random.default_rng(5), 200)
    last = [max(place for place, token in enumerate(row[:128]) if token == WRITE) // 16 for row in tokens.tolist()]
    assert min(last) <= 1 and max(last) == 7
    writes = ((tokens >= WRITE) & (tokens < ASK)).sum(1)
    assert (writes == 5 + 7 * 2).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_documents_for_a_seed_and_others_for_another(name, monkeypatch):
    task = Task(name, 64, 2)
    monkeypatch.setattr(synthetic_tasks, "BLOCK_TOKENS", 3 * task.num_tokens + 5)

    def first(seed):
        return list(itertools.islice(task.documents(seed), 7))

    assert np.array_equal(first([1, 2]), first([1, 2]))
    assert not np.array_equal(first([1, 2]), first([1, 3]))
    assert len({tokens.tobytes() for tokens, _ in first(0)}) == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("recal",), "task recal: there is none of this name; choose one of recall, overwrite, copy, counting"),
        (("recall", 128, 33), "task recall: 33 keys; give 1 to 32"),
        (("recall", 7, 4), "a gap of 7 tokens is too short for its questions; give at least 8"),
        (("copy", 4, 4), "give at least 5"),
    ],
)
def test_a_task_that_there_is_not(arguments, said):
    with pytest.raises(InputError, match=said):
        Task(*arguments)


@pytest.mark.parametrize("name", NAMES)
def test_stores_hold_the_same_documents_and_targets(name, tmp_path):
    """What the tool writes, read back by the lanes of a run, is what the task makes."""
    task = Task(name, 48, 5)
    write_stores(task, tmp_path / "made", (6, 4), seed=3)
    seen = set()
    for split, count in enumerate((6, 4)):
        store = TokenStore(tmp_path / "made" / SPLITS[split])
        assert store.num_documents == count and store.length(0) == task.num_tokens + 1
        lanes = Lanes(
            [Source("made", store)],
            num_lanes=count,
            window_tokens=task.num_tokens,
            seed=0,
            vocab_size=VOCAB_SIZE,
            shuffle=False,
        )
        window, _ = next(lanes)
        documents = list(itertools.islice(task.documents([3, split]), count))
        assert np.array_equal(window.tokens, np.stack([tokens for tokens, _ in documents]))
        assert np.array_equal(window.targets, np.stack([targets for _, targets in documents]))
        seen |= {tokens.tobytes() for tokens, _ in documents}
    assert len(seen) == 10  # none is held out and trained on
    about = json.loads((tmp_path / "made" / TASK_FILE).read_text())
    assert about == {"name": name, "gap_tokens": 48, "keys": 5, "vocab_size": VOCAB_SIZE, "seed": 3}


def test_the_tool_says_what_it_wrote_and_what_is_wrong(tmp_path, monkeypatch, capsys):
    def typed(*words):
        monkeypatch.setattr("sys.argv", ["synthetic_documents.py", *words, "--output", str(tmp_path / "made")])
        return synthetic_documents.main(), "".join(capsys.readouterr())

    assert typed("copy", "--keys", "3", "--documents", "20", "--held-out", "4") == (
        0,
        f"{tmp_path}/made: 20 documents of 145 tokens to train on, and\n"
        "4 held out; a model needs model.vocab_size: 97\n",
    )
    assert typed("copy")[0] == 2
    assert typed("copy", "--keys", "40") == (2, "infctx: task copy: 40 keys; give 1 to 32\n")
