// RWKV-7's spans side by side: what each makes of the state before it, then one pass over all of them.
//
// A span turns the state M before it into  T M + Q  with a whole matrix T, the transition.  So it is walked twice at a
// time: from zeros with its values, which gives Q, and from the identity without values, which gives T.  Backward, the
// gradient of the state after a span becomes that of the state before it in the same way.

#pragma once

#include "wkv7_reader.cuh"
#include "wkv_spans.cuh"

constexpr int32 sum_stages = 2;  // chunks of values in flight or in use

struct Span7Input {
    const Input *outer_writers, *a, *b, *values;  // the outer writers are k, backward r
    const float* w;
    int64 w_batch, w_token, w_head;
    const uint8* starts;
    const float* initial;
    int64 initial_batch;
};

// The rows of a matrix are the slab's values here: 16 rows, keys side by side.
INFCTX_DEVICE void store_by_values(float* matrix, int32 slab, const ValueSlab& slab_of) {
    matrix += (16 * slab + lane_group()) * num_channels + 2 * lane_place();
#pragma unroll
    for (int32 n = 0; n < num_columns; ++n) {
        store_pair(matrix + 8 * n, slab_of.state[n].x[0], slab_of.state[n].x[1]);
        store_pair(matrix + 8 * num_channels + 8 * n, slab_of.state[n].x[2], slab_of.state[n].x[3]);
    }
}

INFCTX_DEVICE void make_identity(ValueSlab& slab_of, int32 slab) {
#pragma unroll
    for (int32 n = 0; n < num_columns; ++n) {
#pragma unroll
        for (int32 i = 0; i < 4; ++i) {
            const int32 key = 8 * n + 2 * lane_place() + i % 2, value = 16 * slab + lane_group() + i / 2 * 8;
            slab_of.state[n].x[i] = key == value ? 1.0f : 0.0f;
        }
    }
}

// sums (B, H, spans, N, N) and transitions (B, H, spans, N, N), transposed, of `spans` spans starting at `first_span`.
template <bool backward>
INFCTX_DEVICE void sum_span7(const Problem& problem, const Span7Input& input, float* sums, float* transitions,
                             int32 first_span, int32 spans) {
    DYNAMIC_SHARED(shared);
    Input* stages = reinterpret_cast<Input*>(shared);
    float* staged_floats_of = reinterpret_cast<float*>(stages + sum_stages * chunk_values);
    float* levels = staged_floats_of + staged_both_floats;
    float* bonuses = levels + both_levels_floats;
    float* scores = bonuses + both_bonus_floats;
    const StagedBoth staged = find_staged_both(staged_floats_of);

    Place place = find_place(problem, first_span, spans);
    place.end_token = opaque(place.end_token);  // a register, rather than where it comes from
    const auto rows = find_rows(input.a, problem, place);  // and of all tensors of its shape
    const auto value_rows = find_rows(input.values, problem, place);
    const auto w_rows = find_decay_rows(input.w, input.w_batch, input.w_token, input.w_head, place);
    const Starts starts = find_starts(input.starts, problem, place);
    const float* initial = find_matrix(input.initial, place.batch * input.initial_batch + place.head);
    const int32 num_chunks = place.num_chunks();
    const int32 slab = warp_index();
    const auto token_at = [&](int32 step) { return place.token_at(chunk_at<backward>(step, num_chunks)); };
    const auto copy_values = [&](int32 step) {
        if (step < num_chunks) {
            start_copy<chunk_tokens, span_threads>(stages + step % sum_stages * chunk_values, value_rows,
                                                   token_at(step), place.end_token,
                                                   opaque(static_cast<int32>(threadIdx.x)));
        }
        cp_async_commit();
    };

    for (int32 i = threadIdx.x; i < all_scores_floats; i += span_threads) scores[i] = 0.0f;
    BothReader<backward> sum, transition;
    sum.clear();
    make_identity(transition, slab);
    Loaded<Input> loaded_writers, loaded_a, loaded_b;
    Loaded<float> loaded_w;
    const auto load = [&](int32 step) {
        const OwnPlaces places = own_places(rows, slab, token_at(step), place.end_token);
        loaded_writers = load_own(input.outer_writers, places);
        loaded_a = load_own(input.a, places);
        loaded_b = load_own(input.b, places);
        loaded_w = load_own(w_rows.start, own_places(w_rows, slab, token_at(step), place.end_token));
    };
    load(0);
    copy_values(0);
#pragma unroll 1
    for (int32 step = 0; step < num_chunks; ++step) {
        copy_values(step + 1);
        const bool begins = starts.at(chunk_at<backward>(step, num_chunks));
        {
            const Own writers = to_own(loaded_writers), none = {};
            const Vectors x = {backward ? writers : none, backward ? none : writers, to_own(loaded_a), to_own(loaded_b)};
            const Decays decays = find_decays(to_own(loaded_w));
            stage_both<backward, false>(staged, levels, bonuses, slab, x, decays);
        }
        if (step + 1 < num_chunks) load(step + 1);
        sync_block();
        find_all_scores<backward>(scores, levels, bonuses, slab);
        sync_block();
        solve<backward>(staged, scores);
        cp_async_wait<1>();
        sync_block();
        if (begins && !backward) {
            if (initial != nullptr) sum.load(initial, slab); else sum.clear();
            transition.clear();
        }
        SumFragment found[2], unread[2];
        const Input* values = stages + step % sum_stages * chunk_values;
        sum.template read<true, false>(found, unread, staged, scores, values, slab);
        sum.template advance<true>(staged);
        transition.template read<false, false>(found, unread, staged, scores, values, slab);
        transition.template advance<false>(staged);
        if (begins && backward) sum.clear(), transition.clear();
        sync_block();
    }
    cp_async_wait<0>();
    const int64 index = static_cast<int64>(place.row) * spans + place.span - first_span;
    sum.store(find_matrix(sums, index), slab);
    store_by_values(find_matrix(transitions, index), slab, transition);
}

