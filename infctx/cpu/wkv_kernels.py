"""The kernels of `wkv_compiled`: forward and backward over whole heads.

Eight tokens make a chunk, over which S is passed once.  With P_t the product of the decays before token t of the chunk,
Q_t of those after it, D of all, A[t, s] = sum_i r_t k_s (decays between s and t) for s < t, and A[t, t] = r_t u k_t:

    y_t = sum_i (r_t P_t)[i] S[i] + sum_{s <= t} A[t, s] v_s;    S <- D S + sum_s (k_s Q_s) v_s

Decays are only multiplied, never divided by, and every gradient is a plain sum of its terms: nothing can overflow or
cancel, whatever the decays.  Tokens beyond the last are zeros: no input, no decay.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
from numba import njit, types

from infctx.conventions import START_SPACING
from infctx.cpu import lanes
from infctx.cpu.lanes import (
    CHUNK,
    TOKENS,
    VECTOR_BYTES,
    load_decays,
    load_tokens,
    macro,
    pack,
    store_tokens,
    transpose,
    unpack,
)

KEPT_TOKENS = 64
"""The forward pass keeps S for the backward pass every this many tokens: N / 64 numbers for each number of r."""


@functools.cache
def compiled(kernel: str, dtype: np.dtype) -> Callable[..., None]:
    """Returns the kernel "forward" or "backward" for float32 or float64, from numba's cache on disk if possible."""
    real, flags = types.float32 if dtype == np.float32 else types.float64, types.boolean[:, :]
    tokens = matrices = types.Array(real, 4, "A")
    inputs = (*[tokens] * 4, real[:, :], flags, matrices)
    kept = real[:, :, ::1]
    if kernel == "forward":
        return build(_forward, (*inputs, matrices, tokens, matrices, kept), (lanes,))
    return build(_backward, (*inputs, kept, *[tokens] * 6, kept, *[matrices] * 2), (lanes,))


def build(
    make: Callable[[str], Callable[..., None]], arguments: tuple[types.Type, ...], sources: tuple[ModuleType, ...]
) -> Callable[..., None]:
    """Compiles a kernel for arguments of these types and two numbers, or gets it from numba's cache on disk.

    sources: the other files with its macros; numba's cache itself notices only changes to the kernel's file
    """
    texts = b"".join(Path(str(source.__file__)).read_bytes() for source in sources)
    function = make(hashlib.sha256(texts).hexdigest())
    signature = types.void(*arguments, types.intp, types.intp)
    try:
        return njit(signature, nogil=True, cache=True)(function)
    except (RuntimeError, OSError):  # no place to write a cache to
        return njit(signature, nogil=True)(function)


