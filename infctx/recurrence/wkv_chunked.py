"""The WKV recurrence parallel over time, in plain torch: any device, any dtype, any decay.

Inside a chunk the causal triangle is halved again and again: in a block of 2h tokens, the right half reads from the
left half through the border between them,

    y[t] += sum_s  (r[t] exp(sum of w from the border to t - 1)) . (k[s] exp(sum of w from s + 1 to the border)) v[s]

which is one matrix product per level; the bonus is left on the diagonal.  Both exponents are sums of log decays, so
they are <= 0: nothing overflows, nothing is clamped, and a decay that underflows is a true zero.  The sums of a level
are those of the level below plus one term, so large sums are never subtracted, and the gradient of every log decay is
a sum of its contributions: fp32 keeps its precision at every decay.
Chunks pass on their states one by one.
A document start inside a chunk is a mask, never a decay of zero (whose logarithm would be -inf).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infctx.conventions import START_SPACING

CHUNK_TOKENS = 64


def wkv_chunked(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, starts: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `infctx.wkv`; runs in the dtype of `state`, gradients by autograd, of any order."""
    num_tokens, y_dtype = r.shape[1], r.dtype
    chunk_tokens = min(CHUNK_TOKENS, 1 << (num_tokens - 1).bit_length())
    r, k, v, w = (_chunks(x.to(state.dtype), chunk_tokens) for x in (r, k, v, w))  # (B, H, C, c, N)
    document = None if starts is None else _document_numbers(starts, r.shape[2], chunk_tokens)  # (B, 1, C, c)

    y = (r * u.to(state.dtype)[:, None, None] * k).sum(-1, keepdim=True) * v
    y, since, until, tail = _within_chunks(y, r, k, v, w, document)
    r, k = r * since.exp(), k * until.exp()
    if document is not None:
        k = k.masked_fill((document != document[..., -1:])[..., None], 0)
    states, last = _across_chunks(k.mT @ v, tail, state, document, initial)
    if document is None:
        y = y + r @ states
    else:
        carried = (document == 0)[..., None]
        y = y + r.masked_fill(~carried, 0) @ states
        if initial is not None:
            y = y + r.masked_fill(carried, 0) @ initial[:, :, None]
    return y.flatten(2, 3)[:, :, :num_tokens].transpose(1, 2).to(y_dtype), last


def _chunks(x: Tensor, chunk_tokens: int) -> Tensor:
    """Reshapes (B, T, H, N) to (B, H, C, c, N), padded with zeros: no input, no decay."""
    x = x.transpose(1, 2)
    missing = -x.shape[2] % chunk_tokens
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(2, (-1, chunk_tokens))


def _document_numbers(starts: Tensor, num_chunks: int, chunk_tokens: int) -> Tensor:
    """Returns (B, 1, C, c): how many documents have started in the chunk, up to and including each token."""
    begins = F.pad(starts.long()[..., None], (0, START_SPACING - 1)).flatten(1)  # (B, T rounded up to 16)
    missing = num_chunks * chunk_tokens - begins.shape[1]
    begins = F.pad(begins, (0, missing))  # negative when a short chunk ends before the spacing does
    return begins.unflatten(1, (num_chunks, chunk_tokens)).cumsum(-1)[:, None]


def _within_chunks(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, w: Tensor, document: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adds to y the reads of tokens from earlier tokens of the same chunk, level by level.

    Returns y, and sums of log decays between a token and the borders of the chunk, each (B, H, C, c, N): `since` the
    beginning (of the document, if it starts in the chunk) to just before a token, `until` the end from just after a
    token; and `tail` (B, H, C, 1, N), from the beginning to the end.
    """
    since, until = torch.zeros_like(w), torch.zeros_like(w)
    whole = tail = w  # sums over each block: all of it, and since the last document start in it
    half = 1
    while half < w.shape[-2]:
        halves = (-1, 2, half)
        left_k, left_v = (x.unflatten(3, halves)[..., 0, :, :] for x in (k, v))
        right_r = r.unflatten(3, halves)[..., 1, :, :]
        since, until = since.unflatten(3, halves), until.unflatten(3, halves)  # (B, H, C, blocks, 2, half, N)
        whole, tail = whole.unflatten(3, (-1, 2)), tail.unflatten(3, (-1, 2))  # (B, H, C, blocks, 2, N)
        seen = right_r * since[..., 1, :, :].exp()
        kept = left_k * until[..., 0, :, :].exp()
        into_right, into_tail = tail[..., 0, None, :], tail[..., 0, :]
        if document is not None and 2 * half > START_SPACING:
            numbers = document.unflatten(3, halves)  # (B, 1, C, blocks, 2, half)
            border = numbers[..., 0, -1:]
            reaches = numbers[..., 1, :] == border
            seen = seen.masked_fill(~reaches[..., None], 0)
            kept = kept.masked_fill((numbers[..., 0, :] != border)[..., None], 0)
            into_right = into_right.masked_fill(~reaches[..., None], 0)
            into_tail = into_tail.masked_fill(~reaches[..., -1:], 0)
        read = (seen @ kept.mT) @ left_v
        y = y + F.pad(read[..., None, :, :], (0, 0, 0, 0, 1, 0)).flatten(3, 5)
        since = torch.stack([since[..., 0, :, :], since[..., 1, :, :] + into_right], dim=4).flatten(3, 5)
        until = torch.stack([until[..., 0, :, :] + whole[..., 1, None, :], until[..., 1, :, :]], dim=4).flatten(3, 5)
        whole, tail = whole.sum(4), tail[..., 1, :] + into_tail
        half *= 2
    return y, since, until, tail


def _across_chunks(
    added: Tensor, tail: Tensor, state: Tensor, document: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Carries the state from chunk to chunk.

    added: (B, H, C, N, N), the sum that a chunk writes; tail: (B, H, C, 1, N), log decay of the state before it.
    Returns the state before each chunk (B, H, C, N, N) and after the last one (B, H, N, N).
    """
    kept = tail.exp().mT  # (B, H, C, N, 1)
    states = []
    for chunk in range(added.shape[2]):
        states.append(state)
        if document is not None:
            begins = (document[:, :, chunk, -1] > 0)[..., None, None]
            state = torch.where(begins, torch.zeros_like(state) if initial is None else initial, state)
        state = kept[:, :, chunk] * state + added[:, :, chunk]
    return torch.stack(states, dim=2), state
