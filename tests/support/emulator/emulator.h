// CUDA's keywords for g++, and the functions that infctx/cuda/primitives.cuh calls instead of PTX.  Included before a
// .cu file.
//
// A CUDA thread is a fiber; blocks run one by one.  Between two rendezvous (a barrier, a warp primitive) a
// fiber runs alone, so nothing here is locked.  `extern __shared__` is DYNAMIC_SHARED(name) of primitives.cuh.

#pragma once

#include <math.h>
#include <stddef.h>

#include <type_traits>
#include <utility>

#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __constant__ static
// One copy is enough, since blocks run in sequence; a separate section, so that they can be found and poisoned.
#define __shared__ static __attribute__((section("emulated_shared"), used))
#ifndef __global__  // emulator.py redefines it to find the kernels' names
#define __global__
#endif
#define __syncthreads() emulator::sync_block({__FILE__, __LINE__})
#define __syncwarp() emulator::sync_warp({__FILE__, __LINE__})

// CUDA has them without a header.  For floats they would differ for NaN; use fminf for those.
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }

namespace emulator {

struct Index {
    unsigned x, y, z;
};

// Where in the source a primitive was called.
struct Place {
    const char* file;
    int line;
};

void sync_block(Place place);
void sync_roles(Place place);
void sync_role(int barrier, int threads, Place place);
void sync_warp(Place place);

unsigned float_bits(float x);
float bits_float(unsigned bits);
unsigned short float_to_bf16(float x);
unsigned float_to_tf32(float x);
float exp2_flushed(float x);

unsigned char* dynamic_shared();
void require_aligned(const void* address, size_t bytes, const char* what, Place place);
void copy_async_16(void* shared, const void* global, bool valid, Place place);
void copy_async_commit();
void copy_async_wait(size_t groups_left);

unsigned shuffle_xor(unsigned value, int mask, Place place);
unsigned shuffle_up(unsigned value, int distance, Place place);
unsigned shuffle_down(unsigned value, int distance, Place place);
unsigned shuffle_from(unsigned value, int source, Place place);

void mma_bf16(float* sum, const unsigned* left, const unsigned* right, Place place);
void mma_tf32(float* sum, const unsigned* left, const unsigned* right, Place place);
void ldmatrix(unsigned* x, int matrices, const void* row, Place place);
void ldmatrix_transposed(unsigned* x, int matrices, const void* row, Place place);

// A kernel that can be launched by name, with an array of pointers to its arguments as cuLaunchKernel wants them.
struct Kernel {
    using Function = void (*)();

    const char* name;
    Function function;
    void (*call)(Function function, void** arguments);
    const char* parameters;  // two letters each: p(ointer), i(nteger) or f(loat), and its bytes; of its target for p
};

void add_kernel(const Kernel& kernel);

template <class T>
constexpr char parameter_kind() {
    static_assert(std::is_pointer_v<T> || std::is_arithmetic_v<T>, "a kernel takes pointers, integers and floats");
    return std::is_pointer_v<T> ? 'p' : std::is_integral_v<T> ? 'i' : 'f';
}

// 0 if unchecked: void, and targets larger than one element.
template <class T>
constexpr char parameter_bytes() {
    using Target = std::remove_cv_t<std::remove_pointer_t<T>>;
    using Element = std::conditional_t<std::is_void_v<Target>, char[10], Target>;
    return sizeof(Element) < 10 ? '0' + sizeof(Element) : '0';
}

template <class... Parameters>
struct AddKernel {
    using Function = void (*)(Parameters...);

    AddKernel(const char* name, Function function) {
        static const char text[] = {parameter_kind<Parameters>()..., 0};
        static const char bytes[] = {parameter_bytes<Parameters>()..., 0};
        static char parameters[2 * sizeof...(Parameters) + 1] = {};
        for (size_t i = 0; i < sizeof...(Parameters); ++i) {
            parameters[2 * i] = text[i];
            parameters[2 * i + 1] = bytes[i];
        }
        add_kernel({name, reinterpret_cast<Kernel::Function>(function), call, parameters});
    }

    static void call(Kernel::Function function, void** arguments) {
        call_with(reinterpret_cast<Function>(function), arguments, std::index_sequence_for<Parameters...>{});
    }

    template <size_t... positions>
    static void call_with(Function function, void** arguments, std::index_sequence<positions...>) {
        function(*static_cast<Parameters*>(arguments[positions])...);
    }
};

}  // namespace emulator

extern emulator::Index threadIdx, blockIdx, blockDim, gridDim;
