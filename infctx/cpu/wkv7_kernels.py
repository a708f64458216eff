"""The kernels of `wkv7_compiled`: forward and backward over whole heads, in chunks as in `wkv_kernels`.

With u_t = S_{t-1}^T a_t each token writes two vectors, k_t v_t and b_t u_t.  a reads before the decay e_t of the token,
r after it: r'_t = r_t e_t.  P_t and Q_t are the products of the decays before and after token t of the chunk, D that of
all, R_x[t, s] = r'_t x_s (decays between), A_x[t, s] = a_t x_s (decays between) for s < t, R_x[t, t] = r_t x_t:

    u_t = (a_t P_t) S + sum_{s < t} (A_b[t, s] u_s + A_k[t, s] v_s)
    y_t = (r'_t P_t) S + sum_{s <= t} (R_b[t, s] u_s + R_k[t, s] v_s)
    S <- D S + sum_s ((b_s Q_s) u_s + (k_s Q_s) v_s)

The triangle in u is solved token by token, in registers.  The forward pass keeps u for the backward pass, which has the
same triangle transposed.  As in `wkv_kernels` decays are never divided by: every decay is exact.
Scores are rows of 16 for each token t: 8 for b, then 8 for k.
"""

import functools
from collections.abc import Callable

import numpy as np
from numba import njit, types

from infctx.conventions import START_SPACING
from infctx.cpu import lanes, wkv_kernels
from infctx.cpu.lanes import (
    CHUNK,
    TOKENS,
    load_decays,
    load_tokens,
    macro,
    pack,
    store_tokens,
    transpose,
)
from infctx.cpu.wkv_kernels import KEPT_TOKENS, add, build, decay_keys, put, scratch, width_of

ROW = 2 * CHUNK


@functools.cache
def compiled(kernel: str, dtype: np.dtype) -> Callable[..., None]:
    """Returns the kernel "forward" or "backward" for float32 or float64, from numba's cache on disk if possible."""
    real, flags = types.float32 if dtype == np.float32 else types.float64, types.boolean[:, :]
    tokens = matrices = types.Array(real, 4, "A")
    inputs, kept = (*[tokens] * 6, flags, matrices), real[:, :, ::1]
    sources = (lanes, wkv_kernels)
    if kernel == "forward":
        return build(_forward, (*inputs, matrices, tokens, matrices, kept, tokens), sources)
    return build(_backward, (*inputs, kept, tokens, tokens, matrices, *[tokens] * 6, *[matrices] * 2), sources)


