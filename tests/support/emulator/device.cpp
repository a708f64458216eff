// The primitives: shared memory and its poison, asynchronous copies, lane to lane, tensor cores, conversions.
//
// A lane's memory is read when the lane arrives, not when all have.  In some order of the lanes, another lane's write
// without a barrier in between is then not there yet, as the PTX memory model allows.

#include <stdint.h>
#include <string.h>

#include "inside.h"

// The linker's names for the ends of the section of __shared__ variables; absent if there are none.
extern "C" {
__attribute__((weak, visibility("hidden"))) extern unsigned char __start_emulated_shared[];
__attribute__((weak, visibility("hidden"))) extern unsigned char __stop_emulated_shared[];
}

namespace emulator {
namespace {

constexpr size_t guard_bytes = 16 * 1024;
constexpr unsigned char poison = 0xff;  // NaN in bf16, fp32 and fp64, -1 in integers

struct DynamicShared {
    std::vector<unsigned char> memory;
    unsigned char* start = nullptr;
    size_t bytes = 0;
};

DynamicShared dynamic;

// Not memset: ASan puts zones between the variables of the section, and would object.
__attribute__((no_sanitize("address"))) void poison_static_shared() {
    for (volatile unsigned char* byte = __start_emulated_shared; byte < __stop_emulated_shared; ++byte) *byte = poison;
}

bool is_shared(const void* address, size_t bytes) {
    const auto* first = static_cast<const unsigned char*>(address);
    return (first >= dynamic.start && first + bytes <= dynamic.start + dynamic.bytes) ||
           (first >= __start_emulated_shared && first + bytes <= __stop_emulated_shared);
}

void require_shared_16(const void* address, const char* what, Place place) {
    if (!is_shared(address, 16)) {
        const std::string beside = place_beside_shared(address);
        const std::string message = what + std::string(": the address is outside of shared memory");
        fail(place, beside.empty() ? message : message + ": " + beside);
    }
    require_aligned(address, 16, what, place);
}

// Lets ASan find a bad source here, not at the wait.
void read_16(const void* source) {
    unsigned char bytes[16];
    memcpy(bytes, source, 16);
    asm volatile("" : : "r"(bytes) : "memory");
}

}  // namespace

// ---- shared memory ----

unsigned char* dynamic_shared() { return dynamic.start; }

// The start is a multiple of exactly 16: DYNAMIC_SHARED promises no more.
void prepare_shared(size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(dynamic.memory.data(), dynamic.memory.size());
#endif
    dynamic.memory.assign(2 * guard_bytes + bytes + 128, poison);
    dynamic.bytes = bytes;
    dynamic.start = dynamic.memory.data() + guard_bytes;
    dynamic.start += (128 - reinterpret_cast<uintptr_t>(dynamic.start) % 128 + 16) % 128;
#ifdef __SANITIZE_ADDRESS__
    unsigned char* const end = dynamic.memory.data() + dynamic.memory.size();
    __asan_poison_memory_region(dynamic.memory.data(), dynamic.start - dynamic.memory.data());
    __asan_poison_memory_region(dynamic.start + bytes, end - dynamic.start - bytes);
#endif
}

void poison_shared() {
    memset(dynamic.start, poison, dynamic.bytes);
    poison_static_shared();
}

std::string damage_to_shared() {
#ifndef __SANITIZE_ADDRESS__  // ASan has already reported it
    const unsigned char* end = dynamic.memory.data() + dynamic.memory.size();
    for (const unsigned char* byte = dynamic.memory.data(); byte < end; ++byte) {
        if (byte == dynamic.start) byte += dynamic.bytes;
        if (*byte != poison) return "written out of bounds: " + place_beside_shared(byte);
    }
#endif
    return {};
}

std::string place_beside_shared(const void* address) {
    const auto* byte = static_cast<const unsigned char*>(address);
    if (byte < dynamic.memory.data() || byte >= dynamic.memory.data() + dynamic.memory.size()) return {};
    return "byte " + std::to_string(byte - dynamic.start) + " of dynamic shared memory, which has " +
           std::to_string(dynamic.bytes) + " bytes";
}

void require_aligned(const void* address, size_t bytes, const char* what, Place place) {
    if (reinterpret_cast<uintptr_t>(address) % bytes)
        fail(place, std::string(what) + ": the address is not a multiple of " + std::to_string(bytes));
}

// ---- asynchronous copies ----

void copy_async_16(void* shared, const void* global, bool valid, Place place) {
    require_shared_16(shared, "cp_async_16", place);
    require_aligned(global, 16, "cp_async_16", place);
    if (valid && is_shared(global, 1)) fail(place, "cp_async_16: the source is in shared memory");
    if (valid) read_16(global);
    memset(shared, poison, 16);
    this_thread_copies().list.push_back({shared, valid ? global : nullptr, place});
}

void copy_async_commit() { this_thread_copies().ends.push_back(this_thread_copies().list.size()); }

void copy_async_wait(size_t groups_left) {
    Copies& copies = this_thread_copies();
    if (copies.ends.size() <= groups_left) return;
    const size_t groups = copies.ends.size() - groups_left;
    const size_t landed = copies.ends[groups - 1];
    for (size_t i = 0; i < landed; ++i) {
        const Copies::Copy& copy = copies.list[i];
        if (copy.global)
            memcpy(copy.shared, copy.global, 16);
        else
            memset(copy.shared, 0, 16);
    }
    copies.list.erase(copies.list.begin(), copies.list.begin() + landed);
    copies.ends.erase(copies.ends.begin(), copies.ends.begin() + groups);
    for (size_t& end : copies.ends) end -= landed;
}

// ---- from lane to lane ----

namespace {

// given[0] is the value, given[1] the wanted lane; outside the warp a lane keeps its own value.
void give_values(Exchange* const* lanes) {
    for (int lane = 0; lane < warp_size; ++lane) {
        const int source = static_cast<int>(lanes[lane]->given[1]);
        lanes[lane]->taken[0] = lanes[source >= 0 && source < warp_size ? source : lane]->given[0];
    }
}

int this_lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warp_size; }

unsigned shuffle(const char* name, unsigned value, int source, Place place) {
    Exchange& exchange = this_exchange();
    exchange.given[0] = value;
    exchange.given[1] = static_cast<unsigned>(source);
    meet_warp(name, give_values, place);
    return exchange.taken[0];
}

void no_exchange(Exchange* const*) {}

}  // namespace

