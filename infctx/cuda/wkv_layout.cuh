// Shared by all WKV kernels: how the work is cut, which numbers a lane owns, how they are loaded and stored.
//
// Time is cut three times.  A *chunk* is 16 tokens, where documents may start.  A *tile* is a few chunks; the state at
// its beginning is kept for the backward pass.  A *span* is many tiles; one block of threads walks through it.
//
// A warp's *slab* is 16 channels.  Lane 4g + t owns, of a slab and a chunk, the channels 2g and 2g + 1 of the tokens
// 2t, 2t + 1, 8 + 2t, 8 + 2t + 1: `Own`.  These are its part of an mma's left operand, channels
// by tokens, and of a result, channels by tokens; two neighbors are one access to memory.

#pragma once

#include "tensor_cores.cuh"

#ifdef INPUT_FLOAT
typedef float Input;
constexpr int32 tile_chunks = 2;
#else
typedef bf16 Input;
constexpr int32 tile_chunks = 4;
#endif

constexpr int32 chunk_tokens = 16;
constexpr int32 tile_tokens = tile_chunks * chunk_tokens;
constexpr int32 num_channels = HEAD_SIZE;
constexpr int32 num_slabs = num_channels / 16;
constexpr int32 num_columns = num_channels / 8;  // fragments side by side
static_assert(num_channels % 16 == 0 && num_channels <= 64, "wkv_cuda.py pads heads, and cuts those that are larger");

// Pitches of rows in shared memory, in elements, so that lanes that read together have no bank conflicts.
constexpr int32 float_pitch = num_channels + 4;                                          // of fp32 by token, as loaded
constexpr int32 value_pitch = sizeof(Input) == 2 ? num_channels + 8 : float_pitch;       // of r k v dy as loaded
constexpr int32 read_pitch = num_channels + 8;                                           // of operands read by rows
constexpr int32 write_pitch = num_channels + 4;                                          // and by columns
constexpr int32 score_pitch = 24;
constexpr int32 chunk_values = chunk_tokens * value_pitch;
constexpr int32 chunk_scores = chunk_tokens * score_pitch;

// Without a sign, a quotient and a remainder are one instruction each.  Version 7 keeps the sign (SIGNED_LANES) in those
// of its builds that would spill without it.
#ifdef SIGNED_LANES
typedef int32 LaneNumber;
#else
typedef uint32 LaneNumber;
#endif

// Compilers would keep every address of a loop's body in registers, which have better uses.  So a lane's number is
// recomputed at every use.
INFCTX_DEVICE int32 lane_group() { return static_cast<int32>(static_cast<LaneNumber>(opaque(lane_index())) / 4); }
INFCTX_DEVICE int32 lane_place() { return static_cast<int32>(static_cast<LaneNumber>(opaque(lane_index())) % 4); }

// ---- the problem ----

// Tokens are (B, T, H, N) without gaps, states (B, H, N, N); N is num_channels.
struct Problem {
    int64 num_batches, num_tokens, num_heads, num_spans, span_tokens;

    INFCTX_DEVICE int64 num_chunks() const { return (num_tokens + chunk_tokens - 1) / chunk_tokens; }
    INFCTX_DEVICE int64 num_tiles() const { return (num_tokens + tile_tokens - 1) / tile_tokens; }
};

// The work of a block: blocks are numbered by batch, head, span.
// Each number alone is below 2^31; offsets of elements are not.
struct Place {
    int32 batch, head, row;  // row = batch * H + head
    int32 span;
    int32 first_token, end_token;

    INFCTX_DEVICE int32 num_chunks() const { return (end_token - first_token + chunk_tokens - 1) / chunk_tokens; }
    INFCTX_DEVICE int32 token_at(int32 chunk) const { return first_token + chunk * chunk_tokens; }
};

INFCTX_DEVICE Place find_place(const Problem& problem, int32 first_span, int32 spans) {
    const int32 heads = static_cast<int32>(problem.num_heads);
    // Roles find their place on their own: kept from before they part, it would be in registers of all.
    const int32 index = opaque(static_cast<int32>(blockIdx.x));
    Place place;
    place.span = first_span + index % spans;
    place.row = index / spans;
    place.batch = place.row / heads;
    place.head = place.row % heads;
    place.first_token = static_cast<int32>(place.span * problem.span_tokens);
    place.end_token = place.first_token + static_cast<int32>(problem.span_tokens);
    // The last span gets the rest.
    if (place.span == problem.num_spans - 1) place.end_token = static_cast<int32>(problem.num_tokens);
    return place;
}

// The channels of one head, token by token.  The offset is separate from `start`, so that tensors of the same shape
// share its registers.
template <typename Element>
struct Rows {
    Element* start;
    int64 offset, stride;

    INFCTX_DEVICE Element* at(int32 token) const { return start + place_of(token); }

    // A token's distance from the next one has 32 bits; so a product of two of 32, without signs, finds its place.
    INFCTX_DEVICE int64 place_of(int32 token) const {
        const uint64 tokens = static_cast<uint32>(token);
        return offset + static_cast<int64>(tokens * static_cast<uint32>(stride));
    }
};

template <typename Element>
INFCTX_DEVICE Rows<Element> find_rows(Element* start, const Problem& problem, const Place& place) {
    const int64 stride = problem.num_heads * num_channels;
    return {start, place.batch * problem.num_tokens * stride + place.head * num_channels, stride};
}

