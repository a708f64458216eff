// All gradients of RWKV-7, for one head size and one input type: -DHEAD_SIZE=64, -DINPUT_FLOAT for fp32.
// README.md has the derivation; wkv7_cuda.py the shapes and the order of the launches.

#if HEAD_SIZE == 64 || (HEAD_SIZE == 16 && defined(INPUT_FLOAT))
#define SIGNED_LANES  // see wkv_layout.cuh
#endif

#include "wkv7_gradients.cuh"
#include "wkv7_reader.cuh"
#include "wkv7_spans.cuh"

extern "C" __global__ void __launch_bounds__(span_threads, 1)
wkv7_sum_span_gradients(const Input* r, const float* w, const Input* a, const Input* b, const Input* dy,
                        const uint8* starts, float* sums, float* transitions, int64 num_batches, int64 num_tokens,
                        int64 num_heads, int64 num_spans, int64 span_tokens, int64 w_batch, int64 w_token,
                        int64 w_head) {
    const Problem problem = {num_batches, num_tokens, num_heads, num_spans, span_tokens};
    const Span7Input input = {r, a, b, dy, w, w_batch, w_token, w_head, starts, nullptr, 0};
    sum_span7<true>(problem, input, sums, transitions, 1, static_cast<int32>(num_spans) - 1);
}

extern "C" __global__ void __launch_bounds__(join_threads)
wkv7_join_span_gradients(const float* dfinal, const float* sums, const float* transitions, float* gradients,
                         int64 spans, int64 row_ends, int64 end_step) {
    join_spans7<true>(dfinal, sums, transitions, gradients, spans, row_ends, end_step);
}

constexpr int32 chunk_floats = chunk_tokens * float_pitch;

struct Shared7 {
    Input *v, *dy;  // of the tile
    float* u;       // inner values of the tile, (tile_tokens, float_pitch)
    StagedBoth staged;
    float *levels, *bonuses, *scores;
    // These lie where the levels are, which are no longer needed then: the gradient of the state after the chunk
    // (N, float_pitch), of its inner values, and of its scores.
    float *gradient, *du, *dscores;
    // This lies where the chunk is staged, when it has been read: the gradient of the state before it, in the lanes'
    // layout, so that the registers are free.
    float* parked;
    Place* place;  // of the block: loading it each time is cheaper than registers
};
constexpr int32 place_floats = 8;

INFCTX_DEVICE Shared7 find_shared7(unsigned char* start) {
    Shared7 shared;
    shared.v = reinterpret_cast<Input*>(start);
    shared.dy = shared.v + tile_chunks * chunk_values;
    shared.u = reinterpret_cast<float*>(shared.dy + tile_chunks * chunk_values);
    float* staged = shared.u + tile_chunks * chunk_floats;
    shared.staged = find_staged_both(staged);
    shared.levels = staged + staged_both_floats;
    shared.bonuses = shared.levels + both_levels_floats;
    shared.scores = shared.bonuses + both_bonus_floats;
    shared.gradient = shared.levels;
    shared.du = shared.gradient + num_channels * float_pitch;
    shared.dscores = shared.du + chunk_floats;
    shared.parked = staged;
    shared.place = reinterpret_cast<Place*>(shared.scores + all_scores_floats);
    static_assert(sizeof(Place) <= 4 * place_floats, "it fits");
    static_assert(num_channels * float_pitch + chunk_floats + all_scores_floats <= both_levels_floats, "they fit");
    static_assert(num_channels * num_channels <= staged_both_floats, "it fits");
    return shared;
}

struct Backward7Input {
    const Input *r, *k, *v, *a, *b, *dy;
    const float *w, *u;      // u: the inner values
    const float* gradients;  // of the state after each span
    const uint8* starts;
    const float* initial;
    const float* kept;  // the state before each tile
    int64 w_batch, w_token, w_head, initial_batch;
};

struct Backward7Output {
    Input *dr, *dk, *dv, *da, *db;
    float *dw, *dstate, *dinitial;
};

struct Span7 {
    const Problem& problem;
    const Backward7Input& input;
    Shared7 shared;

