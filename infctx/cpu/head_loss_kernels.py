"""The kernels of `head_loss`: passes over a block of logits, which lie in the cache from the product that made them.

A block is (C, R): for each of C columns of the vocabulary, from `begin` on, the logits of R tokens; bf16 arrives as
uint16.  `found` (3, R) has for each token the largest logit so far, where it is, and the sum over a block; and `totals`
(2, R), always float64, the sum of exp(logit - largest) so far and the target's logit.  Each call takes BLOCK tokens a
piece, from piece `first` to `last`.
"""

import functools
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import overload

from infctx.cpu import lanes, wkv_kernels
from infctx.cpu.lanes import Lanes, macro
from infctx.cpu.threads import BLOCK
from infctx.cpu.wkv_kernels import build


@functools.cache
def compiled(kernel: str, logits: np.dtype) -> Callable[..., None]:
    """Returns a kernel for blocks of float32, float64 or uint16 (bf16), from numba's cache on disk if possible."""
    real = types.float64 if logits == np.float64 else types.float32
    arguments = real[:, ::1], types.float64[:, ::1], getattr(types, logits.name)[:, ::1], types.int64[::1], types.intp
    make, numbers = {"measure": (_measure, ()), "gradient": (_gradient, (types.float64,))}[kernel]
    return build(make, (*arguments, *numbers), (lanes, wkv_kernels))


def _measure(version: str) -> Callable[..., None]:
    def measure(found, totals, logits, targets, begin, first, last):
        _ = version
        C, R = logits.shape
        first, last = first * BLOCK, min(last * BLOCK, R)
        before = found[0, first:last].copy()
        for c in range(C):
            find_largest(found, logits, c, begin, R, first, last)
        found[2, first:last] = 0
        for c in range(C):
            add_exponentials(found, logits, c, R, first, last)
        for r in range(first, last):
            if found[0, r] != before[r - first]:
                totals[0, r] *= np.exp(before[r - first] - found[0, r])
            totals[0, r] += found[2, r]
            if 0 <= targets[r] - begin < C:
                totals[1, r] = widened(logits, targets[r] - begin, r)

    return measure


# of_largest: the gradient gets this times the largest logit more at its place
def _gradient(version: str) -> Callable[..., None]:
    def gradient(found, totals, logits, targets, begin, of_largest, first, last):
        _ = version
        C, R = logits.shape
        first, last = first * BLOCK, min(last * BLOCK, R)
        for r in range(first, last):
            found[2, r] = 1 / totals[0, r]
        for c in range(C):
            make_probabilities(found, logits, c, R, first, last)
        for r in range(first, last):
            at, largest = targets[r] - begin, np.int64(found[1, r]) - begin
            # The target's share is computed again, for the sake of bf16: it is rounded once, when it is complete.
            extra = of_largest * found[0, r] if 0 <= largest < C else 0.0
            if 0 <= at < C:
                share = np.exp(totals[1, r] - found[0, r]) / totals[0, r] - 1
                put(logits, at, r, share + (extra if at == largest else 0.0))
            if extra != 0 and at != largest:
                put(logits, largest, r, 1 / totals[0, r] + extra)

    return gradient


@njit
def bits_of(value):
    return np.array([value], np.float32).view(np.uint32)[0]


def widened(logits, c, r):
    """Returns a logit as a float."""


def put(logits, c, r, value):
    """Writes a gradient; in bf16 it is rounded to nearest, ties to even."""


@overload(widened)
def _widened(logits, c, r):
    def widen(logits, c, r):
        return np.array([np.uint32(logits[c, r]) << np.uint32(16)], np.uint32).view(np.float32)[0]

    def same(logits, c, r):
        return logits[c, r]

    return widen if logits.dtype == types.uint16 else same


