// The gradients of RWKV-7's r, w, k, a and b, which stay within a key channel.
//
// As in wkv_gradients.cuh, the gradient of a log decay is the sum over all paths that cross it, from a write to a read.
// There are two writes and two reads here, and their paths add up.  The late r reads before its token, so the decay of
// the token itself is crossed by what r reads.

#pragma once

#include "wkv7_reader.cuh"
#include "wkv_gradients.cuh"

struct Gradients7 {
    // Paths that are done; those that leave the tokens seen so far, by the token that reads and by the one that wrote.
    Own w, reads, writes;
    Own r, k, a, b;  // of the late r

    INFCTX_DEVICE float read(int32 channel, int32 group, int32 which) const { return reads.x[channel][group][which]; }
    INFCTX_DEVICE float written(int32 channel, int32 group, int32 which) const {
        return writes.x[channel][group][which];
    }
};

// Scores' gradients, (chunk_tokens, score_pitch) each: of the pairs of a token in a row, whose gradient is sought, and
// one in a column, whose vector is known.  Outer vectors are r after and k before, inner ones a after and b before, so
// what is read from one is the other: `dscores_of(inner, outer)` is for the gradients of a, from k before it, and of b,
// from the late r after it.
INFCTX_DEVICE float* dscores_of(float* dscores, int32 sought, int32 known) {
    return dscores + (2 * sought + known) * chunk_scores;
}

// sums: what tokens read, in rows, times what tokens wrote, summed over values.
template <Precision reading_precision, Precision writing_precision, typename Reading, typename Writing>
INFCTX_DEVICE void meet_values(SumFragment (&sums)[2], const Reading* reading, const Writing* writing) {
#pragma unroll
    for (int32 n = 0; n < num_columns; n += 2) {
        const InputBlock reads = load_by_channels(reading, 8 * n), writes = load_by_channels(writing, 8 * n);
#pragma unroll
        for (int32 half = 0; half < 2; ++half) {
            const auto left = make_left<reading_precision>(reads.x[0][half][0], reads.x[1][half][0],
                                                           reads.x[0][half][1], reads.x[1][half][1]);
#pragma unroll
            for (int32 group = 0; group < 2; ++group) {
                const float* two = writes.x[group][half];
                multiply(sums[group], left, make_right<writing_precision>(two[0], two[1]));
            }
        }
    }
}

// All pairs of the gradients dy and du with the values v and u; each warp does one.
INFCTX_DEVICE void find_all_dscores(float* dscores, const Input* dy, const float* du, const Input* v, const float* u,
                                    int32 warp) {
    for (int32 pair = warp; pair < 4; pair += num_slabs) {
        const int32 reader = pair / 2, writer = pair % 2;
        SumFragment sums[2] = {};
        if (pair == 0) meet_values<of_inputs, of_inputs>(sums, dy, v);
        if (pair == 1) meet_values<of_inputs, full>(sums, dy, u);
        if (pair == 2) meet_values<full, of_inputs>(sums, du, v);
        if (pair == 3) meet_values<full, full>(sums, du, u);
        float *after = dscores_of(dscores, reader, writer), *before = dscores_of(dscores, writer, reader);
#pragma unroll
        for (int32 group = 0; group < 2; ++group) {
#pragma unroll
            for (int32 i = 0; i < 4; ++i) {
                const int32 read_at = lane_group() + i / 2 * 8, written_at = 8 * group + 2 * lane_place() + i % 2;
                // Only r reads its own token.
                if (read_at < written_at || (read_at == written_at && reader == inner)) continue;
                after[read_at * score_pitch + written_at] = sums[group].x[i];
                if (read_at > written_at) before[written_at * score_pitch + read_at] = sums[group].x[i];
            }
        }
    }
}

// sums += a state's 16 keys by 8 of its values, `left`, times these values of the chunk's tokens.
template <Precision precision>
INFCTX_DEVICE void read_values(SumFragment (&sums)[2], const Left<of_states>& left, const InputBlock& block,
                               int32 half) {
#pragma unroll
    for (int32 group = 0; group < 2; ++group) {
        const float* two = block.x[group][half];
        multiply(sums[group], left, make_right<precision>(two[0], two[1]));
    }
}

INFCTX_DEVICE Own own_of(const SumFragment (&sums)[2]) {
    Own own;
    FOR_EACH_OWN(channel, group, which) own.x[channel][group][which] = sums[group].x[2 * channel + which];
    return own;
}

// From outside the chunk: `state` before it, `gradient` (N, float_pitch) in shared memory of the state after it.  The
// results are not scaled yet.
INFCTX_DEVICE void read_outside7(Gradients7& d, const KeySlab& state, const float* gradient, int32 slab,
                                 const Input* dy, const float* du, const Input* v, const float* u) {
    SumFragment r[2] = {}, k[2] = {}, a[2] = {}, b[2] = {};
    float through[2] = {0.0f, 0.0f};  // paths through the whole chunk
#pragma unroll
    for (int32 n = 0; n < num_columns; n += 2) {
#pragma unroll
        for (int32 half = 0; half < 2; ++half) {
            const SumFragment& before = state.x[n + half];
            const float* from = gradient + own_channel(slab) * float_pitch + 8 * (n + half) + 2 * lane_place();
            const Packet<8> first = load_packet<8>(from), second = load_packet<8>(from + float_pitch);
            const SumFragment after = {bits_float(first.x[0]), bits_float(first.x[1]), bits_float(second.x[0]),
                                       bits_float(second.x[1])};
#pragma unroll
            for (int32 i = 0; i < 4; ++i) through[i / 2] += before.x[i] * after.x[i];
            const auto left_before = left_of<of_states>(before), left_after = left_of<of_states>(after);
            read_values<of_inputs>(r, left_before, load_by_channels(dy, 8 * n), half);
            read_values<full>(a, left_before, load_by_channels(du, 8 * n), half);
            read_values<of_inputs>(k, left_after, load_by_channels(v, 8 * n), half);
            read_values<full>(b, left_after, load_by_channels(u, 8 * n), half);
        }
    }
    d.r = own_of(r), d.k = own_of(k), d.a = own_of(a), d.b = own_of(b);
#pragma unroll
    for (int32 channel = 0; channel < 2; ++channel) {
        through[channel] += shuffle_xor(through[channel], 1);
        through[channel] += shuffle_xor(through[channel], 2);
        d.w.x[channel][0][0] = through[channel];
    }
}

