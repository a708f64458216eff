// What all WKV kernels agree on: how the work is cut, which numbers a lane owns, how they come from memory and go back.
//
// Time is cut three times: a *chunk* is 16 tokens, where documents may start; a *tile* is a few chunks, and the state at
// its beginning is kept for the backward; a *span* is many tiles, and one block of threads walks through it.
// Channels are cut once: a block handles HEAD_SIZE key channels by as many value channels, a *piece* of a larger head.
//
// A warp's *slab* is 16 channels.  Lane 4g + t owns, of a slab and a chunk, the channels 2g and 2g + 1 of the tokens
// 2t, 2t + 1, 8 + 2t, 8 + 2t + 1: `Own`.  As the left operand of an mma, channels by tokens, that is what the lane has
// to bring, and what it gets when channels by tokens is the result; two neighbours are one access to memory.

#pragma once

#include "tensor_cores.cuh"

#ifdef INPUT_FLOAT
typedef float Input;
constexpr int32 tile_chunks = 2;
#else
typedef bf16 Input;
constexpr int32 tile_chunks = 4;
#endif

// Where a head is cut into pieces, each leaves a part of the results by token (pieces, B, T, H, N) in fp32, to be added up.
#ifdef HEAD_PIECES
constexpr int32 num_pieces = HEAD_PIECES;
typedef float Output;
#else
constexpr int32 num_pieces = 1;
typedef Input Output;
#endif
constexpr bool in_pieces = num_pieces > 1;

constexpr int32 chunk_tokens = 16;
constexpr int32 tile_tokens = tile_chunks * chunk_tokens;
constexpr int32 num_channels = HEAD_SIZE;
constexpr int32 num_slabs = num_channels / 16;
constexpr int32 num_columns = num_channels / 8;  // fragments side by side
constexpr int32 head_size = num_channels * num_pieces;  // all channels of a head
static_assert(num_channels % 16 == 0 && num_channels <= 64, "larger heads are cut into pieces");

// Rows of shared memory, in elements: each is what lets the lanes that read together meet no bank twice.
constexpr int32 value_pitch = sizeof(Input) == 2 ? num_channels + 8 : num_channels + 4;  // of r k v dy as they came
constexpr int32 read_pitch = num_channels + 8;                                           // of operands read by rows
constexpr int32 write_pitch = num_channels + 4;                                          // and by columns
constexpr int32 score_pitch = 24;
constexpr int32 chunk_values = chunk_tokens * value_pitch;
constexpr int32 chunk_scores = chunk_tokens * score_pitch;

// Compilers would keep every address of a loop's body in registers, of which there are better uses: so a lane's number is
// new wherever it is asked for.
INFCTX_DEVICE int32 lane_group() { return opaque(lane_index()) / 4; }
INFCTX_DEVICE int32 lane_place() { return opaque(lane_index()) % 4; }

// ---- the problem ----

// Tokens are (B, T, H, N) without gaps, states (B, H, N, N), N a multiple of num_channels.
struct Problem {
    int64 num_batches, num_tokens, num_heads, num_spans, span_tokens;

    INFCTX_DEVICE int64 num_chunks() const { return (num_tokens + chunk_tokens - 1) / chunk_tokens; }
    INFCTX_DEVICE int64 num_tiles() const { return (num_tokens + tile_tokens - 1) / tile_tokens; }
};

// What a block works on: blocks are numbered by batch, head, span, piece of keys, piece of values.
// Each number alone is below 2^31; offsets of elements are not.
struct Place {
    int32 batch, head, row;  // row = batch * H + head
    int32 span;
    int32 first_key, first_value;
    int32 first_token, end_token;

    INFCTX_DEVICE int32 num_chunks() const { return (end_token - first_token + chunk_tokens - 1) / chunk_tokens; }
    INFCTX_DEVICE int32 token_at(int32 chunk) const { return first_token + chunk * chunk_tokens; }
};

