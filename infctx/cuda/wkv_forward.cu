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

// Spans begin with `states`; with several spans, these are already in their places in `kept`.  A chunk passes through
// three steps in three turns of the loop: all warps stage it, scores are found, it is read.
extern "C" __global__ void __launch_bounds__(span_threads)
wkv_forward(const Input* r, const Input* k, const Input* v, const float* w, const float* u, const float* states,
            const uint8* starts, const float* initial, Input* y, float* final, float* kept, int64 num_batches,
            int64 num_tokens, int64 num_heads, int64 num_spans, int64 span_tokens, int64 w_batch, int64 w_token,
            int64 w_head, int64 initial_batch, int64 row_states, int64 state_step) {
    DYNAMIC_SHARED(shared);
    Input* values = reinterpret_cast<Input*>(shared);
    float* staged = reinterpret_cast<float*>(values + value_stages * chunk_values);
    float* levels = staged + staged_chunks * staged_floats;
    float* bonuses = levels + 2 * level_floats;
    float* scores = bonuses + 2 * bonus_floats;

    const Problem problem = {num_batches, num_tokens, num_heads, num_spans, span_tokens};
    const Place place = find_place(problem, 0, num_spans);
    const auto r_rows = find_rows(r, problem, place);
    const auto v_rows = find_rows(v, problem, place);
    const auto w_rows = find_decay_rows(w, w_batch, w_token, w_head, place);
    const auto y_rows = find_rows(y, problem, place);
    const Starts begins = find_starts(starts, problem, place);
    const float* initial_state = find_matrix(initial, place.batch * initial_batch + place.head);
    const int32 num_chunks = place.num_chunks();
    const int32 slab = warp_index();
    const float* u_pair = u + place.head * num_channels + own_channel(slab);
    const float bonus[2] = {u_pair[0], u_pair[1]};

    const auto copy_values = [&](int32 chunk) {
        if (chunk < num_chunks) {
            start_copy<chunk_tokens, span_threads>(values + chunk % value_stages * chunk_values, v_rows,
                                                   place.token_at(chunk), place.end_token, threadIdx.x);
        }
        cp_async_commit();
    };
    const auto staged_at = [&](int32 chunk) { return find_staged(staged + chunk % staged_chunks * staged_floats); };

    for (int32 i = threadIdx.x; i < 2 * chunk_scores; i += span_threads) scores[i] = 0.0f;
    Reader<false> reader;
    const int64 state_index = place.row * row_states + place.span * state_step;
    reader.load(find_matrix(states, state_index), slab);
    Loaded<Input> loaded_r, loaded_k;
    Loaded<float> loaded_w;
    const auto load = [&](int32 chunk) {
        const OwnPlaces places = own_places(r_rows, slab, place.token_at(chunk), place.end_token);
        loaded_r = load_own(r, places);
        loaded_k = load_own(k, places);
        loaded_w = load_own(w, own_places(w_rows, slab, place.token_at(chunk), place.end_token));
    };
    load(0);
    copy_values(0);
    sync_block();
    for (int32 chunk = -2; chunk < num_chunks; ++chunk) {
        copy_values(chunk + 3);
        if (chunk >= 0) {
            if (begins.at(chunk)) {
                if (initial_state != nullptr) reader.load(initial_state, slab); else reader.clear();
            }
            if (kept != nullptr && chunk % tile_chunks == 0 && (chunk > 0 || num_spans == 1)) {
                const int64 tile = place.row * problem.num_tiles() + place.token_at(chunk) / tile_tokens;
                reader.store(find_matrix(kept, tile), slab);
            }
            SumFragment results[2];
            reader.advance(results, staged_at(chunk), scores + chunk % 2 * chunk_scores,
                           values + chunk % value_stages * chunk_values, slab);
            store_tokens(y_rows, slab, place.token_at(chunk), place.end_token, results);
        }
        if (chunk + 1 >= 0 && chunk + 1 < num_chunks) {
            find_scores<false>(scores + (chunk + 1) % 2 * chunk_scores, levels + (chunk + 1) % 2 * level_floats,
                               bonuses + (chunk + 1) % 2 * bonus_floats, slab);
        }
        if (chunk + 2 < num_chunks) {
            const Own r_own = to_own(loaded_r), k_own = to_own(loaded_k);
            const Decays decays = find_decays(to_own(loaded_w));
            if (chunk + 3 < num_chunks) load(chunk + 3);
            stage_chunk(staged_at(chunk + 2), levels + (chunk + 2) % 2 * level_floats,
                        bonuses + (chunk + 2) % 2 * bonus_floats,
                        slab, since_start(r_own, decays), until_end(k_own, decays), r_own, k_own, decays, bonus);
        }
        cp_async_wait<2>();
        sync_block();
    }
    cp_async_wait<0>();
    if (place.span == num_spans - 1) {
        reader.store(find_matrix(final, place.row), slab);
    }
}