INFCTX_DEVICE void scale_outside7(Gradients7& d, const Vectors& x, const Decays& decays) {
    const Own late = late_of(x.r, decays);
    FOR_EACH_OWN(channel, group, which) {
        const float since = decays.since(channel, group, which), until = decays.until(channel, group, which);
        d.r.x[channel][group][which] *= since;
        d.a.x[channel][group][which] *= since;
        d.k.x[channel][group][which] *= until;
        d.b.x[channel][group][which] *= until;
        d.reads.x[channel][group][which] = late.x[channel][group][which] * d.r.x[channel][group][which] +
                                           x.a.x[channel][group][which] * d.a.x[channel][group][which];
        d.writes.x[channel][group][which] = x.k.x[channel][group][which] * d.k.x[channel][group][which] +
                                            x.b.x[channel][group][which] * d.b.x[channel][group][which];
    }
#pragma unroll
    for (int32 channel = 0; channel < 2; ++channel) {
        const float through = d.w.x[channel][0][0] * decays.whole[channel];
        FOR_EACH_TOKEN(group, which) d.w.x[channel][group][which] = through;
    }
    cross_halves<8>(d.w, d);
}

// Adds the paths that meet in the middle of blocks of 2 half tokens.
template <int32 half>
INFCTX_DEVICE void meet_halves7(Gradients7& d, float* dscores, const Vectors& x, const Decays& decays) {
    const Own of_outer = meet_at<half>(late_of(x.r, decays), x.k, decays), of_inner = meet_at<half>(x.a, x.b, decays);
    SumFragment outer_sums[2] = {}, inner_sums[2] = {};
#pragma unroll
    for (int32 group = 0; group < 2; ++group) {
        const int32 others = half == 8 ? 1 - group : group;
        const auto outer_left = left_of<of_states>(of_outer, others);
        multiply(outer_sums[group], outer_left, load_dscores<half>(dscores_of(dscores, outer, outer), group));
        multiply(inner_sums[group], outer_left, load_dscores<half>(dscores_of(dscores, inner, outer), group));
        sync_warp();
        const auto inner_left = left_of<of_states>(of_inner, others);
        multiply(outer_sums[group], inner_left, load_dscores<half>(dscores_of(dscores, outer, inner), group));
        multiply(inner_sums[group], inner_left, load_dscores<half>(dscores_of(dscores, inner, inner), group));
    }
    FOR_EACH_OWN(channel, group, which) {
        const float outer_sum = outer_sums[group].x[2 * channel + which];
        const float inner_sum = inner_sums[group].x[2 * channel + which];
        const float factor = level_factor<half>(decays, channel, group, which);
        const float path = outer_sum * of_outer.x[channel][group][which] + inner_sum * of_inner.x[channel][group][which];
        if (is_left<half>(group, which)) {
            d.k.x[channel][group][which] += outer_sum * factor;
            d.b.x[channel][group][which] += inner_sum * factor;
            d.writes.x[channel][group][which] += path;
        } else {
            d.r.x[channel][group][which] += outer_sum * factor;
            d.a.x[channel][group][which] += inner_sum * factor;
            d.reads.x[channel][group][which] += path;
        }
    }
}

// From inside the chunk; then d is complete, and d.r is that of r.
INFCTX_DEVICE void find_inner_gradients7(Gradients7& d, float* dscores, const Vectors& x, const Decays& decays) {
    // The warp syncs, here and in `meet_halves7`, only so that compilers do one thing at a time, with fewer registers.
    meet_halves7<8>(d, dscores, x, decays);
    cross_halves<4>(d.w, d);
    sync_warp();
    meet_halves7<4>(d, dscores, x, decays);
    cross_halves<2>(d.w, d);
    sync_warp();
    meet_halves7<2>(d, dscores, x, decays);
    cross_halves<1>(d.w, d);
    sync_warp();
    meet_halves7<1>(d, dscores, x, decays);
    FOR_EACH_OWN(channel, group, which) {
        const int32 diagonal = own_token(group, which) * (score_pitch + 1);
        const float of_k = dscores_of(dscores, outer, outer)[diagonal], of_b = dscores_of(dscores, outer, inner)[diagonal];
        const float r = x.r.x[channel][group][which], k = x.k.x[channel][group][which], b = x.b.x[channel][group][which];
        const float decay = which == 0 ? decays.first[channel][group] : decays.second[channel][group];
        const float late = decay * d.r.x[channel][group][which];
        d.w.x[channel][group][which] += r * late;
        d.r.x[channel][group][which] = late + of_k * k + of_b * b;
        d.k.x[channel][group][which] += of_k * r;
        d.b.x[channel][group][which] += of_b * r;
    }
}
