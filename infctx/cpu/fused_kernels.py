"""The kernels of `fused`: each makes one pass over rows, where plain torch makes one for every elementwise step.

Tokens are contiguous arrays (B, T, D) or (B, T, H, N), here rows of D numbers: `places` holds their addresses, in the
order of the list above the kernel, because numba takes long to compile functions of many arrays.  Each call takes heads
(of blends and squares: blocks of columns) from `first` to `last`, so a sum over rows belongs to one thread and does not
depend on how many there are.  Sums are made over a stretch of rows and then added up, which keeps fp32 exact.
"""

import functools
from collections.abc import Callable

import numpy as np
from numba import njit, types

from infctx.cpu import lanes, wkv_kernels
from infctx.cpu.lanes import macro
from infctx.cpu.threads import BLOCK
from infctx.cpu.wkv_kernels import build, scratch, width_of

STRETCH = 64
"""Rows whose gradients of a vector are summed up before they are added to the sum over all rows."""
SHORTEST = 1e-12
"""Below this length a key is divided by it instead, so that zeros stay zeros."""


@functools.cache
def compiled(kernel: str, dtype: np.dtype) -> Callable[..., None]:
    """Returns a kernel for float32 or float64, from numba's cache on disk if possible."""
    real = types.float32 if dtype == np.float32 else types.float64
    vectors, places, rows, number = real[:, :, ::1], types.int64[::1], types.intp, types.float64
    make, signature = {
        "blend": (_blend, (vectors, places, rows)),
        "blend_back": (_blend_back, (vectors, vectors, places, rows)),
        "squared_relu": (_squared_relu, (real[:, ::1], real[:, ::1])),
        "squared_relu_back": (_squared_relu_back, (real[:, ::1], real[:, ::1], real[:, ::1])),
        "delta_inputs": (_delta_inputs, (vectors, places, rows, number)),
        "delta_inputs_back": (_delta_inputs_back, (vectors, vectors, places, rows, number)),
        "delta_output": (_delta_output, (vectors, places, rows, number)),
        "delta_output_back": (_delta_output_back, (vectors, vectors, places, rows, number)),
    }[kernel]
    return build(make, signature, (lanes, wkv_kernels))


# places: origin, difference, all blends
def _blend(version: str) -> Callable[..., None]:
    def blend(mixes, places, rows, first, last):
        _ = version
        M, each, D = mixes.shape
        for row in range(rows):
            blend_row(mixes, places, row, rows, M, each > 1, D, first * BLOCK, min(last * BLOCK, D))

    return blend


# places: difference, gradients of origin and difference, gradient of each blend
def _blend_back(version: str) -> Callable[..., None]:
    def blend_back(mixes, d_mixes, places, rows, first, last):
        _ = version
        M, each, D = mixes.shape
        begin, end, width = first * BLOCK, min(last * BLOCK, D), width_of(D, mixes)
        sums = scratch(1, M * width, mixes)[0]
        for row in range(rows):
            blend_row_back(mixes, places, row, rows, M, each > 1, D, begin, end)
            if len(d_mixes) == 0:
                continue
            if each > 1:
                mix_gradients(d_mixes, places, row, rows, M, D, begin, end)
                continue
            mix_sums(sums, places, row, M, D, begin, end, width)
            if (row + 1) % STRETCH == 0 or row == rows - 1:
                for m in range(M):
                    for c in range(begin, end):
                        d_mixes[m, 0, c] += sums[m * width + c]
                        sums[m * width + c] = 0

    return blend_back


def _squared_relu(version: str) -> Callable[..., None]:
    def squared_relu(x, y, first, last):
        _ = version
        R, D = x.shape
        for row in range(R):
            square_row(x, y, row, D, first * BLOCK, min(last * BLOCK, D))

    return squared_relu


def _squared_relu_back(version: str) -> Callable[..., None]:
    def squared_relu_back(x, dy, dx, first, last):
        _ = version
        R, D = x.shape
        for row in range(R):
            square_row_back(x, dy, dx, row, D, first * BLOCK, min(last * BLOCK, D))

    return squared_relu_back


# places: k, decay, rate, w, key, a, b; v, first value, share, new v, or 0 0 0 0
def _delta_inputs(version: str) -> Callable[..., None]:
    def delta_inputs(vectors, places, rows, fastest, first, last):
        _ = version
        _, H, N = vectors.shape
        padded = pad(vectors)
        for row in range(rows):
            for h in range(first, last):
                delta_row(padded[h], places, row * H + h, N, width_of(N, vectors), fastest)
                if places[7] != 0:
                    value_row(padded[h], places[7:], row * H + h, N, width_of(N, vectors))

    return delta_inputs


