"""Models whose memory is known, for tests of what measures memory: they predict from the tokens that they have read.

Each has what a measure uses of a model: tokens and a state in, hidden vectors and a state out, here the logits and the
last tokens read.
"""

from types import SimpleNamespace

import torch

from infctx.data.synthetic_tasks import ASK, WRITE
from infctx.data.tokenizer import get_tokenizer


class Remembering:
    """Predicts with certainty what `next_token` says of the tokens in memory, None: all tokens alike.

    memory: how many tokens it remembers
    """

    def __init__(self, memory, vocab_size=257):
        self.memory = memory
        self.sizes = SimpleNamespace(vocab_size=vocab_size)
        self.embedding = SimpleNamespace(weight=torch.zeros(1))
        self.head = SimpleNamespace(weight=torch.eye(vocab_size))

    def __call__(self, tokens, state=None):
        lanes = []
        for lane, row in enumerate(tokens.tolist()):
            before = [] if state is None else state[lane]
            text = before + row
            hidden = torch.zeros(len(row), self.sizes.vocab_size)
            for place in range(len(row)):
                end = len(before) + place + 1
                predicted = self.next_token(text[max(0, end - self.memory) : end])
                if predicted is not None:
                    hidden[place, predicted] = 50.0
            lanes.append((hidden, text[-self.memory :]))
        return torch.stack([hidden for hidden, _ in lanes]), [text for _, text in lanes]

    def logits(self, hidden):
        return hidden


class Copier(Remembering):
    """Predicts the token that came after the last occurrence of the last three."""

    def next_token(self, text):
        last = text[-3:]
        for begin in range(len(text) - 4, -1, -1):
            if text[begin : begin + 3] == last:
                return text[begin + 3]
        return None


class Answering(Remembering):
    """Answers the questions of data/synthetic_tasks."""

    def next_token(self, text):
        key = text[-1] - ASK
        for place in range(len(text) - 2, -1, -1):
            if key >= 0 and text[place] == WRITE + key:
                return text[place + 1]
        return None


class Finder(Remembering):
    """Finds a needle's value by its words, and says it after the question, in bytes."""

    def next_token(self, text):
        decode = get_tokenizer("bytes").decode
        if b"provided text is" not in decode(text[-60:]):
            return None
        head, _, said = decode(text).decode(errors="ignore").rpartition("provided text is")
        _, found, after = head.partition(" is: ")
        value = f" {after.partition('.')[0]}"
        return 1 + ord(value[len(said)]) if found and len(said) < len(value) else None
