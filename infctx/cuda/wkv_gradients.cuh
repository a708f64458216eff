// The gradients of r, k, w and u, which stay within a key channel.
//
// The gradient of a log decay is the sum over all paths that cross it, from a write to a read.  Paths differ in where
// they begin and end, as in the forward pass: through the whole chunk, from the state, to the next state, or across the
// border of one block at one level.  All are added and none subtracted, so a small gradient is as exact as a large one.

#pragma once

#include "wkv_products.cuh"

// dscores (chunk_tokens, score_pitch): dy of one token times v of the other, at both places; by one warp.
INFCTX_DEVICE void find_dscores(float* dscores, const Input* dy, const Input* v) {
    SumFragment sums[2] = {};
#pragma unroll
    for (int32 n = 0; n < num_columns; n += 2) {
        const InputBlock reading = load_by_channels(dy, 8 * n), writing = load_by_channels(v, 8 * n);
#pragma unroll
        for (int32 half = 0; half < 2; ++half) {
            const auto left = make_left<of_inputs>(reading.x[0][half][0], reading.x[1][half][0],
                                                   reading.x[0][half][1], reading.x[1][half][1]);
#pragma unroll
            for (int32 group = 0; group < 2; ++group) {
                const float* two = writing.x[group][half];
                multiply(sums[group], left, make_right<of_inputs>(two[0], two[1]));
            }
        }
    }
#pragma unroll
    for (int32 group = 0; group < 2; ++group) {
#pragma unroll
        for (int32 i = 0; i < 4; ++i) {
            const int32 reader = lane_group() + i / 2 * 8, writer = 8 * group + 2 * lane_place() + i % 2;
            if (reader >= writer) {
                dscores[reader * score_pitch + writer] = sums[group].x[i];
                dscores[writer * score_pitch + reader] = sums[group].x[i];
            }
        }
    }
}

struct Gradients {
    Own r, k, w;
    float u[2];  // of the lane's own tokens
};

// Paths that leave the tokens seen so far: those that a token reads are r dr, those that it wrote are k dk.
struct Paths {
    const Gradients& d;
    const Own &r, &k;

    INFCTX_DEVICE float read(int32 channel, int32 group, int32 which) const {
        return r.x[channel][group][which] * d.r.x[channel][group][which];
    }
    INFCTX_DEVICE float written(int32 channel, int32 group, int32 which) const {
        return k.x[channel][group][which] * d.k.x[channel][group][which];
    }
};

// dw, the gradient of the decays, of one half of a block of 2 half tokens: all paths from the other half's writes to
// later tokens, or to its reads from earlier ones, cross all of this half.
template <int32 half, typename AnyPaths>
INFCTX_DEVICE void cross_halves(Own& dw, const AnyPaths& paths) {
    float sums[2][2];
    FOR_EACH_PAIR(channel, group) {
        if (half == 1) {
            dw.x[channel][group][0] += paths.read(channel, group, 1);
            dw.x[channel][group][1] += paths.written(channel, group, 0);
        } else {
            const float written = paths.written(channel, group, 0) + paths.written(channel, group, 1);
            const float read = paths.read(channel, group, 0) + paths.read(channel, group, 1);
            float sum = is_left<half>(group, 0) ? written : read;
            if (half >= 4) sum += shuffle_xor(sum, 1);
            if (half == 8) sum += shuffle_xor(sum, 2);
            sums[channel][group] = half == 8 ? sum : shuffle_xor(sum, half / 2);
        }
    }
    if (half == 1) return;
    FOR_EACH_OWN(channel, group, which) dw.x[channel][group][which] += sums[channel][half == 8 ? 1 - group : group];
}

// The paths through the whole chunk, by channel: from `state` before it to `gradient` of the state after it.
INFCTX_DEVICE void find_through(float (&through)[2], const KeySlab& state, const KeySlab& gradient) {
#pragma unroll
    for (int32 channel = 0; channel < 2; ++channel) {
        through[channel] = 0.0f;
#pragma unroll
        for (int32 n = 0; n < num_columns; ++n) {
            through[channel] += state.x[n].x[2 * channel] * gradient.x[n].x[2 * channel];
            through[channel] += state.x[n].x[2 * channel + 1] * gradient.x[n].x[2 * channel + 1];
        }
        through[channel] += shuffle_xor(through[channel], 1);
        through[channel] += shuffle_xor(through[channel], 2);
    }
}

