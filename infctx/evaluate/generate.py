"""Generation: a prompt in, bytes out, token by token from the state.

`generate` is for one prompt; `read` and `Continuation`, which it is made of, also carry the state of a chat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from infctx.conventions import END_OF_DOCUMENT
from infctx.data.tokenizer import Tokenizer, get_tokenizer, tokenizer_for_vocab
from infctx.errors import InputError
from infctx.model.rwkv import RWKV
from infctx.model.state import State

PROMPT_SEGMENT_TOKENS = 1024


# Seven parameters: two of what to continue, one of where to stop, and those of Sampling.
def generate(
    model: RWKV,
    prompt: str,
    *,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 0.7,
    seed: int = 0,
    stop: bytes = b"",
) -> Iterator[bytes]:
    """Yields the bytes of each token after the prompt, until the document ends or there are max_tokens.

    prompt:      an empty one starts a new document, after the end of another
    temperature: 0 picks the most likely token each time
    top_p:       draws only from the most likely tokens that together reach this probability; 1 for all
    stop:        ends before these bytes too, such as the two newlines that end a turn of a chat
    Raises InputError for values out of range, and if no tokenizer fits the model's vocabulary.
    """
    sampling = Sampling(max_tokens, temperature, top_p, seed)
    tokenizer = tokenizer_of(model)
    tokens = tokenizer.encode(prompt).tolist()

    def pieces() -> Iterator[bytes]:
        yield from Continuation(model, read(model, tokens), sampling, stop, sampling.random())

    return pieces()


@dataclass(frozen=True)
class Sampling:
    """How many tokens are drawn, and how; raises InputError for values out of range."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # written so that NaN fails too
            raise InputError(f"temperature: {self.temperature} does not fit; give 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p} does not fit; give more than 0, and 1 at most")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens: {self.max_tokens} does not fit; give at least 1")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"seed: {self.seed} does not fit; give 0 to 2^63 - 1")

    def random(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def tokenizer_of(model: RWKV) -> Tokenizer:
    """Returns the tokenizer whose ids a model has; raises InputError if there is none."""
    name = tokenizer_for_vocab(model.sizes.vocab_size)
    if name is None:
        raise InputError(
            f"generate: no tokenizer here has the model's {model.sizes.vocab_size} ids; take a model of 257 (bytes) or "
            "65,536 (World)"
        )
    return get_tokenizer(name)


class Reached(NamedTuple):
    """Where a model is in a text: its hidden vector (D) after the last token, and its state."""

    hidden: Tensor
    state: State


@torch.no_grad()
def read(model: RWKV, tokens: Sequence[int], reached: Reached | None = None) -> Reached:
    """Reads tokens, segment by segment.

    reached: where to continue; None starts a document, and if there is no token, after the end of another
    """
    if reached and not len(tokens):
        return reached
    state = reached.state if reached else None
    every = torch.tensor(list(tokens) or [END_OF_DOCUMENT], device=model.embedding.weight.device)[None]
    for piece in every.split(PROMPT_SEGMENT_TOKENS, dim=1):
        hidden, state = model(piece, state)
    assert state is not None
    return Reached(hidden[0, -1], state)


class Continuation:
    """What a model writes: an iterator of bytes until its document ends, there are max_tokens, or `stop` comes.

    stop: bytes that end it and are not yielded; none for b""
    random: what tokens are drawn with
    It may be left at any time; then, as at its end, `reached` is after the last token that was drawn. If `stop` has
    come, `reached` is after it: of a token that holds more than its end, the model reads that end alone.
    """

    def __init__(self, model: RWKV, reached: Reached, sampling: Sampling, stop: bytes, random: torch.Generator) -> None:
        self.reached = reached
        self._model, self._sampling, self._stop, self._random = model, sampling, stop, random
        self._tokenizer = tokenizer_of(model)
        self._pending = b""  # may be the beginning of the stop, so it is not yielded yet
        self._has_stopped = False

    @property
    def missing(self) -> bytes:
        """Returns what is missing of `stop` where the model is: all of it, or what follows a beginning of it."""
        rest = b"" if self._has_stopped else self._stop[len(self._pending) :]
        return self._stop if rest and rest[0] & 0xC0 == 0x80 else rest  # the middle of a character is no text

    def __iter__(self) -> Iterator[bytes]:
        for _ in range(self._sampling.max_tokens):
            token = self._draw()
            if token == END_OF_DOCUMENT:
                break
            written = self._tokenizer.decode([token])
            text = self._pending + written
            end = text.find(self._stop) if self._stop else -1
            if end >= 0:
                beyond = len(text) - end - len(self._stop)
                kept = written[: len(written) - beyond]
                self._read(self._tokenizer.encode(kept.decode()).tolist() if beyond else [token])
                self._has_stopped = True
                if end:
                    yield text[:end]
                return
            self._read([token])
            self._pending = _beginning_of(self._stop, text)
            if piece := text[: len(text) - len(self._pending)]:
                yield piece
        if self._pending:
            yield self._pending

    @torch.no_grad()
    def _draw(self) -> int:
        logits = self._model.logits(self.reached.hidden).double().cpu()
        return draw(logits, self._sampling.temperature, self._sampling.top_p, self._random)

    def _read(self, tokens: Sequence[int]) -> None:
        self.reached = read(self._model, tokens, self.reached)


def _beginning_of(stop: bytes, text: bytes) -> bytes:
    """Returns the longest end of a text that is a beginning of the stop."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((stop[:length] for length in lengths if text.endswith(stop[:length])), b"")


def draw(logits: Tensor, temperature: float, top_p: float, random: torch.Generator) -> int:
    """Draws one token from logits (V)."""
    if not logits.isfinite().all():
        raise InputError("generate: the model's logits are not finite; the weights are damaged")
    if temperature == 0:
        return int(logits.argmax())
    likely, ids = torch.softmax((logits - logits.max()) / temperature, dim=0).sort(descending=True)
    before = likely.cumsum(0) - likely
    likely = likely.masked_fill(before >= top_p, 0)  # always keeps the first: nothing comes before it
    return int(ids[torch.multinomial(likely, 1, generator=random)])
