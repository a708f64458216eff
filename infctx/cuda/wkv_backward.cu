// All gradients of WKV, for one head size and one input type: -DHEAD_SIZE=64, -DINPUT_FLOAT for fp32.
// README.md has the derivation; wkv_cuda.py the shapes and the order of the launches.

#include "wkv_roles.cuh"

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

// ---- values ----

// Reads with the state's gradient, which is dv; copies v a tile ahead, of which the state within a tile needs all, and
// dy a chunk ahead.
INFCTX_DEVICE void run_values(const Span& span, const BackwardOutput& output) {
    const Place& place = span.place;
    const Shared& shared = span.shared;
    const auto dv_rows = find_rows(output.dv, span.problem, place);
    const Starts starts = find_starts(span.input.starts, span.problem, place);
    const bool is_first = threadIdx.x % span_threads == 0;
    const auto flag_of = [&](int32 chunk) {
        return starts.flags == nullptr ? uint8(0) : starts.flags[starts.first + chunk];
    };
    const auto copy = [&](Input* to, const Input* from, int32 chunk) {
        if (chunk < 0) return;
        start_copy<chunk_tokens, span_threads>(to, find_rows(from, span.problem, place), place.token_at(chunk),
                                               place.end_token, threadIdx.x % span_threads);
    };
    const int32 last = span.num_chunks - 1;
    for (int32 chunk = last; chunk >= 0 && chunk > last - v_ahead; --chunk) {
        copy(shared.v_of(chunk), span.input.v, chunk);
        if (is_first) shared.begins_at(chunk) = flag_of(chunk);
    }
    uint8 begins = last >= v_ahead ? flag_of(last - v_ahead) : uint8(0);
    copy(shared.dy_of(last), span.input.dy, last);
    cp_async_commit();
    Reader<true> reader;
    reader.load(span.entering(), span.slab);
    cp_async_wait<0>();
    sync_roles();
    sync_roles();
#pragma unroll 1
    for (int32 chunk = last; chunk >= 0; --chunk) {
        const int32 ahead = chunk - v_ahead;
        copy(shared.v_of(ahead), span.input.v, ahead);
        copy(shared.dy_of(chunk - 1), span.input.dy, chunk - 1);
        cp_async_commit();
        if (chunk % num_slabs == span.slab) {
            find_dscores(shared.dscores_of(chunk), shared.dy_of(chunk), shared.v_of(chunk));
        }
        SumFragment results[2];
        reader.advance(results, shared.staged_of(chunk), shared.scores_of(chunk), shared.dy_of(chunk), span.slab);
        store_tokens(dv_rows, span.slab, place.token_at(chunk), place.end_token, results);
        if (span.begins_at(chunk)) {
            sync_warp();  // only so that this is a branch, and not a choice for each number
            reader.clear();
        }
        // Loaded at the end of the turn before.
        if (is_first && ahead >= 0) shared.begins_at(ahead) = begins;
        if (ahead >= 1) begins = flag_of(ahead - 1);
        cp_async_wait<0>();
        sync_roles();
    }
}

// ---- stage ----

// The rows of a fourth of the chunk's tokens: one of the lane's own four, by lanes of the first groups, a line each.
template <typename Element>
INFCTX_DEVICE void prefetch_rows(const Element* start, const Span& span, const OwnPlaces& places, int32 part) {
    constexpr int32 lines = (num_channels * sizeof(Element) + 127) / 128, line = 128 / sizeof(Element);
    if (lane_group() >= lines) return;
    prefetch(places.at(start + places.first, part / 2, part % 2) - own_channel(span.slab) + lane_group() * line);
}

// What the roles load themselves, two tiles ahead: r, k, w, and a part of the state kept before the tile.
INFCTX_DEVICE void prefetch_chunk(const Span& span, int32 chunk) {
    if (chunk < 0) return;
    const OwnPlaces places = span.places(chunk), w_places = span.w_places(chunk);
#pragma unroll
    for (int32 part = 0; part < 4; part += num_slabs) {
        prefetch_rows(span.input.r, span, places, part + span.slab);
        prefetch_rows(span.input.k, span, places, part + span.slab);
        prefetch_rows(span.input.w, span, w_places, part + span.slab);
    }
    constexpr int32 lines = state_floats / 32 / tile_chunks;
    const int32 index = span.slab * 32 + lane_index();
    if (index < lines) prefetch(span.kept_before(chunk) + (chunk % tile_chunks * lines + index) * 32);
}

