// The backward pass: what its four roles share, and the role that owns states by keys.

#pragma once

#include "wkv_gradients.cuh"
#include "wkv_products.cuh"
#include "wkv_reader.cuh"
#include "wkv_spans.cuh"

// Warps have four roles, a warp of each for every slab:
//   outside   owns 16 keys' state and its gradient: what chunks read from outside, and the state within a tile
//   values    owns 16 values' gradient of the state: dv
//   stage     prepares a chunk for both of them, one turn ahead
//   inside    finishes the gradients of r, k, w and u, one turn later
constexpr int32 backward_threads = 4 * span_threads;
// Whether the states of a tile are walked through a tile ahead, by `stage`: a tile of two chunks is too short for that.
constexpr bool walks_ahead = tile_chunks > 2;
// Whether `outside` loads the vectors of its walk a turn ahead.  From sm_100 on, compilers have no registers for it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool loads_ahead = false;
#else
constexpr bool loads_ahead = true;
#endif
// v is copied this many chunks ahead.
constexpr int32 v_ahead = walks_ahead ? tile_chunks + 2 : tile_chunks;
// Buffers of v: one more; a power of two makes remainders cheap, but fp32 has no room for it.
constexpr int32 v_places = walks_ahead ? 8 : v_ahead + 1;
// Columns of the gradient that wait in shared memory until the state has been read.
constexpr int32 parked = num_columns < 4 ? num_columns : 4;
// Barriers of roles.
constexpr int32 stage_barrier = 1, state_barrier = 2;
constexpr int32 state_floats = num_channels * num_channels;
// What a chunk reads from outside: dr and dk in the lanes' layout, and the paths through it by key.
constexpr int32 outside_lanes = 16 * span_threads;
constexpr int32 outside_floats = outside_lanes + num_channels;

struct Shared {
    Input *v, *dy;
    float* state;  // before a pair of chunks, in the lanes' layout
    float *staged, *levels, *bonuses, *scores, *dscores, *outside;
    float* u;
    int64* places;  // in numbers from the tensors' beginnings, see `find_places`
    uint8* begins;  // whether a document starts there, of the chunks whose v is here

    // Without a sign, a remainder is fewer instructions.
    static INFCTX_DEVICE uint32 place_of(int32 chunk, uint32 places) { return static_cast<uint32>(chunk) % places; }
    INFCTX_DEVICE Input* v_of(int32 chunk) const { return v + place_of(chunk, v_places) * chunk_values; }
    INFCTX_DEVICE Input* dy_of(int32 chunk) const { return dy + place_of(chunk, 2) * chunk_values; }
    INFCTX_DEVICE Staged staged_of(int32 chunk) const {
        return find_staged(staged + place_of(chunk, 2) * staged_floats);
    }
    INFCTX_DEVICE float* scores_of(int32 chunk) const { return scores + place_of(chunk, 2) * chunk_scores; }
    INFCTX_DEVICE float* dscores_of(int32 chunk) const { return dscores + place_of(chunk, 2) * chunk_scores; }
    INFCTX_DEVICE float* outside_of(int32 chunk) const { return outside + place_of(chunk, 2) * outside_floats; }
    INFCTX_DEVICE uint8& begins_at(int32 chunk) const { return begins[place_of(chunk, v_places)]; }
};

INFCTX_DEVICE Shared find_shared(unsigned char* start) {
    Shared shared;
    shared.v = reinterpret_cast<Input*>(start);
    shared.dy = shared.v + v_places * chunk_values;
    shared.state = reinterpret_cast<float*>(shared.dy + 2 * chunk_values);
    shared.staged = shared.state + state_floats;
    shared.levels = shared.staged + 2 * staged_floats;
    shared.bonuses = shared.levels + level_floats;
    shared.scores = shared.bonuses + bonus_floats;
    shared.dscores = shared.scores + 2 * chunk_scores;
    shared.outside = shared.dscores + 2 * chunk_scores;
    shared.u = shared.outside + 2 * outside_floats;
    shared.places = reinterpret_cast<int64*>(shared.u + num_channels);
    shared.begins = reinterpret_cast<uint8*>(shared.places + 6);
    return shared;
}