INFCTX_DEVICE Place find_place(const Problem& problem, int32 first_span, int32 spans) {
    const int32 heads = static_cast<int32>(problem.num_heads);
    int32 index = static_cast<int32>(blockIdx.x);
    Place place;
    place.first_value = index % num_pieces * num_channels;
    index /= num_pieces;
    place.first_key = index % num_pieces * num_channels;
    index /= num_pieces;
    place.span = first_span + index % spans;
    place.row = index / spans;
    place.batch = place.row / heads;
    place.head = place.row % heads;
    place.first_token = static_cast<int32>(place.span * problem.span_tokens);
    place.end_token = place.first_token + static_cast<int32>(problem.span_tokens);
    // The last span takes what is left, which may be more.
    if (place.span == problem.num_spans - 1) place.end_token = static_cast<int32>(problem.num_tokens);
    return place;
}

// The channels of one head's piece, token by token.  The offset is apart from `start`, so that tensors of one shape share
// its registers.
template <typename Element>
struct Rows {
    Element* start;
    int64 offset, stride;

    INFCTX_DEVICE Element* at(int32 token) const { return start + (offset + token * stride); }
};

template <typename Element>
INFCTX_DEVICE Rows<Element> find_rows(Element* start, const Problem& problem, const Place& place, int64 first_channel) {
    const int64 stride = problem.num_heads * head_size;
    return {start, place.batch * problem.num_tokens * stride + place.head * head_size + first_channel, stride};
}

template <typename Element>
INFCTX_DEVICE Rows<Element> find_parts(Element* start, const Problem& problem, const Place& place, int64 first_channel,
                                       int64 part) {
    if (!in_pieces) return find_rows(start, problem, place, first_channel);
    const int64 size = problem.num_batches * problem.num_tokens * problem.num_heads * head_size;
    auto rows = find_rows(start, problem, place, first_channel);
    rows.offset += part * size;
    return rows;
}

// Which chunks of the span begin a document.
struct Starts {
    const uint8* flags;

    INFCTX_DEVICE bool at(int32 chunk) const { return flags != nullptr && flags[chunk] != 0; }
};

INFCTX_DEVICE Starts find_starts(const uint8* flags, const Problem& problem, const Place& place) {
    if (flags == nullptr) return {nullptr};
    return {flags + place.batch * problem.num_chunks() + place.first_token / chunk_tokens};
}

// The block's piece of one of many (N, N) matrices, key by value.
template <typename Element>
INFCTX_DEVICE Element* find_matrix(Element* start, int64 index, const Place& place) {
    if (start == nullptr) return nullptr;
    return start + (index * head_size + place.first_key) * head_size + place.first_value;
}

// ---- what a lane owns of 16 channels and a chunk ----

struct Own {
    float x[2][2][2];  // channel, group of 8 tokens, first or second token
};

#define FOR_EACH_PAIR(channel, group)                      \
    _Pragma("unroll") for (int32 channel = 0; channel < 2; ++channel) \
        _Pragma("unroll") for (int32 group = 0; group < 2; ++group)
#define FOR_EACH_TOKEN(group, which)                     \
    _Pragma("unroll") for (int32 group = 0; group < 2; ++group) \
        _Pragma("unroll") for (int32 which = 0; which < 2; ++which)
#define FOR_EACH_OWN(channel, group, which) \
    _Pragma("unroll") for (int32 channel = 0; channel < 2; ++channel) FOR_EACH_TOKEN(group, which)

INFCTX_DEVICE int32 own_token(int32 group, int32 which) { return 8 * group + 2 * lane_place() + which; }
INFCTX_DEVICE int32 own_channel(int32 slab) { return 16 * slab + 2 * lane_group(); }

// Where the lane's numbers of a chunk lie in tensors of one shape: elements from the start, the same for all of them.
struct OwnPlaces {
    int64 first, stride;
    int32 tokens_left;  // from the lane's first token to the end

