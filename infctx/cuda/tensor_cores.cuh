// Products of small matrices on tensor cores, and loads of their operands.
//
// Fragment layouts (PTX ISA, "Matrix multiply-accumulate operation using mma instruction"): g = lane / 4 is a lane's
// group, t = lane % 4 its place in the group.

#pragma once

#include "primitives.cuh"

// The left operand, 16 rows: mma_bf16 has 16 columns, two neighbors per register (lower half first), mma_tf32 has 8.
//              x[0]                    x[1]                    x[2]                    x[3]
//   bf16   (g, 2t), (g, 2t+1)     row g + 8, same         row g, columns + 8      row g + 8, columns + 8
//   tf32   (g, t)                 (g + 8, t)              (g, t + 4)              (g + 8, t + 4)
struct LeftFragment {
    uint32 x[4];
};

// The right operand, 8 columns: mma_bf16 has 16 rows, two neighbors of a column per register, mma_tf32 has 8.
//              x[0]                    x[1]
//   bf16   (2t, g), (2t+1, g)     rows + 8, same
//   tf32   (t, g)                 (t + 4, g)
struct RightFragment {
    uint32 x[2];
};

// The sum, 16 x 8 floats in both cases: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
struct SumFragment {
    float x[4];
};

// sum += left right, 16 x 16 by 16 x 8: products of bf16 are exact, added in fp32.
INFCTX_DEVICE void mma_bf16(SumFragment& sum, const LeftFragment& left, const RightFragment& right INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    emulator::mma_bf16(sum.x, left.x, right.x, {file, line});
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum.x[0]), "+f"(sum.x[1]), "+f"(sum.x[2]), "+f"(sum.x[3])
        : "r"(left.x[0]), "r"(left.x[1]), "r"(left.x[2]), "r"(left.x[3]), "r"(right.x[0]), "r"(right.x[1]));
#endif
}

// sum += left right, 16 x 8 by 8 x 8: operands are tf32.  PTX does not say what the 13 lowest bits of a register do; an
// H100 ignores them.
INFCTX_DEVICE void mma_tf32(SumFragment& sum, const LeftFragment& left, const RightFragment& right INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    emulator::mma_tf32(sum.x, left.x, right.x, {file, line});
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum.x[0]), "+f"(sum.x[1]), "+f"(sum.x[2]), "+f"(sum.x[3])
        : "r"(left.x[0]), "r"(left.x[1]), "r"(left.x[2]), "r"(left.x[3]), "r"(right.x[0]), "r"(right.x[1]));
#endif
}

// sum = left right: the same for the first of several, without zeros in registers.
INFCTX_DEVICE void first_mma_tf32(SumFragment& sum, const LeftFragment& left,
                                  const RightFragment& right INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    sum = {};
    emulator::mma_tf32(sum.x, left.x, right.x, {file, line});
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=f"(sum.x[0]), "=f"(sum.x[1]), "=f"(sum.x[2]), "=f"(sum.x[3])
        : "r"(left.x[0]), "r"(left.x[1]), "r"(left.x[2]), "r"(left.x[3]), "r"(right.x[0]), "r"(right.x[1]), "f"(0.0f));
#endif
}

// 1, 2 or 4 matrices of 8 x 8 elements of two bytes from shared memory, by the length of `x`.  Lane 8m + i gives the
// address of row i of matrix m: 16 bytes, aligned to 16; with fewer than 4 matrices the last lanes' are ignored.  x[m]
// becomes (g, 2t), (g, 2t + 1) of matrix m.  So a row-major 16 x 16 tile is a LeftFragment with lane l at row l % 16,
// column l / 16 * 8; a 16 x 8 tile stored column by column is a RightFragment with lane l at column l % 8, row
// l / 8 % 2 * 8.
// Volatile without a memory clobber is enough: barriers have one, and volatile statements keep their order.
INFCTX_DEVICE void ldmatrix(uint32 (&x)[1], const void* row INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    emulator::ldmatrix(x, 1, row, {file, line});
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(x[0]) : "r"(shared_address(row)));
#endif
}

INFCTX_DEVICE void ldmatrix(uint32 (&x)[2], const void* row INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    emulator::ldmatrix(x, 2, row, {file, line});
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(x[0]), "=r"(x[1])
                 : "r"(shared_address(row)));
#endif
}

INFCTX_DEVICE void ldmatrix(uint32 (&x)[4], const void* row INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    emulator::ldmatrix(x, 4, row, {file, line});
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row)));
#endif
}

// The same with each matrix transposed: x[m] becomes (2t, g), (2t + 1, g) of matrix m.  So a row-major 16 x 8 tile is
// a RightFragment with lane l at row l % 16, and 16 x 16 are two of them with lane l at row l % 16, column l / 16 * 8.
INFCTX_DEVICE void ldmatrix_transposed(uint32 (&x)[1], const void* row INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    emulator::ldmatrix_transposed(x, 1, row, {file, line});
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(x[0]) : "r"(shared_address(row)));
#endif
}

INFCTX_DEVICE void ldmatrix_transposed(uint32 (&x)[2], const void* row INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    emulator::ldmatrix_transposed(x, 2, row, {file, line});
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(x[0]), "=r"(x[1])
                 : "r"(shared_address(row)));
#endif
}

INFCTX_DEVICE void ldmatrix_transposed(uint32 (&x)[4], const void* row INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    emulator::ldmatrix_transposed(x, 4, row, {file, line});
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row)));
#endif
}
