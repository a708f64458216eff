// y and the states of WKV, for one head size and one input type: -DHEAD_SIZE=64, -DINPUT_FLOAT for fp32.
// README.md has the derivation; wkv_cuda.py the shapes and the order of the launches.

#include "wkv_products.cuh"
#include "wkv_reader.cuh"
#include "wkv_spans.cuh"

extern "C" __global__ void __launch_bounds__(span_threads)
wkv_sum_spans(const Input* k, const Input* v, const float* w, const uint8* starts, const float* initial, float* sums,
              float* decays, int64 num_batches, int64 num_tokens, int64 num_heads, int64 num_spans,
              int64 span_tokens, int64 w_batch, int64 w_token, int64 w_head, int64 initial_batch) {
    const Problem problem = {num_batches, num_tokens, num_heads, num_spans, span_tokens};
    const SpanInput input = {k, v, w, w_batch, w_token, w_head, starts, initial, initial_batch};
    sum_span<false>(problem, input, sums, decays, 0, num_spans - 1);
}

extern "C" __global__ void __launch_bounds__(256)
wkv_join_spans(const float* state, const float* sums, const float* decays, float* states, int64 rows, int64 spans,
               int64 row_ends, int64 end_step) {
    join_spans<false>(state, sums, decays, states, rows, spans, row_ends, end_step);
}

constexpr int32 value_stages = 4;
constexpr int32 staged_chunks = 3;
// Warps have two roles: half of them stage chunks, the other half read them.
constexpr int32 forward_threads = 2 * span_threads;

struct ForwardInput {
    const Input *r, *k, *v;
    const float *w, *u;
    const float* states;  // before each span
    const uint8* starts;
    const float* initial;
    int64 w_batch, w_token, w_head, initial_batch, row_states, state_step;
};

struct ForwardOutput {
    Input* y;
    float *final, *kept;
};

// Shared by both roles: their span, and a chunk's place in shared memory at each step.
struct Walk {
    const Problem& problem;
    const ForwardInput& input;
    Place place;
    int32 num_chunks, slab;
    unsigned char* shared;

    INFCTX_DEVICE Input* values_of(int32 chunk) const {
        return reinterpret_cast<Input*>(shared) + chunk % value_stages * chunk_values;
    }
    INFCTX_DEVICE float* staged_start() const {
        return reinterpret_cast<float*>(reinterpret_cast<Input*>(shared) + value_stages * chunk_values);
    }
    INFCTX_DEVICE Staged staged_of(int32 chunk) const {
        return find_staged(staged_start() + chunk % staged_chunks * staged_floats);
    }
    INFCTX_DEVICE float* levels_of(int32 chunk) const {
        return staged_start() + staged_chunks * staged_floats + chunk % 2 * level_floats;
    }
    INFCTX_DEVICE float* bonuses_of(int32 chunk) const {
        return staged_start() + staged_chunks * staged_floats + 2 * level_floats + chunk % 2 * bonus_floats;
    }
    INFCTX_DEVICE float* scores_start() const {
        return staged_start() + staged_chunks * staged_floats + 2 * level_floats + 2 * bonus_floats;
    }
    INFCTX_DEVICE float* scores_of(int32 chunk) const { return scores_start() + chunk % 2 * chunk_scores; }
};