constexpr int32 join_columns = 16;  // of values, by a block; a thread has a key and four of them
constexpr int32 join_threads = num_channels * join_columns / 4;

INFCTX_DEVICE void put_four(float* to, const float (&x)[4]) {
    store_packet<16>(to, Packet<16>{{float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])}});
}
INFCTX_DEVICE void take_four(float (&x)[4], const float* from) {
    const Packet<16> packet = load_packet<16>(from);
#pragma unroll
    for (int32 i = 0; i < 4; ++i) x[i] = bits_float(packet.x[i]);
}

// ends[s + 1] = transitions[s] ends[s] + sums[s], from ends[0] = outside, or backward from the other end.  outside:
// (B, H, N, N); a head's spans + 1 ends are every `end_step`-th of its `row_ends` matrices.
template <bool backward>
INFCTX_DEVICE void join_spans7(const float* outside, const float* sums, const float* transitions, float* ends,
                               int64 spans, int64 row_ends, int64 end_step) {
    DYNAMIC_SHARED(shared);
    float* matrix = reinterpret_cast<float*>(shared);  // (2, N, join_columns): the state, by turns
    constexpr int32 size = num_channels * join_columns;
    const int32 thread = static_cast<int32>(threadIdx.x), key = thread % num_channels, four = thread / num_channels;
    const int64 row = static_cast<int64>(blockIdx.x) / num_slabs;
    const int32 column = static_cast<int32>(blockIdx.x % num_slabs) * join_columns + 4 * four;
    const int64 element = static_cast<int64>(key) * num_channels + column;
    float state[4];
    take_four(state, find_matrix(outside, row) + element);
    for (int64 step = 0; step < spans; ++step) {
        const int64 span = backward ? spans - 1 - step : step;
        put_four(find_matrix(ends, row * row_ends + (backward ? span + 1 : span) * end_step) + element, state);
        float* before = matrix + step % 2 * size;
        put_four(before + key * join_columns + 4 * four, state);
        const float* transition = find_matrix(transitions, row * spans + span) + key;
        sync_block();
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 16
        for (int32 other = 0; other < num_channels; ++other) {
            const float weight = transition[other * num_channels];
            float of_other[4];
            take_four(of_other, before + other * join_columns + 4 * four);
#pragma unroll
            for (int32 i = 0; i < 4; ++i) sum[i] = multiply_add(weight, of_other[i], sum[i]);
        }
        take_four(state, find_matrix(sums, row * spans + span) + element);
#pragma unroll
        for (int32 i = 0; i < 4; ++i) state[i] += sum[i];
    }
    put_four(find_matrix(ends, row * row_ends + (backward ? 0 : spans) * end_step) + element, state);
}
