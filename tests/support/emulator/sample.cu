// Kernels for test_emulator.py: a matrix product that uses the primitives as a real kernel does, with bugs that
// PLANT_... plants one at a time, and small kernels that show a primitive's registers.

#include "tensor_cores.cuh"

constexpr int32 block_threads = 128;
constexpr int32 tile_rows = 64;     // of the result: 16 a warp
constexpr int32 tile_columns = 32;  // of the result
constexpr int32 tile_depth = 32;
constexpr int32 pitch = 40;  // elements from row to row in shared memory: 80 bytes, so 8 rows have no bank conflict
constexpr int32 stage_elements = (tile_rows + tile_depth) * pitch;
constexpr int32 num_stages = 2;
// Shared memory: the stages, then tile_rows * pitch elements of results; 20480 bytes.

struct Matrix {
    const bf16* start;
    int32 rows, columns;
};

// Copies a tile of `rows` x 32 from (first_row, first_column), zeros outside the matrix; by 16 bytes where possible.
__device__ void start_copy(bf16* tile, int32 rows, const Matrix& matrix, int32 first_row, int32 first_column) {
    for (int32 chunk = threadIdx.x; chunk < rows * 4; chunk += block_threads) {
        const int32 row = first_row + chunk / 4, column = first_column + chunk % 4 * 8;
        const bool inside = row < matrix.rows;
        const bf16* from = matrix.start + (inside ? static_cast<int64>(row) * matrix.columns + column : 0);
        bf16* to = tile + chunk / 4 * pitch + chunk % 4 * 8;
        if (!inside || (column + 8 <= matrix.columns && is_aligned<16>(from))) {
            cp_async_16(to, from, inside);
            continue;
        }
        for (int32 i = 0; i < 8; ++i) {
#ifdef PLANT_OUT_OF_BOUNDS_GLOBAL_READ
            to[i] = column + i <= matrix.columns ? from[i] : bf16{0};
#else
            to[i] = column + i < matrix.columns ? from[i] : bf16{0};
#endif
        }
    }
}

// A warp's 16 rows of the tile: sums[n] are columns 8n to 8n + 7.
__device__ void multiply_stage(SumFragment (&sums)[4], const bf16* left_tile, const bf16* right_tile) {
    const int32 row = lane_index() % 16, column = lane_index() / 16 * 8;
#pragma unroll
    for (int32 k = 0; k < tile_depth; k += 16) {
        LeftFragment left;
        ldmatrix(left.x, left_tile + (warp_index() * 16 + row) * pitch + k + column);
#pragma unroll
        for (int32 n = 0; n < 4; n += 2) {
            uint32 x[4];
            ldmatrix_transposed(x, right_tile + (k + row) * pitch + n * 8 + column);
            mma_bf16(sums[n], left, RightFragment{{x[0], x[1]}});
            mma_bf16(sums[n + 1], left, RightFragment{{x[2], x[3]}});
        }
    }
}

// The sums of one tile, by a pipeline of two stages: one is multiplied while the next is copied.
__device__ void multiply_tile(SumFragment (&sums)[4], bf16* stages, const Matrix& left, const Matrix& right) {
    const int32 first_row = blockIdx.y * tile_rows, first_column = blockIdx.x * tile_columns;
    const int32 steps = (left.columns + tile_depth - 1) / tile_depth;
    for (int32 step = -1; step < steps; ++step) {
        if (step + 1 < steps) {
            bf16* stage = stages + (step + 1) % num_stages * stage_elements;
            start_copy(stage, tile_rows, left, first_row, (step + 1) * tile_depth);
            start_copy(stage + tile_rows * pitch, tile_depth, right, (step + 1) * tile_depth, first_column);
        }
        cp_async_commit();
        if (step < 0) continue;
#ifdef PLANT_LATE_WAIT
        cp_async_wait<2>();  // the copies of this step may still be in flight
#elif !defined(PLANT_MISSING_WAIT)
        cp_async_wait<1>();
#endif
#ifdef PLANT_DIVERGENT_BARRIER
        if (warp_index() == 1)
            sync_block();
        else
            sync_block();
#elif !defined(PLANT_MISSING_BARRIER_BEFORE_READ)
        sync_block();
#endif
        const bf16* stage = stages + step % num_stages * stage_elements;
        multiply_stage(sums, stage, stage + tile_rows * pitch);
#ifndef PLANT_MISSING_BARRIER_BEFORE_OVERWRITE
        sync_block();
#endif
    }
#ifndef PLANT_MISSING_WAIT
    cp_async_wait<0>();
#endif
}

