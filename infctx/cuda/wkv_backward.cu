// All gradients of WKV, for one head size and one input type: -DHEAD_SIZE=64, -DINPUT_FLOAT for fp32.
// README.md has the derivation; wkv_cuda.py the shapes and the order of the launches.

#include "wkv_gradients.cuh"
#include "wkv_products.cuh"
#include "wkv_reader.cuh"
#include "wkv_spans.cuh"

extern "C" __global__ void __launch_bounds__(span_threads)
wkv_sum_span_gradients(const Input* r, const Input* dy, const float* w, const uint8* starts, float* sums,
                       float* decays, int64 num_batches, int64 num_tokens, int64 num_heads,
                       int64 num_spans, int64 span_tokens, int64 w_batch, int64 w_token, int64 w_head) {
    const Problem problem = {num_batches, num_tokens, num_heads, num_spans, span_tokens};
    const SpanInput input = {r, dy, w, w_batch, w_token, w_head, starts, nullptr, 0};
    sum_span<true>(problem, input, sums, decays, 1, num_spans - 1);
}

extern "C" __global__ void __launch_bounds__(256)
wkv_join_span_gradients(const float* dfinal, const float* sums, const float* decays, float* gradients, int64 rows,
                        int64 spans, int64 row_ends, int64 end_step) {
    join_spans<true>(dfinal, sums, decays, gradients, rows, spans, row_ends, end_step);
}

// Warps have two roles: half of them own key channels, the other half value channels.
constexpr int32 backward_threads = 2 * span_threads;
constexpr int32 stored_states = tile_chunks / 2;
constexpr int32 state_floats = num_channels * num_channels;

struct Shared {
    Input *v, *dy;  // of the tile
    float* states;  // before every second chunk of the tile, in the lanes' layout
    float *staged, *levels, *bonuses, *scores, *dscores;
};

INFCTX_DEVICE Shared find_shared(unsigned char* start) {
    Shared shared;
    shared.v = reinterpret_cast<Input*>(start);
    shared.dy = shared.v + tile_chunks * chunk_values;
    shared.states = reinterpret_cast<float*>(shared.dy + tile_chunks * chunk_values);
    shared.staged = shared.states + stored_states * state_floats;
    shared.levels = shared.staged + 2 * staged_floats;
    shared.bonuses = shared.levels + level_floats;
    shared.scores = shared.bonuses + bonus_floats;
    shared.dscores = shared.scores + chunk_scores;
    return shared;
}

// Stores to and loads from places that no other lane reads.
INFCTX_DEVICE float* own_state(const Shared& shared, int32 which, int32 slab) {
    return shared.states + which * state_floats + (slab * 32 * num_columns + lane_index()) * 4;
}
INFCTX_DEVICE void put_state(float* to, const KeySlab& state) {
#pragma unroll
    for (int32 n = 0; n < num_columns; ++n) {
        const float* x = state.x[n].x;
        const Packet<16> packet = {{float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])}};
        store_packet<16>(to + n * 128, packet);
    }
}
INFCTX_DEVICE void take_state(KeySlab& state, const float* from) {
#pragma unroll
    for (int32 n = 0; n < num_columns; ++n) {
        const Packet<16> packet = load_packet<16>(from + n * 128);
#pragma unroll
        for (int32 i = 0; i < 4; ++i) state.x[n].x[i] = bits_float(packet.x[i]);
    }
}