// Which chunks of the span begin a document.
struct Starts {
    const uint8* flags;
    int64 first;

    INFCTX_DEVICE bool at(int32 chunk) const { return flags != nullptr && flags[first + chunk] != 0; }
};

INFCTX_DEVICE Starts find_starts(const uint8* flags, const Problem& problem, const Place& place) {
    return {flags, place.batch * problem.num_chunks() + place.first_token / chunk_tokens};
}

// One of many (N, N) matrices, key by value.
template <typename Element>
INFCTX_DEVICE Element* find_matrix(Element* start, int64 index) {
    if (start == nullptr) return nullptr;
    return start + index * num_channels * num_channels;
}

// ---- a lane's part of 16 channels and a chunk ----

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

// The offsets of the lane's numbers of a chunk, the same in all tensors of one shape: elements from the start.
struct OwnPlaces {
    int64 first;
    int32 stride, tokens_left;  // from the lane's first token to the end

    template <typename Element>
    INFCTX_DEVICE Element* at(Element* own, int32 group, int32 which) const {
        return own + (8 * group + which) * opaque(stride);
    }
    INFCTX_DEVICE bool inside(int32 group, int32 which) const { return 8 * group + which < tokens_left; }
};

template <typename Element>
INFCTX_DEVICE OwnPlaces own_places(const Rows<Element>& rows, int32 slab, int32 first_token, int32 end) {
    const int32 token = first_token + 2 * lane_place();
    return {rows.place_of(token) + own_channel(slab), static_cast<int32>(rows.stride), end - token};
}

// Unconverted, as loaded: the conversion waits for the load, so it is done late.
template <typename Element>
struct Loaded {
    Packet<2 * sizeof(Element)> x[2][2];
};

// Tokens at or past the end are zeros.
template <typename Element>
INFCTX_DEVICE Loaded<Element> load_own(const Element* start, const OwnPlaces& places) {
    Loaded<Element> loaded;
    const Element* own = opaque(start + places.first);
    FOR_EACH_TOKEN(group, which) {
        const bool inside = places.inside(group, which);
        loaded.x[group][which] = load_global<2 * sizeof(Element)>(places.at(own, group, which), inside);
    }
    return loaded;
}

template <typename Element>
INFCTX_DEVICE void abandon(Loaded<Element>& loaded) {
    FOR_EACH_TOKEN(group, which) {
#pragma unroll
        for (uint32 i = 0; i < sizeof(Element) / 2; ++i) abandon(loaded.x[group][which].x[i]);
    }
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

INFCTX_DEVICE Packet<4> pair_of(const bf16*, float first, float second) { return {{pack_bf16(first, second)}}; }
INFCTX_DEVICE Packet<8> pair_of(const float*, float first, float second) {
    return {{float_bits(first), float_bits(second)}};
}

template <typename Element>
INFCTX_DEVICE void store_pair(Element* to, float first, float second) {
    store_packet<2 * sizeof(Element)>(to, pair_of(to, first, second));
}

template <typename Element>
INFCTX_DEVICE void store_own(Element* start, const OwnPlaces& places, const Own& own) {
    Element* to = opaque(start + places.first);
    FOR_EACH_TOKEN(group, which) {
        const auto pair = pair_of(to, own.x[0][group][which], own.x[1][group][which]);
        store_global<2 * sizeof(Element)>(places.at(to, group, which), pair, places.inside(group, which));
    }
}

// To shared memory, one row per token.
template <int32 pitch>
INFCTX_DEVICE void stage_own(float* rows, int32 slab, const Own& own) {
    FOR_EACH_TOKEN(group, which) {
        float* to = rows + own_token(group, which) * pitch + own_channel(slab);
        store_pair(to, own.x[0][group][which], own.x[1][group][which]);
    }
}

// Loads the lane's staged numbers back.
template <int32 pitch>
INFCTX_DEVICE Own staged_own(const float* rows, int32 slab) {
    Own own;
    FOR_EACH_TOKEN(group, which) {
        const auto two = load_packet<8>(rows + own_token(group, which) * pitch + own_channel(slab));
        own.x[0][group][which] = bits_float(two.x[0]), own.x[1][group][which] = bits_float(two.x[1]);
    }
    return own;
}

// Starts copying rows of inputs, zeros from `end`; this is `thread` of `threads`.
template <int32 count, int32 threads, typename Element>
INFCTX_DEVICE void start_copy(Element* to, const Rows<const Element>& rows, int32 first_token, int32 end,
                              int32 thread) {
    constexpr int32 packet = 16 / sizeof(Element), pitch = sizeof(Element) == 2 ? value_pitch : float_pitch;
    constexpr int32 packets = num_channels / packet;
#pragma unroll
    for (int32 turn = 0; turn < (count * packets + threads - 1) / threads; ++turn) {
        const int32 index = thread + turn * threads;
        if (count * packets % threads != 0 && index >= count * packets) break;
        const int32 token = first_token + index / packets;
        const int32 column = index % packets * packet;
        const bool inside = token < end;
        cp_async_16(to + index / packets * pitch + column, rows.at(inside ? token : 0) + column, inside);
    }
}