void sync_warp(Place place) { meet_warp("sync_warp", no_exchange, place); }

unsigned shuffle_xor(unsigned value, int mask, Place place) {
    return shuffle("shuffle_xor", value, this_lane() ^ (mask & 31), place);
}

unsigned shuffle_up(unsigned value, int distance, Place place) {
    return shuffle("shuffle_up", value, this_lane() - (distance & 31), place);
}

unsigned shuffle_down(unsigned value, int distance, Place place) {
    return shuffle("shuffle_down", value, this_lane() + (distance & 31), place);
}

unsigned shuffle_from(unsigned value, int source, Place place) {
    return shuffle("shuffle_from", value, source & 31, place);
}

// ---- tensor cores: layouts as primitives.cuh describes them ----

namespace {

constexpr int left_words = 4, right_words = 2, sum_words = 4;

float half_of(unsigned packed, int half) { return bits_float(half ? packed & 0xffff0000u : packed << 16); }

// sum += left right; 8 columns together, so that the compiler can vectorize.
template <int depth>
void multiply(Exchange* const* lanes, const float (&left)[16][depth], const float (&right)[depth][8]) {
    float sum[16][8];
    for (int lane = 0; lane < warp_size; ++lane) {
        const unsigned* given = lanes[lane]->given + left_words + right_words;
        for (int i = 0; i < sum_words; ++i) sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = bits_float(given[i]);
    }
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < depth; ++k)
            for (int column = 0; column < 8; ++column) sum[row][column] += left[row][k] * right[k][column];
    for (int lane = 0; lane < warp_size; ++lane)
        for (int i = 0; i < sum_words; ++i)
            lanes[lane]->taken[i] = float_bits(sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
}

void multiply_bf16(Exchange* const* lanes) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < warp_size; ++lane) {
        const int group = lane / 4, pair = lane % 4 * 2;
        const unsigned* given = lanes[lane]->given;
        for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < left_words; ++i)
                left[group + i % 2 * 8][pair + i / 2 * 8 + half] = half_of(given[i], half);
            for (int i = 0; i < right_words; ++i)
                right[pair + i * 8 + half][group] = half_of(given[left_words + i], half);
        }
    }
    multiply<16>(lanes, left, right);
}

