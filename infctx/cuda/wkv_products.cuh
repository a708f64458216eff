// Products of small matrices on tensor cores, each in the precision that it needs.
//
// A tf32 has 11 bits.  A bf16 is exactly one tf32.  A float is the sum of two, `large` and `small`, to 22 bits:
// products of these, without small times small, are as exact as fp32.  Results that are rounded to bf16 in the end need
// only one.

#pragma once

#include "wkv_decays.cuh"

enum Precision { exact, rounded, full };

constexpr Precision of_inputs = sizeof(Input) == 2 ? exact : full;     // v and dy as loaded
constexpr Precision of_outputs = sizeof(Input) == 2 ? rounded : full;  // for results stored as Input
constexpr Precision of_states = full;                                  // for states and results stored as fp32

struct Split {
    uint32 large, small;
};

template <Precision precision>
INFCTX_DEVICE Split split(float x) {
    if (precision == exact) return {float_bits(x), 0};
    // Tensor cores cut off all bits after the 11th, 2^-11 / (2 ln 2) of a number on average; this compensates
    // beforehand.
    if (precision == rounded) return {float_bits(x * 1.00035222f), 0};
    // Adding half of the last bit of a tf32 and then clearing the 13 bits below rounds x; the rest is small, of either
    // sign, and exact.  PTX does not say what tensor cores do with those 13 bits, so a large part has none.  If a NaN
    // turns into a number here, the small part is still NaN.
    const float large = tf32_value(float_bits(x) + 0x1000u);
    return {float_bits(large), float_bits(x - large)};
}

template <Precision precision>
struct Left {
    LeftFragment large, small;
};

template <Precision precision>
struct Right {
    RightFragment large, small;
};

// The lane's elements in the order of the fragment: (row, column) of (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4).
template <Precision precision>
INFCTX_DEVICE Left<precision> make_left(float a, float b, float c, float d) {
    const float x[4] = {a, b, c, d};
    Left<precision> left;
#pragma unroll
    for (int32 i = 0; i < 4; ++i) {
        const Split parts = split<precision>(x[i]);
        left.large.x[i] = parts.large;
        left.small.x[i] = parts.small;
    }
    return left;
}

// (t, g), (t + 4, g).
template <Precision precision>
INFCTX_DEVICE Right<precision> make_right(float a, float b) {
    const Split first = split<precision>(a), second = split<precision>(b);
    return {{{first.large, second.large}}, {{first.small, second.small}}};
}

template <Precision left_precision, Precision right_precision>
INFCTX_DEVICE void multiply(SumFragment& sum, const Left<left_precision>& left, const Right<right_precision>& right) {
    if (left_precision == full) mma_tf32(sum, left.small, right.large);
    if (right_precision == full) mma_tf32(sum, left.large, right.small);
    mma_tf32(sum, left.large, right.large);
}

// The same for the first product of a sum.
template <Precision left_precision, Precision right_precision>
INFCTX_DEVICE void begin_product(SumFragment& sum, const Left<left_precision>& left,
                                 const Right<right_precision>& right) {
    if (left_precision == full) {
        first_mma_tf32(sum, left.small, right.large);
        if (right_precision == full) mma_tf32(sum, left.large, right.small);
        mma_tf32(sum, left.large, right.large);
    } else if (right_precision == full) {
        first_mma_tf32(sum, left.large, right.small);
        mma_tf32(sum, left.large, right.large);
    } else {
        first_mma_tf32(sum, left.large, right.large);
    }
}

// ---- operands ----
//
// A product over 8 tokens or channels uses them in the order 0 2 4 6 1 3 5 7, on both sides, so that a lane's two are
// neighbors, as they are in memory and in results.

// 16 channels by 8 tokens.
template <Precision precision>
INFCTX_DEVICE Left<precision> left_of(const Own& own, int32 group) {
    return make_left<precision>(own.x[0][group][0], own.x[1][group][0], own.x[0][group][1], own.x[1][group][1]);
}

// 16 rows by 8 columns of a slab.
template <Precision precision>
INFCTX_DEVICE Left<precision> left_of(const SumFragment& columns) {
    return make_left<precision>(columns.x[0], columns.x[2], columns.x[1], columns.x[3]);
}

// Operands from inputs in shared memory, rows of tokens: all operands of a chunk and 16 channels.
struct InputBlock {
    float x[2][2][2];  // group of 8 tokens, of 8 channels, and the two neighbors
};

// Tokens 2t and 2t + 1 of channel g: a product over tokens.
INFCTX_DEVICE InputBlock load_by_tokens(const float* rows, int32 first_channel) {
    InputBlock block;
    FOR_EACH_TOKEN(group, which) {
        const float* from = rows + (8 * group + 2 * lane_place() + which) * float_pitch + first_channel + lane_group();
        block.x[group][0][which] = from[0];
        block.x[group][1][which] = from[8];
    }
    return block;
}
INFCTX_DEVICE InputBlock load_by_tokens(const bf16* rows, int32 first_channel) {
    InputBlock block;
    uint32 x[4];
    const int32 row = lane_index() % 16, column = lane_index() / 16 * 8;
    ldmatrix_transposed(x, rows + row * value_pitch + first_channel + column);
#pragma unroll
    for (int32 i = 0; i < 4; ++i) {
        block.x[i % 2][i / 2][0] = first_of(x[i]);
        block.x[i % 2][i / 2][1] = second_of(x[i]);
    }
    return block;
}

