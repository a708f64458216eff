// RWKV-7 within a chunk: what its tokens read from each other and from the state before it.
//
// A token has two readers and two writers.  The outer ones are r and k: k writes the values v, and r reads y.  The inner
// ones are a and b: a reads the inner values u, and b writes them.  Backward is the same in reverse: the outer reader is
// k and reads dv, the outer writer is r and writes dy; b reads the gradient of u, which a writes.  So both directions are
// one code, in these terms.  r reads after its own token's decay: r times that decay is the *late* r, and reads before
// it, as a does.

#pragma once

#include "wkv_products.cuh"
#include "wkv_reader.cuh"

constexpr int32 both_levels_floats = 2 * level_floats;
constexpr int32 both_bonus_floats = 2 * bonus_floats;

// A chunk as `stage_both` leaves it in shared memory for all warps.
struct StagedBoth {
    float* readers;        // (chunk_tokens, read_pitch): decayed since the state; backward k
    float* inner_readers;  // the same; after `solve`, what u or its gradient reads of the state
    float* writers;        // (chunk_tokens, write_pitch): decayed until the next state; backward r
    float* inner_writers;
    float* decays;  // (num_channels): of the whole chunk
};
constexpr int32 staged_both_floats = 2 * chunk_tokens * (read_pitch + write_pitch) + num_channels;

INFCTX_DEVICE StagedBoth find_staged_both(float* start) {
    constexpr int32 read = chunk_tokens * read_pitch, write = chunk_tokens * write_pitch;
    return {start, start + read, start + 2 * read, start + 2 * read + write, start + 2 * read + 2 * write};
}

// Scores of a chunk in shared memory: what a reader finds of a writer's values, (chunk_tokens, score_pitch) each.
constexpr int32 outer = 0, inner = 1;
constexpr int32 all_scores_floats = 4 * chunk_scores;

INFCTX_DEVICE float* scores_of(float* scores, int32 reader, int32 writer) {
    return scores + (2 * reader + writer) * chunk_scores;
}

// A lane's part of the four vectors of a chunk.
struct Vectors {
    Own r, k, a, b;
};

INFCTX_DEVICE Own late_of(const Own& r, const Decays& decays) {
    Own own;
    FOR_EACH_OWN(channel, group, which) {
        const float decay = which == 0 ? decays.first[channel][group] : decays.second[channel][group];
        own.x[channel][group][which] = r.x[channel][group][which] * decay;
    }
    return own;
}

INFCTX_DEVICE void stage_levels(float* levels, int32 slab, const Own& reader, const Own& writer, const Decays& decays) {
    constexpr int32 level = chunk_tokens * read_pitch;
    stage_level<8>(levels, slab, meet_at<8>(reader, writer, decays));
    stage_level<4>(levels + level, slab, meet_at<4>(reader, writer, decays));
    stage_level<2>(levels + 2 * level, slab, meet_at<2>(reader, writer, decays));
    stage_level<1>(levels + 3 * level, slab, meet_at<1>(reader, writer, decays));
}

// What r finds of the token it is in: sums over the slab's channels.
INFCTX_DEVICE void stage_bonus(float* bonuses, int32 slab, const Own& r, const Own& writer) {
    FOR_EACH_TOKEN(group, which) {
        float bonus = r.x[0][group][which] * writer.x[0][group][which];
        bonus += r.x[1][group][which] * writer.x[1][group][which];
        bonus += shuffle_xor(bonus, 4);
        bonus += shuffle_xor(bonus, 8);
        bonus += shuffle_xor(bonus, 16);
        if (lane_group() == 0) bonuses[slab * chunk_tokens + own_token(group, which)] = bonus;
    }
}

// levels: of the outer vectors, then of the inner ones; bonuses: of k, then of b.  Without `reads`, nothing is staged for
// the outer readers, which a state does not need.
template <bool backward, bool reads>
INFCTX_DEVICE void stage_both(const StagedBoth& staged, float* levels, float* bonuses, int32 slab, const Vectors& x,
                              const Decays& decays) {
    const Own late = late_of(x.r, decays);
    stage_levels(levels, slab, late, x.k, decays);
    stage_levels(levels + level_floats, slab, x.a, x.b, decays);
    if (reads) stage_own<read_pitch>(staged.readers, slab, backward ? until_end(x.k, decays) : since_start(late, decays));
    stage_own<write_pitch>(staged.writers, slab, backward ? since_start(late, decays) : until_end(x.k, decays));
    stage_own<read_pitch>(staged.inner_readers, slab, backward ? until_end(x.b, decays) : since_start(x.a, decays));
    stage_own<write_pitch>(staged.inner_writers, slab, backward ? since_start(x.a, decays) : until_end(x.b, decays));
    if (lane_place() == 0) store_pair(staged.decays + own_channel(slab), decays.whole[0], decays.whole[1]);
    if (reads) stage_bonus(bonuses, slab, x.r, x.k);
    if (reads || backward) stage_bonus(bonuses + bonus_floats, slab, x.r, x.b);
}

