"""The WKV recurrences parallel over time, in plain torch: any device, any dtype, any decay.

Inside a chunk the causal triangle is halved again and again: in a block of 2h tokens, the right half reads from the
left half through the border between them,

    y[t] += sum_s  (r[t] exp(sum of w from the border to t - 1)) . (k[s] exp(sum of w from s + 1 to the border)) v[s]

which is one matrix product per level; the bonus is left on the diagonal.  Both exponents are sums of log decays, so
they are <= 0: nothing overflows, nothing is clamped, and a decay that underflows is a true zero.  The sums of a level
are those of the level below plus one term, so large sums are never subtracted, and the gradient of every log decay is
a sum of its contributions: fp32 keeps its precision at every decay.
Chunks pass on their states one by one.
A document start inside a chunk is a mask, never a decay of zero (whose logarithm would be -inf).

In RWKV-7, with u[t] = a[t] . S, a token writes two vectors, k[t] v[t] and b[t] u[t], and u itself reads the state
before the token.  Inside a chunk, with A and R the sums of what reads by a and r find of earlier writes by b and k,

    u = A_b u + A_k v + (a decayed) S;      y = R_b u + R_k v + (r decayed) S;      S <- kept S + b u + k v

so u = (1 - A_b)^-1 (...).  The triangle A_b and its inverse grow together, level by level: the inverse of two blocks
with c below them has -(right inverse) c (left inverse) below.  A chunk turns the state before it into F S + E with a
whole matrix F.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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
    chunk_tokens = _tokens_in_chunk(num_tokens)
    r, k, v, w = (_in_chunks(x.to(state.dtype), chunk_tokens) for x in (r, k, v, w))  # (B, H, C, c, N)
    document = None if starts is None else _document_numbers(starts, r.shape[2], chunk_tokens)  # (B, 1, C, c)

    levels, since, until, tail = _decays_by_level(w, document)
    y = (r * u.to(state.dtype)[:, None, None] * k).sum(-1, keepdim=True) * v
    for level in levels:
        left_v = v.unflatten(-2, level.halves)[..., 0, :, :]
        read = (level.seen(r) @ level.kept(k).mT) @ left_v
        y = y + F.pad(read[..., None, :, :], (0, 0, 0, 0, 1, 0)).flatten(3, 5)
    k = _in_last_document(k * until.exp(), document)
    states, last = _across_chunks(torch.mul, tail.exp().mT, k.mT @ v, state, document, initial)
    y = y + _read_states(r * since.exp(), states, document, initial)
    return _tokens_of(y, num_tokens).to(y_dtype), last


def wkv7_chunked(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    starts: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `infctx.wkv7`; runs in the dtype of `state`, gradients by autograd, of any order."""
    num_tokens, y_dtype = r.shape[1], r.dtype
    size = _tokens_in_chunk(num_tokens)
    r, w, k, v, a, b = (_in_chunks(x.to(state.dtype), size) for x in (r, w, k, v, a, b))  # (B, H, C, c, N)
    document = None if starts is None else _document_numbers(starts, r.shape[2], size)  # (B, 1, C, c)
    levels, since, until, tail = _decays_by_level(w, document)
    late_r = r * w.exp()  # r reads after its own token's decay, a before it

    own = torch.stack([(r * b).sum(-1), (r * k).sum(-1)])[..., None, None]  # (2, B, H, C, c, 1, 1)
    reads, writes = torch.stack([late_r, a]), torch.stack([b, k])
    inverse, r_scores, a_scores = _within_chunks(levels, own, reads, writes)
    by_state, by_chunk = inverse @ (a * since.exp()), inverse @ (a_scores[1] @ v)  # u = by_state @ S + by_chunk

    y = r_scores[0] @ by_chunk + r_scores[1] @ v
    reads_of_state = late_r * since.exp() + r_scores[0] @ by_state
    b, k = (_in_last_document(x * until.exp(), document).mT for x in (b, k))
    kept, added = torch.diag_embed(tail.exp().squeeze(3)) + b @ by_state, b @ by_chunk + k @ v
    states, last = _across_chunks(torch.matmul, kept, added, state, document, initial)
    y = y + _read_states(reads_of_state, states, document, initial)
    return _tokens_of(y, num_tokens).to(y_dtype), last