    INFCTX_DEVICE Place place() const { return *shared.place; }
    // Computed each time, as lane_group() is.
    INFCTX_DEVICE int32 slab() const { return opaque(static_cast<int32>(threadIdx.x)) / 32; }

    INFCTX_DEVICE bool begins_at(int32 chunk) const { return find_starts(input.starts, problem, place()).at(chunk); }
    INFCTX_DEVICE OwnPlaces places(int32 chunk) const {
        const Place here = place();
        return own_places(find_rows(input.r, problem, here), slab(), here.token_at(chunk), here.end_token);
    }
    INFCTX_DEVICE const Input* v_of(int32 chunk) const { return shared.v + chunk % tile_chunks * chunk_values; }
    INFCTX_DEVICE const Input* dy_of(int32 chunk) const { return shared.dy + chunk % tile_chunks * chunk_values; }
    INFCTX_DEVICE const float* u_of(int32 chunk) const { return shared.u + chunk % tile_chunks * chunk_floats; }
    INFCTX_DEVICE Own load(const Input* start, int32 chunk) const { return to_own(load_own(start, places(chunk))); }
    INFCTX_DEVICE Decays load_decays(int32 chunk) const {
        const Place here = place();
        const auto w_rows = find_decay_rows(input.w, input.w_batch, input.w_token, input.w_head, here);
        const OwnPlaces at = own_places(w_rows, slab(), here.token_at(chunk), here.end_token);
        return find_decays(to_own(load_own(input.w, at)));
    }
    INFCTX_DEVICE Vectors load_vectors(int32 chunk) const {
        const OwnPlaces at = places(chunk);
        return {to_own(load_own(input.r, at)), to_own(load_own(input.k, at)), to_own(load_own(input.a, at)),
                to_own(load_own(input.b, at))};
    }
};

// Loads v, dy and the inner values of a tile.  The one before is no longer in use: all of it is read before the last
// barrier of its first chunk.
INFCTX_DEVICE void fetch_tile7(const Span7& span, int32 first) {
    const Backward7Input& input = span.input;
    const int32 token = span.place().token_at(first), end = span.place().end_token;
    const int32 thread = opaque(static_cast<int32>(threadIdx.x));  // addresses are computed here and not kept
    start_copy<tile_tokens, span_threads>(span.shared.v, find_rows(input.v, span.problem, span.place()), token, end, thread);
    start_copy<tile_tokens, span_threads>(span.shared.dy, find_rows(input.dy, span.problem, span.place()), token, end,
                                          thread);
    start_copy<tile_tokens, span_threads>(span.shared.u, find_rows(input.u, span.problem, span.place()), token, end, thread);
    cp_async_commit();
    cp_async_wait<0>();
    sync_block();
}

// this = decays this + keys values + inner keys inner values, summed over the tokens of a chunk: see KeySlab::advance.
INFCTX_DEVICE void advance_both(KeySlab& state, const Decays& decays, const Own& keys, const Input* values,
                                const Own& inner_keys, const float* inner_values) {
    const Left<of_states> left[2] = {left_of<of_states>(keys, 0), left_of<of_states>(keys, 1)};
    const Left<of_states> inner_left[2] = {left_of<of_states>(inner_keys, 0), left_of<of_states>(inner_keys, 1)};
#pragma unroll
    for (int32 n = 0; n < num_columns; n += 2) {
        const InputBlock block = load_by_tokens(values, 8 * n), inner_block = load_by_tokens(inner_values, 8 * n);
#pragma unroll
        for (int32 half = 0; half < 2; ++half) {
            SumFragment sum = {};
#pragma unroll
            for (int32 group = 0; group < 2; ++group) {
                const float *two = block.x[group][half], *inner_two = inner_block.x[group][half];
                multiply(sum, left[group], make_right<of_inputs>(two[0], two[1]));
                multiply(sum, inner_left[group], make_right<full>(inner_two[0], inner_two[1]));
            }
            float* numbers = state.x[n + half].x;
#pragma unroll
            for (int32 i = 0; i < 4; ++i) numbers[i] = multiply_add(numbers[i], decays.whole[i / 2], sum.x[i]);
        }
    }
}