// Each warp does one level at a time: late r and a on the right of its borders, k and b on their left.  Forward scores
// are (right, left), backward (left, right); the entries on the other side of the diagonal are already zero.
template <bool backward>
INFCTX_DEVICE void find_all_scores(float* scores, const float* levels, const float* bonuses, int32 warp) {
    const int32 group = lane_group(), place = lane_place();
    for (int32 level = warp; level < num_levels; level += num_slabs) {
        const float* outer_rows = levels + level * chunk_tokens * read_pitch + group * read_pitch + 2 * place;
        const float* inner_rows = outer_rows + level_floats;
        SumFragment sums[2] = {};  // of k and b; rows 0 to 7 are read by r, rows 8 to 15 by a
#pragma unroll
        for (int32 n = 0; n < num_columns; ++n) {
            const Packet<8> by_r = load_packet<8>(outer_rows + 8 * read_pitch + 8 * n);
            const Packet<8> by_a = load_packet<8>(inner_rows + 8 * read_pitch + 8 * n);
            const auto readers = make_left<full>(bits_float(by_r.x[0]), bits_float(by_a.x[0]), bits_float(by_r.x[1]),
                                                 bits_float(by_a.x[1]));
            multiply(sums[0], readers, load_right<full>(outer_rows + 8 * n));
            multiply(sums[1], readers, load_right<full>(inner_rows + 8 * n));
        }
        const int32 half = 8 >> level, shift = 3 - level;  // of blocks of 2 half tokens
        const int32 right = (group >> shift << (shift + 1)) + half + (group & (half - 1));
#pragma unroll
        for (int32 i = 0; i < 2; ++i) {
            const int32 column = 2 * place + i;
            const int32 left = (column >> shift << (shift + 1)) + (column & (half - 1));
            if (group >> shift != column >> shift) continue;
            const int32 at = backward ? left * score_pitch + right : right * score_pitch + left;
#pragma unroll
            for (int32 pair = 0; pair < 4; ++pair) {
                const int32 by_a = pair / 2, of_b = pair % 2;
                float* matrix = backward ? scores_of(scores, of_b, by_a) : scores_of(scores, by_a, of_b);
                matrix[at] = sums[of_b].x[2 * by_a + i];
            }
        }
    }
    if (warp == 0) {
        const int32 lane = opaque(lane_index()), token = lane % chunk_tokens, of_b = lane / chunk_tokens;
        float bonus = 0.0f;
        for (int32 slab = 0; slab < num_slabs; ++slab) {
            bonus += bonuses[of_b * bonus_floats + slab * chunk_tokens + token];
        }
        float* matrix = backward ? scores_of(scores, of_b, outer) : scores_of(scores, outer, of_b);
        matrix[token * (score_pitch + 1)] = bonus;
    }
}

constexpr int32 solve_columns = num_channels + chunk_tokens;

// Inner values depend on those of the tokens before (backward: after) them, x = scores x + known.  Each thread solves it
// for one column of what is known: first what inner readers read of the state, then their scores of outer writers.
// Both are replaced by the solution, so that inner values = inner readers * state + scores of outer * outer values.
template <bool backward>
INFCTX_DEVICE void solve(const StagedBoth& staged, float* scores) {
    const int32 column = opaque(static_cast<int32>(threadIdx.x));
    if (column >= solve_columns) return;
    const float* between = scores_of(scores, inner, inner);
    const bool of_state = column < num_channels;
    float* known = of_state ? staged.inner_readers + column : scores_of(scores, inner, outer) + column - num_channels;
    const int32 pitch = of_state ? read_pitch : score_pitch;
    float x[chunk_tokens];
#pragma unroll
    for (int32 step = 0; step < chunk_tokens; ++step) {
        const int32 token = backward ? chunk_tokens - 1 - step : step;
        float sum = known[token * pitch];
#pragma unroll
        for (int32 four = 0; 4 * four < step; ++four) {
            const int32 first = backward ? chunk_tokens - 4 - 4 * four : 4 * four;
            const Packet<16> row = load_packet<16>(between + token * score_pitch + first);
#pragma unroll
            for (int32 i = 0; i < 4; ++i) {
                const int32 before = 4 * four + i;
                if (before < step) sum = multiply_add(bits_float(row.x[backward ? 3 - i : i]), x[before], sum);
            }
        }
        x[step] = sum;
        known[token * pitch] = sum;
    }
}