// Channels 2t and 2t + 1 of token g: a product over channels.
INFCTX_DEVICE InputBlock load_by_channels(const float* rows, int32 first_channel) {
    InputBlock block;
#pragma unroll
    for (int32 group = 0; group < 2; ++group) {
        const float* from = rows + (8 * group + lane_group()) * float_pitch + first_channel + 2 * lane_place();
        block.x[group][0][0] = from[0], block.x[group][0][1] = from[1];
        block.x[group][1][0] = from[8], block.x[group][1][1] = from[9];
    }
    return block;
}
INFCTX_DEVICE InputBlock load_by_channels(const bf16* rows, int32 first_channel) {
    InputBlock block;
    uint32 x[4];
    const int32 row = lane_index() % 16, column = lane_index() / 16 * 8;
    ldmatrix(x, rows + row * value_pitch + first_channel + column);
#pragma unroll
    for (int32 i = 0; i < 4; ++i) {
        block.x[i % 2][i / 2][0] = first_of(x[i]);
        block.x[i % 2][i / 2][1] = second_of(x[i]);
    }
    return block;
}

// Two neighboring fp32 in shared memory.
template <Precision precision>
INFCTX_DEVICE Right<precision> load_right(const float* two) {
    const Packet<8> packet = load_packet<8>(two);
    return make_right<precision>(bits_float(packet.x[0]), bits_float(packet.x[1]));
}

// ---- states of a warp ----

// 16 keys by all values: row g is channel 2g of the slab, row g + 8 channel 2g + 1.
struct KeySlab {
    SumFragment x[num_columns];

    INFCTX_DEVICE void clear() {
#pragma unroll
        for (int32 n = 0; n < num_columns; ++n) x[n] = {};
    }

    INFCTX_DEVICE void forget() {
#pragma unroll
        for (int32 n = 0; n < num_columns; ++n) {
#pragma unroll
            for (int32 i = 0; i < 4; ++i) abandon(x[n].x[i]);
        }
    }

    // The lane's first number; the others are at fixed distances.
    template <typename Number>
    static INFCTX_DEVICE Number* own_corner(Number* matrix, int32 slab) {
        return matrix + (own_channel(slab) * num_channels + 2 * lane_place());
    }

    INFCTX_DEVICE void load(const float* matrix, int32 slab) {
        const float* own = own_corner(matrix, slab);
#pragma unroll
        for (int32 n = 0; n < num_columns; ++n) {
            const Packet<8> first = load_packet<8>(own + 8 * n), second = load_packet<8>(own + 8 * n + num_channels);
            x[n] = {bits_float(first.x[0]), bits_float(first.x[1]), bits_float(second.x[0]), bits_float(second.x[1])};
        }
    }

    INFCTX_DEVICE void store(float* matrix, int32 slab) const {
        float* own = own_corner(matrix, slab);
#pragma unroll
        for (int32 n = 0; n < num_columns; ++n) {
            store_pair(own + 8 * n, x[n].x[0], x[n].x[1]);
            store_pair(own + 8 * n + num_channels, x[n].x[2], x[n].x[3]);
        }
    }

    // this = decays this + keys values, summed over the tokens of a chunk.  The sum is computed separately: tensor
    // cores truncate addends to a large number, always in the same direction; here it is rounded once.
    INFCTX_DEVICE void advance(const float (&decays)[2], const Own& keys, const Input* values) {
        const Left<of_states> left[2] = {left_of<of_states>(keys, 0), left_of<of_states>(keys, 1)};
#pragma unroll
        for (int32 n = 0; n < num_columns; n += 2) {
            const InputBlock block = load_by_tokens(values, 8 * n);
#pragma unroll
            for (int32 half = 0; half < 2; ++half) {
                SumFragment sum;
                const float (&two)[2] = block.x[0][half], (&others)[2] = block.x[1][half];
                begin_product(sum, left[0], make_right<of_inputs>(two[0], two[1]));
                multiply(sum, left[1], make_right<of_inputs>(others[0], others[1]));
                float* numbers = x[n + half].x;
#pragma unroll
                for (int32 i = 0; i < 4; ++i) numbers[i] = multiply_add(numbers[i], decays[i / 2], sum.x[i]);
            }
        }
    }

    // For each key and token, the sum over values of this times the token's values.
    INFCTX_DEVICE Own read(const Input* values) const {
        SumFragment sums[2][2] = {};  // two for each group, so that a product waits less for the one before
#pragma unroll
        for (int32 n = 0; n < num_columns; n += 2) {
            const InputBlock block = load_by_channels(values, 8 * n);
#pragma unroll
            for (int32 half = 0; half < 2; ++half) {
                const Left<of_states> left = left_of<of_states>(x[n + half]);
#pragma unroll
                for (int32 group = 0; group < 2; ++group) {
                    const float* two = block.x[group][half];
                    multiply(sums[group][half], left, make_right<of_inputs>(two[0], two[1]));
                }
            }
        }
        Own own;
        FOR_EACH_OWN(channel, group, which) {
            const int32 i = 2 * channel + which;
            own.x[channel][group][which] = sums[group][0].x[i] + sums[group][1].x[i];
        }
        return own;
    }
};