// The state before a chunk of the tile, recomputed from the one kept before the tile.
INFCTX_DEVICE void find_state(KeySlab& state, const Span7& span, int32 chunk) {
    const int32 first = chunk / tile_chunks * tile_chunks;
    const Problem& problem = span.problem;
    const Backward7Input& input = span.input;
    // A number of tokens is below 2^31.
    const int32 tiles = (opaque(static_cast<int32>(problem.num_tokens)) + tile_tokens - 1) / tile_tokens;
    const int64 tile = static_cast<int64>(span.place().row) * tiles + span.place().token_at(first) / tile_tokens;
    state.load(find_matrix(input.kept, tile), span.slab());
#pragma unroll 1
    for (int32 passed = first; passed <= chunk; ++passed) {
        if (span.begins_at(passed)) {
            state.clear();
            if (input.initial != nullptr) {
                const Place place = span.place();
                const int64 index = place.batch * input.initial_batch + place.head;
                state.load(find_matrix(input.initial, index), span.slab());
            }
        }
        if (passed == chunk) break;
        const Own k = span.load(input.k, passed), b = span.load(input.b, passed);
        const Decays decays = span.load_decays(passed);
        advance_both(state, decays, until_end(k, decays), span.v_of(passed), until_end(b, decays), span.u_of(passed));
    }
}

// Stores to and loads from places that no other lane reads.
INFCTX_DEVICE float* parking_place(const Shared7& shared, int32 slab) {
    return shared.parked + (slab * 32 * num_columns + opaque(lane_index())) * 4;
}
INFCTX_DEVICE void park(float* to, const ValueSlab& gradient) {
#pragma unroll
    for (int32 n = 0; n < num_columns; ++n) put_four(to + n * 128, gradient.state[n].x);
}
INFCTX_DEVICE void take_back(ValueSlab& gradient, const float* from) {
#pragma unroll
    for (int32 n = 0; n < num_columns; ++n) take_four(gradient.state[n].x, from + n * 128);
}

// The gradient of the state after the chunk, from lanes that own values to lanes that own keys.
INFCTX_DEVICE void share_gradient(float* matrix, int32 slab, const ValueSlab& gradient) {
    float* to = matrix + 2 * lane_place() * float_pitch + 16 * slab + lane_group();
#pragma unroll
    for (int32 n = 0; n < num_columns; ++n) {
#pragma unroll
        for (int32 i = 0; i < 4; ++i) to[(8 * n + i % 2) * float_pitch + i / 2 * 8] = gradient.state[n].x[i];
    }
}

INFCTX_DEVICE void share_du(float* rows, int32 slab, const SumFragment (&found)[2]) {
    float* to = rows + 2 * lane_place() * float_pitch + 16 * slab + lane_group();
#pragma unroll
    for (int32 group = 0; group < 2; ++group) {
#pragma unroll
        for (int32 i = 0; i < 4; ++i) to[(8 * group + i % 2) * float_pitch + i / 2 * 8] = found[group].x[i];
    }
}

// dv of the chunk, and the gradient of its inner values; then `gradient` is that of the state before it.
INFCTX_DEVICE void read_values_back(BothReader<true>& gradient, const Span7& span, const Backward7Output& output,
                                    int32 chunk) {
    const Shared7& shared = span.shared;
    stage_both<true, true>(shared.staged, shared.levels, shared.bonuses, span.slab(), span.load_vectors(chunk),
                           span.load_decays(chunk));
    sync_block();
    find_all_scores<true>(shared.scores, shared.levels, shared.bonuses, span.slab());
    sync_block();
    solve<true>(shared.staged, shared.scores);
    share_gradient(shared.gradient, span.slab(), gradient);
    sync_block();
    SumFragment found[2], results[2];
    gradient.read<true, true>(found, results, shared.staged, shared.scores, span.dy_of(chunk), span.slab());
    share_du(shared.du, span.slab(), found);
    store_tokens(find_rows(output.dv, span.problem, span.place()), span.slab(), span.place().token_at(chunk),
                 span.place().end_token, results);
    gradient.advance<true>(shared.staged);
    if (!span.begins_at(chunk)) return;
    if (output.dinitial != nullptr) {
        float* matrix = find_matrix(output.dinitial, span.place().row * span.problem.num_spans + span.place().span);
        ValueSlab sum;
        sum.load(matrix, span.slab());
#pragma unroll
        for (int32 n = 0; n < num_columns; ++n) {
#pragma unroll
            for (int32 i = 0; i < 4; ++i) sum.state[n].x[i] += gradient.state[n].x[i];
        }
        sum.store(matrix, span.slab());
    }
    gradient.clear();
}