# places: k, decay, rate, dw, dkey, da, db, dk, ddecay, drate; v, first value, share, dnew v, dv, dshare, or 0 ...
def _delta_inputs_back(version: str) -> Callable[..., None]:
    def delta_inputs_back(vectors, d_vectors, places, rows, fastest, first, last):
        _ = version
        _, H, N = vectors.shape
        width = width_of(N, vectors)
        padded, sums, rates = pad(vectors), scratch(H, 5 * width, vectors), scratch(1, 2 * width, vectors)[0]
        for row in range(rows):
            for h in range(first, last):
                delta_row_back(padded[h], places, row * H + h, N, width, fastest, sums[h], rates)
                if places[10] != 0:
                    value_row_back(padded[h], places[10:], row * H + h, N, width, sums[h])
                if (row + 1) % STRETCH == 0 or row == rows - 1:
                    add_sums(d_vectors, sums[h], h)

    return delta_inputs_back


# places: y, r, k, v, gate, output
def _delta_output(version: str) -> Callable[..., None]:
    def delta_output(vectors, places, rows, eps, first, last):
        _ = version
        _, H, N = vectors.shape
        padded = pad(vectors)
        for row in range(rows):
            for h in range(first, last):
                output_row(padded[h], places, row * H + h, N, width_of(N, vectors), eps)

    return delta_output


# places: y, r, k, v, gate, d_output, dy, dr, dk, dv, dgate
def _delta_output_back(version: str) -> Callable[..., None]:
    def delta_output_back(vectors, d_vectors, places, rows, eps, first, last):
        _ = version
        _, H, N = vectors.shape
        width = width_of(N, vectors)
        padded, sums = pad(vectors), scratch(H, 3 * width, vectors)
        for row in range(rows):
            for h in range(first, last):
                output_row_back(padded[h], places, row * H + h, N, width, eps, sums[h])
                if (row + 1) % STRETCH == 0 or row == rows - 1:
                    add_sums(d_vectors, sums[h], h)

    return delta_output_back


@njit
def pad(vectors):
    """Returns vectors (V, H, N) as (H, V * width), zeros beyond N."""
    V, H, N = vectors.shape
    width = width_of(N, vectors)
    padded = scratch(H, V * width, vectors)
    for h in range(H):
        for v in range(V):
            for c in range(N):
                padded[h, v * width + c] = vectors[v, h, c]
    return padded


@njit
def add_sums(target, sums, h):
    """Adds the sums to head h of the target (V, H, N), and empties them."""
    V, _, N = target.shape
    for v in range(V):
        for c in range(N):
            target[v, h, c] += sums[v * width_of(N, target) + c]
            sums[v * width_of(N, target) + c] = 0


@macro
def blend_row(x, mixes, places, row, rows, M, each_token, D, begin, end):
    origin, difference, blends = x.rows_at(places, 3, row, D)
    mix_row = x.builder.select(each_token, row, x.index(0))
    mix_rows = x.builder.select(each_token, rows, x.index(1))
    with x.span(begin, end) as column:
        start, by = x.load_part(origin, D, column), x.load_part(difference, D, column)
        with x.loop(M) as m:
            mix = x.load_part(x.builder.gep(mixes, [x.index((x.index((m, mix_rows), mix_row), D))]), D, column)
            blend = x.muladd(by, mix, start)
            x.store_part(blend, x.builder.gep(blends, [x.index((x.index((m, rows)), D))]), D, column)


@macro
def blend_row_back(x, mixes, places, row, rows, M, each_token, D, begin, end):
    _, d_origin, d_difference = x.rows_at(places, 3, row, D)
    mix_row = x.builder.select(each_token, row, x.index(0))
    mix_rows = x.builder.select(each_token, rows, x.index(1))
    with x.span(begin, end) as column:
        straight, by_mix = x.sums(2)
        with x.loop(M) as m:
            gradient = x.load_part(x.row_at(places, x.index(m, 3), row, D), D, column)
            mix = x.load_part(x.builder.gep(mixes, [x.index((x.index((m, mix_rows), mix_row), D))]), D, column)
            x.accumulate(straight, x.constant(1.0), gradient)
            x.accumulate(by_mix, mix, gradient)
        for slot, target in ((straight, d_origin), (by_mix, d_difference)):
            x.store_part(x.builder.load(slot), target, D, column)


@macro
def mix_sums(x, sums, places, row, M, D, begin, end, width):
    """sums[m] += gradient_m difference."""
    difference = x.row_at(places, x.index(0), row, D)
    with x.span(begin, end) as column:
        by = x.load_part(difference, D, column)
        with x.loop(M) as m:
            gradient = x.load_part(x.row_at(places, x.index(m, 3), row, D), D, column)
            place = sums, (m, width), column
            x.store(x.muladd(gradient, by, x.load(*place)), *place)


