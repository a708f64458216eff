"""Vector instructions for the kernels of `wkv_compiled` and `fused`, written with llvmlite.

LLVM's vectorizer does not keep eight accumulators in registers across an outer loop, and it checks at run time whether
any two pointers overlap.  So the loops over a chunk are written here as vector instructions.  A `@macro` is Python that
writes the instructions of a function for compiled code: a Python `for` is unrolled, `loop` and `columns` become loops.

The scratch that macros work on is contiguous and aligned to VECTOR_BYTES.  *Rows* are (8, width), eight tokens;
*packed* is the same transposed, (width, 8).  A *matrix* (width, width) is stored by columns of L lanes: element (a, c)
lies at c // L * L * width + a * L + c % L.  `width` is N rounded up to whole vectors of L numbers; beyond N are zeros.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

VECTOR_BYTES = 64 if binding.get_host_cpu_features().get("avx512f") else 32
CHUNK = 8
TOKENS = range(CHUNK)

INDEX = ir.IntType(64)
BYTES = ir.IntType(8).as_pointer()

Term: TypeAlias = int | ir.Value | tuple


def macro(write: Callable) -> Callable:
    """Turns write(lanes, *arguments) into a function for compiled code; scratch arrives as a pointer to its data."""

    @intrinsic
    def call(typing_context, *arguments):
        def generate(context, builder, signature, values):
            kinds = signature.args[0]
            values = cgutils.unpack_tuple(builder, values[0], len(kinds))
            for place, kind in enumerate(kinds):
                if isinstance(kind, types.Array):
                    array = context.make_array(kind)(context, builder, value=values[place])
                    values[place] = array if kind.ndim == 4 else array.data
            write(Lanes(builder, kinds[0].dtype), *values)
            return context.get_dummy_value()

        return types.void(types.BaseTuple.from_types(arguments)), generate

    return call


class Lanes:
    """Writes LLVM instructions on vectors of L numbers.

    An address is a pointer plus terms; a pair is a product: load(data, (row, width), column).
    """

    def __init__(self, builder: ir.IRBuilder, real: types.Float):
        self.builder = builder
        self.bytes = real.bitwidth // 8
        self.scalar = ir.FloatType() if self.bytes == 4 else ir.DoubleType()
        self.L = VECTOR_BYTES // self.bytes
        self.vector = ir.VectorType(self.scalar, self.L)
        self.add, self.sub, self.mul, self.divide = builder.fadd, builder.fsub, builder.fmul, builder.fdiv

    def index(self, *terms: Term) -> ir.Value:
        known, unknown = 0, []
        for term in terms:
            a, b = term if isinstance(term, tuple) else (term, 1)
            if isinstance(a, int) and isinstance(b, int):
                known += a * b
            elif a != 0:
                a, b = (ir.Constant(INDEX, x) if isinstance(x, int) else x for x in (a, b))
                unknown.append(self.builder.mul(a, b))
        return functools.reduce(self.builder.add, unknown, ir.Constant(INDEX, known))

    def place(self, data: ir.Value, *terms: Term) -> ir.Value:
        return self.builder.bitcast(self.builder.gep(data, [self.index(*terms)]), self.vector.as_pointer())

    def load(self, data: ir.Value, *terms: Term) -> ir.Value:
        return self.builder.load(self.place(data, *terms), align=VECTOR_BYTES)

    def store(self, value: ir.Value, data: ir.Value, *terms: Term) -> None:
        place = self.builder.bitcast(self.place(data, *terms), value.type.as_pointer())
        self.builder.store(value, place, align=value.type.count * self.bytes)

    def rows(self, data: ir.Value, width: ir.Value, column: ir.Value) -> list[ir.Value]:
        return [self.load(data, (t, width), column) for t in TOKENS]

    def store_rows(self, values: Sequence[ir.Value], data: ir.Value, width: ir.Value, column: ir.Value) -> None:
        for t, value in enumerate(values):
            self.store(value, data, (t, width), column)

    def splat(self, data: ir.Value, *terms: Term) -> ir.Value:
        """Returns one number in every lane."""
        return self.fill(self.builder.load(self.builder.gep(data, [self.index(*terms)])))

    def fill(self, value: ir.Value) -> ir.Value:
        none = ir.Constant(ir.VectorType(value.type, self.L), ir.Undefined)
        one = self.builder.insert_element(none, value, ir.Constant(ir.IntType(32), 0))
        return self.shuffle(one, one, [0] * self.L)

    def constant(self, value: float) -> ir.Value:
        return ir.Constant(self.vector, [value] * self.L)

    def muladd(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return self.call("llvm.fmuladd", self.vector, a, b, c)

    def call(self, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
        suffix = f".v{self.L}f{8 * self.bytes}" + (".p0" if "masked" in name else "")
        kind = ir.FunctionType(result, [arg.type for arg in args])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name + suffix), args)

    @contextlib.contextmanager
    def loop(self, count: ir.Value, step: int = 1) -> Iterator[ir.Value]:
        """Runs over 0, step, 2 step, ... below count."""
        bounds = (self.index(0), count, self.index(step))
        with cgutils.for_range_slice(self.builder, *bounds, INDEX) as (index, _):
            yield index

    @contextlib.contextmanager
    def span(self, begin: ir.Value, end: ir.Value) -> Iterator[ir.Value]:
        """Runs over the columns begin, begin + L, ... below end."""
        with cgutils.for_range_slice(self.builder, begin, end, self.index(self.L), INDEX) as (index, _):
            yield index

    def columns(self, width: ir.Value) -> contextlib.AbstractContextManager[ir.Value]:
        return self.loop(width, self.L)

    def sums(self, count: int) -> list[ir.Value]:
        """Accumulators at zero: stack slots, which LLVM turns into registers."""
        return [cgutils.alloca_once_value(self.builder, self.constant(0.0)) for _ in range(count)]

    def accumulate(self, slot: ir.Value, a: ir.Value, b: ir.Value) -> None:
        self.builder.store(self.muladd(a, b, self.builder.load(slot)), slot)

    def totals(self, slots: Sequence[ir.Value]) -> list[ir.Value]:
        return [self.builder.load(slot) for slot in slots]

    def store_totals(self, slots: Sequence[ir.Value], data: ir.Value, *terms: Term) -> None:
        """Stores the sum over the lanes of each accumulator, one number after another."""
        vectors, lanes = self.totals(slots), self.L
        while lanes > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True) if len(vectors) > 1 else [(vectors[0], None)]
            vectors, lanes = [self.add(*self.even_odd(*pair)) for pair in pairs], lanes // 2
        for n, vector in enumerate(vectors):
            self.store(vector, data, *terms, n * self.L)

    def shuffle(self, a: ir.Value, b: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """Returns the given lanes of a followed by b."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes)))

    def even_odd(self, a: ir.Value, b: ir.Value | None) -> list[ir.Value]:
        total = a.type.count * (1 if b is None else 2)
        return [self.shuffle(a, a if b is None else b, range(first, total, 2)) for first in (0, 1)]

    def interleave(self, vectors: Sequence[ir.Value]) -> list[ir.Value]:
        """Reorders n vectors a, b, c, ... into a[0], b[0], c[0], ..., a[1], b[1], c[1], ..."""
        if len(vectors) == 1:
            return list(vectors)
        order = [x for lane in range(self.L) for x in (lane, self.L + lane)]
        pairs = zip(self.interleave(vectors[::2]), self.interleave(vectors[1::2]), strict=True)
        return [self.shuffle(a, b, half) for a, b in pairs for half in (order[: self.L], order[self.L :])]

    def separate(self, vectors: Sequence[ir.Value]) -> list[ir.Value]:
        """Undoes `interleave`."""
        if len(vectors) == 1:
            return list(vectors)
        halves = zip(*(self.even_odd(a, b) for a, b in zip(vectors[::2], vectors[1::2], strict=True)), strict=True)
        return [vector for pair in zip(*map(self.separate, halves), strict=True) for vector in pair]

    def exp(self, x: ir.Value) -> ir.Value:
        """Returns exp(x) for x <= 0 to about an ulp; 0 for results below the smallest normal number; NaN stays NaN."""
        build, single = self.builder, self.bytes == 4
        fraction_bits, bias, terms = (23, 127, 8) if single else (52, 1023, 14)
        # ln 2 in two parts; the first is short, so that its product with a whole number is exact.
        coarse, fine = (0.693359375, -2.12194440e-4) if single else (6.93145751953125e-1, 1.42860682030941723212e-6)
        # Adding this rounds to a whole number, which ends up in the lowest bits.
        rounder = self.constant(1.5 * 2**fraction_bits)
        rounded = self.add(self.mul(x, self.constant(1 / math.log(2))), rounder)
        whole = self.sub(rounded, rounder)
        rest = self.muladd(whole, self.constant(-fine), self.muladd(whole, self.constant(-coarse), x))
        series = self.constant(1 / math.factorial(terms - 1))
        for n in reversed(range(terms - 1)):
            series = self.muladd(series, rest, self.constant(1 / math.factorial(n)))
        whole_type = ir.VectorType(ir.IntType(8 * self.bytes), self.L)
        exponent = build.add(build.bitcast(rounded, whole_type), ir.Constant(whole_type, [bias] * self.L))
        exponent = build.shl(exponent, ir.Constant(whole_type, [fraction_bits] * self.L))
        vanishes = build.fcmp_ordered("<", x, self.constant((1 - bias) * math.log(2)))
        return build.select(vanishes, self.constant(0.0), self.mul(series, build.bitcast(exponent, self.vector)))

    def sigmoid(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Returns sigmoid(x) and sigmoid(-x), both to a few ulp."""
        small = self.exp(self.sub(self.constant(0.0), self.call("llvm.fabs", self.vector, x)))
        near = self.divide(self.constant(1.0), self.add(self.constant(1.0), small))
        far, positive = self.mul(near, small), self.builder.fcmp_ordered(">", x, self.constant(0.0))
        return self.builder.select(positive, near, far), self.builder.select(positive, far, near)

    def whole(self, slot: ir.Value) -> ir.Value:
        """Returns the sum over the lanes of an accumulator, in every lane."""
        vector, half = self.builder.load(slot), self.L // 2
        while half:
            vector = self.add(vector, self.shuffle(vector, vector, [(n + half) % self.L for n in range(self.L)]))
            half //= 2
        return vector

    def valid(self, left: ir.Value) -> ir.Value:
        """Returns which lanes come before the first `left`."""
        lanes = ir.Constant(ir.VectorType(INDEX, self.L), list(range(self.L)))
        return self.builder.icmp_signed("<", lanes, self.fill(left))

    def within(self, value: ir.Value, N: ir.Value, column: ir.Value) -> ir.Value:
        """Returns the value with zeros beyond column N."""
        return self.builder.select(self.valid(self.builder.sub(N, column)), value, self.constant(0.0))

    def positive(self, x: ir.Value) -> ir.Value:
        """Returns max(x, 0); NaN stays NaN."""
        return self.builder.select(self.builder.fcmp_ordered("<", x, self.constant(0.0)), self.constant(0.0), x)

    def negative(self, x: ir.Value) -> ir.Value:
        return self.sub(self.constant(-0.0), x)

    def root(self, x: ir.Value) -> ir.Value:
        return self.call("llvm.sqrt", self.vector, x)

    def inverse_root(self, x: ir.Value) -> ir.Value:
        return self.divide(self.constant(1.0), self.root(x))

    def length(self, square: ir.Value, shortest: float) -> tuple[ir.Value, ir.Value]:
        """From the accumulator of a vector's square: whether it is too short, and 1 / max(its length, shortest)."""
        length, least = self.root(self.whole(square)), self.constant(shortest)
        is_short = self.builder.fcmp_ordered("<", length, least)
        return is_short, self.divide(self.constant(1.0), self.builder.select(is_short, least, length))

    def number(self, value: ir.Value) -> ir.Value:
        """Returns a number of the kernel's caller, a double, in every lane."""
        return self.fill(self.builder.fptrunc(value, self.scalar) if self.bytes == 4 else value)

    def count(self, N: ir.Value) -> ir.Value:
        return self.fill(self.builder.sitofp(N, self.scalar))

    def parts(self, data: ir.Value, number: int, width: ir.Value, column: ir.Value) -> list[ir.Value]:
        """Loads a column of several vectors that lie one after the other."""
        return [self.load(data, (n, width), column) for n in range(number)]

    def add_parts(self, values: Sequence[ir.Value | None], data: ir.Value, width: ir.Value, column: ir.Value) -> None:
        """Adds to a column of several vectors; None: nothing."""
        for n, value in enumerate(values):
            if value is not None:
                self.store(self.add(self.load(data, (n, width), column), value), data, (n, width), column)

    def inside(
        self, array: ir.Value, token: Sequence[ir.Value], limit: Sequence[ir.Value], column: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Returns address, alignment and valid lanes of a row of a (B, T, H, N) array, from a column to its end.

        token: the row (b, t, h); limit: (T, N).  No lane is valid at token T or later.
        """
        build, (b, t, h) = self.builder, token
        over_batch, over_time, over_heads, _ = cgutils.unpack_tuple(build, array.strides, 4)
        offset = self.index((b, over_batch), (t, over_time), (h, over_heads), (column, self.bytes))
        data = build.bitcast(build.gep(build.bitcast(array.data, BYTES), [offset]), self.vector.as_pointer())
        left = build.select(build.icmp_signed("<", t, limit[0]), build.sub(limit[1], column), self.index(0))
        return data, ir.Constant(ir.IntType(32), self.bytes), self.valid(left)

    def load_inside(self, array: ir.Value, *where: ir.Value | Sequence[ir.Value]) -> ir.Value:
        """Loads from the array, with zeros outside of it."""
        return self.call("llvm.masked.load", self.vector, *self.inside(array, *where), self.constant(0.0))

    def row_at(self, places: ir.Value, n: ir.Value, row: ir.Value, size: ir.Value) -> ir.Value:
        """Returns the address of a row of `size` numbers in the array whose address is places[n]."""
        data = self.builder.load(self.builder.gep(places, [n]))
        return self.builder.gep(self.builder.inttoptr(data, self.scalar.as_pointer()), [self.index((row, size))])

    def rows_at(self, places: ir.Value, count: int, row: ir.Value, size: ir.Value) -> list[ir.Value]:
        return [self.row_at(places, self.index(n), row, size) for n in range(count)]

    def part(self, data: ir.Value, size: ir.Value, column: ir.Value) -> tuple[ir.Value, ...]:
        align = ir.Constant(ir.IntType(32), self.bytes)
        return self.place(data, column), align, self.valid(self.builder.sub(size, column))

    def load_part(self, data: ir.Value, size: ir.Value, column: ir.Value) -> ir.Value:
        """Loads a row from a column on, with zeros from `size` on."""
        return self.call("llvm.masked.load", self.vector, *self.part(data, size, column), self.constant(0.0))

    def store_part(self, value: ir.Value, data: ir.Value, size: ir.Value, column: ir.Value) -> None:
        self.call("llvm.masked.store", ir.VoidType(), value, *self.part(data, size, column))

    def store_inside(self, value: ir.Value, array: ir.Value, *where: ir.Value | Sequence[ir.Value]) -> None:
        self.call("llvm.masked.store", ir.VoidType(), value, *self.inside(array, *where))


@macro
def load_tokens(x, rows, source, b, t, h, T, N, width):
    with x.columns(width) as column:
        for token in TOKENS:
            value = x.load_inside(source, (b, x.index(t, token), h), (T, N), column)
            x.store(value, rows, (token, width), column)


@macro
def load_decays(x, rows, source, b, t, h, T, N, width):
    with x.columns(width) as column:
        for token in TOKENS:
            value = x.load_inside(source, (b, x.index(t, token), h), (T, N), column)
            x.store(x.exp(value), rows, (token, width), column)


@macro
def store_tokens(x, target, rows, b, t, h, T, N, width):
    with x.columns(width) as column:
        for token, value in enumerate(x.rows(rows, width, column)):
            x.store_inside(value, target, (b, x.index(t, token), h), (T, N), column)


@macro
def pack(x, packed, rows, width):
    with x.columns(width) as column:
        for n, vector in enumerate(x.interleave(x.rows(rows, width, column))):
            x.store(vector, packed, (column, CHUNK), n * x.L)


@macro
def unpack(x, rows, packed, width):
    with x.columns(width) as column:
        vectors = [x.load(packed, (column, CHUNK), n * x.L) for n in TOKENS]
        x.store_rows(x.separate(vectors), rows, width, column)


@macro
def transpose(x, target, source, width):
    with x.columns(width) as i, x.columns(width) as j:
        vectors = [x.load(source, (j, width), (i, x.L), n * x.L) for n in range(x.L)]
        for n, vector in enumerate(x.interleave(vectors)):
            x.store(vector, target, (i, width), (j, x.L), n * x.L)