def _tokens_in_chunk(num_tokens: int) -> int:
    """Returns how many tokens a chunk has: a power of two."""
    return min(CHUNK_TOKENS, 1 << (num_tokens - 1).bit_length())


def _in_chunks(x: Tensor, chunk_tokens: int) -> Tensor:
    """Reshapes (B, T, H, N) to (B, H, C, c, N), padded with zeros: no input, no decay."""
    x = x.transpose(1, 2)
    missing = -x.shape[2] % chunk_tokens
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(2, (-1, chunk_tokens))


def _tokens_of(x: Tensor, num_tokens: int) -> Tensor:
    """Inverts `in_chunks`."""
    return x.flatten(2, 3)[:, :, :num_tokens].transpose(1, 2)


def _document_numbers(starts: Tensor, num_chunks: int, chunk_tokens: int) -> Tensor:
    """Returns (B, 1, C, c): how many documents have started in the chunk, up to and including each token."""
    begins = F.pad(starts.long()[..., None], (0, START_SPACING - 1)).flatten(1)  # (B, T rounded up to 16)
    missing = num_chunks * chunk_tokens - begins.shape[1]
    begins = F.pad(begins, (0, missing))  # negative when a short chunk ends before the spacing does
    return begins.unflatten(1, (num_chunks, chunk_tokens)).cumsum(-1)[:, None]


class _Level(NamedTuple):
    """Halves of blocks of 2h tokens: the right ones read what the left ones write, through the border between them.

    since, until: (B, H, C, blocks, h, N) log decay from the border to a right token, from a left token to the border
    reaches, stays: (B, 1, C, blocks, h, 1) whether these tokens are in the border's document; None: all are
    """

    halves: tuple[int, int, int]
    since: Tensor
    until: Tensor
    reaches: Tensor | None
    stays: Tensor | None

    def seen(self, reads: Tensor) -> Tensor:
        """Returns vectors (..., c, N) as right tokens apply them to the state at the border: (..., blocks, h, N)."""
        reads = reads.unflatten(-2, self.halves)[..., 1, :, :] * self.since.exp()
        return reads if self.reaches is None else reads.masked_fill(~self.reaches, 0)

    def kept(self, writes: Tensor) -> Tensor:
        """Returns what is left at the border of vectors (..., c, N) that left tokens write: (..., blocks, h, N)."""
        writes = writes.unflatten(-2, self.halves)[..., 0, :, :] * self.until.exp()
        return writes if self.stays is None else writes.masked_fill(~self.stays, 0)


def _decays_by_level(w: Tensor, document: Tensor | None) -> tuple[list[_Level], Tensor, Tensor, Tensor]:
    """Returns the levels, from blocks of two tokens to the chunk, and sums of log decays to the borders of the chunk.

    These are, each (B, H, C, c, N): `since` from the beginning (of the document, if it starts in the chunk) to just
    before a token, `until` from just after a token to the end; and `tail` (B, H, C, 1, N), from the beginning to the
    end.
    """
    since, until = torch.zeros_like(w), torch.zeros_like(w)
    whole = tail = w  # sums over each block: all of it, and since the last document start in it
    levels, half = [], 1
    while half < w.shape[-2]:
        halves = (-1, 2, half)
        since, until = since.unflatten(3, halves), until.unflatten(3, halves)  # (B, H, C, blocks, 2, half, N)
        whole, tail = whole.unflatten(3, (-1, 2)), tail.unflatten(3, (-1, 2))  # (B, H, C, blocks, 2, N)
        into_right, into_tail = tail[..., 0, None, :], tail[..., 0, :]
        reaches = stays = None
        if document is not None and 2 * half > START_SPACING:
            numbers = document.unflatten(3, halves)  # (B, 1, C, blocks, 2, half)
            border = numbers[..., 0, -1:]
            reaches, stays = ((numbers[..., side, :] == border)[..., None] for side in (1, 0))
            into_right = into_right.masked_fill(~reaches, 0)
            into_tail = into_tail.masked_fill(~reaches[..., -1, :], 0)
        levels.append(_Level(halves, since[..., 1, :, :], until[..., 0, :, :], reaches, stays))
        since = torch.stack([since[..., 0, :, :], since[..., 1, :, :] + into_right], dim=4).flatten(3, 5)
        until = torch.stack([until[..., 0, :, :] + whole[..., 1, None, :], until[..., 1, :, :]], dim=4).flatten(3, 5)
        whole, tail = whole.sum(4), tail[..., 1, :] + into_tail
        half *= 2
    return levels, since, until, tail