@macro
def mix_gradients(x, d_mixes, places, row, rows, M, D, begin, end):
    """d_mixes[m] = gradient_m difference."""
    difference = x.row_at(places, x.index(0), row, D)
    with x.span(begin, end) as column:
        by = x.load_part(difference, D, column)
        with x.loop(M) as m:
            gradient = x.load_part(x.row_at(places, x.index(m, 3), row, D), D, column)
            target = x.builder.gep(d_mixes, [x.index((x.index((m, rows), row), D))])
            x.store_part(x.mul(gradient, by), target, D, column)


@macro
def square_row(x, source, target, row, D, begin, end):
    source, target = (x.builder.gep(data, [x.index((row, D))]) for data in (source, target))
    with x.span(begin, end) as column:
        positive = x.positive(x.load_part(source, D, column))
        x.store_part(x.mul(positive, positive), target, D, column)


@macro
def square_row_back(x, source, gradient, target, row, D, begin, end):
    source, gradient, target = (x.builder.gep(data, [x.index((row, D))]) for data in (source, gradient, target))
    with x.span(begin, end) as column:
        slope = x.mul(x.constant(2.0), x.positive(x.load_part(source, D, column)))
        x.store_part(x.mul(slope, x.load_part(gradient, D, column)), target, D, column)


@macro
def delta_row(x, vectors, places, row, N, width, fastest):
    """See `fused.delta_inputs`; vectors: bases of decay, rate and share, scale, key_rate."""
    k, decay, rate, w, key, a, b = x.rows_at(places, 7, row, N)
    slots, one = x.sums(1), x.constant(1.0)
    with x.columns(width) as column:
        scaled = x.mul(x.load_part(k, N, column), x.load(vectors, (3, width), column))
        x.accumulate(slots[0], scaled, scaled)
    _, inverse = x.length(slots[0], SHORTEST)
    with x.columns(width) as column:
        base, rate_base, _, scale, key_rate = x.parts(vectors, 5, width, column)
        ks, decays, rates = (x.load_part(data, N, column) for data in (k, decay, rate))
        rates, left = x.sigmoid(x.add(rates, rate_base))
        kappa = x.mul(x.mul(ks, scale), inverse)
        x.store_part(x.mul(x.number(fastest), x.sigmoid(x.add(decays, base))[0]), w, N, column)
        x.store_part(x.mul(ks, x.sub(one, x.mul(left, key_rate))), key, N, column)
        x.store_part(x.negative(kappa), a, N, column)
        x.store_part(x.mul(kappa, rates), b, N, column)


@macro
def delta_row_back(x, vectors, places, row, N, width, fastest, sums, rows):
    """With kappa = s / |s|, s = k scale: the gradient of kappa is db rate - da; rows: scratch."""
    k, decay, rate, dw, dkey, da, db, dk, ddecay, drate = x.rows_at(places, 10, row, N)
    (square, along), one = x.sums(2), x.constant(1.0)
    with x.columns(width) as column:
        scaled = x.mul(x.load_part(k, N, column), x.load(vectors, (3, width), column))
        rates, left = x.sigmoid(x.add(x.load_part(rate, N, column), x.load(vectors, (1, width), column)))
        x.store(rates, rows, column)
        x.store(left, rows, width, column)
        of_kappa = x.sub(x.mul(x.load_part(db, N, column), rates), x.load_part(da, N, column))
        x.accumulate(square, scaled, scaled)
        x.accumulate(along, scaled, of_kappa)
    is_short, inverse = x.length(square, SHORTEST)
    along = x.builder.select(is_short, x.constant(0.0), x.mul(x.whole(along), inverse))
    with x.columns(width) as column:
        base, _, _, scale, key_rate = x.parts(vectors, 5, width, column)
        ks, decays, dws, dkeys, das, dbs = (x.load_part(data, N, column) for data in (k, decay, dw, dkey, da, db))
        rates, left = x.load(rows, column), x.load(rows, width, column)
        kappa = x.mul(x.mul(ks, scale), inverse)
        of_kappa = x.sub(x.mul(dbs, rates), das)
        of_scaled = x.mul(x.sub(of_kappa, x.mul(along, kappa)), inverse)
        share, rest = x.sigmoid(x.add(decays, base))
        of_decay = x.mul(x.mul(dws, x.number(fastest)), x.mul(share, rest))
        of_factor = x.mul(dkeys, ks)
        of_rate = x.mul(x.muladd(of_factor, key_rate, x.mul(dbs, kappa)), x.mul(rates, left))
        of_k = x.muladd(dkeys, x.sub(one, x.mul(left, key_rate)), x.mul(of_scaled, scale))
        for value, target in ((of_k, dk), (of_decay, ddecay), (of_rate, drate)):
            x.store_part(value, target, N, column)
        totals = of_decay, of_rate, None, x.mul(of_scaled, ks), x.negative(x.mul(of_factor, left))
        x.add_parts(totals, sums, width, column)