def padded_size(size: int, item_bytes: int) -> int:
    """Returns N rounded up to whole vectors."""
    vector = VECTOR_BYTES // item_bytes
    return -(-size // vector) * vector


def _forward(version: str) -> Callable[..., None]:
    def forward(r, k, v, w, u, starts, initial, state, y, final, kept, first, last):
        _ = version  # makes numba's cache notice changes to the macros' file
        B, T, H, N = r.shape
        width = width_of(N, state)
        rt, kt, vt, et, read, key, yt, packed_read, packed_key = scratch(9, CHUNK * width, state)
        scores, decay = scratch(1, CHUNK * CHUNK, state)[0], scratch(1, width, state)[0]
        bonus, S = scratch(H, width, state), scratch(H, width * width, state)
        bonus[:, :N] = u
        for b in range(first // H, -(-last // H)):
            heads = range(max(first - b * H, 0), min(last - b * H, H))
            for h in heads:
                put(S[h], state[b, h], width, False)
            for begin in range(0, T, KEPT_TOKENS):
                # All heads of a stretch of tokens, then the next stretch: heads share the pages of memory.
                for h in heads:
                    for t in range(begin, min(begin + KEPT_TOKENS, T), CHUNK):
                        if t % START_SPACING == 0 and starts[b, t // START_SPACING]:
                            put(S[h], initial[b, h], width, False)
                        if t == begin and kept.shape[0] > 0:
                            kept[b * H + h, t // KEPT_TOKENS] = S[h]
                        for rows, source in ((rt, r), (kt, k), (vt, v)):
                            load_tokens(rows, source, b, t, h, T, N, width)
                        load_decays(et, w, b, t, h, T, N, width)
                        decay_reads(read, scores, rt, kt, et, bonus[h], width)
                        decay_keys(key, decay, kt, et, width)
                        pack(packed_read, read, width)
                        pack(packed_key, key, width)
                        read_and_write(S[h], yt, packed_read, packed_key, vt, decay, N, width)
                        add_scores(yt, scores, vt, width)
                        store_tokens(y, yt, b, t, h, T, N, width)
            for h in heads:
                add(final[b, h], S[h], width, False)

    return forward


def _backward(version: str) -> Callable[..., None]:
    def backward(r, k, v, w, u, starts, initial, kept, dy, dfinal, dr, dk, dv, dw, du, dstate, dinitial, first, last):
        _ = version
        B, T, H, N = r.shape
        width = width_of(N, u)
        rt, kt, vt, et, dyt, drt, dkt, dvt, dwt, read, key, pv, pdy, pdv = scratch(14, CHUNK * width, u)
        scores, dscores = scratch(2, CHUNK * CHUNK, u)
        decay, ddecay = scratch(2, width, u)
        bonus, dbonus, dS = scratch(H, width, u), scratch(H, width, u), scratch(H, width * width, u)
        # S and dS are value by key here: sums over values are then sums of vectors.
        S = scratch(KEPT_TOKENS // CHUNK, width * width, u)
        bonus[:, :N] = u
        for b in range(first // H, -(-last // H)):
            heads = range(max(first - b * H, 0), min(last - b * H, H))
            dbonus[:] = 0
            for h in heads:
                put(dS[h], dfinal[b, h], width, True)
            for begin in range((T - 1) // KEPT_TOKENS * KEPT_TOKENS, -1, -KEPT_TOKENS):
                chunks = min(KEPT_TOKENS // CHUNK, -(-(T - begin) // CHUNK))
                for h in heads:
                    transpose(S[0], kept[b * H + h, begin // KEPT_TOKENS], width)
                    for c in range(1, chunks):
                        t = begin + c * CHUNK
                        if t % START_SPACING == 0 and starts[b, t // START_SPACING]:
                            put(S[c], initial[b, h], width, True)
                            continue
                        load_tokens(kt, k, b, t - CHUNK, h, T, N, width)
                        load_tokens(vt, v, b, t - CHUNK, h, T, N, width)
                        load_decays(et, w, b, t - CHUNK, h, T, N, width)
                        decay_keys(key, decay, kt, et, width)
                        pack(pv, vt, width)
                        write(S[c], S[c - 1], pv, key, decay, N, width)
                    for c in range(chunks - 1, -1, -1):
                        t = begin + c * CHUNK
                        for rows, source in ((rt, r), (kt, k), (vt, v), (dyt, dy)):
                            load_tokens(rows, source, b, t, h, T, N, width)
                        load_decays(et, w, b, t, h, T, N, width)
                        decay_reads(read, scores, rt, kt, et, bonus[h], width)
                        decay_keys(key, decay, kt, et, width)
                        dot_tokens(dscores, dyt, vt, width)
                        pack(pdy, dyt, width)
                        pack(pv, vt, width)
                        read_gradients(drt, ddecay, S[c], dS[h], pdy, N, width)
                        value_gradients(pdv, dS[h], key, N, width)
                        unpack(dvt, pdv, width)
                        key_gradients(dS[h], dkt, pv, pdy, read, decay, N, width)
                        add_scores_transposed(dvt, scores, dyt, width)
                        token_gradients(drt, dkt, dwt, dbonus[h], rt, kt, et, bonus[h], decay, ddecay, dscores, width)
                        for target, rows in ((dr, drt), (dk, dkt), (dv, dvt), (dw, dwt)):
                            store_tokens(target, rows, b, t, h, T, N, width)
                        if t % START_SPACING == 0 and starts[b, t // START_SPACING]:
                            add(dinitial[b, h], dS[h], width, True)
                            dS[h] = 0
            for h in heads:
                du[b, h] = dbonus[h, :N]
                add(dstate[b, h], dS[h], width, True)

    return backward


@njit
def width_of(size, like):
    vector = VECTOR_BYTES // like.itemsize
    return -(-size // vector) * vector


@njit
def scratch(rows, size, like):
    """Zeros, aligned."""
    memory = np.zeros(rows * size + VECTOR_BYTES // like.itemsize, like.dtype)
    skip = -memory.ctypes.data % VECTOR_BYTES // like.itemsize
    return memory[skip : skip + rows * size].reshape((rows, size))


@njit
def put(matrix, source, width, transposed):
    L = VECTOR_BYTES // matrix.itemsize
    for a in range(source.shape[0]):
        for c in range(source.shape[0]):
            matrix[c // L * L * width + a * L + c % L] = source[c, a] if transposed else source[a, c]


@njit
def add(target, matrix, width, transposed):
    L = VECTOR_BYTES // matrix.itemsize
    for a in range(target.shape[0]):
        for c in range(target.shape[0]):
            value = matrix[c // L * L * width + a * L + c % L]
            if transposed:
                target[c, a] += value
            else:
                target[a, c] += value


@macro
def decay_reads(x, read, scores, r, k, e, bonus, width):
    """read_t = r_t P_t; scores[t, s] = A[t, s], zero for s > t."""
    for t in TOKENS:
        slots = x.sums(CHUNK)
        with x.columns(width) as column:
            decayed = x.load(r, (t, width), column)
            x.accumulate(slots[t], decayed, x.mul(x.load(bonus, column), x.load(k, (t, width), column)))
            for s in reversed(range(t)):
                x.accumulate(slots[s], decayed, x.load(k, (s, width), column))
                decayed = x.mul(decayed, x.load(e, (s, width), column))
            x.store(decayed, read, (t, width), column)
        x.store_totals(slots, scores, t * CHUNK)


@macro
def decay_keys(x, key, decay, k, e, width):
    """key_t = k_t Q_t; decay = D."""
    with x.columns(width) as column:
        until_end = x.constant(1.0)
        for t in reversed(TOKENS):
            x.store(x.mul(x.load(k, (t, width), column), until_end), key, (t, width), column)
            until_end = x.mul(until_end, x.load(e, (t, width), column))
        x.store(until_end, decay, column)


@macro
def dot_tokens(x, scores, later, earlier, width):
    """scores[t, s] = later_t . earlier_s for s <= t."""
    for t in TOKENS:
        slots = x.sums(CHUNK)
        with x.columns(width) as column:
            value = x.load(later, (t, width), column)
            for s in range(t + 1):
                x.accumulate(slots[s], value, x.load(earlier, (s, width), column))
        x.store_totals(slots, scores, t * CHUNK)


@macro
def add_scores(x, y, scores, v, width):
    """y_t += sum_{s <= t} A[t, s] v_s."""
    with x.columns(width) as column:
        values, totals = x.rows(v, width, column), x.rows(y, width, column)
        for t in TOKENS:
            for s in range(t + 1):
                totals[t] = x.muladd(x.splat(scores, t * CHUNK + s), values[s], totals[t])
        x.store_rows(totals, y, width, column)


@macro
def add_scores_transposed(x, dv, scores, dy, width):
    """dv_s += sum_{t >= s} A[t, s] dy_t."""
    with x.columns(width) as column:
        values, totals = x.rows(dy, width, column), x.rows(dv, width, column)
        for t in TOKENS:
            for s in range(t + 1):
                totals[s] = x.muladd(x.splat(scores, t * CHUNK + s), values[t], totals[s])
        x.store_rows(totals, dv, width, column)


@macro
def read_and_write(x, S, y, packed_read, packed_key, v, decay, N, width):
    """y_t = sum_i read_t[i] S[i]; S <- D S + sum_s key_s v_s."""
    with x.columns(width) as column:
        values, slots = x.rows(v, width, column), x.sums(CHUNK)
        with x.loop(N) as i:
            place = ((column, width), (i, x.L))
            old = x.load(S, *place)
            new = x.mul(old, x.splat(decay, i))
            for t in TOKENS:
                x.accumulate(slots[t], x.splat(packed_read, (i, CHUNK), t), old)
                new = x.muladd(x.splat(packed_key, (i, CHUNK), t), values[t], new)
            x.store(new, S, *place)
        x.store_rows(x.totals(slots), y, width, column)


@macro
def write(x, target, S, packed_value, key, decay, N, width):
    """target = S D + sum_s v_s key_s, value by key."""
    with x.columns(width) as column:
        keys, kept = x.rows(key, width, column), x.load(decay, column)
        with x.loop(N) as j:
            place = ((column, width), (j, x.L))
            new = x.mul(x.load(S, *place), kept)
            for s in TOKENS:
                new = x.muladd(x.splat(packed_value, (j, CHUNK), s), keys[s], new)
            x.store(new, target, *place)


@macro
def read_gradients(x, dread, ddecay, S, dS, packed_dy, N, width):
    """dread_t = sum_j dy_t[j] S[j]; ddecay = sum_j S[j] dS[j], value by key."""
    with x.columns(width) as column:
        slots = x.sums(CHUNK + 1)
        with x.loop(N) as j:
            place = ((column, width), (j, x.L))
            old = x.load(S, *place)
            for t in TOKENS:
                x.accumulate(slots[t], x.splat(packed_dy, (j, CHUNK), t), old)
            x.accumulate(slots[CHUNK], x.load(dS, *place), old)
        *reads, whole = x.totals(slots)
        x.store_rows(reads, dread, width, column)
        x.store(whole, ddecay, column)


@macro
def value_gradients(x, packed_dv, dS, key, N, width):
    """dv_s[j] = sum_i key_s[i] dS[j, i], value by key: for two j at a time, which share the loads of keys."""
    with x.loop(N, 2) as j:
        slots = x.sums(2 * CHUNK)
        with x.columns(width) as column:
            keys = x.rows(key, width, column)
            for next_j in range(2):
                gradient = x.load(dS, (column, width), (j, x.L), next_j * x.L)
                for s in TOKENS:
                    x.accumulate(slots[next_j * CHUNK + s], keys[s], gradient)
        x.store_totals(slots, packed_dv, (j, CHUNK))


@macro
def key_gradients(x, dS, dkey, packed_value, packed_dy, read, decay, N, width):
    """dkey_s = sum_j v_s[j] dS[j]; dS <- dS D + sum_t dy_t read_t, value by key."""
    with x.columns(width) as column:
        reads, kept, slots = x.rows(read, width, column), x.load(decay, column), x.sums(CHUNK)
        with x.loop(N) as j:
            place = ((column, width), (j, x.L))
            old = x.load(dS, *place)
            new = x.mul(old, kept)
            for t in TOKENS:
                x.accumulate(slots[t], x.splat(packed_value, (j, CHUNK), t), old)
                new = x.muladd(x.splat(packed_dy, (j, CHUNK), t), reads[t], new)
            x.store(new, dS, *place)
        x.store_rows(x.totals(slots), dkey, width, column)


@macro
def token_gradients(x, dr, dk, dw, du, r, k, e, bonus, decay, ddecay, dscores, width):
    """From dread and dkey, which dr and dk hold, to dr, dk and dw; adds to du.

    The gradient of log decay t is the sum over all paths that cross t: from S to dS, from S to a later read, from an
    earlier key to dS, and from an earlier key s to a later read t, r_t k_s (decays between) dscores[t, s].
    """
    with x.columns(width) as column:
        rs, ks, es, drs, dks = (x.rows(data, width, column) for data in (r, k, e, dr, dk))
        boost, du_total = x.load(bonus, column), x.load(du, column)
        dws = [x.mul(x.load(decay, column), x.load(ddecay, column))] * CHUNK
        before = until_end = x.constant(1.0)
        earlier = later = x.constant(0.0)
        for t in TOKENS:
            drs[t], before = x.mul(drs[t], before), x.mul(before, es[t])
        for t in reversed(TOKENS):
            dks[t], until_end = x.mul(dks[t], until_end), x.mul(until_end, es[t])
        for t in TOKENS:
            dws[t], earlier = x.add(dws[t], earlier), x.muladd(ks[t], dks[t], earlier)
        for t in reversed(TOKENS):
            dws[t], later = x.add(dws[t], later), x.muladd(rs[t], drs[t], later)
        for t in TOKENS:
            own = x.splat(dscores, t * CHUNK + t)
            du_total = x.muladd(x.mul(rs[t], ks[t]), own, du_total)
            drs[t] = x.muladd(x.mul(boost, ks[t]), own, drs[t])
            dks[t] = x.muladd(x.mul(boost, rs[t]), own, dks[t])
            between, paths = x.constant(1.0), {}
            for s in reversed(range(t)):
                across = x.mul(between, x.splat(dscores, t * CHUNK + s))
                drs[t] = x.muladd(across, ks[s], drs[t])
                dks[s] = x.muladd(across, rs[t], dks[s])
                paths[s] = x.mul(x.mul(across, rs[t]), ks[s])
                between = x.mul(between, es[s])
            for s in range(1, t):
                dws[s] = x.add(dws[s], paths[s - 1])
                paths[s] = x.add(paths[s - 1], paths[s])
        x.store(du_total, du, column)
        for values, data in ((drs, dr), (dks, dk), (dws, dw)):
            x.store_rows(values, data, width, column)
