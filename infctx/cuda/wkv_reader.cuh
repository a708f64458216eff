// Everything that sums over key channels: the scores between the tokens of a chunk, and reading from the state.
//
// Forward, y of a token is r times the state, plus scores times v of the tokens before it.  Backward, dv is the same in
// reverse: k for r, dy for v, transposed scores, the gradient of the state for the state.  So both are `Reader`, in the
// terms of the forward pass.
//
// A warp reads for 16 value channels: the state is transposed, 16 values by all keys, and never leaves registers.

#pragma once

#include "wkv_products.cuh"

// A chunk as `stage_chunk` leaves it in shared memory for all warps.
struct Staged {
    float* readers;  // (chunk_tokens, read_pitch): r times the decay since the state; backward k
    float* writers;  // (chunk_tokens, write_pitch): k times the decay until the next state; backward r
    float* decays;   // (num_channels): of the whole chunk
};
constexpr int32 staged_floats = chunk_tokens * (read_pitch + write_pitch) + num_channels;
constexpr int32 level_floats = num_levels * chunk_tokens * read_pitch;
constexpr int32 bonus_floats = num_slabs * chunk_tokens;

INFCTX_DEVICE Staged find_staged(float* start) {
    return {start, start + chunk_tokens * read_pitch, start + chunk_tokens * (read_pitch + write_pitch)};
}

// levels (num_levels, chunk_tokens, read_pitch), bonuses (num_slabs, chunk_tokens): for find_scores.
INFCTX_DEVICE void stage_chunk(const Staged& staged, float* levels, float* bonuses, int32 slab, const Own& readers,
                               const Own& writers, const Own& r, const Own& k, const Decays& decays,
                               const float (&u)[2]) {
    stage_own<read_pitch>(staged.readers, slab, readers);
    stage_own<write_pitch>(staged.writers, slab, writers);
    constexpr int32 level = chunk_tokens * read_pitch;
    stage_level<8>(levels, slab, meet_at<8>(r, k, decays));
    stage_level<4>(levels + level, slab, meet_at<4>(r, k, decays));
    stage_level<2>(levels + 2 * level, slab, meet_at<2>(r, k, decays));
    stage_level<1>(levels + 3 * level, slab, meet_at<1>(r, k, decays));
    if (lane_place() == 0) store_pair(staged.decays + own_channel(slab), decays.whole[0], decays.whole[1]);
    float of_tokens[2][2];
    FOR_EACH_TOKEN(group, which) {
        of_tokens[group][which] = r.x[0][group][which] * u[0] * k.x[0][group][which];
        of_tokens[group][which] += r.x[1][group][which] * u[1] * k.x[1][group][which];
    }
    // Sums over the lanes' groups.  Of a lane's four tokens two go to a neighbor at first, then one of the other two.
    const int32 kept_group = lane_group() % 2, kept = lane_group() / 2 % 2;
    float of_two[2];
#pragma unroll
    for (int32 which = 0; which < 2; ++which) {
        const float first = of_tokens[0][which], second = of_tokens[1][which];
        of_two[which] = (kept_group == 0 ? first : second) + shuffle_xor(kept_group == 0 ? second : first, 4);
    }
    float bonus = (kept == 0 ? of_two[0] : of_two[1]) + shuffle_xor(kept == 0 ? of_two[1] : of_two[0], 8);
    bonus += shuffle_xor(bonus, 16);
    if (lane_group() < 4) bonuses[slab * chunk_tokens + own_token(kept_group, kept)] = bonus;
}

// The weight with which a token on the right reads one on the left; each warp does one level at a time.  The bonus is
// on the diagonal, and the entries above it are already zero.  Forward scores are (right, left), backward (left,
// right).
template <bool backward>
INFCTX_DEVICE void find_scores(float* scores, const float* levels, const float* bonuses, int32 warp) {
    const int32 group = lane_group(), place = lane_place();
    for (int32 level = warp; level < num_levels; level += num_slabs) {
        const float* rows = levels + level * chunk_tokens * read_pitch + group * read_pitch + 2 * place;
        // Rows 8 to 15 of the product are free: they get the small parts, rows 0 to 7 the large ones.
        SumFragment sum = {};
#pragma unroll
        for (int32 n = 0; n < num_columns; ++n) {
            const Packet<8> reading = load_packet<8>(rows + 8 * read_pitch + 8 * n);
            const Split first = split<full>(bits_float(reading.x[0])), second = split<full>(bits_float(reading.x[1]));
            const LeftFragment right_side = {{first.large, first.small, second.large, second.small}};
            const auto left_side = load_right<of_outputs>(rows + 8 * n);
            if (of_outputs == full) mma_tf32(sum, right_side, left_side.small);
            mma_tf32(sum, right_side, left_side.large);
        }
        const int32 half = 8 >> level, shift = 3 - level;  // of blocks of 2 half tokens
        const int32 right = (group >> shift << (shift + 1)) + half + (group & (half - 1));
#pragma unroll
        for (int32 i = 0; i < 2; ++i) {
            const int32 column = 2 * place + i;
            const int32 left = (column >> shift << (shift + 1)) + (column & (half - 1));
            const float score = sum.x[i] + sum.x[i + 2];
            if (group >> shift == column >> shift) {
                scores[backward ? left * score_pitch + right : right * score_pitch + left] = score;
            }
        }
    }
    if (warp == 0 && lane_index() < chunk_tokens) {
        float bonus = bonuses[lane_index()];
        for (int32 slab = 1; slab < num_slabs; ++slab) bonus += bonuses[slab * chunk_tokens + lane_index()];
        scores[lane_index() * score_pitch + lane_index()] = bonus;
    }
}

