// y and the states of RWKV-7, for one head size and one input type: -DHEAD_SIZE=64, -DINPUT_FLOAT for fp32.
// README.md has the derivation; wkv7_cuda.py the shapes and the order of the launches.

#if HEAD_SIZE == 64 || (HEAD_SIZE == 16 && defined(INPUT_FLOAT))
#define SIGNED_LANES  // see wkv_layout.cuh
#endif

#include "wkv7_reader.cuh"
#include "wkv7_spans.cuh"

extern "C" __global__ void __launch_bounds__(span_threads, 1)
wkv7_sum_spans(const float* w, const Input* k, const Input* v, const Input* a, const Input* b, const uint8* starts,
               const float* initial, float* sums, float* transitions, int64 num_batches, int64 num_tokens,
               int64 num_heads, int64 num_spans, int64 span_tokens, int64 w_batch, int64 w_token, int64 w_head,
               int64 initial_batch) {
    const Problem problem = {num_batches, num_tokens, num_heads, num_spans, span_tokens};
    const Span7Input input = {k, a, b, v, w, w_batch, w_token, w_head, starts, initial, initial_batch};
    sum_span7<false>(problem, input, sums, transitions, 0, static_cast<int32>(num_spans) - 1);
}

extern "C" __global__ void __launch_bounds__(join_threads)
wkv7_join_spans(const float* state, const float* sums, const float* transitions, float* states, int64 spans,
                int64 row_ends, int64 end_step) {
    join_spans7<false>(state, sums, transitions, states, spans, row_ends, end_step);
}

constexpr int32 forward_stages = 2;  // chunks of values in flight or in use

// Spans begin with `states`; with several spans, these are already in their places in `kept`.
// Three blocks have room on a processor; without this number ptxas takes registers for two.
extern "C" __global__ void __launch_bounds__(span_threads, 3)
wkv7_forward(const Input* r, const float* w, const Input* k, const Input* v, const Input* a, const Input* b,
             const float* states, const uint8* starts, const float* initial, Input* y, float* final, float* kept,
             float* inner_values, int64 num_batches, int64 num_tokens, int64 num_heads, int64 num_spans,
             int64 span_tokens, int64 w_batch, int64 w_token, int64 w_head, int64 initial_batch, int64 row_states,
             int64 state_step) {
    DYNAMIC_SHARED(shared);
    Input* stages = reinterpret_cast<Input*>(shared);
    float* all_staged = reinterpret_cast<float*>(stages + forward_stages * chunk_values);
    float* levels = all_staged + staged_both_floats;
    float* bonuses = levels + both_levels_floats;
    float* scores = bonuses + both_bonus_floats;
    const StagedBoth staged = find_staged_both(all_staged);

    const Problem problem = {num_batches, num_tokens, num_heads, num_spans, span_tokens};
    const Place place = find_place(problem, 0, static_cast<int32>(num_spans));
    const auto rows = find_rows(r, problem, place);  // and of all tensors of its shape
    const auto v_rows = find_rows(v, problem, place);
    const auto w_rows = find_decay_rows(w, w_batch, w_token, w_head, place);
    const auto y_rows = find_rows(y, problem, place);
    const auto inner_rows = find_rows(inner_values, problem, place);
    const Starts begins = find_starts(starts, problem, place);
    const float* initial_state = find_matrix(initial, place.batch * initial_batch + place.head);
    const int32 num_chunks = place.num_chunks();
    const int32 slab = warp_index();
    const auto copy_values = [&](int32 chunk) {
        if (chunk < num_chunks) {
            start_copy<chunk_tokens, span_threads>(stages + chunk % forward_stages * chunk_values, v_rows,
                                                   place.token_at(chunk), place.end_token, threadIdx.x);
        }
        cp_async_commit();
    };

    for (int32 i = threadIdx.x; i < all_scores_floats; i += span_threads) scores[i] = 0.0f;
    BothReader<false> reader;
    reader.load(find_matrix(states, place.row * row_states + place.span * state_step), slab);
    Loaded<Input> loaded_r, loaded_k, loaded_a, loaded_b;
    Loaded<float> loaded_w;
    const auto load = [&](int32 chunk) {
        const OwnPlaces places = own_places(rows, slab, place.token_at(chunk), place.end_token);
        loaded_r = load_own(r, places);
        loaded_k = load_own(k, places);
        loaded_a = load_own(a, places);
        loaded_b = load_own(b, places);
        loaded_w = load_own(w, own_places(w_rows, slab, place.token_at(chunk), place.end_token));
    };
    load(0);
    copy_values(0);
#pragma unroll 1
    for (int32 chunk = 0; chunk < num_chunks; ++chunk) {
        copy_values(chunk + 1);
        {
            const Vectors x = {to_own(loaded_r), to_own(loaded_k), to_own(loaded_a), to_own(loaded_b)};
            const Decays decays = find_decays(to_own(loaded_w));
            stage_both<false, true>(staged, levels, bonuses, slab, x, decays);
        }
        if (chunk + 1 < num_chunks) load(chunk + 1);
        sync_block();
        find_all_scores<false>(scores, levels, bonuses, slab);
        sync_block();
        solve<false>(staged, scores);
        cp_async_wait<1>();
        sync_block();
        if (begins.at(chunk)) {
            if (initial_state != nullptr) reader.load(initial_state, slab); else reader.clear();
        }
        if (kept != nullptr && chunk % tile_chunks == 0 && (chunk > 0 || num_spans == 1)) {
            const int64 tile = place.row * problem.num_tiles() + place.token_at(chunk) / tile_tokens;
            reader.store(find_matrix(kept, tile), slab);
        }
        SumFragment found[2], results[2];
        reader.read<true, true>(found, results, staged, scores, stages + chunk % forward_stages * chunk_values, slab);
        store_tokens(y_rows, slab, place.token_at(chunk), place.end_token, results);
        if (inner_values != nullptr) store_tokens(inner_rows, slab, place.token_at(chunk), place.end_token, found);
        reader.advance<true>(staged);
        sync_block();
    }
    cp_async_wait<0>();
    if (place.span == num_spans - 1) reader.store(find_matrix(final, place.row), slab);
}