// dr, dw, dk, da, db of the chunk.
INFCTX_DEVICE void find_key_gradients(BothReader<true>& gradient, const Span7& span, const Backward7Output& output, int32 chunk) {
    const Shared7& shared = span.shared;
    const Input *v = span.v_of(chunk), *dy = span.dy_of(chunk);
    const float* u = span.u_of(chunk);
    Gradients7 d;
    sync_block();
    park(parking_place(shared, span.slab()), gradient);
    {
        KeySlab state;
        find_state(state, span, chunk);
        find_all_dscores(shared.dscores, dy, shared.du, v, u, span.slab());
        read_outside7(d, state, shared.gradient, span.slab(), dy, shared.du, v, u);
    }
    sync_block();
    const Vectors x = span.load_vectors(chunk);
    const Decays decays = span.load_decays(chunk);
    scale_outside7(d, x, decays);
    sync_warp();
    find_inner_gradients7(d, shared.dscores, x, decays);
    sync_warp();  // only so that the addresses are computed here and not kept from above
    const OwnPlaces results = span.places(chunk);
    store_own(output.dr, results, d.r);
    store_own(output.dw, results, d.w);
    store_own(output.dk, results, d.k);
    store_own(output.da, results, d.a);
    store_own(output.db, results, d.b);
    take_back(gradient, parking_place(shared, span.slab()));
    sync_block();
}

// With one block at least, ptxas gives a lane more than 168 registers, which small heads need; at 64 channels it spills.
#if HEAD_SIZE < 64
#define BACKWARD_BOUNDS span_threads, 1
#else
#define BACKWARD_BOUNDS span_threads
#endif

extern "C" __global__ void __launch_bounds__(BACKWARD_BOUNDS)
wkv7_backward(const Input* r, const float* w, const Input* k, const Input* v, const Input* a, const Input* b,
              const float* inner_values, const Input* dy, const float* gradients, const uint8* starts,
              const float* initial, const float* kept, Input* dr, float* dw, Input* dk, Input* dv, Input* da, Input* db,
              float* dstate, float* dinitial, int64 num_batches, int64 num_tokens, int64 num_heads, int64 num_spans,
              int64 span_tokens, int64 w_batch, int64 w_token, int64 w_head, int64 initial_batch) {
    DYNAMIC_SHARED(shared_bytes);
    const Problem problem = {num_batches, num_tokens, num_heads, num_spans, span_tokens};
    const Backward7Input input = {r, k, v, a, b, dy, w, inner_values, gradients, starts, initial, kept,
                                  w_batch, w_token, w_head, initial_batch};
    const Backward7Output output = {dr, dk, dv, da, db, dw, dstate, dinitial};
    const Span7 span = {problem, input, find_shared7(shared_bytes)};
    if (threadIdx.x == 0) *span.shared.place = find_place(problem, 0, static_cast<int32>(num_spans));
    for (int32 i = threadIdx.x; i < all_scores_floats; i += span_threads) span.shared.scores[i] = 0.0f;
    sync_block();
    BothReader<true> gradient;
    gradient.load(find_matrix(gradients, span.place().row * num_spans + span.place().span), span.slab());
    const int32 last_chunk = span.place().num_chunks() - 1;
#pragma unroll 1
    for (int32 turn = last_chunk; turn >= 0; --turn) {
        const int32 chunk = opaque(turn);  // so that no register keeps what only grows with it
        if (chunk == last_chunk || chunk % tile_chunks == tile_chunks - 1) {
            fetch_tile7(span, chunk / tile_chunks * tile_chunks);
        }
        read_values_back(gradient, span, output, chunk);
        find_key_gradients(gradient, span, output, chunk);
    }
    if (span.place().span == 0) gradient.store(find_matrix(dstate, span.place().row), span.slab());
}
