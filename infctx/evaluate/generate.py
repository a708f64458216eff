"""Generation: a prompt in, bytes out, token by token from the state."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from infctx.conventions import END_OF_DOCUMENT
from infctx.data.tokenizer import Tokenizer, get_tokenizer, tokenizer_for_vocab
from infctx.errors import InputError
from infctx.model.rwkv import RWKV

PROMPT_SEGMENT_TOKENS = 1024


def generate(
    model: RWKV, prompt: str, *, max_tokens: int = 256, temperature: float = 1.0, top_p: float = 0.7, seed: int = 0
) -> Iterator[bytes]:
    """Yields the bytes of each token after the prompt, until the document ends or there are max_tokens.

    prompt:      an empty one starts a new document, after the end of another
    temperature: 0 picks the most likely token each time
    top_p:       draws only from the most likely tokens that together reach this probability; 1 for all
    Raises InputError for values out of range, and if no tokenizer fits the model's vocabulary.
    """
    if not temperature >= 0:  # written so that NaN fails too
        raise InputError(f"generate: temperature: {temperature} does not fit; give 0 or more")
    if not 0 < top_p <= 1:
        raise InputError(f"generate: top_p: {top_p} does not fit; give more than 0, and 1 at most")
    if max_tokens < 1:
        raise InputError(f"generate: max_tokens: {max_tokens} does not fit; give at least 1")
    name = tokenizer_for_vocab(model.sizes.vocab_size)
    if name is None:
        raise InputError(
            f"generate: no tokenizer here has the model's {model.sizes.vocab_size} ids; take a model of 257 (bytes) or "
            "65,536 (World)"
        )
    tokenizer = get_tokenizer(name)
    if not 0 <= seed < 1 << 63:
        raise InputError(f"generate: seed: {seed} does not fit; give 0 to 2^63 - 1")
    tokens = torch.tensor(tokenizer.encode(prompt).tolist() or [END_OF_DOCUMENT])[None]
    return _continue(model, tokenizer, tokens, max_tokens, temperature, top_p, torch.Generator().manual_seed(seed))


@torch.no_grad()
def _continue(
    model: RWKV,
    tokenizer: Tokenizer,
    tokens: Tensor,
    max_tokens: int,
    temperature: float,
    top_p: float,
    random: torch.Generator,
) -> Iterator[bytes]:
    device, state = model.embedding.weight.device, None
    for piece in tokens.split(PROMPT_SEGMENT_TOKENS, dim=1):
        hidden, state = model(piece.to(device), state)
    for _ in range(max_tokens):
        logits = model.logits(hidden[0, -1]).double().cpu()
        token = draw(logits, temperature, top_p, random)
        if token == END_OF_DOCUMENT:
            return
        yield tokenizer.decode([token])
        hidden, state = model(torch.tensor([[token]], device=device), state)


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