INFCTX_DEVICE void add_to_matrix(float* matrix, int32 slab, const KeySlab& more) {
    KeySlab sum;
    sum.load(matrix, slab);
#pragma unroll
    for (int32 n = 0; n < num_columns; ++n) {
#pragma unroll
        for (int32 i = 0; i < 4; ++i) sum.x[n].x[i] += more.x[n].x[i];
    }
    sum.store(matrix, slab);
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

// Shared by both roles: their span.
struct Span {
    const Problem& problem;
    const BackwardInput& input;
    Place place;
    Shared shared;
    int32 num_chunks, slab;

    // Computed each time: keeping the address of the flags would need registers.
    INFCTX_DEVICE bool begins_at(int32 chunk) const { return find_starts(input.starts, problem, place).at(chunk); }

    INFCTX_DEVICE int32 last_tile() const { return (num_chunks - 1) / tile_chunks * tile_chunks; }
    INFCTX_DEVICE int32 chunks_from(int32 first) const {
        return num_chunks - first < tile_chunks ? num_chunks - first : tile_chunks;
    }
    INFCTX_DEVICE const float* entering() const {
        return find_matrix(input.gradients, place.row * problem.num_spans + place.span);
    }
    INFCTX_DEVICE const Input* v_of(int32 chunk) const { return shared.v + chunk * chunk_values; }
    INFCTX_DEVICE const Input* dy_of(int32 chunk) const { return shared.dy + chunk * chunk_values; }
};

// One row of bytes for each token of a tile, by all threads.
template <typename Element>
INFCTX_DEVICE void prefetch_rows(const Rows<const Element>& rows, int32 first_token) {
    constexpr int32 lines = (num_channels * sizeof(Element) + 127) / 128;
#pragma unroll
    for (int32 turn = 0; turn < (tile_tokens * lines + backward_threads - 1) / backward_threads; ++turn) {
        const int32 index = threadIdx.x + turn * backward_threads;
        if (tile_tokens * lines % backward_threads != 0 && index >= tile_tokens * lines) break;
        prefetch(rows.at(first_token + index / lines) + index % lines * (128 / sizeof(Element)));
    }
}

// Prefetches the next tile.
INFCTX_DEVICE void prefetch_tile(const Span& span, int32 first) {
    const Problem& problem = span.problem;
    const BackwardInput& input = span.input;
    const Place& place = span.place;
    const int32 token = place.token_at(first);
    prefetch_rows(find_rows(input.r, problem, place), token);
    prefetch_rows(find_rows(input.k, problem, place), token);
    prefetch_rows(find_rows(input.v, problem, place), token);
    prefetch_rows(find_rows(input.dy, problem, place), token);
    prefetch_rows(find_decay_rows(input.w, input.w_batch, input.w_token, input.w_head, place), token);
    const int64 tile = place.row * problem.num_tiles() + token / tile_tokens;
    const float* state = find_matrix(input.kept, tile);
    constexpr int32 lines = num_channels * 4 / 128 > 0 ? num_channels * 4 / 128 : 1;
    for (int32 index = threadIdx.x; index < num_channels * lines; index += backward_threads) {
        prefetch(state + index / lines * num_channels + index % lines * 32);
    }
}

// Both roles together wait until the previous tile is no longer in use, then load v and dy of this one.
INFCTX_DEVICE void fetch_tile(const Span& span, int32 first) {
    const auto v_rows = find_rows(span.input.v, span.problem, span.place);
    const auto dy_rows = find_rows(span.input.dy, span.problem, span.place);
    const int32 token = span.place.token_at(first), end = span.place.end_token;
    sync_roles();
    start_copy<tile_tokens, backward_threads>(span.shared.v, v_rows, token, end, threadIdx.x);
    start_copy<tile_tokens, backward_threads>(span.shared.dy, dy_rows, token, end, threadIdx.x);
    cp_async_commit();
    if (first > 0) prefetch_tile(span, first - tile_chunks);
    cp_async_wait<0>();
    sync_roles();
}

// Reads with the state's gradient, which is dv.
INFCTX_DEVICE void run_values(const Span& span, const BackwardOutput& output) {
    const Place& place = span.place;
    const auto dv_rows = find_rows(output.dv, span.problem, place);
    const Shared& shared = span.shared;
    Reader<true> reader;
    reader.load(span.entering(), span.slab);
    for (int32 first = span.last_tile(); first >= 0; first -= tile_chunks) {
        fetch_tile(span, first);
        const int32 chunks = span.chunks_from(first);
        for (int32 chunk = span.slab; chunk < chunks; chunk += num_slabs) {
            find_dscores(shared.dscores + chunk * chunk_scores, span.dy_of(chunk), span.v_of(chunk));
        }
        for (int32 chunk = chunks - 1; chunk >= 0; --chunk) {
            sync_roles();
            find_scores<true>(shared.scores, shared.levels, shared.bonuses, span.slab);
            sync_roles();
            SumFragment results[2];
            const Staged staged = find_staged(shared.staged + chunk % 2 * staged_floats);
            reader.advance(results, staged, shared.scores, span.dy_of(chunk), span.slab);
            store_tokens(dv_rows, span.slab, span.place.token_at(first + chunk), place.end_token, results);
            if (span.begins_at(first + chunk)) reader.clear();
        }
    }
}

// The state within a tile, recomputed from the state kept before the tile.
struct StateWalk {
    const Span& span;
    Rows<const Input> k_rows;  // and of r, dr, dk
    Rows<const float> w_rows;
    KeySlab state;

    INFCTX_DEVICE Own load_w(int32 token) const {
        return to_own(load_own(w_rows.start, own_places(w_rows, span.slab, token, span.place.end_token)));
    }

    INFCTX_DEVICE void start_tile(int32 first) {
        const int64 tile = span.place.row * span.problem.num_tiles() + span.place.token_at(first) / tile_tokens;
        state.load(find_matrix(span.input.kept, tile), span.slab);
    }

    INFCTX_DEVICE void begin_document(int32 chunk) {
        if (!span.begins_at(chunk)) return;
        state.clear();
        if (span.input.initial != nullptr) {
            const int64 index = span.place.batch * span.input.initial_batch + span.place.head;
            const float* initial = find_matrix(span.input.initial, index);
            state.load(initial, span.slab);
        }
    }

    INFCTX_DEVICE void pass(int32 first, int32 chunk) {
        const int32 token = span.place.token_at(first + chunk);
        const Own k = to_own(load_own(k_rows.start, own_places(k_rows, span.slab, token, span.place.end_token)));
        const Decays decays = find_decays(load_w(token));
        state.advance(decays.whole, until_end(k, decays), span.v_of(chunk));
    }
};

// One sum per chunk, added up later: a single sum over all of them would lose digits to rounding.
INFCTX_DEVICE void store_du(float* du, const Span& span, int32 chunk, const Gradients& d) {
    const Problem& problem = span.problem;
    const Place& place = span.place;
    float sums[2];
#pragma unroll
    for (int32 channel = 0; channel < 2; ++channel) {
        sums[channel] = d.u[channel] + shuffle_xor(d.u[channel], 1);
        sums[channel] += shuffle_xor(sums[channel], 2);
    }
    if (lane_place() != 0) return;
    const int64 index = static_cast<int64>(place.batch) * problem.num_chunks() + place.token_at(chunk) / chunk_tokens;
    float* to = du + (index * problem.num_heads + place.head) * num_channels;
    store_pair(to + own_channel(span.slab), sums[0], sums[1]);
}

// Stages chunks for the other role, recomputes the state within a tile, and finds the gradients of r, k, w and u.
INFCTX_DEVICE void run_keys(const Span& span, const BackwardOutput& output) {
    const Problem& problem = span.problem;
    const Place& place = span.place;
    const BackwardInput& input = span.input;
    const Shared& shared = span.shared;
    const int32 slab = span.slab;
    // dr, dk and dw have the same shape.
    const auto dr_rows = find_rows(output.dr, problem, place);
    const float* u_pair = input.u + place.head * num_channels + own_channel(slab);

    StateWalk walk = {span, find_rows(input.k, problem, place),
                      find_decay_rows(input.w, input.w_batch, input.w_token, input.w_head, place)};
    KeySlab gradient;
    gradient.load(span.entering(), slab);
    Gradients d;
    for (int32 first = span.last_tile(); first >= 0; first -= tile_chunks) {
        const int32 chunks = span.chunks_from(first), last_pair = (chunks - 1) / 2 * 2;
        walk.start_tile(first);
        fetch_tile(span, first);
#pragma unroll 1
        for (int32 chunk = 0; chunk <= last_pair; ++chunk) {
            walk.begin_document(first + chunk);
            if (chunk % 2 == 0) put_state(own_state(shared, chunk / 2, slab), walk.state);
            if (chunk < last_pair) walk.pass(first, chunk);
        }
#pragma unroll 1
        for (int32 chunk = chunks - 1; chunk >= 0; --chunk) {
            const int32 token = span.place.token_at(first + chunk), end = place.end_token;
            take_state(walk.state, own_state(shared, chunk / 2, slab));
            if (chunk % 2 == 1) {
                walk.pass(first, chunk - 1);
                walk.begin_document(first + chunk);
            }
            read_outside(d, walk.state, gradient, span.dy_of(chunk), span.v_of(chunk));
            Decays decays = find_decays(walk.load_w(token));
            const OwnPlaces places = own_places(walk.k_rows, slab, token, end);
            Own r = to_own(load_own(input.r, places)), k = to_own(load_own(input.k, places));
            const float u[2] = {opaque(u_pair[0]), opaque(u_pair[1])};  // a load instead of two registers
            const Staged staged = find_staged(shared.staged + chunk % 2 * staged_floats);
            stage_chunk(staged, shared.levels, shared.bonuses, slab, until_end(k, decays), since_start(r, decays), r, k,
                        decays, u);
            forget_products(r);  // recomputing them is cheaper than keeping them
            forget_products(k);
            forget_products(decays);
            sync_roles();
            scale_outside(d, r, k, decays);
            sync_roles();
            find_inner_gradients(d, shared.dscores + chunk * chunk_scores, r, k, decays, u);
            store_du(output.du, span, first + chunk, d);
            sync_warp();  // only so that the addresses are computed here and not kept from above
            const OwnPlaces results = own_places(dr_rows, slab, token, end);
            store_own(output.dr, results, d.r);
            store_own(output.dk, results, d.k);
            store_own(output.dw, results, d.w);
            const Packet<8> whole = load_packet<8>(staged.decays + own_channel(slab));
            gradient.advance({bits_float(whole.x[0]), bits_float(whole.x[1])},
                             staged_own<write_pitch>(staged.writers, slab), span.dy_of(chunk));
            if (span.begins_at(first + chunk)) {
                if (output.dinitial != nullptr) {
                    const int64 index = place.row * problem.num_spans + place.span;
                    add_to_matrix(find_matrix(output.dinitial, index), slab, gradient);
                }
                gradient.clear();
            }
        }
    }
    if (place.span == 0) {
        gradient.store(find_matrix(output.dstate, place.row), slab);
    }
}

extern "C" __global__ void __launch_bounds__(backward_threads)
wkv_backward(const Input* r, const Input* k, const Input* v, const float* w, const float* u, const Input* dy,
             const float* gradients, const uint8* starts, const float* initial, const float* kept, Input* dr, Input* dk,
             Input* dv, float* dw, float* du, float* dstate, float* dinitial, int64 num_batches, int64 num_tokens,
             int64 num_heads, int64 num_spans, int64 span_tokens, int64 w_batch, int64 w_token,
             int64 w_head, int64 initial_batch) {
    DYNAMIC_SHARED(shared_bytes);
    const Problem problem = {num_batches, num_tokens, num_heads, num_spans, span_tokens};
    const BackwardInput input = {r, k, v, dy, w, u, gradients, starts, initial, kept,
                                 w_batch, w_token, w_head, initial_batch};
    const BackwardOutput output = {dr, dk, dv, dw, du, dstate, dinitial};
    const Place place = find_place(problem, 0, num_spans);
    const Shared shared = find_shared(shared_bytes);
    const Span span = {problem, input, place, shared, place.num_chunks(), warp_index() % num_slabs};
    for (int32 i = threadIdx.x; i < chunk_scores; i += backward_threads) shared.scores[i] = 0.0f;
    if (warp_index() < num_slabs) {
        run_keys(span, output);
    } else {
        run_values(span, output);
    }
}