def _forward(version: str) -> Callable[..., None]:
    def forward(r, w, k, v, a, b, starts, initial, state, y, final, kept, kept_u, first, last):
        _ = version
        B, T, H, N = r.shape
        width = width_of(N, state)
        rt, kt, vt, at, bt, et, read, aread, key, bkey, yt, ut, p1, p2 = scratch(14, CHUNK * width, state)
        rscores, ascores = scratch(2, CHUNK * ROW, state)
        decay, S = scratch(1, width, state)[0], scratch(H, width * width, state)
        for n in range(first // H, -(-last // H)):
            heads = range(max(first - n * H, 0), min(last - n * H, H))
            for h in heads:
                put(S[h], state[n, h], width, False)
            for begin in range(0, T, KEPT_TOKENS):
                # All heads of a stretch of tokens, then the next stretch: heads share the pages of memory.
                for h in heads:
                    for t in range(begin, min(begin + KEPT_TOKENS, T), CHUNK):
                        if t % START_SPACING == 0 and starts[n, t // START_SPACING]:
                            put(S[h], initial[n, h], width, False)
                        if t == begin and kept.shape[0] > 0:
                            kept[n * H + h, t // KEPT_TOKENS] = S[h]
                        for rows, source in ((rt, r), (kt, k), (vt, v), (at, a), (bt, b)):
                            load_tokens(rows, source, n, t, h, T, N, width)
                        load_decays(et, w, n, t, h, T, N, width)
                        late_scores(read, rscores, rt, bt, kt, et, width)
                        early_scores(aread, ascores, at, bt, kt, et, width)
                        decay_keys(key, decay, kt, et, width)
                        decay_keys(bkey, decay, bt, et, width)
                        pack(p1, read, width)
                        pack(p2, aread, width)
                        read_two(S[h], yt, ut, p1, p2, N, width)
                        solve(yt, ut, vt, rscores, ascores, width)
                        pack(p1, key, width)
                        pack(p2, bkey, width)
                        write_two(S[h], p1, p2, vt, ut, decay, N, width)
                        store_tokens(y, yt, n, t, h, T, N, width)
                        if kept.shape[0] > 0:
                            store_tokens(kept_u, ut, n, t, h, T, N, width)
            for h in heads:
                add(final[n, h], S[h], width, False)

    return forward


def _backward(version: str) -> Callable[..., None]:
    def backward(r, w, k, v, a, b, starts, initial, kept, u, dy, dfinal, dr, dw, dk, dv, da, db, dstate, dinitial,
                 first, last):  # fmt: skip
        _ = version
        B, T, H, N = r.shape
        width = width_of(N, dfinal)
        rt, kt, vt, at, bt, et, ut, dyt, dut, dvt = scratch(10, CHUNK * width, dfinal)
        drt, dkt, dat, dbt, dwt, read, aread, key, bkey, p1, p2, pv, pu = scratch(13, CHUNK * width, dfinal)
        rscores, ascores, drscores, dascores = scratch(4, CHUNK * ROW, dfinal)
        decay, ddecay = scratch(2, width, dfinal)
        # S and dS are value by key here, dSt is key by value.
        dS, dSt = scratch(H, width * width, dfinal), scratch(1, width * width, dfinal)[0]
        S = scratch(KEPT_TOKENS // CHUNK, width * width, dfinal)
        for n in range(first // H, -(-last // H)):
            heads = range(max(first - n * H, 0), min(last - n * H, H))
            for h in heads:
                put(dS[h], dfinal[n, h], width, True)
            for begin in range((T - 1) // KEPT_TOKENS * KEPT_TOKENS, -1, -KEPT_TOKENS):
                chunks = min(KEPT_TOKENS // CHUNK, -(-(T - begin) // CHUNK))
                for h in heads:
                    transpose(S[0], kept[n * H + h, begin // KEPT_TOKENS], width)
                    rows = (kt, vt, bt, ut, et, key, bkey, pv, pu, decay)
                    remake_states(S, k, w, v, b, u, starts, initial, n, begin, h, chunks, rows, width)
                    for c in range(chunks - 1, -1, -1):
                        t = begin + c * CHUNK
                        for rows, source in ((rt, r), (kt, k), (vt, v), (at, a), (bt, b), (ut, u), (dyt, dy)):
                            load_tokens(rows, source, n, t, h, T, N, width)
                        load_decays(et, w, n, t, h, T, N, width)
                        late_scores(read, rscores, rt, bt, kt, et, width)
                        early_scores(aread, ascores, at, bt, kt, et, width)
                        decay_keys(key, decay, kt, et, width)
                        decay_keys(bkey, decay, bt, et, width)
                        pack(p1, key, width)
                        pack(p2, bkey, width)
                        transpose(dSt, dS[h], width)
                        read_two(dSt, dvt, dut, p1, p2, N, width)
                        solve_back(dvt, dut, dyt, rscores, ascores, width)
                        dot_tokens(drscores, dyt, ut, vt, width)
                        dot_tokens(dascores, dut, ut, vt, width)
                        for packed, rows in ((pv, vt), (pu, ut), (p1, dyt), (p2, dut)):
                            pack(packed, rows, width)
                        read_two(S[c], drt, dat, p1, p2, N, width)
                        read_two(dS[h], dkt, dbt, pv, pu, N, width)
                        dot_rows(ddecay, S[c], dS[h], N, width)
                        write_rows(dS[h], dS[h], p1, p2, read, aread, decay, N, width)
                        token_gradients(drt, dkt, dat, dbt, dwt, rt, kt, at, bt, et, decay, ddecay, drscores,
                                        dascores, width)  # fmt: skip
                        for target, rows in ((dr, drt), (dw, dwt), (dk, dkt), (dv, dvt), (da, dat), (db, dbt)):
                            store_tokens(target, rows, n, t, h, T, N, width)
                        if t % START_SPACING == 0 and starts[n, t // START_SPACING]:
                            add(dinitial[n, h], dS[h], width, True)
                            dS[h] = 0
            for h in heads:
                add(dstate[n, h], dS[h], width, True)

    return backward


@njit
def remake_states(S, k, w, v, b, u, starts, initial, n, begin, h, chunks, rows, width):
    """Fills S with the states before each chunk, value by key, from the first; rows: scratch."""
    kt, vt, bt, ut, et, key, bkey, pv, pu, decay = rows
    _, T, _, N = k.shape
    for c in range(1, chunks):
        t = begin + c * CHUNK
        if t % START_SPACING == 0 and starts[n, t // START_SPACING]:
            put(S[c], initial[n, h], width, True)
            continue
        for target, source in ((kt, k), (vt, v), (bt, b), (ut, u)):
            load_tokens(target, source, n, t - CHUNK, h, T, N, width)
        load_decays(et, w, n, t - CHUNK, h, T, N, width)
        decay_keys(key, decay, kt, et, width)
        decay_keys(bkey, decay, bt, et, width)
        pack(pv, vt, width)
        pack(pu, ut, width)
        write_rows(S[c], S[c - 1], pv, pu, key, bkey, decay, N, width)


@macro
def late_scores(x, read, scores, r, b, k, e, width):
    """read_t = r'_t P_t; scores[t] = R_b[t], R_k[t], zero for s > t."""
    _scores(x, read, scores, (r, b, k, e), width, late=True)


@macro
def early_scores(x, read, scores, a, b, k, e, width):
    """read_t = a_t P_t; scores[t] = A_b[t], A_k[t], zero for s >= t."""
    _scores(x, read, scores, (a, b, k, e), width, late=False)


def _scores(x, read, scores, inputs, width, late):
    reads, b, k, e = inputs
    for t in TOKENS:
        slots = x.sums(ROW)
        with x.columns(width) as column:
            decayed = x.load(reads, (t, width), column)
            for s in reversed(range(t + late)):
                x.accumulate(slots[s], decayed, x.load(b, (s, width), column))
                x.accumulate(slots[CHUNK + s], decayed, x.load(k, (s, width), column))
                decayed = x.mul(decayed, x.load(e, (s, width), column))
            x.store(decayed, read, (t, width), column)
        x.store_totals(slots, scores, t * ROW)


@macro
def dot_tokens(x, scores, later, u, v, width):
    """scores[t] = later_t . u_s, later_t . v_s for s <= t."""
    for t in TOKENS:
        slots = x.sums(ROW)
        with x.columns(width) as column:
            value = x.load(later, (t, width), column)
            for s in range(t + 1):
                x.accumulate(slots[s], value, x.load(u, (s, width), column))
                x.accumulate(slots[CHUNK + s], value, x.load(v, (s, width), column))
        x.store_totals(slots, scores, t * ROW)


@macro
def read_two(x, S, first, second, packed_first, packed_second, N, width):
    """first_t = sum_i packed_first[i, t] S[i]; second_t likewise."""
    with x.columns(width) as column:
        slots = x.sums(2 * CHUNK)
        with x.loop(N) as i:
            old = x.load(S, (column, width), (i, x.L))
            for t in TOKENS:
                x.accumulate(slots[t], x.splat(packed_first, (i, CHUNK), t), old)
                x.accumulate(slots[CHUNK + t], x.splat(packed_second, (i, CHUNK), t), old)
        totals = x.totals(slots)
        x.store_rows(totals[:CHUNK], first, width, column)
        x.store_rows(totals[CHUNK:], second, width, column)


@macro
def write_two(x, S, packed_key, packed_bkey, v, u, decay, N, width):
    """S <- D S + sum_s (key_s v_s + bkey_s u_s), key by value."""
    with x.columns(width) as column:
        values, others = x.rows(v, width, column), x.rows(u, width, column)
        with x.loop(N) as i:
            place = ((column, width), (i, x.L))
            new = x.mul(x.load(S, *place), x.splat(decay, i))
            for s in TOKENS:
                new = x.muladd(x.splat(packed_key, (i, CHUNK), s), values[s], new)
                new = x.muladd(x.splat(packed_bkey, (i, CHUNK), s), others[s], new)
            x.store(new, S, *place)


@macro
def write_rows(x, target, S, packed_first, packed_second, first, second, decay, N, width):
    """target[j] = S[j] D + sum_s (packed_first[j, s] first_s + packed_second[j, s] second_s), value by key."""
    with x.columns(width) as column:
        firsts, seconds = x.rows(first, width, column), x.rows(second, width, column)
        kept = x.load(decay, column)
        with x.loop(N) as j:
            place = ((column, width), (j, x.L))
            new = x.mul(x.load(S, *place), kept)
            for s in TOKENS:
                new = x.muladd(x.splat(packed_first, (j, CHUNK), s), firsts[s], new)
                new = x.muladd(x.splat(packed_second, (j, CHUNK), s), seconds[s], new)
            x.store(new, target, *place)


@macro
def dot_rows(x, dots, S, dS, N, width):
    """dots = sum_j S[j] dS[j]."""
    with x.columns(width) as column:
        slots = x.sums(4)
        with x.loop(N, 4) as j:  # N beyond whole fours are zeros
            for n in range(4):
                place = ((column, width), (j, x.L), n * x.L)
                x.accumulate(slots[n], x.load(S, *place), x.load(dS, *place))
        one, two, three, four = x.totals(slots)
        x.store(x.add(x.add(one, two), x.add(three, four)), dots, column)


@macro
def solve(x, y, u, v, rscores, ascores, width):
    """From what r and a read of S, which y and u hold, to y and u."""
    with x.columns(width) as column:
        values, ys, us = (x.rows(data, width, column) for data in (v, y, u))
        for t in TOKENS:
            for s in range(t):
                us[t] = x.muladd(x.splat(ascores, t * ROW + s), us[s], us[t])
                us[t] = x.muladd(x.splat(ascores, t * ROW + CHUNK + s), values[s], us[t])
            for s in range(t + 1):
                ys[t] = x.muladd(x.splat(rscores, t * ROW + s), us[s], ys[t])
                ys[t] = x.muladd(x.splat(rscores, t * ROW + CHUNK + s), values[s], ys[t])
        x.store_rows(us, u, width, column)
        x.store_rows(ys, y, width, column)


@macro
def solve_back(x, dv, du, dy, rscores, ascores, width):
    """From what k and b find in dS, which dv and du hold, to dv and du."""
    with x.columns(width) as column:
        dys, dvs, dus = (x.rows(data, width, column) for data in (dy, dv, du))
        for s in reversed(TOKENS):
            for t in range(s, CHUNK):
                dus[s] = x.muladd(x.splat(rscores, t * ROW + s), dys[t], dus[s])
                dvs[s] = x.muladd(x.splat(rscores, t * ROW + CHUNK + s), dys[t], dvs[s])
            for t in range(s + 1, CHUNK):
                dus[s] = x.muladd(x.splat(ascores, t * ROW + s), dus[t], dus[s])
                dvs[s] = x.muladd(x.splat(ascores, t * ROW + CHUNK + s), dus[t], dvs[s])
        x.store_rows(dvs, dv, width, column)
        x.store_rows(dus, du, width, column)


@macro
def token_gradients(x, dr, dk, da, db, dw, r, k, a, b, e, decay, ddecay, drscores, dascores, width):
    """From the gradients of r'_t P_t, k_t Q_t, a_t P_t, b_t Q_t, which dr, dk, da and db hold, to those of the inputs.

    The gradient of log decay t is the sum over all paths that cross t, as in `wkv_kernels`.
    """
    with x.columns(width) as column:
        rs, ks, as_, bs, es = (x.rows(data, width, column) for data in (r, k, a, b, e))
        drs, dks, das, dbs = (x.rows(data, width, column) for data in (dr, dk, da, db))
        lates = [x.mul(rs[t], es[t]) for t in TOKENS]
        dws = [x.mul(x.load(decay, column), x.load(ddecay, column))] * CHUNK
        before = until_end = x.constant(1.0)
        earlier = later = x.constant(0.0)
        for t in TOKENS:
            drs[t], das[t], before = x.mul(drs[t], before), x.mul(das[t], before), x.mul(before, es[t])
        for t in reversed(TOKENS):
            dks[t], dbs[t] = x.mul(dks[t], until_end), x.mul(dbs[t], until_end)
            until_end = x.mul(until_end, es[t])
        for t in TOKENS:
            dws[t], earlier = x.add(dws[t], earlier), x.muladd(ks[t], dks[t], x.muladd(bs[t], dbs[t], earlier))
        for t in reversed(TOKENS):
            dws[t], later = x.add(dws[t], later), x.muladd(lates[t], drs[t], x.muladd(as_[t], das[t], later))
        for t in TOKENS:
            between, paths = x.constant(1.0), {}
            for s in reversed(range(t)):
                rb, rk, ab, ak = (
                    x.splat(scores, t * ROW + side + s) for scores in (drscores, dascores) for side in (0, CHUNK)
                )
                by_r, by_a = (
                    x.mul(between, x.muladd(on_k, ks[s], x.mul(on_b, bs[s]))) for on_b, on_k in ((rb, rk), (ab, ak))
                )
                of_b, of_k = (x.muladd(on_r, lates[t], x.mul(on_a, as_[t])) for on_r, on_a in ((rb, ab), (rk, ak)))
                drs[t], das[t] = x.add(drs[t], by_r), x.add(das[t], by_a)
                dks[s], dbs[s] = x.muladd(between, of_k, dks[s]), x.muladd(between, of_b, dbs[s])
                paths[s] = x.muladd(lates[t], by_r, x.mul(as_[t], by_a))
                between = x.mul(between, es[s])
            for s in range(1, t):
                dws[s] = x.add(dws[s], paths[s - 1])
                paths[s] = x.add(paths[s - 1], paths[s])
        for t in TOKENS:
            own_b, own_k = x.splat(drscores, t * ROW + t), x.splat(drscores, t * ROW + CHUNK + t)
            dws[t] = x.muladd(lates[t], drs[t], dws[t])
            drs[t] = x.muladd(es[t], drs[t], x.muladd(own_k, ks[t], x.mul(own_b, bs[t])))
            dks[t], dbs[t] = x.muladd(own_k, rs[t], dks[t]), x.muladd(own_b, rs[t], dbs[t])
        for values, data in ((drs, dr), (dks, dk), (das, da), (dbs, db), (dws, dw)):
            x.store_rows(values, data, width, column)
