// The decays of 16 tokens, and the levels at which the tokens of a chunk meet.

#pragma once

#include "wkv_layout.cuh"

constexpr float log2_e = 1.4426950408889634f;

// exp of a log decay or a sum of them: 2^(x log2 e).
INFCTX_DEVICE float decay_of(float log_decay) { return exp2_approximate(log_decay * log2_e); }

// Factors from 16 log decays of a channel, for the tokens that a lane owns, by channel and group.  Each is the
// exponential of a sum of log decays <= 0, so at most 1; nothing is divided or subtracted.
struct Decays {
    float first[2][2], second[2][2];  // of the token itself
    float other_pair[2][2];  // of the other two tokens of the four
    float other_four[2][2];  // of the other four tokens of the group
    float eight[2][2];  // of the group
    float whole[2], log2_whole[2];  // of the chunk

    INFCTX_DEVICE float pair_before(int32 channel, int32 group) const {
        return lane_place() % 2 == 1 ? other_pair[channel][group] : 1.0f;
    }
    INFCTX_DEVICE float pair_after(int32 channel, int32 group) const {
        return lane_place() % 2 == 0 ? other_pair[channel][group] : 1.0f;
    }
    INFCTX_DEVICE float four_before(int32 channel, int32 group) const {
        return lane_place() / 2 == 1 ? other_four[channel][group] : 1.0f;
    }
    INFCTX_DEVICE float four_after(int32 channel, int32 group) const {
        return lane_place() / 2 == 0 ? other_four[channel][group] : 1.0f;
    }

    // From the beginning of the group to just before a token, and from just after it to the end of the group.
    INFCTX_DEVICE float since_group(int32 channel, int32 group, int32 which) const {
        const float since = pair_before(channel, group) * four_before(channel, group);
        return which == 0 ? since : since * first[channel][group];
    }
    INFCTX_DEVICE float until_group(int32 channel, int32 group, int32 which) const {
        const float until = pair_after(channel, group) * four_after(channel, group);
        return which == 1 ? until : until * second[channel][group];
    }
    // The same for the chunk.
    INFCTX_DEVICE float since(int32 channel, int32 group, int32 which) const {
        const float since = since_group(channel, group, which);
        return group == 0 ? since : since * eight[channel][0];
    }
    INFCTX_DEVICE float until(int32 channel, int32 group, int32 which) const {
        const float until = until_group(channel, group, which);
        return group == 1 ? until : until * eight[channel][1];
    }
};

INFCTX_DEVICE Decays find_decays(const Own& w) {
    Decays decays;
    FOR_EACH_PAIR(channel, group) {
        // To powers of two once, instead of for each sum.
        const float first = w.x[channel][group][0] * log2_e, second = w.x[channel][group][1] * log2_e;
        const float pair = first + second;
        const float other_pair = shuffle_xor(pair, 1);
        const float four = pair + other_pair;
        const float other_four = shuffle_xor(four, 2);
        decays.first[channel][group] = exp2_approximate(first);
        decays.second[channel][group] = exp2_approximate(second);
        decays.other_pair[channel][group] = exp2_approximate(other_pair);
        decays.other_four[channel][group] = exp2_approximate(other_four);
        decays.eight[channel][group] = four + other_four;
    }
#pragma unroll
    for (int32 channel = 0; channel < 2; ++channel) {
        decays.log2_whole[channel] = decays.eight[channel][0] + decays.eight[channel][1];
        decays.whole[channel] = exp2_approximate(decays.log2_whole[channel]);
        decays.eight[channel][0] = exp2_approximate(decays.eight[channel][0]);
        decays.eight[channel][1] = exp2_approximate(decays.eight[channel][1]);
    }
    return decays;
}