def _in_last_document(x: Tensor, document: Tensor | None) -> Tensor:
    """Returns (B, H, C, c, N) with zeros for tokens of documents that end before their chunk does."""
    return x if document is None else x.masked_fill((document != document[..., -1:])[..., None], 0)


def _across_chunks(
    apply: Callable[[Tensor, Tensor], Tensor],
    kept: Tensor,
    added: Tensor,
    state: Tensor,
    document: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Carries the state from chunk to chunk: apply(kept, state) + added.

    kept:  (B, H, C, N, 1) or (B, H, C, N, N), what a chunk leaves of the state before it
    added: (B, H, C, N, N), the sum that a chunk writes
    Returns the state before each chunk (B, H, C, N, N) and after the last one (B, H, N, N).
    """
    states = []
    for chunk in range(added.shape[2]):
        states.append(state)
        if document is not None:
            begins = (document[:, :, chunk, -1] > 0)[..., None, None]
            state = torch.where(begins, torch.zeros_like(state) if initial is None else initial, state)
        state = apply(kept[:, :, chunk], state) + added[:, :, chunk]
    return torch.stack(states, dim=2), state


def _read_states(reads: Tensor, states: Tensor, document: Tensor | None, initial: Tensor | None) -> Tensor:
    """Returns what tokens read (B, H, C, c, N) of the state before their chunk, or of the one their document begins in.

    reads:  (B, H, C, c, N), decayed since then
    states: (B, H, C, N, N), before each chunk
    """
    if document is None:
        return reads @ states
    carried = (document == 0)[..., None]
    y = reads.masked_fill(~carried, 0) @ states
    return y if initial is None else y + reads.masked_fill(carried, 0) @ initial[:, :, None]


def _within_chunks(levels: list[_Level], own: Tensor, reads: Tensor, writes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (1 - A_b)^-1 (B, H, C, c, c), the scores R_b, R_k and the scores A_b, A_k (2, B, H, C, c, c).

    own:    (2, B, H, C, c, 1, 1) what r finds of the writes of the token itself
    reads:  (2, B, H, C, c, N) by r and a, of the state before a token
    writes: (2, B, H, C, c, N) by b and k
    """
    scores = torch.stack([own, torch.zeros_like(own)])  # (2, 2, B, H, C, blocks, half, half), reads by writes
    inverse = torch.ones_like(own[0])
    for level in levels:
        below = level.seen(reads)[:, None] @ level.kept(writes)[None].mT
        left, right = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        inverse = _join(inverse, right @ below[1, 0] @ left)
        scores = _join(scores, below)
    return inverse.squeeze(-3), *scores.squeeze(-3)


def _join(blocks: Tensor, below: Tensor) -> Tensor:
    """Joins pairs of lower triangles (..., 2 n, h, h), with `below` (..., n, h, h) between them: (..., n, 2 h, 2 h)."""
    above = F.pad(blocks[..., ::2, :, :], (0, blocks.shape[-1]))
    return torch.cat([above, torch.cat([below, blocks[..., 1::2, :, :]], dim=-1)], dim=-2)
