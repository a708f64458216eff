"""Tasks that only memory solves: a name, a distance and a seed in; documents of tokens and targets out, of any length.

    recall     each key gets a value, and much later is asked for it
    overwrite  the keys get values; in each of seven more spans, some get new ones and all are asked for; much later all
               are asked for again
    copy       a row of values; much later it is to be written again
    counting   marks of each key among noise; much later their numbers are asked for

A document begins with its facts among noise; then comes nothing but noise, for `gap_tokens` with the questions, which
are its last tokens.  Each question is followed by its answer.  Answers are drawn uniformly from 16 values, and no token
between the facts and a question says anything about them: who does not remember is right once in 16 times.  For how the
tasks are used, see tools/synthetic_documents.py, which writes them as token stores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from infctx.conventions import MASKED
from infctx.errors import InputError

NAMES = ("recall", "overwrite", "copy", "counting")
VALUES = NOISES = 16
MOST_KEYS = 32
# Ids from 1 on, as in every store, where 0 ends a document.
FIRST_VALUE = 1
FIRST_NOISE = FIRST_VALUE + VALUES
WRITE = FIRST_NOISE + NOISES
"""WRITE + key says that the value of the key comes next, or in counting that here is one of its marks."""
ASK = WRITE + MOST_KEYS
"""ASK + key asks for a key; the answer comes next."""
VOCAB_SIZE = ASK + MOST_KEYS
SPAN, SPANS = 16, 8  # facts take a multiple of 16 tokens, as segments do; those of `overwrite` eight such spans
BLOCK_TOKENS = 1 << 16  # of documents made at once


@dataclass(frozen=True)
class Task:
    """A task; InputError if there is no such one.

    name: one of NAMES
    gap_tokens: tokens of a document after its facts, the last questions and answers included
    keys: keys to remember, 1..32; in `copy`, values to remember
    """

    name: str
    gap_tokens: int = 128
    keys: int = 1

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise InputError(f"task {self.name}: there is none of this name; choose one of {', '.join(NAMES)}")
        if not 1 <= self.keys <= MOST_KEYS:
            raise InputError(f"task {self.name}: {self.keys} keys; give 1 to {MOST_KEYS}")
        if self.gap_tokens < self._asking_tokens:
            raise InputError(
                f"task {self.name}: a gap of {self.gap_tokens} tokens is too short for its questions; "
                f"give at least {self._asking_tokens}"
            )

    @property
    def num_tokens(self) -> int:
        """Returns the tokens of a document, its end not included."""
        return self._spans * self._span_tokens + self.gap_tokens

    @property
    def questions(self) -> np.ndarray:
        """Returns the places (keys,) of a document's last questions: of the tokens whose targets are the answers."""
        step = 1 if self.name == "copy" else 2
        return self.num_tokens - 1 - step * np.arange(self.keys, 0, -1) + (step - 1)

    def documents(self, seed: int | Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields documents without end: tokens and targets, int64 (num_tokens,) each; the same ones for a seed."""
        random = np.random.default_rng(seed)
        while True:
            yield from zip(*self.batch(random, max(1, BLOCK_TOKENS // self.num_tokens)), strict=True)

    def batch(self, random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns documents: tokens and targets, int64 (count, num_tokens) each.

        A target is the token that comes next where that is an answer, and MASKED everywhere else.
        """
        tokens = random.integers(FIRST_NOISE, FIRST_NOISE + NOISES, (count, self.num_tokens))
        answers = np.zeros_like(tokens, dtype=bool)
        if self.name == "copy":
            self._copy(tokens, answers, random)
        else:
            held = self._count(tokens, random) if self.name == "counting" else self._write(tokens, answers, random)
            self._ask(tokens, answers, held, self.num_tokens, random)
        targets = np.full_like(tokens, MASKED)
        targets[:, :-1] = np.where(answers[:, 1:], tokens[:, 1:], MASKED)
        return tokens, targets

    @property
    def _spans(self) -> int:
        return SPANS if self.name == "overwrite" else 1

    @property
    def _span_tokens(self) -> int:
        needed = {
            "recall": 2 * self.keys,
            "overwrite": 2 * (self.keys + self._changed),
            "copy": self.keys + 1,
            "counting": SPAN * self.keys,
        }[self.name]
        return -(-needed // SPAN) * SPAN

    @property
    def _changed(self) -> int:
        """Returns how many keys get new values in a span of `overwrite`."""
        return max(1, 2 * self.keys // 5)

    @property
    def _asking_tokens(self) -> int:
        return self.keys + 1 if self.name == "copy" else 2 * self.keys

    def _write(self, tokens: np.ndarray, answers: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Gives keys their values, and asks after each span but the first; returns the last values (count, keys)."""
        count, span, asking = len(tokens), self._span_tokens, self._asking_tokens
        rows = np.arange(count)[:, None]
        held = np.zeros((count, self.keys), np.int64)
        for number in range(self._spans):
            begin, end = span * number, span * (number + 1)
            keys = _shuffled(count, self.keys, random)[:, : self._changed if number else self.keys]
            values = random.integers(FIRST_VALUE, FIRST_VALUE + VALUES, keys.shape)
            held[rows, keys] = values
            room = span - asking if number else span
            places = begin + 2 * _shuffled(count, room // 2, random)[:, : keys.shape[1]]
            tokens[rows, places], tokens[rows, places + 1] = WRITE + keys, values
            if number:
                self._ask(tokens, answers, held, end, random)
        return held

    def _ask(
        self, tokens: np.ndarray, answers: np.ndarray, held: np.ndarray, end: int, random: np.random.Generator
    ) -> None:
        """Asks for every key, in random order, in the tokens before `end`."""
        keys = _shuffled(len(tokens), self.keys, random)
        begin = end - self._asking_tokens
        tokens[:, begin:end:2], tokens[:, begin + 1 : end : 2] = ASK + keys, np.take_along_axis(held, keys, 1)
        answers[:, begin + 1 : end : 2] = True

    def _count(self, tokens: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Puts 0 to 15 marks of each key among the noise of the first span; returns their answers (count, keys)."""
        numbers = random.integers(VALUES, size=(len(tokens), self.keys))
        places = np.arange(self._span_tokens)
        are_marks = places % SPAN < numbers[:, places // SPAN]  # (count, span): those of a key side by side
        facts = np.where(are_marks, WRITE + places // SPAN, tokens[:, places])
        tokens[:, places] = np.take_along_axis(facts, _shuffled(len(tokens), self._span_tokens, random), 1)
        return FIRST_VALUE + numbers

    def _copy(self, tokens: np.ndarray, answers: np.ndarray, random: np.random.Generator) -> None:
        """Puts WRITE and a row of values into the first span; at the end ASK, and the row again as the answer."""
        rows = np.arange(len(tokens))[:, None]
        values = random.integers(FIRST_VALUE, FIRST_VALUE + VALUES, (len(tokens), self.keys))
        begins = random.integers(self._span_tokens - self.keys, size=(len(tokens), 1))
        tokens[rows, begins], tokens[:, -self.keys - 1] = WRITE, ASK
        tokens[rows, begins + 1 + np.arange(self.keys)] = tokens[:, -self.keys :] = values
        answers[:, -self.keys :] = True


def _shuffled(count: int, length: int, random: np.random.Generator) -> np.ndarray:
    """Returns 0..length-1 in a new order for each row, (count, length)."""
    return random.permuted(np.tile(np.arange(length), (count, 1)), axis=1)