// A warp's 16 x 32 results from its shared memory to global memory.
__device__ void store_results(bf16* results, const bf16* tile, int32 first_row, int32 rows, int32 columns) {
    for (int32 chunk = lane_index(); chunk < 16 * 4; chunk += 32) {
        const int32 row = first_row + chunk / 4, column = blockIdx.x * tile_columns + chunk % 4 * 8;
        const bf16* from = tile + chunk / 4 * pitch + chunk % 4 * 8;
        bf16* to = results + static_cast<int64>(row) * columns + column;
        if (row >= rows) continue;
        if (column + 8 <= columns && is_aligned<16>(to))
            store_packet<16>(to, load_packet<16>(from));
        else
            for (int32 i = 0; i < 8 && column + i < columns; ++i) to[i] = from[i];
    }
}

// product (M, N) = left (M, K) right (K, N); results = 2^-|product|; row_sums (M, tiles of N) = their sums over a tile.
extern "C" __global__ void __launch_bounds__(block_threads)
    matrix_product(const bf16* left, const bf16* right, float* product, bf16* results, float* row_sums, int32 rows,
                   int32 columns, int32 depth) {
    DYNAMIC_SHARED(bytes);
    bf16* stages = reinterpret_cast<bf16*>(bytes);
    const int32 first_row = blockIdx.y * tile_rows + warp_index() * 16;
    const int32 g = lane_index() / 4, t = lane_index() % 4;
#ifdef PLANT_EARLY_RETURN
    if (first_row >= rows) return;
#endif
    SumFragment sums[4] = {};
    multiply_tile(sums, stages, Matrix{left, rows, depth}, Matrix{right, depth, columns});

#ifdef PLANT_OUT_OF_BOUNDS_SHARED
    bf16* tile = stages + num_stages * stage_elements + (warp_index() + 1) * 16 * pitch;
#else
    bf16* tile = stages + num_stages * stage_elements + warp_index() * 16 * pitch;
#endif
#pragma unroll
    for (int32 half = 0; half < 2; ++half) {
        const int32 row = first_row + g + half * 8;
        float row_sum = 0, powers[4][2];
#pragma unroll
        for (int32 i = 0; i < 8; ++i) {
            const float x = sums[i / 2].x[half * 2 + i % 2];
            const int32 column = blockIdx.x * tile_columns + i / 2 * 8 + t * 2 + i % 2;
            powers[i / 2][i % 2] = exp2_approximate(x < 0 ? x : -x);
            if (column < columns) row_sum += powers[i / 2][i % 2];
#ifdef PLANT_OUT_OF_BOUNDS_GLOBAL_WRITE
            if (row <= rows && column < columns) product[static_cast<int64>(row) * columns + column] = x;
#else
            if (row < rows && column < columns) product[static_cast<int64>(row) * columns + column] = x;
#endif
        }
#ifdef PLANT_DIVERGENT_SHUFFLE
        if (row < rows)
#endif
            row_sum += shuffle_xor(row_sum, 1);
        row_sum += shuffle_xor(row_sum, 2);
        if (row < rows && t == 0) row_sums[static_cast<int64>(row) * gridDim.x + blockIdx.x] = row_sum;
        for (int32 n = 0; n < 4; ++n) {
            const Packet<4> packet{{pack_bf16(powers[n][0], powers[n][1])}};
            store_packet<4>(tile + (g + half * 8) * pitch + n * 8 + t * 2, packet);
        }
    }
#ifndef PLANT_MISSING_SYNC_WARP
    sync_warp();
#endif
    store_results(results, tile, first_row, rows, columns);
}