// An operand in full precision, as it is multiplied for results stored as Input.
INFCTX_DEVICE Left<of_outputs> for_outputs(const Left<full>& left) { return {left.large, left.small}; }

// A state that is read and written by a chunk, 16 value channels of it.
template <bool backward>
struct BothReader : ValueSlab {
    Left<full> inner_values[2];  // by groups of tokens
    Left<of_inputs> values[2];

    // found: inner values, channels by tokens.  With `reads`, results are what the outer readers find of the state.
    template <bool has_values, bool reads>
    INFCTX_DEVICE void read(SumFragment (&found)[2], SumFragment (&results)[2], const StagedBoth& staged,
                            float* scores, const Input* rows, int32 slab) {
        const int32 at = lane_group() * read_pitch + 2 * lane_place();
        found[0] = {}, found[1] = {}, results[0] = {}, results[1] = {};
#pragma unroll
        for (int32 n = 0; n < num_columns; ++n) {
            const auto left = left_of<full>(state[n]);
#pragma unroll
            for (int32 i = 0; i < 2; ++i) {
                const int32 from = at + 8 * i * read_pitch + 8 * n;
                multiply(found[i], left, load_right<full>(staged.inner_readers + from));
                if (reads) multiply(results[i], for_outputs(left), load_right<of_outputs>(staged.readers + from));
            }
        }
        if (has_values) {
            const InputBlock block = load_by_tokens(rows, 16 * slab);
#pragma unroll
            for (int32 i = 0; i < 2; ++i) {
                const auto& x = block.x[i];
                values[i] = make_left<of_inputs>(x[0][0], x[1][0], x[0][1], x[1][1]);
            }
            add_scores<full>(found, values, scores_of(scores, inner, outer));
        }
#pragma unroll
        for (int32 i = 0; i < 2; ++i) inner_values[i] = left_of<full>(found[i]);
        if (reads) {
            add_scores<of_outputs>(results, values, scores_of(scores, outer, outer));
            const Left<of_outputs> rounder[2] = {for_outputs(inner_values[0]), for_outputs(inner_values[1])};
            add_scores<of_outputs>(results, rounder, scores_of(scores, outer, inner));
        }
    }

    // The state of the chunk after; the chunk has been read.
    template <bool has_values>
    INFCTX_DEVICE void advance(const StagedBoth& staged) {
        const int32 group = lane_group(), place = lane_place();
#pragma unroll
        for (int32 n = 0; n < num_columns; ++n) {
            const Packet<8> decays = load_packet<8>(staged.decays + 8 * n + 2 * place);
            SumFragment sum = {};
#pragma unroll
            for (int32 i = 0; i < 2; ++i) {
                const int32 from = (8 * i + 2 * place) * write_pitch + 8 * n + group;
                const float *writers = staged.writers + from, *inner_writers = staged.inner_writers + from;
                if (has_values) multiply(sum, values[i], make_right<of_states>(writers[0], writers[write_pitch]));
                const auto right = make_right<of_states>(inner_writers[0], inner_writers[write_pitch]);
                multiply(sum, inner_values[i], right);
            }
            float* numbers = state[n].x;
#pragma unroll
            for (int32 i = 0; i < 4; ++i) numbers[i] = multiply_add(numbers[i], bits_float(decays.x[i % 2]), sum.x[i]);
        }
    }

    // Tokens before (backward: after) a token, and itself.
    template <Precision precision, Precision values_precision>
    INFCTX_DEVICE void add_scores(SumFragment (&sums)[2], const Left<values_precision> (&of)[2], const float* matrix) {
        const float* own = matrix + lane_group() * score_pitch + 2 * lane_place();
        multiply(sums[0], of[0], load_right<precision>(own));
        multiply(sums[1], of[1], load_right<precision>(own + 8 * score_pitch + 8));
        if (backward) {
            multiply(sums[0], of[1], load_right<precision>(own + 8));
        } else {
            multiply(sums[1], of[0], load_right<precision>(own + 8 * score_pitch));
        }
    }
};