    INFCTX_DEVICE int64 at(int32 group, int32 which) const { return first + (8 * group + which) * stride; }
    INFCTX_DEVICE bool inside(int32 group, int32 which) const { return 8 * group + which < tokens_left; }
};

template <typename Element>
INFCTX_DEVICE OwnPlaces own_places(const Rows<Element>& rows, int32 slab, int32 first_token, int32 end) {
    const int32 token = first_token + 2 * lane_place();
    return {rows.offset + token * rows.stride + own_channel(slab), rows.stride, end - token};
}

// As it comes from memory: the conversion waits for the load, so it is done late.
template <typename Element>
struct Loaded {
    Packet<2 * sizeof(Element)> x[2][2];
};

// Tokens from the end on are zeros.
template <typename Element>
INFCTX_DEVICE Loaded<Element> load_own(const Element* start, const OwnPlaces& places) {
    Loaded<Element> loaded;
    FOR_EACH_TOKEN(group, which) {
        loaded.x[group][which] = {};
        if (places.inside(group, which)) {
            loaded.x[group][which] = load_packet<2 * sizeof(Element)>(start + places.at(group, which));
        }
    }
    return loaded;
}

INFCTX_DEVICE float one_of(const Packet<4>& two, int32 channel) {
    return channel == 0 ? first_of(two.x[0]) : second_of(two.x[0]);
}
INFCTX_DEVICE float one_of(const Packet<8>& two, int32 channel) { return bits_float(two.x[channel]); }

template <typename Element>
INFCTX_DEVICE Own to_own(const Loaded<Element>& loaded) {
    Own own;
    FOR_EACH_OWN(channel, group, which) own.x[channel][group][which] = one_of(loaded.x[group][which], channel);
    return own;
}

INFCTX_DEVICE void store_pair(bf16* to, float first, float second) {
    store_packet<4>(to, Packet<4>{{pack_bf16(first, second)}});
}
INFCTX_DEVICE void store_pair(float* to, float first, float second) {
    store_packet<8>(to, Packet<8>{{float_bits(first), float_bits(second)}});
}

template <typename Element>
INFCTX_DEVICE void store_own(Element* start, const OwnPlaces& places, const Own& own) {
    FOR_EACH_TOKEN(group, which) {
        if (places.inside(group, which)) {
            store_pair(start + places.at(group, which), own.x[0][group][which], own.x[1][group][which]);
        }
    }
}

// To shared memory, a row a token.
template <int32 pitch>
INFCTX_DEVICE void stage_own(float* rows, int32 slab, const Own& own) {
    FOR_EACH_TOKEN(group, which) {
        float* to = rows + own_token(group, which) * pitch + own_channel(slab);
        store_pair(to, own.x[0][group][which], own.x[1][group][which]);
    }
}

// What the lane staged, back.
template <int32 pitch>
INFCTX_DEVICE Own staged_own(const float* rows, int32 slab) {
    Own own;
    FOR_EACH_TOKEN(group, which) {
        const auto two = load_packet<8>(rows + own_token(group, which) * pitch + own_channel(slab));
        own.x[0][group][which] = bits_float(two.x[0]), own.x[1][group][which] = bits_float(two.x[1]);
    }
    return own;
}

// Starts copying rows of inputs, zeros from `end` on; `thread` of `threads` takes part.
INFCTX_DEVICE void start_copy(Input* to, const Rows<const Input>& rows, int32 count, int32 first_token, int32 end,
                              int32 thread, int32 threads) {
    constexpr int32 packet = 16 / sizeof(Input);
    constexpr int32 packets = num_channels / packet;
    for (int32 index = thread; index < count * packets; index += threads) {
        const int32 token = first_token + index / packets;
        const int32 column = index % packets * packet;
        const bool inside = token < end;
        cp_async_16(to + index / packets * value_pitch + column, rows.at(inside ? token : 0) + column, inside);
    }
}

// ---- decays ----

