"""Needle in a haystack: does a model repeat a sentence's value that it read in a long text, by length and depth?

The three tasks with a single needle of RULER (arXiv 2404.06654), in its words:

    s-niah-1  a number of seven digits, in five short sentences that repeat
    s-niah-2  the same number, in the store's text
    s-niah-3  a UUID, in the store's text

The value is right if the likeliest tokens after the question are exactly its own, as the tokenizer writes it after a
space.  That is stricter than RULER, which looks for it anywhere in an answer.  In: a model and a store's text.  Out: a
row for each task, length and depth.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from infctx.data.tokenizer import Tokenizer, get_tokenizer, tokenizer_for_vocab
from infctx.errors import InputError
from infctx.measures.predictions import most_likely, read_pieces, shown
from infctx.measures.text import StoreText
from infctx.model.rwkv import RWKV

TASKS = ("s-niah-1", "s-niah-2", "s-niah-3")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PROMPTS = 4
LENGTHS = (1024, 4096)
HOW_TO_READ = "right answers of those asked for; depth 0 is a needle at the beginning of the text, 1 at its end"

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
BEFORE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n"
)
AFTER = (
    "\nWhat is the special magic {kind} for {key} mentioned in the provided text? The special magic {kind} for {key} "
    "mentioned in the provided text is"
)
WORDS = (
    "amber anchor apple arrow autumn basket beacon berry blanket bottle branch bridge bucket butter button candle "
    "canyon carpet castle cedar cherry circle clover cobalt comet copper coral cotton crystal desert eagle ember "
    "falcon feather forest fountain garden ginger glacier granite harbor hazel helmet island ivory jacket jungle "
    "kettle ladder lantern lemon lily magnet maple marble meadow mirror needle ocean olive orchard oyster paper "
    "pebble pepper pillow planet pocket prairie quartz rabbit ribbon river saddle saffron sailor shadow silver spider "
    "spiral summit sunset temple thistle thunder timber tunnel turtle valley velvet violet walnut whistle willow "
    "window winter"
)
KEYS = tuple(WORDS.split())


class Row(NamedTuple):
    """The right answers of those asked for, with a needle at a depth (0 to 1) of a prompt of `length` tokens."""

    task: str
    length: int
    depth: float
    right: int
    asked: int


class Prompt(NamedTuple):
    """A prompt, and the answer after it: tokens, int64."""

    tokens: np.ndarray
    answer: np.ndarray


# Six parameters: the model, the text, how it is read, and the grid.
def measure_needle(
    model: RWKV, text: StoreText, segment_tokens: int, lengths: Sequence[int], samples: int | None, seed: int
) -> list[Row]:
    """Measures every task at each length, from `lengths_of`, and depth.

    samples: how many prompts for each, None for 4
    """
    tokenizer = _tokenizer_of(text)
    cells = [(task, length, depth) for task in TASKS for length in lengths for depth in DEPTHS]
    rows = []
    for task, length, depth in shown(cells, len(cells), "needle"):
        random = np.random.default_rng([seed, TASKS.index(task), length, DEPTHS.index(depth)])
        prompts = (make_prompt(task, text, tokenizer, (length, depth), random) for _ in range(samples or PROMPTS))
        right = sum(_is_found(model, prompt, segment_tokens) for prompt in prompts)
        rows.append(Row(task, length, depth, right, samples or PROMPTS))
    return rows


def lengths_of(text: StoreText, lengths: Sequence[int] | None) -> list[int]:
    """Returns the given lengths of prompts, or the usual ones as far as the store is long enough.

    Raises InputError for a vocabulary without a tokenizer, for a length without room, and for a store that is shorter.
    """
    tokenizer = _tokenizer_of(text)
    chosen = list(lengths or [length for length in LENGTHS if length <= text.num_tokens] or LENGTHS[:1])
    parts = [part.format(kind="number", key=max(KEYS, key=len), value="f" * 36) for part in (BEFORE, NEEDLE, AFTER)]
    needed = 2 * len(tokenizer.encode("".join(parts)))
    if min(chosen) < needed:
        raise InputError(f"--lengths: a prompt of {min(chosen)} tokens is too short for needle; give {needed} or more")
    text.refuse_shorter(max(chosen), "and a prompt of needle takes")
    return chosen


def _tokenizer_of(text: StoreText) -> Tokenizer:
    name = tokenizer_for_vocab(text.vocab_size)
    if name is None:
        raise InputError(
            f"--what needle: it asks in words, and no tokenizer here has the model's {text.vocab_size} ids; leave "
            "needle out"
        )
    return get_tokenizer(name)


def make_prompt(
    task: str, text: StoreText, tokenizer: Tokenizer, place: tuple[int, float], random: np.random.Generator
) -> Prompt:
    """Makes a prompt of the given length in tokens, its answer included, up to a few at the needle's borders.

    place: the length, and the needle's depth
    """
    length, depth = place
    kind, value = _value(task, random)
    words = {"kind": kind, "key": str(random.choice(KEYS)), "value": value}
    frame = [part.format(**words) for part in (BEFORE, NEEDLE, AFTER)]
    answer = tokenizer.encode(f" {value}").astype(np.int64)
    room = length - len(answer) - sum(len(tokenizer.encode(part)) for part in frame) - 2
    if task == TASKS[0]:
        noise = tokenizer.encode(NOISE + "\n")
        hay = tokenizer.decode(np.resize(noise, room)).decode(errors="ignore")
    else:
        begin = int(random.integers(text.num_tokens - room + 1))
        hay = tokenizer.decode(text.read(begin, begin + room).numpy()).decode(errors="ignore")
    at = _sentence_end(hay, int(depth * len(hay)))
    whole = f"{frame[0]}{hay[:at]} {frame[1]} {hay[at:]}{frame[2]}"
    return Prompt(tokenizer.encode(whole).astype(np.int64), answer)


def _value(task: str, random: np.random.Generator) -> tuple[str, str]:
    """Returns what a value is called, and a value."""
    if task == TASKS[2]:
        return "uuid", str(uuid.UUID(bytes=random.bytes(16), version=4))
    return "number", str(random.integers(1_000_000, 10_000_000))


def _sentence_end(hay: str, at: int) -> int:
    """Returns the end of a sentence or line near a place of a text, on any side; the place if none is near."""
    if at in (0, len(hay)):
        return at
    ends = [place for mark in (". ", ".\n", "\n") for place in _around(hay, mark, at)]
    return min(ends, key=lambda place: abs(place - at), default=at)


def _around(hay: str, mark: str, at: int, near: int = 400) -> list[int]:
    before, after = hay.rfind(mark, max(0, at - near), at), hay.find(mark, at, at + near)
    return [place + 1 for place in (before, after) if place >= 0]


def _is_found(model: RWKV, prompt: Prompt, segment_tokens: int) -> bool:
    """Returns whether the model's likeliest tokens after a prompt are the answer."""
    # Each token of the answer is predicted after the true ones before it: up to the first mistake, that is greedy.
    tokens = torch.from_numpy(np.concatenate([prompt.tokens, prompt.answer[:-1]]))
    first = len(prompt.tokens) - 1
    for piece in read_pieces(model, lambda begin, end: tokens[begin:end], (0, len(tokens)), segment_tokens):
        here = slice(max(first, piece.begin), piece.begin + len(piece.hidden))
        if here.start < here.stop:
            written = most_likely(model, piece.hidden[here.start - piece.begin :])
            if (written.numpy() != prompt.answer[here.start - first : here.stop - first]).any():
                return False
    return True


def format_needle(rows: Sequence[Row], title: str) -> str:
    """Formats the rows as a table: tasks and lengths down, depths across."""
    depths = sorted({row.depth for row in rows})
    cells = {(row.task, row.length, row.depth): f"{row.right}/{row.asked}" for row in rows}
    lines = [f"needles of {title}", _line("task", "length", [f"depth {depth:g}" for depth in depths])]
    for task, length in dict.fromkeys((row.task, row.length) for row in rows):
        lines.append(_line(task, f"{length:,}", [cells[task, length, depth] for depth in depths]))
    return "\n".join(lines)


def _line(task: str, length: str, cells: Sequence[str]) -> str:
    return f"{task:>10} {length:>9} " + " ".join(f"{cell:>10}" for cell in cells)