@macro
def value_row(x, vectors, places, row, N, width):
    """new v = v + (first - v) sigmoid(share)."""
    v, first, share, value = x.rows_at(places, 4, row, N)
    with x.columns(width) as column:
        old, new, amount = (x.load_part(data, N, column) for data in (v, first, share))
        amount, _ = x.sigmoid(x.add(amount, x.load(vectors, (2, width), column)))
        x.store_part(x.muladd(x.sub(new, old), amount, old), value, N, column)


@macro
def value_row_back(x, vectors, places, row, N, width, sums):
    """The gradient of `first` is dvalue - dv."""
    v, first, share, dvalue, dv, dshare = x.rows_at(places, 6, row, N)
    with x.columns(width) as column:
        old, new, amount, gradient = (x.load_part(data, N, column) for data in (v, first, share, dvalue))
        amount, rest = x.sigmoid(x.add(amount, x.load(vectors, (2, width), column)))
        of_share = x.mul(x.mul(gradient, x.sub(new, old)), x.mul(amount, rest))
        x.store_part(x.mul(gradient, rest), dv, N, column)
        x.store_part(of_share, dshare, N, column)
        x.add_parts((None, None, of_share), sums, width, column)


@macro
def output_row(x, vectors, places, row, N, width, eps):
    """See `fused.delta_output`; vectors: weight and bias of the norm, bonus."""
    y, r, k, v, gate, out = x.rows_at(places, 6, row, N)
    count = x.count(N)
    total, own, square = x.sums(3)
    with x.columns(width) as column:
        x.accumulate(total, x.constant(1.0), x.load_part(y, N, column))
        found = x.mul(x.load_part(r, N, column), x.load_part(k, N, column))
        x.accumulate(own, found, x.load(vectors, (2, width), column))
    mean, own = x.divide(x.whole(total), count), x.whole(own)
    with x.columns(width) as column:
        centered = x.within(x.sub(x.load_part(y, N, column), mean), N, column)
        x.accumulate(square, centered, centered)
    scale = x.inverse_root(x.add(x.divide(x.whole(square), count), x.number(eps)))
    with x.columns(width) as column:
        ys, vs, gates = (x.load_part(data, N, column) for data in (y, v, gate))
        weight, bias, _ = x.parts(vectors, 3, width, column)
        normal = x.mul(x.sub(ys, mean), scale)
        x.store_part(x.mul(x.muladd(own, vs, x.muladd(normal, weight, bias)), gates), out, N, column)


@macro
def output_row_back(x, vectors, places, row, N, width, eps, sums):
    y, r, k, v, gate, dout, dy, dr, dk, dv, dgate = x.rows_at(places, 11, row, N)
    count = x.count(N)
    total, own, square, whole, along, of_own = x.sums(6)
    with x.columns(width) as column:
        x.accumulate(total, x.constant(1.0), x.load_part(y, N, column))
        found = x.mul(x.load_part(r, N, column), x.load_part(k, N, column))
        x.accumulate(own, found, x.load(vectors, (2, width), column))
    mean, own = x.divide(x.whole(total), count), x.whole(own)
    with x.columns(width) as column:
        ys, vs, gates, gradient = (x.load_part(data, N, column) for data in (y, v, gate, dout))
        centered, gradient = x.within(x.sub(ys, mean), N, column), x.mul(gradient, gates)
        of_normal = x.mul(gradient, x.load(vectors, column))
        x.accumulate(square, centered, centered)
        x.accumulate(whole, x.constant(1.0), of_normal)
        x.accumulate(along, of_normal, centered)
        x.accumulate(of_own, gradient, vs)
    scale = x.inverse_root(x.add(x.divide(x.whole(square), count), x.number(eps)))
    whole, along = x.divide(x.whole(whole), count), x.divide(x.mul(x.whole(along), scale), count)
    of_own = x.whole(of_own)
    with x.columns(width) as column:
        ys, rs, ks, vs, gates, douts = (x.load_part(data, N, column) for data in (y, r, k, v, gate, dout))
        weight, bias, bonus = x.parts(vectors, 3, width, column)
        normal, gradient = x.mul(x.sub(ys, mean), scale), x.mul(douts, gates)
        ungated = x.muladd(own, vs, x.muladd(normal, weight, bias))
        of_y = x.mul(scale, x.sub(x.sub(x.mul(gradient, weight), whole), x.mul(normal, along)))
        by_own = x.mul(of_own, bonus)
        found = (of_y, x.mul(by_own, ks), x.mul(by_own, rs), x.mul(gradient, own), x.mul(douts, ungated))
        for value, target in zip(found, (dy, dr, dk, dv, dgate), strict=True):
            x.store_part(value, target, N, column)
        x.add_parts((x.mul(gradient, normal), gradient, x.mul(of_own, x.mul(rs, ks))), sums, width, column)