// A state of a warp: 16 values by all keys, in registers.
struct ValueSlab {
    SumFragment state[num_columns];  // row g is value channel g of the warp's 16, columns are keys

    INFCTX_DEVICE void clear() {
#pragma unroll
        for (int32 n = 0; n < num_columns; ++n) state[n] = {};
    }

    // The matrix is key by value, as everywhere in memory.
    INFCTX_DEVICE void load(const float* matrix, int32 slab) {
        matrix += 2 * lane_place() * num_channels + 16 * slab + lane_group();
#pragma unroll
        for (int32 n = 0; n < num_columns; ++n) {
#pragma unroll
            for (int32 i = 0; i < 4; ++i) state[n].x[i] = matrix[(8 * n + i % 2) * num_channels + i / 2 * 8];
        }
    }

    INFCTX_DEVICE void store(float* matrix, int32 slab) const {
        matrix += 2 * lane_place() * num_channels + 16 * slab + lane_group();
#pragma unroll
        for (int32 n = 0; n < num_columns; ++n) {
#pragma unroll
            for (int32 i = 0; i < 4; ++i) matrix[(8 * n + i % 2) * num_channels + i / 2 * 8] = state[n].x[i];
        }
    }
};

template <bool backward>
struct Reader : ValueSlab {
    // results[group]: the reads of the chunk's tokens, value channels by tokens; then the state advances.
    INFCTX_DEVICE void advance(SumFragment (&results)[2], const Staged& staged, const float* scores,
                               const Input* values, int32 slab) {
        const int32 group = lane_group(), place = lane_place();
        results[0] = {}, results[1] = {};
#pragma unroll
        for (int32 n = 0; n < num_columns; ++n) {
            const auto left = left_of<of_outputs>(state[n]);
#pragma unroll
            for (int32 i = 0; i < 2; ++i) {
                const float* readers = staged.readers + (8 * i + group) * read_pitch + 8 * n + 2 * place;
                multiply(results[i], left, load_right<of_outputs>(readers));
            }
        }
        const InputBlock block = load_by_tokens(values, 16 * slab);
        Left<of_inputs> values_of[2];
#pragma unroll
        for (int32 i = 0; i < 2; ++i) {
            const auto& x = block.x[i];
            values_of[i] = make_left<of_inputs>(x[0][0], x[1][0], x[0][1], x[1][1]);
        }
        const float* own_scores = scores + group * score_pitch + 2 * place;
        multiply(results[0], values_of[0], load_right<of_outputs>(own_scores));
        multiply(results[1], values_of[1], load_right<of_outputs>(own_scores + 8 * score_pitch + 8));
        if (backward) {
            multiply(results[0], values_of[1], load_right<of_outputs>(own_scores + 8));
        } else {
            multiply(results[1], values_of[0], load_right<of_outputs>(own_scores + 8 * score_pitch));
        }
#pragma unroll
        for (int32 n = 0; n < num_columns; ++n) {
            const Packet<8> decays = load_packet<8>(staged.decays + 8 * n + 2 * place);
            SumFragment sum;
            const float* writers = staged.writers + 2 * place * write_pitch + 8 * n + group;
            begin_product(sum, values_of[0], make_right<of_states>(writers[0], writers[write_pitch]));
            multiply(sum, values_of[1], make_right<of_states>(writers[8 * write_pitch], writers[9 * write_pitch]));
            float* numbers = state[n].x;
#pragma unroll
            for (int32 i = 0; i < 4; ++i) numbers[i] = multiply_add(numbers[i], bits_float(decays.x[i % 2]), sum.x[i]);
        }
    }
};

// Results of a warp, value channels by tokens.  Neighboring lanes exchange halves, so that each has two neighboring
// channels of one token: one access.
template <typename Element>
INFCTX_DEVICE void store_tokens(const Rows<Element>& rows, int32 slab, int32 first_token, int32 end,
                                const SumFragment (&results)[2]) {
    const bool odd = lane_group() % 2 == 1;
    const int32 channel = 16 * slab + lane_group() / 2 * 2;
#pragma unroll
    for (int32 group = 0; group < 2; ++group) {
        const int32 token = first_token + 8 * group + 2 * lane_place() + (odd ? 1 : 0);
#pragma unroll
        for (int32 half = 0; half < 2; ++half) {
            const float first = results[group].x[2 * half], second = results[group].x[2 * half + 1];
            const float other = shuffle_xor(odd ? first : second, 4);
            if (token < end) {
                store_pair(rows.at(token) + channel + 8 * half, odd ? other : first, odd ? second : other);
            }
        }
    }
}