// exp of a log decay or a sum of them: 2^(x log2 e).
INFCTX_DEVICE float decay_of(float log_decay) { return exp2_approximate(log_decay * 1.4426950408889634f); }

// All that 16 log decays of a channel say, for the tokens that a lane owns, by channel and group.  Each factor is the
// exponential of a sum of log decays <= 0, so at most one, and nothing is divided or subtracted.
struct Decays {
    float first[2][2], second[2][2];  // of the token itself
    float other_pair[2][2];  // of the other two tokens of the four
    float other_four[2][2];  // of the other four tokens of the group
    float eight[2][2];  // of the group
    float whole[2], log_whole[2];  // of the chunk

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

    // From the beginning of the group to before a token, and from behind it to the end of the group.
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
        const float first = w.x[channel][group][0], second = w.x[channel][group][1];
        const float pair = first + second;
        const float other_pair = shuffle_xor(pair, 1);
        const float four = pair + other_pair;
        const float other_four = shuffle_xor(four, 2);
        decays.first[channel][group] = decay_of(first);
        decays.second[channel][group] = decay_of(second);
        decays.other_pair[channel][group] = decay_of(other_pair);
        decays.other_four[channel][group] = decay_of(other_four);
        decays.eight[channel][group] = four + other_four;
    }
#pragma unroll
    for (int32 channel = 0; channel < 2; ++channel) {
        decays.log_whole[channel] = decays.eight[channel][0] + decays.eight[channel][1];
        decays.whole[channel] = decay_of(decays.log_whole[channel]);
        decays.eight[channel][0] = decay_of(decays.eight[channel][0]);
        decays.eight[channel][1] = decay_of(decays.eight[channel][1]);
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

// What the state reads with: r times the decay since the beginning of the chunk.
INFCTX_DEVICE Own since_start(const Own& r, const Decays& decays) {
    Own own;
    FOR_EACH_OWN(channel, group, which) {
        own.x[channel][group][which] = r.x[channel][group][which] * decays.since(channel, group, which);
    }
    return own;
}

// What the state is left with: k times the decay until the end of the chunk.
INFCTX_DEVICE Own until_end(const Own& k, const Decays& decays) {
    Own own;
    FOR_EACH_OWN(channel, group, which) {
        own.x[channel][group][which] = k.x[channel][group][which] * decays.until(channel, group, which);
    }
    return own;
}

// ---- levels: how tokens of a chunk read from each other ----

// Two tokens whose numbers differ first in the bit of worth `half` meet at level `half` = 8, 4, 2, 1: at the border in
// the middle of a block of 2 half tokens, the one on the *left* leaves k, the one on the *right* reads with r.
constexpr int32 num_levels = 4;

template <int32 half>
INFCTX_DEVICE bool is_left(int32 group, int32 which) {
    if (half == 8) return group == 0;
    if (half == 4) return lane_place() / 2 == 0;
    if (half == 2) return lane_place() % 2 == 0;
    return which == 0;
}

// The decay between a token and the border of its block: what is left until there, or since there.
template <int32 half>
INFCTX_DEVICE float level_factor(const Decays& decays, int32 channel, int32 group, int32 which) {
    if (half == 8) {
        return group == 0 ? decays.until_group(channel, group, which) : decays.since_group(channel, group, which);
    }
    if (half == 1) return 1.0f;
    const bool left = is_left<half>(group, which);
    float own = left ? (which == 0 ? decays.second[channel][group] : 1.0f)
                     : (which == 0 ? 1.0f : decays.first[channel][group]);
    if (half == 4) own *= left ? decays.pair_after(channel, group) : decays.pair_before(channel, group);
    return own;
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

// The rows of a level that is staged are the 8 tokens on the left, then the 8 on the right, block by block.
template <int32 half>
INFCTX_DEVICE void stage_level(float* rows, int32 slab, const Own& met) {
    // Of a token's four bits the one worth `half` is the side, which comes first; 8 is the lane's group of tokens, 4 and 2
    // are its place, 1 says which of its two tokens.
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
