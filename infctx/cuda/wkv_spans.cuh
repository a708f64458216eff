// Spans side by side: the sum that each leaves, then one pass over all of them for the state that each begins with.
//
// Forward, a span turns the state S before it into  decays * S + sum, key by key; backward, it turns the gradient G of
// the state after it into  decays * G + sum  in the same way.  One kernel does both: k and v walking forward, r and dy
// walking back.

#pragma once

#include "wkv_products.cuh"

constexpr int32 span_stages = 4;  // chunks of values in flight or in use
constexpr int32 span_threads = 32 * num_slabs;

struct SpanInput {
    const Input *keys, *values;
    const float* w;
    int64 w_batch, w_token, w_head;
    const uint8* starts;
    const float* initial;
    int64 initial_batch;
};

// The chunk that step `step` works on.
template <bool backward>
INFCTX_DEVICE int32 chunk_at(int32 step, int32 num_chunks) {
    return backward ? num_chunks - 1 - step : step;
}

INFCTX_DEVICE Rows<const float> find_decay_rows(const float* w, int64 batch_stride, int64 token_stride,
                                                int64 head_stride, const Place& place) {
    return {w, place.batch * batch_stride + place.head * head_stride, token_stride};
}

// sums (B, H, spans, N, N) and decays (B, H, spans, N) of `spans` spans starting at `first_span`, walking from zeros.
template <bool backward>
INFCTX_DEVICE void sum_span(const Problem& problem, const SpanInput& input, float* sums, float* decays,
                            int32 first_span, int32 spans) {
    DYNAMIC_SHARED(shared);
    Input* stages = reinterpret_cast<Input*>(shared);
    const Place place = find_place(problem, first_span, spans);
    const auto key_rows = find_rows(input.keys, problem, place);
    const auto value_rows = find_rows(input.values, problem, place);
    const auto w_rows = find_decay_rows(input.w, input.w_batch, input.w_token, input.w_head, place);
    const Starts starts = find_starts(input.starts, problem, place);
    const float* initial =
        find_matrix(input.initial, place.batch * input.initial_batch + place.head);
    const int32 num_chunks = place.num_chunks();
    const int32 slab = warp_index();

    const auto copy_values = [&](int32 step) {
        if (step < num_chunks) {
            start_copy<chunk_tokens, span_threads>(
                stages + step % span_stages * chunk_values, value_rows,
                place.token_at(chunk_at<backward>(step, num_chunks)), place.end_token, threadIdx.x);
        }
        cp_async_commit();
    };
    const auto token_at = [&](int32 step) {
        return place.token_at(chunk_at<backward>(step, num_chunks));
    };

    KeySlab state;
    state.clear();
    float log2_decay[2] = {0.0f, 0.0f};
    bool cut = false;
    for (int32 step = 0; step < span_stages - 1; ++step) copy_values(step);
    const auto load = [&](int32 step, Loaded<Input>& loaded_keys, Loaded<float>& loaded_w) {
        loaded_keys = load_own(key_rows.start, own_places(key_rows, slab, token_at(step), place.end_token));
        loaded_w = load_own(w_rows.start, own_places(w_rows, slab, token_at(step), place.end_token));
    };
    Loaded<Input> loaded_keys;
    Loaded<float> loaded_w;
    load(0, loaded_keys, loaded_w);
    for (int32 step = 0; step < num_chunks; ++step) {
        const Own keys = to_own(loaded_keys);
        const Decays chunk = find_decays(to_own(loaded_w));
        if (step + 1 < num_chunks) load(step + 1, loaded_keys, loaded_w);
        const bool begins = starts.at(chunk_at<backward>(step, num_chunks));
        if (begins && !backward) {
            if (initial != nullptr) state.load(initial, slab); else state.clear();
        }
        cp_async_wait<span_stages - 2>();
        sync_block();
        copy_values(step + span_stages - 1);
        state.advance(chunk.whole, backward ? since_start(keys, chunk) : until_end(keys, chunk),
                      stages + step % span_stages * chunk_values);
        if (begins && backward) {
            sync_warp();  // only so that this is a branch, and not a choice for each number
            state.clear();
        }
        cut = cut || begins;
        log2_decay[0] += chunk.log2_whole[0], log2_decay[1] += chunk.log2_whole[1];
    }
    cp_async_wait<0>();
    const int64 index = static_cast<int64>(place.row) * spans + place.span - first_span;
    state.store(find_matrix(sums, index), slab);
    if (lane_place() == 0) {
        float* to = decays + index * num_channels + own_channel(slab);
        to[0] = cut ? 0.0f : exp2_approximate(log2_decay[0]);
        to[1] = cut ? 0.0f : exp2_approximate(log2_decay[1]);
    }
}

// One thread per element of a head's (N, N): ends[s + 1] = decays[s] * ends[s] + sums[s], from ends[0] = outside, or
// backward from the other end.  outside: (B, H, N, N); a head's spans + 1 ends are every `end_step`-th of its
// `row_ends` matrices.
template <bool backward>
INFCTX_DEVICE void join_spans(const float* outside, const float* sums, const float* decays, float* ends,
                              int64 rows, int64 spans, int64 row_ends, int64 end_step) {
    const int64 size = num_channels * num_channels;
    const int64 index = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= rows * size) return;
    const int64 row = index / size, element = index % size;
    float value = outside[index];
    ends += row * row_ends * size + element;
    sums += row * spans * size + element;
    decays += row * spans * num_channels + element / num_channels;
    for (int64 step = 0; step < spans; ++step) {
        const int64 span = backward ? spans - 1 - step : step;
        ends[(backward ? span + 1 : span) * end_step * size] = value;
        value = multiply_add(decays[span * num_channels], value, sums[span * size]);
    }
    ends[(backward ? 0 : spans) * end_step * size] = value;
}