@overload(put)
def _put(logits, c, r, value):
    def narrow(logits, c, r, value):
        bits = bits_of(value)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        logits[c, r] = rounded if value == value else np.uint16(NOT_A_NUMBER)

    def same(logits, c, r, value):
        logits[c, r] = value

    return narrow if logits.dtype == types.uint16 else same


@macro
def find_largest(x, found, logits, c, begin, R, first, last):
    """NaN is passed over."""
    place = x.fill(x.builder.sitofp(x.index(begin, c), x.scalar))
    largest, where = found, x.builder.gep(found, [R])
    with x.span(first, last) as column:
        value, before = load(x, logits, c, R, column), x.load_part(largest, R, column)
        larger = x.builder.fcmp_ordered(">", value, before)
        x.store_part(x.builder.select(larger, value, before), largest, R, column)
        x.store_part(x.builder.select(larger, place, x.load_part(where, R, column)), where, R, column)


@macro
def add_exponentials(x, found, logits, c, R, first, last):
    largest, total = found, x.builder.gep(found, [x.index((R, 2))])
    with x.span(first, last) as column:
        value = x.exp(x.sub(load(x, logits, c, R, column), x.load_part(largest, R, column)))
        x.store_part(x.add(x.load_part(total, R, column), value), total, R, column)


@macro
def make_probabilities(x, found, logits, c, R, first, last):
    largest, inverse = found, x.builder.gep(found, [x.index((R, 2))])
    with x.span(first, last) as column:
        value = x.exp(x.sub(load(x, logits, c, R, column), x.load_part(largest, R, column)))
        store(x, x.mul(value, x.load_part(inverse, R, column)), logits, c, R, column)


NOT_A_NUMBER = 0x7FC0
"""Of bf16."""


def load(x: Lanes, logits: ir.Value, c: ir.Value, R: ir.Value, column: ir.Value) -> ir.Value:
    """Loads logits of column c of the block; zeros from token R on."""
    data = x.builder.gep(logits, [x.index((c, R))])
    if data.type.pointee != ir.IntType(16):
        return x.load_part(data, R, column)
    half, whole = (ir.VectorType(ir.IntType(bits), x.L) for bits in (16, 32))
    place = x.builder.bitcast(x.builder.gep(data, [column]), half.as_pointer())
    nothing, valid = ir.Constant(half, [0] * x.L), x.valid(x.builder.sub(R, column))
    loaded = call(x, "load", half, place, ir.Constant(ir.IntType(32), 2), valid, nothing)
    sixteen = ir.Constant(whole, [16] * x.L)
    return x.builder.bitcast(x.builder.shl(x.builder.zext(loaded, whole), sixteen), x.vector)


def store(x: Lanes, value: ir.Value, logits: ir.Value, c: ir.Value, R: ir.Value, column: ir.Value) -> None:
    """Stores numbers over logits; in bf16 they are rounded to nearest, ties to even."""
    data, build = x.builder.gep(logits, [x.index((c, R))]), x.builder
    if data.type.pointee != ir.IntType(16):
        x.store_part(value, data, R, column)
        return
    half, whole = (ir.VectorType(ir.IntType(bits), x.L) for bits in (16, 32))

    def number(n: int) -> ir.Constant:
        return ir.Constant(whole, [n] * x.L)

    bits = build.bitcast(value, whole)
    up = build.add(number(0x7FFF), build.and_(build.lshr(bits, number(16)), number(1)))
    rounded = build.select(build.fcmp_unordered("uno", value, value), number(NOT_A_NUMBER << 16), build.add(bits, up))
    narrow = build.trunc(build.lshr(rounded, number(16)), half)
    place = build.bitcast(build.gep(data, [column]), half.as_pointer())
    call(x, "store", ir.VoidType(), narrow, place, ir.Constant(ir.IntType(32), 2), x.valid(build.sub(R, column)))


def call(x: Lanes, doing: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    name = f"llvm.masked.{doing}.v{x.L}i16.p0"
    return x.builder.call(cgutils.get_or_insert_function(x.builder.module, kind, name), args)
