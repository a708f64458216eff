"""A chat with a model: messages in; the text of its answers out, piece by piece.

The state is carried from turn to turn, and nothing is ever read twice. What the model has read is token by token what
it read in training, whatever its answers are cut by.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from itertools import chain

from infctx.documents.templates import Template
from infctx.errors import InputError
from infctx.evaluate.generate import Continuation, Reached, Sampling, read, tokenizer_of
from infctx.model.rwkv import RWKV

ASKS, ANSWERS, INSTRUCTS = "user", "assistant", "system"


class Chat:
    """A chat.

    system: what the system says first; nothing for ""
    thinks: whether answers begin with reasoning
    Raises InputError for a template without the roles that this takes.
    """

    # Five parameters besides the template: who speaks, how, and what the chat starts with.
    def __init__(
        self, model: RWKV, template: Template, sampling: Sampling, *, system: str = "", thinks: bool = False
    ) -> None:
        roles = [ASKS, ANSWERS, *([INSTRUCTS] if system else [])]
        for role in roles:
            if role not in template.roles:
                raise InputError(f"--template: has no role {role}, which a chat takes; add it")
        if thinks and template.roles[ANSWERS].reasoning is None:
            raise InputError("--think: the template has no place for reasoning; take --template g1")
        self._model, self._template, self._sampling = model, template, sampling
        self._system, self._thinks = system, thinks
        self._tokenizer, self._random = tokenizer_of(model), sampling.random()
        self._stop = template.roles[ANSWERS].end.encode()
        self._asked: Reached | None = None
        self._answer: Continuation | None = None

    @property
    def has_answer(self) -> bool:
        """Returns whether there is an answer to be tried again."""
        return self._answer is not None

    def say(self, message: str) -> Iterator[str]:
        """Reads a message and yields the answer as complete characters; it may be left before its end."""
        turn = self._template.turn(ASKS, message)
        texts = [turn.heading, turn.body, self._template.answer_heading(ANSWERS, self._thinks)]
        if self._answer is not None:
            texts.insert(0, self._answer.missing.decode())
        elif self._system:
            texts = [*self._template.turn(INSTRUCTS, self._system), *texts]
        tokens = [token for text in texts for token in self._tokenizer.encode(text).tolist()]
        self._asked = read(self._model, tokens, self._answer.reached if self._answer else None)
        return self.retry()

    def retry(self) -> Iterator[str]:
        """Yields another answer to the last message, in place of the one before."""
        assert self._asked is not None
        self._answer = Continuation(self._model, self._asked, self._sampling, self._stop, self._random)
        lead = self._template.answer_lead(ANSWERS, self._thinks)
        answer = _characters(_without_lead(self._answer, lead.encode()))
        return chain([self._template.reasoning_mark(ANSWERS)], answer) if self._thinks else answer

    def reset(self) -> None:
        """Starts again, from the initial state."""
        self._asked = self._answer = None


def _without_lead(pieces: Continuation, lead: bytes) -> Iterator[bytes]:
    """Drops what a template puts before an answer."""
    begin = b""
    for piece in pieces:
        if lead:
            begin += piece
            if len(begin) < len(lead) and lead.startswith(begin):
                continue
            piece, lead = begin.removeprefix(lead), b""
        if piece:
            yield piece
    if lead:
        yield begin


def _characters(pieces: Iterator[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text