// Stores to and loads from places that no other lane of this role reads.
INFCTX_DEVICE float* own_packets(float* start, int32 slab, int32 packets) {
    return start + (slab * 32 * packets + opaque(lane_index())) * 4;
}
template <int32 columns>
INFCTX_DEVICE void put_columns(float* to, const KeySlab& state) {
#pragma unroll
    for (int32 n = 0; n < columns; ++n) {
        const float* x = state.x[n].x;
        const Packet<16> packet = {{float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])}};
        store_packet<16>(to + n * 128, packet);
    }
}
template <int32 columns>
INFCTX_DEVICE void take_columns(KeySlab& state, const float* from) {
#pragma unroll
    for (int32 n = 0; n < columns; ++n) {
        const Packet<16> packet = load_packet<16>(from + n * 128);
#pragma unroll
        for (int32 i = 0; i < 4; ++i) state.x[n].x[i] = bits_float(packet.x[i]);
    }
}
INFCTX_DEVICE void put_state(float* to, const KeySlab& state) { put_columns<num_columns>(to, state); }
INFCTX_DEVICE void take_state(KeySlab& state, const float* from) { take_columns<num_columns>(state, from); }
INFCTX_DEVICE void put_own(float* to, const Own& own) {
#pragma unroll
    for (int32 channel = 0; channel < 2; ++channel) {
        const float(&x)[2][2] = own.x[channel];
        const Packet<16> packet = {
            {float_bits(x[0][0]), float_bits(x[0][1]), float_bits(x[1][0]), float_bits(x[1][1])}};
        store_packet<16>(to + channel * 128, packet);
    }
}
INFCTX_DEVICE void take_own(Own& own, const float* from) {
#pragma unroll
    for (int32 channel = 0; channel < 2; ++channel) {
        const Packet<16> packet = load_packet<16>(from + channel * 128);
        FOR_EACH_TOKEN(group, which) own.x[channel][group][which] = bits_float(packet.x[2 * group + which]);
    }
}

// matrix += more.
INFCTX_DEVICE void add_to_matrix(float* matrix, int32 slab, const KeySlab& more) {
    float* own = KeySlab::own_corner(matrix, slab);
#pragma unroll
    for (int32 n = 0; n < num_columns; ++n) {
        const float* x = more.x[n].x;
        float* to = own + 8 * n;
        const Packet<8> sum = load_packet<8>(to), below = load_packet<8>(to + num_channels);
        store_pair(to, bits_float(sum.x[0]) + x[0], bits_float(sum.x[1]) + x[1]);
        store_pair(to + num_channels, bits_float(below.x[0]) + x[2], bits_float(below.x[1]) + x[3]);
        if (n % 2 == 1) sync_warp();
    }
}

struct BackwardInput {
    const Input *r, *k, *v, *dy;
    const float *w, *u;
    const float* gradients;  // of the state after each span
    const uint8* starts;
    const float* initial;
    const float* kept;  // the state before each tile
    int64 w_batch, w_token, w_head, initial_batch;
};

struct BackwardOutput {
    Input *dr, *dk, *dv;
    float *dw, *du, *dstate, *dinitial;
};

// Shared by all roles: their span.  All meet at the same barriers: one before the first turn, one after each.  There is
// a turn for each chunk, in which it is read; in the one before it is staged, and in the one after it is finished.
struct Span {
    const Problem& problem;
    const BackwardInput& input;
    Place place;
    Shared shared;
    int32 num_chunks, slab;

    INFCTX_DEVICE bool begins_at(int32 chunk) const { return shared.begins_at(chunk) != 0; }
    INFCTX_DEVICE const float* entering() const {
        return find_matrix(input.gradients, place.row * problem.num_spans + place.span);
    }
    // These wait in shared memory: no role has registers for them.
    INFCTX_DEVICE void find_places() const {
        const auto rows = find_rows(input.k, problem, place);
        const auto w_rows = find_decay_rows(input.w, input.w_batch, input.w_token, input.w_head, place);
        shared.places[0] = rows.place_of(place.first_token);
        shared.places[1] = w_rows.place_of(place.first_token);
        shared.places[2] = (place.row * problem.num_tiles() + place.first_token / tile_tokens) * state_floats;
        shared.places[3] = (place.batch * input.initial_batch + place.head) * state_floats;
        shared.places[4] = (place.row * problem.num_spans + place.span) * state_floats;
        shared.places[5] = place.end_token - place.first_token;
    }
    INFCTX_DEVICE OwnPlaces places(int64 start, int32 stride, int32 chunk) const {
        const int32 token = chunk * chunk_tokens + 2 * lane_place();
        // Without signs, this is one instruction.
        const uint64 offset = static_cast<uint64>(static_cast<uint32>(token)) * static_cast<uint32>(stride);
        return {start + static_cast<int64>(offset) + own_channel(slab), stride, num_tokens() - token};
    }
    INFCTX_DEVICE int32 num_tokens() const { return static_cast<int32>(shared.places[5]); }
    // Of r, k, dr, dk and dw.
    INFCTX_DEVICE OwnPlaces places(int32 chunk) const {
        return places(shared.places[0], static_cast<int32>(problem.num_heads) * num_channels, chunk);
    }
    INFCTX_DEVICE OwnPlaces w_places(int32 chunk) const {
        return places(shared.places[1], static_cast<int32>(input.w_token), chunk);
    }
    INFCTX_DEVICE const float* kept_before(int32 chunk) const {
        return input.kept + (shared.places[2] + static_cast<int64>(chunk / tile_chunks) * state_floats);
    }
    INFCTX_DEVICE Packet<8> load_u() const { return load_packet<8>(shared.u + own_channel(slab)); }
};

// ---- outside ----

// What a chunk does to a state besides its values.
struct Writers {
    Own keys;
    float decays[2];
};