// What becomes of an operand's 13 low bits: PTX does not say.  These are the models in the order of emulator.py's TF32.
struct Tf32 {
    unsigned added, kept;
};
constexpr Tf32 tf32_models[] = {{0, 0xffffe000u}, {0x1000u, 0xffffe000u}, {0, 0xfffff000u}, {0, 0xffffffffu}};
Tf32 tf32 = tf32_models[0];

float tf32_of(unsigned bits) {
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    return bits_float((finite ? bits + tf32.added : bits) & tf32.kept);
}

void multiply_tf32(Exchange* const* lanes) {
    float left[16][8], right[8][8];
    for (int lane = 0; lane < warp_size; ++lane) {
        const int group = lane / 4, place = lane % 4;
        const unsigned* given = lanes[lane]->given;
        for (int i = 0; i < left_words; ++i) left[group + i % 2 * 8][place + i / 2 * 4] = tf32_of(given[i]);
        for (int i = 0; i < right_words; ++i) right[place + i * 4][group] = tf32_of(given[left_words + i]);
    }
    multiply<8>(lanes, left, right);
}

void mma(const char* name, Operation operation, float* sum, const unsigned* left, const unsigned* right, Place place) {
    Exchange& exchange = this_exchange();
    memcpy(exchange.given, left, 4 * left_words);
    memcpy(exchange.given + left_words, right, 4 * right_words);
    memcpy(exchange.given + left_words + right_words, sum, 4 * sum_words);
    meet_warp(name, operation, place);
    memcpy(sum, exchange.taken, 4 * sum_words);
}

// given[0..3] is the row at the lane's address.
void spread_rows(Exchange* const* lanes) {
    for (int lane = 0; lane < warp_size; ++lane)
        for (int matrix = 0; matrix < 4; ++matrix)
            lanes[lane]->taken[matrix] = lanes[matrix * 8 + lane / 4]->given[lane % 4];
}

void spread_columns(Exchange* const* lanes) {
    for (int lane = 0; lane < warp_size; ++lane)
        for (int matrix = 0; matrix < 4; ++matrix) {
            const int row = lane % 4 * 2, column = lane / 4;
            const auto element = [&](int r) {
                return lanes[matrix * 8 + r]->given[column / 2] >> column % 2 * 16 & 0xffffu;
            };
            lanes[lane]->taken[matrix] = element(row) | element(row + 1) << 16;
        }
}

void load(const char* name, Operation operation, unsigned* x, int matrices, const void* row, Place place) {
    Exchange& exchange = this_exchange();
    memset(exchange.given, poison, 16);
    if (this_lane() < 8 * matrices) {
        require_shared_16(row, name, place);
        memcpy(exchange.given, row, 16);
    }
    meet_warp(name, operation, place);
    memcpy(x, exchange.taken, 4 * matrices);
}

}  // namespace

void mma_bf16(float* sum, const unsigned* left, const unsigned* right, Place place) {
    mma("mma_bf16", multiply_bf16, sum, left, right, place);
}

void set_tf32(int model) { tf32 = tf32_models[model]; }

void mma_tf32(float* sum, const unsigned* left, const unsigned* right, Place place) {
    mma("mma_tf32", multiply_tf32, sum, left, right, place);
}

void ldmatrix(unsigned* x, int matrices, const void* row, Place place) {
    load("ldmatrix", spread_rows, x, matrices, row, place);
}

void ldmatrix_transposed(unsigned* x, int matrices, const void* row, Place place) {
    load("ldmatrix_transposed", spread_columns, x, matrices, row, place);
}

// ---- numbers ----

unsigned float_bits(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}

float bits_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

unsigned short float_to_bf16(float x) {
    const unsigned bits = float_bits(x);
    if (x != x) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Sets the 13 lowest bits, which PTX leaves unspecified, so that using the register as a float is noticed.
unsigned float_to_tf32(float x) {
    const unsigned bits = float_bits(x);
    if (x != x) return 0x7fffffffu;
    return (isinf(x) ? bits : bits + 0x1000u) | 0x1fffu;
}

float exp2_flushed(float x) {
    const float result = fpclassify(x) == FP_SUBNORMAL ? 1.0f : exp2f(x);
    return fpclassify(result) == FP_SUBNORMAL ? 0.0f : result;
}

}  // namespace emulator