INFCTX_DEVICE void forget_products(Own& own) {
    FOR_EACH_OWN(channel, group, which) own.x[channel][group][which] = opaque(own.x[channel][group][which]);
}
INFCTX_DEVICE void forget_products(Decays& decays) {
    FOR_EACH_PAIR(channel, group) {
        decays.first[channel][group] = opaque(decays.first[channel][group]);
        decays.second[channel][group] = opaque(decays.second[channel][group]);
        decays.other_pair[channel][group] = opaque(decays.other_pair[channel][group]);
        decays.other_four[channel][group] = opaque(decays.other_four[channel][group]);
    }
}

// For reading from the state: r times the decay since the beginning of the chunk.
INFCTX_DEVICE Own since_start(const Own& r, const Decays& decays) {
    Own own;
    FOR_EACH_OWN(channel, group, which) {
        own.x[channel][group][which] = r.x[channel][group][which] * decays.since(channel, group, which);
    }
    return own;
}

// For writing to the state: k times the decay until the end of the chunk.
INFCTX_DEVICE Own until_end(const Own& k, const Decays& decays) {
    Own own;
    FOR_EACH_OWN(channel, group, which) {
        own.x[channel][group][which] = k.x[channel][group][which] * decays.until(channel, group, which);
    }
    return own;
}

// ---- levels: how tokens of a chunk read from each other ----

// Two tokens whose numbers differ first in the bit of value `half` meet at level `half` = 8, 4, 2, 1.  At the border in
// the middle of a block of 2 half tokens, the one on the *left* leaves k and the one on the *right* reads with r.
constexpr int32 num_levels = 4;

template <int32 half>
INFCTX_DEVICE bool is_left(int32 group, int32 which) {
    if (half == 8) return group == 0;
    if (half == 4) return lane_place() / 2 == 0;
    if (half == 2) return lane_place() % 2 == 0;
    return which == 0;
}

// The decay between a token and the border of its block: until the border on the left, since the border on the right.
template <int32 half>
INFCTX_DEVICE float level_factor(const Decays& decays, int32 channel, int32 group, int32 which) {
    if (half == 8) {
        return group == 0 ? decays.until_group(channel, group, which) : decays.since_group(channel, group, which);
    }
    if (half == 1) return 1.0f;
    const bool left = is_left<half>(group, which);
    const float one = which == 0 ? decays.second[channel][group] : decays.first[channel][group];
    const float own = left == (which == 0) ? one : 1.0f;
    if (half == 2) return own;
    // Of a group's four pairs the outer ones, 0 and 3, have another between themselves and the border.
    return own * ((lane_place() + 1) / 2 % 2 == 0 ? decays.other_pair[channel][group] : 1.0f);
}

// Both sides of a level in one: k with its factor on the left, r with its factor on the right.
template <int32 half>
INFCTX_DEVICE Own meet_at(const Own& r, const Own& k, const Decays& decays) {
    Own own;
    FOR_EACH_OWN(channel, group, which) {
        const float side = is_left<half>(group, which) ? k.x[channel][group][which] : r.x[channel][group][which];
        own.x[channel][group][which] = side * level_factor<half>(decays, channel, group, which);
    }
    return own;
}

// The rows of a staged level are the 8 tokens on the left, then the 8 on the right, block by block.
template <int32 half>
INFCTX_DEVICE void stage_level(float* rows, int32 slab, const Own& met) {
    // Of a token's four bits, the one of value `half` is the side and comes first.  8 is the lane's group of tokens, 4
    // and 2 are its place, 1 is which of its two tokens.
    const int32 four = lane_place() / 2, two = lane_place() % 2;
    const int32 of_four = half == 8 ? 4 : half == 4 ? 8 : 2;
    const int32 of_two = half == 8 || half == 4 ? 2 : half == 2 ? 8 : 1;
    const int32 row = of_four * four + of_two * two;
    float* own = rows + row * read_pitch + own_channel(slab);
    FOR_EACH_TOKEN(group, which) {
        const int32 further = (half == 8 ? 8 : 4) * group + (half == 1 ? 8 : 1) * which;
        store_pair(own + further * read_pitch, met.x[0][group][which], met.x[1][group][which]);
    }
}