// The state within a tile, recomputed from the one kept before it.
struct StateWalk {
    const Span& span;
    KeySlab state;
    Loaded<Input> k;  // of the chunk that it passes next
    Loaded<float> w;

    INFCTX_DEVICE void load(int32 chunk) {
        k = load_own(span.input.k, span.places(chunk));
        w = load_own(span.input.w, span.w_places(chunk));
    }

    INFCTX_DEVICE Writers find_writers() const {
        const Decays decays = find_decays(to_own(w));
        return {until_end(to_own(k), decays), {decays.whole[0], decays.whole[1]}};
    }

    INFCTX_DEVICE void pass(int32 chunk, const Writers& writers) {
        state.advance(writers.decays, writers.keys, span.shared.v_of(chunk));
        begin_document(chunk + 1);
    }

    INFCTX_DEVICE void begin_document(int32 chunk) {
        if (!span.begins_at(chunk)) return;
        state.clear();
        if (span.input.initial != nullptr) state.load(span.input.initial + span.shared.places[3], span.slab);
    }

    INFCTX_DEVICE void forget_inputs() {
        abandon(k);
        abandon(w);
    }

    INFCTX_DEVICE void start(int32 first) { state.load(span.kept_before(first), span.slab); }

    INFCTX_DEVICE void leave() {
        put_state(own_packets(span.shared.state, span.slab, num_columns), state);
        state.forget();
    }
};

// The state before a pair of chunks is in shared memory.  Before the second pair of a tile, `stage` has left it there;
// that before the first one is the state before the tile.
INFCTX_DEVICE void run_outside(const Span& span, const BackwardOutput& output) {
    const Shared& shared = span.shared;
    const int32 last = span.num_chunks - 1;
    StateWalk walk = {span};
    KeySlab gradient;
    gradient.load(span.entering(), span.slab);
    walk.state.forget();
    if (loads_ahead) walk.load(last / 2 * 2);
    sync_roles();
    sync_roles();
#pragma unroll 1
    for (int32 turn = last; turn >= 0; --turn) {
        const int32 chunk = opaque(turn);  // so that no register keeps what only grows with it
        float* before_pair = own_packets(shared.state, span.slab, num_columns);
        float* outside = shared.outside_of(chunk);
        float* own = own_packets(outside, span.slab, 4);  // the gradient's until the results come
        put_columns<parked>(own, gradient);
        if (chunk % 2 == 1) {
            // Before the last pair, `stage` has left the state from the start.
            if (chunk % tile_chunks == 1 && chunk * chunk_tokens + chunk_tokens < span.num_tokens()) {
                walk.begin_document(chunk - 1);
                put_state(before_pair, walk.state);
            }
            if (!loads_ahead) walk.load(chunk - 1);
            const Writers writers = walk.find_writers();
            sync_warp();  // only so that what is taken back is loaded now: registers have no room for it before
            take_state(walk.state, before_pair);
            walk.pass(chunk - 1, writers);
        } else {
            take_state(walk.state, before_pair);
            if (walks_ahead && chunk % tile_chunks == 0 && chunk > 0) sync_role<2 * span_threads>(state_barrier);
        }
        sync_warp();  // here and below only so that one thing is done after the other, with fewer registers
        const Own read = walk.state.read(shared.dy_of(chunk));
        sync_warp();
        take_columns<parked>(gradient, own);
        put_own(own, read);
        float through[2];
        sync_warp();
        find_through(through, walk.state, gradient);
        sync_warp();
        put_own(own + 256, gradient.read(shared.v_of(chunk)));
        if (lane_place() == 0) {
            store_pair(outside + outside_lanes + own_channel(span.slab), through[0], through[1]);
        }
        sync_warp();
        const Staged staged = shared.staged_of(chunk);
        const Packet<8> whole = load_packet<8>(staged.decays + own_channel(span.slab));
        gradient.advance({bits_float(whole.x[0]), bits_float(whole.x[1])},
                         staged_own<write_pitch>(staged.writers, span.slab), shared.dy_of(chunk));
        if (span.begins_at(chunk)) {
            if (output.dinitial != nullptr) {
                add_to_matrix(output.dinitial + shared.places[4], span.slab, gradient);
            }
            gradient.clear();
        }
        // What is not loaded is forgotten, so that no register keeps it from the last use on.
        if (chunk % tile_chunks == 2 % tile_chunks && chunk > 0) {
            walk.start(chunk - 2);
        } else {
            walk.state.forget();
        }
        if (loads_ahead && chunk % 2 == 0 && chunk > 0) {
            walk.load(chunk - 2);
        } else {
            walk.forget_inputs();
        }
        sync_roles();
    }
    const Place place = find_place(span.problem, 0, static_cast<int32>(span.problem.num_spans));  // found again
    if (place.span == 0) {
        // Opaque, so that no register keeps the slab's offset from where the gradient was loaded.
        gradient.store(find_matrix(output.dstate, place.row), opaque(span.slab));
    }
}