// In turn `chunk`, stages the chunk after the next one, by slabs of keys, and copies the values of the one after that.
INFCTX_DEVICE void run_stagers(const Walk& walk) {
    const Place& place = walk.place;
    const ForwardInput& input = walk.input;
    const int32 num_chunks = walk.num_chunks, slab = walk.slab;
    const auto r_rows = find_rows(input.r, walk.problem, place);
    const auto v_rows = find_rows(input.v, walk.problem, place);
    const auto w_rows = find_decay_rows(input.w, input.w_batch, input.w_token, input.w_head, place);
    const float* u_pair = input.u + place.head * num_channels + own_channel(slab);
    const float bonus[2] = {u_pair[0], u_pair[1]};
    const auto copy_values = [&](int32 chunk) {
        if (chunk < num_chunks) {
            start_copy<chunk_tokens, span_threads>(walk.values_of(chunk), v_rows, place.token_at(chunk),
                                                   place.end_token, threadIdx.x);
        }
        cp_async_commit();
    };
    Loaded<Input> loaded_r, loaded_k;
    Loaded<float> loaded_w;
    const auto load = [&](int32 chunk) {
        const OwnPlaces places = own_places(r_rows, slab, place.token_at(chunk), place.end_token);
        loaded_r = load_own(input.r, places);
        loaded_k = load_own(input.k, places);
        loaded_w = load_own(input.w, own_places(w_rows, slab, place.token_at(chunk), place.end_token));
    };
    load(0);
    copy_values(0);
    for (int32 chunk = -2; chunk < num_chunks; ++chunk) {
        copy_values(chunk + 3);
        if (chunk + 2 < num_chunks) {
            const Own r_own = to_own(loaded_r), k_own = to_own(loaded_k);
            const Decays decays = find_decays(to_own(loaded_w));
            if (chunk + 3 < num_chunks) load(chunk + 3);
            stage_chunk(walk.staged_of(chunk + 2), walk.levels_of(chunk + 2), walk.bonuses_of(chunk + 2), slab,
                        since_start(r_own, decays), until_end(k_own, decays), r_own, k_own, decays, bonus);
        }
        if (chunk + 1 >= 0 && chunk + 1 < walk.num_chunks) {
            find_scores<false>(walk.scores_of(chunk + 1), walk.levels_of(chunk + 1), walk.bonuses_of(chunk + 1),
                               walk.slab);
        }
        cp_async_wait<2>();
        sync_roles();
    }
    cp_async_wait<0>();
}

// In turn `chunk`, reads the chunk by slabs of values, then finds the scores of the next one.
INFCTX_DEVICE void run_readers(const Walk& walk, const ForwardOutput& output) {
    const Place& place = walk.place;
    const ForwardInput& input = walk.input;
    const Problem& problem = walk.problem;
    const auto y_rows = find_rows(output.y, problem, place);
    const Starts begins = find_starts(input.starts, problem, place);
    const float* initial_state = find_matrix(input.initial, place.batch * input.initial_batch + place.head);
    Reader<false> reader;
    const int64 state_index = place.row * input.row_states + place.span * input.state_step;
    reader.load(find_matrix(input.states, state_index), walk.slab);
    for (int32 chunk = -2; chunk < walk.num_chunks; ++chunk) {
        if (chunk >= 0) {
            if (begins.at(chunk)) {
                if (initial_state != nullptr) reader.load(initial_state, walk.slab); else reader.clear();
            }
            if (output.kept != nullptr && chunk % tile_chunks == 0 && (chunk > 0 || problem.num_spans == 1)) {
                const int64 tile = place.row * problem.num_tiles() + place.token_at(chunk) / tile_tokens;
                reader.store(find_matrix(output.kept, tile), walk.slab);
            }
            SumFragment results[2];
            reader.advance(results, walk.staged_of(chunk), walk.scores_of(chunk), walk.values_of(chunk), walk.slab);
            store_tokens(y_rows, walk.slab, place.token_at(chunk), place.end_token, results);
        }
        sync_roles();
    }
    if (place.span == problem.num_spans - 1) {
        reader.store(find_matrix(output.final, place.row), walk.slab);
    }
}

// Spans begin with `states`; with several spans, these are already in their places in `kept`.  A chunk passes through
// three steps in three turns: it is staged, its scores are found, it is read.
extern "C" __global__ void __launch_bounds__(forward_threads, 2)
wkv_forward(const Input* r, const Input* k, const Input* v, const float* w, const float* u, const float* states,
            const uint8* starts, const float* initial, Input* y, float* final, float* kept, int64 num_batches,
            int64 num_tokens, int64 num_heads, int64 num_spans, int64 span_tokens, int64 w_batch, int64 w_token,
            int64 w_head, int64 initial_batch, int64 row_states, int64 state_step) {
    DYNAMIC_SHARED(shared);
    const Problem problem = {num_batches, num_tokens, num_heads, num_spans, span_tokens};
    const ForwardInput input = {r, k, v, w, u, states, starts, initial,
                                w_batch, w_token, w_head, initial_batch, row_states, state_step};
    const Place place = find_place(problem, 0, num_spans);
    const Walk walk = {problem, input, place, place.num_chunks(), warp_index() % num_slabs, shared};
    for (int32 i = threadIdx.x; i < 2 * chunk_scores; i += forward_threads) walk.scores_start()[i] = 0.0f;
    sync_block();
    if (warp_index() < num_slabs) {
        run_stagers(walk);
    } else {
        run_readers(walk, {y, final, kept});
    }
}