INFCTX_DEVICE void run_stage(const Span& span) {
    const BackwardInput& input = span.input;
    const Shared& shared = span.shared;
    const int32 slab = span.slab;
    Loaded<Input> loaded_r, loaded_k;
    Loaded<float> loaded_w;
    const auto load = [&](int32 chunk) {
        const OwnPlaces places = span.places(chunk);
        loaded_r = load_own(input.r, places);
        loaded_k = load_own(input.k, places);
        loaded_w = load_own(input.w, span.w_places(chunk));
    };
    const int32 last = span.num_chunks - 1;
    sync_roles();
    // Before the first turn, to the last pair of chunks, and as far as turns before it would have gone in the next
    // tile.
    StateWalk walk = {span};
    const int32 last_tile = last / tile_chunks * tile_chunks;
    const bool is_late = walks_ahead && last - last_tile < 2 && last_tile > 0;
#pragma unroll 1
    for (int32 tile = last_tile; tile >= (is_late ? last_tile - tile_chunks : last_tile); tile -= tile_chunks) {
        const int32 end = tile == last_tile ? last / 2 * 2 : tile + 1 - (last - last_tile);
        walk.start(tile);
        if (tile == last_tile || end > tile) walk.begin_document(tile);
        for (int32 chunk = tile; chunk < end; ++chunk) {
            walk.load(chunk);
            walk.pass(chunk, walk.find_writers());
        }
        if (tile == last_tile) walk.leave();
    }
    load(last);
#pragma unroll 1
    for (int32 chunk = last; chunk >= 0; --chunk) {
        const Packet<8> u = span.load_u();
        const Own r = to_own(loaded_r), k = to_own(loaded_k);
        const Decays decays = find_decays(to_own(loaded_w));
        prefetch_chunk(span, chunk - 2 * tile_chunks);
        stage_chunk(shared.staged_of(chunk), shared.levels, shared.bonuses, slab, until_end(k, decays),
                    since_start(r, decays), r, k, decays, {bits_float(u.x[0]), bits_float(u.x[1])});
        // In the turn in which the next chunk is read, `step` of its tile.
        const int32 turn = chunk + 1, step = tile_chunks - 1 - turn % tile_chunks;
        const int32 tile = turn + step + 1 - 2 * tile_chunks;
        const bool is_read = turn * chunk_tokens < span.num_tokens();
        const bool walks = walks_ahead && tile >= 0 && is_read, passes = walks && step >= 2;
        if (walks && step == 1) walk.start(tile);
        if (passes) walk.load(tile + step - 2); else walk.forget_inputs();
        load(chunk > 0 ? chunk - 1 : 0);
        sync_role<span_threads>(stage_barrier);
        find_scores<true>(shared.scores_of(chunk), shared.levels, shared.bonuses, slab);
        if (passes) {
            if (step == 2) walk.begin_document(tile);
            walk.pass(tile + step - 2, walk.find_writers());
            if (step == 3) {
                sync_role<2 * span_threads>(state_barrier);
                walk.leave();
            }
        }
        sync_roles();
    }
    sync_roles();
}

// ---- inside ----

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
    const int64 index = place.batch * problem.num_chunks() + place.first_token / chunk_tokens + chunk;
    float* to = du + (index * problem.num_heads + place.head) * num_channels;
    store_pair(to + own_channel(span.slab), sums[0], sums[1]);
}

INFCTX_DEVICE void run_inside(const Span& span, const BackwardOutput& output) {
    const BackwardInput& input = span.input;
    const Shared& shared = span.shared;
    Loaded<Input> loaded_r, loaded_k;
    Loaded<float> loaded_w;
    const auto load = [&](int32 chunk) {
        const OwnPlaces places = span.places(chunk);
        loaded_r = load_own(input.r, places);
        loaded_k = load_own(input.k, places);
        loaded_w = load_own(input.w, span.w_places(chunk));
    };
    load(span.num_chunks - 1);
    sync_roles();
    sync_roles();
    sync_roles();
#pragma unroll 1
    for (int32 chunk = span.num_chunks - 1; chunk >= 0; --chunk) {
        Own r = to_own(loaded_r), k = to_own(loaded_k);
        Decays decays = find_decays(to_own(loaded_w));
        const Packet<8> u = span.load_u();
        Gradients d;
        const float* outside = shared.outside_of(chunk);
        const float* own = own_packets(shared.outside_of(chunk), span.slab, 4);
        take_own(d.r, own);
        take_own(d.k, own + 256);
        const Packet<8> through = load_packet<8>(outside + outside_lanes + own_channel(span.slab));
        scale_outside(d, {bits_float(through.x[0]), bits_float(through.x[1])}, r, k, decays);
        forget_products(r);  // recomputing them is cheaper than keeping them
        forget_products(k);
        forget_products(decays);
        find_inner_gradients(d, shared.dscores_of(chunk), r, k, decays, {bits_float(u.x[0]), bits_float(u.x[1])});
        store_du(output.du, span, chunk, d);
        sync_warp();  // only so that the addresses are computed here and not kept from above
        const OwnPlaces results = span.places(chunk);
        store_own(output.dr, results, d.r);
        store_own(output.dk, results, d.k);
        store_own(output.dw, results, d.w);
        load(chunk > 0 ? chunk - 1 : 0);
        if (chunk > 0) sync_roles();
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
    const Shared shared = find_shared(shared_bytes);
    const int32 warp = shuffle_from(warp_index(), 0);  // so that the compiler knows it to be the same in all lanes
    const auto span = [&] {
        const Place own = find_place(problem, 0, num_spans);
        return Span{problem, input, own, shared, own.num_chunks(), warp % num_slabs};
    };
    for (int32 i = threadIdx.x; i < 2 * chunk_scores; i += backward_threads) shared.scores[i] = 0.0f;
    const Place place = find_place(problem, 0, num_spans);
    for (int32 i = threadIdx.x; i < num_channels; i += backward_threads) {
        shared.u[i] = u[place.head * num_channels + i];
    }
    if (threadIdx.x == 0) Span{problem, input, place, shared, 0, 0}.find_places();
    sync_block();
    const int32 role = warp / num_slabs;
    if (role == 0) {
        run_outside(span(), output);
    } else if (role == 1) {
        run_values(span(), output);
    } else if (role == 2) {
        run_stage(span());
    } else {
        run_inside(span(), output);
    }
}