// d.r and d.k: the state before the chunk times dy, and the gradient of the state after it times v.
INFCTX_DEVICE void scale_outside(Gradients& d, const float (&through)[2], const Own& r, const Own& k,
                                 const Decays& decays) {
    FOR_EACH_OWN(channel, group, which) {
        d.r.x[channel][group][which] *= decays.since(channel, group, which);
        d.k.x[channel][group][which] *= decays.until(channel, group, which);
    }
#pragma unroll
    for (int32 channel = 0; channel < 2; ++channel) {
        const float whole = through[channel] * decays.whole[channel];
        FOR_EACH_TOKEN(group, which) d.w.x[channel][group][which] = whole;
    }
    cross_halves<8>(d.w, Paths{d, r, k});
}

// The dscores between the tokens of `group`, in columns, and those that they meet at this level, in rows.
template <int32 half>
INFCTX_DEVICE Right<of_states> load_dscores(const float* dscores, int32 group) {
    const int32 row = lane_group(), column = 2 * lane_place();
    const int32 others = half == 8 ? 1 - group : group;
    const Packet<8> two = load_packet<8>(dscores + (8 * group + row) * score_pitch + 8 * others + column);
    float x[2] = {bits_float(two.x[0]), bits_float(two.x[1])};
#pragma unroll
    for (int32 i = 0; i < 2; ++i) x[i] = half == 8 || (row ^ (column + i)) / half == 1 ? x[i] : 0.0f;
    return make_right<of_states>(x[0], x[1]);
}

// Adds the paths that meet in the middle of blocks of 2 half tokens.
template <int32 half>
INFCTX_DEVICE void meet_halves(Gradients& d, const float* dscores, const Own& r, const Own& k,
                               const Decays& decays) {
    const Own met = meet_at<half>(r, k, decays);
    SumFragment sums[2];
#pragma unroll
    for (int32 group = 0; group < 2; ++group) {
        const auto others = left_of<of_states>(met, half == 8 ? 1 - group : group);
        begin_product(sums[group], others, load_dscores<half>(dscores, group));
    }
    FOR_EACH_OWN(channel, group, which) {
        const float sum = sums[group].x[2 * channel + which];
        const float gradient = sum * level_factor<half>(decays, channel, group, which);
        if (is_left<half>(group, which)) {
            d.k.x[channel][group][which] += gradient;
        } else {
            d.r.x[channel][group][which] += gradient;
        }
    }
}

// From inside the chunk; then d is complete.
INFCTX_DEVICE void find_inner_gradients(Gradients& d, const float* dscores, const Own& r, const Own& k,
                                        const Decays& decays, const float (&u)[2]) {
    // The warp syncs only so that compilers do one level at a time, with fewer registers.
    meet_halves<8>(d, dscores, r, k, decays);
    cross_halves<4>(d.w, Paths{d, r, k});
    sync_warp();
    meet_halves<4>(d, dscores, r, k, decays);
    cross_halves<2>(d.w, Paths{d, r, k});
    sync_warp();
    meet_halves<2>(d, dscores, r, k, decays);
    cross_halves<1>(d.w, Paths{d, r, k});
    sync_warp();
    meet_halves<1>(d, dscores, r, k, decays);
    d.u[0] = 0.0f, d.u[1] = 0.0f;
    FOR_EACH_OWN(channel, group, which) {
        const float bonus = dscores[own_token(group, which) * (score_pitch + 1)];
        const float r_one = r.x[channel][group][which], k_one = k.x[channel][group][which];
        d.r.x[channel][group][which] += bonus * u[channel] * k_one;
        d.k.x[channel][group][which] += bonus * u[channel] * r_one;
        d.u[channel] += bonus * r_one * k_one;
    }
}