// One warp: registers in, registers out, lane by lane.
extern "C" __global__ void multiply_fragments(const uint32* left, const uint32* right, const float* sums,
                                              float* bf16_sums, float* tf32_sums) {
    LeftFragment a;
    RightFragment b;
    SumFragment by_bf16, by_tf32;
    for (int32 i = 0; i < 4; ++i) a.x[i] = left[lane_index() * 4 + i];
    for (int32 i = 0; i < 2; ++i) b.x[i] = right[lane_index() * 2 + i];
    for (int32 i = 0; i < 4; ++i) by_bf16.x[i] = by_tf32.x[i] = sums[lane_index() * 4 + i];
    mma_bf16(by_bf16, a, b);
    mma_tf32(by_tf32, a, b);
    for (int32 i = 0; i < 4; ++i) {
        bf16_sums[lane_index() * 4 + i] = by_bf16.x[i];
        tf32_sums[lane_index() * 4 + i] = by_tf32.x[i];
    }
}

// One warp: 32 rows of 8 elements; registers (lane, 14): x1, x2, x4, and the same transposed.
extern "C" __global__ void load_matrices(const bf16* rows, uint32* registers) {
    __shared__ __align__(16) bf16 shared[32 * 8];
    for (int32 i = 0; i < 8; ++i) shared[lane_index() * 8 + i] = rows[lane_index() * 8 + i];
    sync_warp();
    const bf16* row = shared + lane_index() * 8;
    uint32 x1[1], x2[2], x4[4], y1[1], y2[2], y4[4];
    ldmatrix(x1, row);
    ldmatrix(x2, row);
    ldmatrix(x4, row);
    ldmatrix_transposed(y1, row);
    ldmatrix_transposed(y2, row);
    ldmatrix_transposed(y4, row);
    uint32* out = registers + lane_index() * 14;
    out[0] = x1[0];
    out[7] = y1[0];
    for (int32 i = 0; i < 2; ++i) out[1 + i] = x2[i], out[8 + i] = y2[i];
    for (int32 i = 0; i < 4; ++i) out[3 + i] = x4[i], out[10 + i] = y4[i];
}

extern "C" __global__ void convert(const float* x, bf16* rounded, float* widened, uint32* packed, float* unpacked,
                                   float* tf32, float* powers, int64 count) {
    const int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    rounded[i] = to_bf16(x[i]);
    widened[i] = to_float(rounded[i]);
    packed[i] = pack_bf16(x[i], -x[i]);
    unpacked[i] = first_of(packed[i]) - second_of(packed[i]);
    tf32[i] = tf32_value(to_tf32(x[i]));
    powers[i] = exp2_approximate(x[i]);
}

// One warp; values (4, 32) of each type.
extern "C" __global__ void shuffles(const float* x, float* floats, int32* integers, float factor) {
    const int32 lane = lane_index(), number = static_cast<int32>(x[lane] * factor);
    floats[lane] = shuffle_xor(x[lane], 5);
    floats[32 + lane] = shuffle_up(x[lane], 3);
    floats[64 + lane] = shuffle_down(x[lane], 7);
    floats[96 + lane] = shuffle_from(x[lane], lane * 7 % 32);
    integers[lane] = shuffle_xor(number, 16);
    integers[32 + lane] = shuffle_up(number, 1);
    integers[64 + lane] = shuffle_down(number, 31);
    integers[96 + lane] = shuffle_from(number, 9);
}

template <int32 threads>
__device__ float neighbours_value(float x) {
    __shared__ float values[threads];
    values[threadIdx.x] = x;
    sync_block();
    const float neighbours = values[(threadIdx.x + 1) % threads];
    sync_block();
    return neighbours;
}

// Passes the values around the block `steps` times, with two barriers for each.
extern "C" __global__ void hand_round(float* x, int32 steps) {
    float value = x[threadIdx.x];
    for (int32 step = 0; step < steps; ++step) value = neighbours_value<block_threads>(value);
    x[threadIdx.x] = value;
}

// Touches element `position` of x, of dynamic or of static shared memory, which have 8 floats each.
extern "C" __global__ void touch(float* x, int32 what, int32 position) {
    DYNAMIC_SHARED(bytes);
    __shared__ __align__(16) float variable[8];
    float* const dynamic = reinterpret_cast<float*>(bytes);
    uint32 row[1] = {};
    if (what == 0) x[0] = dynamic[position];
    if (what == 1) x[0] = variable[position];
    if (what == 2) ldmatrix(row, dynamic + position);
    if (what == 3) cp_async_16(dynamic, x + position, true);
    if (what == 4) cp_async_16(dynamic + position, x, true);
    if (what == 5) x[0] = bits_float(load_packet<8>(x + position).x[0]);
    cp_async_commit();
    cp_async_wait<0>();
}
