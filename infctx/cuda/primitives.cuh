// The primitives of the kernels: sized integers, bf16, accesses of 16 bytes, asynchronous copies, shuffles.  Tensor
// cores are in tensor_cores.cuh.
//
// No header is included, not even CUDA's: mixes of header and compiler versions are a recurring failure.  The same file
// is compiled by NVRTC 12 and 13 for sm_80 to sm_120, where each primitive is one or two PTX instructions, and by g++
// with INFCTX_EMULATOR after tests/support/emulator/emulator.h, where each is a call into the emulator.  There are no
// atomics, so that the same input gives the same bits.  Blocks have one dimension, a multiple of 32 threads; all 32
// lanes of a warp call a warp primitive together.

#pragma once

#ifdef INFCTX_EMULATOR
// The emulator's messages name the line of the call, by default arguments that callers never pass.
#define INFCTX_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define INFCTX_AND_PLACE , INFCTX_PLACE
// Dynamic shared memory as unsigned chars with this name, aligned to exactly 16 bytes.
#define DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared()
#else
#define INFCTX_PLACE
#define INFCTX_AND_PLACE
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#define INFCTX_DEVICE __device__ __forceinline__

typedef signed char int8;
typedef unsigned char uint8;
typedef short int16;
typedef unsigned short uint16;
typedef int int32;
typedef unsigned int uint32;
typedef long long int64;
typedef unsigned long long uint64;

static_assert(sizeof(int16) == 2 && sizeof(int32) == 4 && sizeof(int64) == 8, "integers have the sizes in their names");

// ---- threads ----

INFCTX_DEVICE int32 lane_index() { return static_cast<int32>(threadIdx.x % 32); }

INFCTX_DEVICE int32 warp_index() { return static_cast<int32>(threadIdx.x / 32); }

// All threads of the block arrive before any continues, and then see the others' writes.
INFCTX_DEVICE void sync_block(INFCTX_PLACE) {
#ifdef INFCTX_EMULATOR
    emulator::sync_block({file, line});
#else
    asm volatile("bar.sync 0;" ::: "memory");
#endif
}

// The same barrier for warps with roles: warps may arrive at different lines, but all lanes of a warp at one.
INFCTX_DEVICE void sync_roles(INFCTX_PLACE) {
#ifdef INFCTX_EMULATOR
    emulator::sync_roles({file, line});
#else
    asm volatile("bar.sync 0;" ::: "memory");
#endif
}

// The same for the threads of one role alone, whole warps side by side; `barrier` 1 to 15 is the role's.
template <int threads>
INFCTX_DEVICE void sync_role(int32 barrier INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    emulator::sync_role(barrier, threads, {file, line});
#else
    asm volatile("bar.sync %0, %1;" : : "r"(barrier), "n"(threads) : "memory");
#endif
}

// The same for the lanes of a warp: a lane sees another lane's writes to memory only after this.
INFCTX_DEVICE void sync_warp(INFCTX_PLACE) {
#ifdef INFCTX_EMULATOR
    emulator::sync_warp({file, line});
#else
    asm volatile("bar.warp.sync 0xffffffff;" ::: "memory");
#endif
}

// ---- numbers ----

INFCTX_DEVICE uint32 float_bits(float x) {
#ifdef INFCTX_EMULATOR
    return emulator::float_bits(x);
#else
    return __float_as_uint(x);
#endif
}

INFCTX_DEVICE float bits_float(uint32 bits) {
#ifdef INFCTX_EMULATOR
    return emulator::bits_float(bits);
#else
    return __uint_as_float(bits);
#endif
}

// The upper half of a float: 8 bits of exponent, 7 of mantissa.
struct bf16 {
    uint16 bits;
};

static_assert(sizeof(bf16) == 2, "bf16 lies in memory as torch.bfloat16 does");

// Exact.
INFCTX_DEVICE float to_float(bf16 x) { return bits_float(static_cast<uint32>(x.bits) << 16); }

// Two floats in one register, in the order of the fragments: the first in memory is in the lower half.  Rounded to
// nearest, ties to even; subnormals are kept; every NaN becomes 0x7fff.
INFCTX_DEVICE uint32 pack_bf16(float first, float second) {
#ifdef INFCTX_EMULATOR
    return emulator::float_to_bf16(first) | static_cast<uint32>(emulator::float_to_bf16(second)) << 16;
#else
    uint32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));  // PTX names the upper half first
    return packed;
#endif
}

// Rounded in the same way by the same instruction; the one for a single float (F2F) is slow.
INFCTX_DEVICE bf16 to_bf16(float x) { return bf16{static_cast<uint16>(pack_bf16(x, 0.0f))}; }

INFCTX_DEVICE float first_of(uint32 packed) { return bits_float(packed << 16); }

INFCTX_DEVICE float second_of(uint32 packed) { return bits_float(packed & 0xffff0000u); }

// A register for mma_tf32: 8 bits of exponent, 10 of mantissa, ties away from zero.  The 13 lowest bits are
// unspecified; `tf32_value` clears them.
INFCTX_DEVICE uint32 to_tf32(float x) {
#ifdef INFCTX_EMULATOR
    return emulator::float_to_tf32(x);
#else
    uint32 result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
    return result;
#endif
}

INFCTX_DEVICE float tf32_value(uint32 x) { return bits_float(x & 0xffffe000u); }

// a b + c, rounded once.
INFCTX_DEVICE float multiply_add(float a, float b, float c) {
#ifdef INFCTX_EMULATOR
    return __builtin_fmaf(a, b, c);
#else
    return __fmaf_rn(a, b, c);
#endif
}

// 2^x to a relative 2^-22; subnormal x and results become zero.  Not named exp2, which compilers define differently.
INFCTX_DEVICE float exp2_approximate(float x) {
#ifdef INFCTX_EMULATOR
    return emulator::exp2_flushed(x);
#else
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#endif
}

// x, hidden from the compiler: values computed from it are computed again at each use, not kept in registers from an
// earlier one.
INFCTX_DEVICE int32 opaque(int32 x) {
#ifndef INFCTX_EMULATOR
    asm volatile("" : "+r"(x));
#endif
    return x;
}
INFCTX_DEVICE float opaque(float x) {
#ifndef INFCTX_EMULATOR
    asm volatile("" : "+f"(x));
#endif
    return x;
}
INFCTX_DEVICE int64 opaque(int64 x) {
#ifndef INFCTX_EMULATOR
    asm volatile("" : "+l"(x));
#endif
    return x;
}
template <typename Element>
INFCTX_DEVICE Element* opaque(Element* x) {
#ifndef INFCTX_EMULATOR
    asm volatile("" : "+l"(x));
#endif
    return x;
}

// Leaves x undefined, so that no register keeps it around a loop's end; NaN in the emulator.
INFCTX_DEVICE void abandon(float& x) {
#ifdef INFCTX_EMULATOR
    x = emulator::bits_float(0x7fc00000u);
#else
    asm volatile("" : "=f"(x));
#endif
}
INFCTX_DEVICE void abandon(uint32& x) {
#ifdef INFCTX_EMULATOR
    x = 0x7fc07fc0u;
#else
    asm volatile("" : "=r"(x));
#endif
}

// ---- memory, several elements at once ----

// 4, 8 or 16 bytes that move in one instruction; the address must be a multiple of the size.
template <int bytes>
struct alignas(bytes) Packet {
    uint32 x[bytes / 4];
};

template <int bytes>
INFCTX_DEVICE bool is_aligned(const void* address) {
    return reinterpret_cast<uint64>(address) % bytes == 0;
}

template <int bytes>
INFCTX_DEVICE Packet<bytes> load_packet(const void* address INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    emulator::require_aligned(address, bytes, "load_packet", {file, line});
#endif
    return *static_cast<const Packet<bytes>*>(address);
}

template <int bytes>
INFCTX_DEVICE void store_packet(void* address, const Packet<bytes>& packet INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    emulator::require_aligned(address, bytes, "store_packet", {file, line});
#endif
    *static_cast<Packet<bytes>*>(address) = packet;
}

// The same in global memory, 4 or 8 bytes; if not `valid`, zeros are loaded or nothing is stored.  Predicates instead
// of branches, and addresses that the compiler does not take apart.
template <int bytes>
INFCTX_DEVICE Packet<bytes> load_global(const void* address, bool valid INFCTX_AND_PLACE) {
    static_assert(bytes == 4 || bytes == 8, "one or two registers");
    Packet<bytes> packet = {};
#ifdef INFCTX_EMULATOR
    if (valid) packet = load_packet<bytes>(address, file, line);
#else
    if (bytes == 4) {
        asm volatile(
            "{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.b32 %0, [%1]; }"
            : "+r"(packet.x[0])
            : "l"(address), "r"(static_cast<uint32>(valid)));
    } else {
        asm volatile(
            "{ .reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.v2.b32 {%0, %1}, [%2]; }"
            : "+r"(packet.x[0]), "+r"(packet.x[bytes / 4 - 1])
            : "l"(address), "r"(static_cast<uint32>(valid)));
    }
#endif
    return packet;
}

template <int bytes>
INFCTX_DEVICE void store_global(void* address, const Packet<bytes>& packet, bool valid INFCTX_AND_PLACE) {
    static_assert(bytes == 4 || bytes == 8, "one or two registers");
#ifdef INFCTX_EMULATOR
    if (valid) store_packet<bytes>(address, packet, file, line);
#else
    if (bytes == 4) {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p st.global.b32 [%0], %1; }"
                     :
                     : "l"(address), "r"(packet.x[0]), "r"(static_cast<uint32>(valid))
                     : "memory");
    } else {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; @p st.global.v2.b32 [%0], {%1, %2}; }"
                     :
                     : "l"(address), "r"(packet.x[0]), "r"(packet.x[bytes / 4 - 1]), "r"(static_cast<uint32>(valid))
                     : "memory");
    }
#endif
}

// Prefetches the 128 bytes around an address of global memory into the L2 cache; loading them from there takes a third
// of the time.
INFCTX_DEVICE void prefetch(const void* address) {
#ifndef INFCTX_EMULATOR
    asm volatile("prefetch.global.L2 [%0];" : : "l"(__cvta_generic_to_global(address)));
#endif
}

#ifndef INFCTX_EMULATOR
// The address inside the shared window, which the instructions below need instead of a generic one.
INFCTX_DEVICE uint32 shared_address(const void* shared) {
    return static_cast<uint32>(__cvta_generic_to_shared(shared));
}
#endif

// Copies 16 bytes from global to shared memory, both aligned to 16, while the thread continues.  If `valid` is false,
// zeros arrive and `global` is not read.  Visible after cp_async_wait to this thread, after a barrier to others.
INFCTX_DEVICE void cp_async_16(void* shared, const void* global, bool valid INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    emulator::copy_async_16(shared, global, valid, {file, line});
#else
    asm volatile(
        "{ .reg .u64 source; cvta.to.global.u64 source, %1; cp.async.cg.shared.global [%0], [source], 16, %2; }"
        :
        : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
        : "memory");
#endif
}

// Ends a group: this thread's copies since the last one.  A group may be empty.
INFCTX_DEVICE void cp_async_commit() {
#ifdef INFCTX_EMULATOR
    emulator::copy_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the newest `groups_left` of this thread's groups are in flight.
template <int groups_left>
INFCTX_DEVICE void cp_async_wait() {
#ifdef INFCTX_EMULATOR
    emulator::copy_async_wait(groups_left);
#else
    asm volatile("cp.async.wait_group %0;" : : "n"(groups_left) : "memory");
#endif
}

// ---- from lane to lane ----

// The value of lane `lane ^ mask`, for masks below 32.
INFCTX_DEVICE uint32 shuffle_xor(uint32 value, int32 mask INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    return emulator::shuffle_xor(value, mask, {file, line});
#else
    asm volatile("shfl.sync.bfly.b32 %0, %0, %1, 0x1f, 0xffffffff;" : "+r"(value) : "r"(mask));
    return value;
#endif
}

// The value of lane `lane - distance`; the first `distance` lanes keep their own.
INFCTX_DEVICE uint32 shuffle_up(uint32 value, int32 distance INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    return emulator::shuffle_up(value, distance, {file, line});
#else
    asm volatile("shfl.sync.up.b32 %0, %0, %1, 0, 0xffffffff;" : "+r"(value) : "r"(distance));
    return value;
#endif
}

// The value of lane `lane + distance`; the last `distance` lanes keep their own.
INFCTX_DEVICE uint32 shuffle_down(uint32 value, int32 distance INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    return emulator::shuffle_down(value, distance, {file, line});
#else
    asm volatile("shfl.sync.down.b32 %0, %0, %1, 0x1f, 0xffffffff;" : "+r"(value) : "r"(distance));
    return value;
#endif
}

// The value of lane `source`, which each lane chooses.
INFCTX_DEVICE uint32 shuffle_from(uint32 value, int32 source INFCTX_AND_PLACE) {
#ifdef INFCTX_EMULATOR
    return emulator::shuffle_from(value, source, {file, line});
#else
    asm volatile("shfl.sync.idx.b32 %0, %0, %1, 0x1f, 0xffffffff;" : "+r"(value) : "r"(source));
    return value;
#endif
}

#ifdef INFCTX_EMULATOR
#define INFCTX_PASS_PLACE , file, line
#else
#define INFCTX_PASS_PLACE
#endif

// The same four for int32 and float.
#define INFCTX_SHUFFLE(name)                                                                      \
    INFCTX_DEVICE int32 name(int32 value, int32 parameter INFCTX_AND_PLACE) {                     \
        return static_cast<int32>(name(static_cast<uint32>(value), parameter INFCTX_PASS_PLACE)); \
    }                                                                                             \
    INFCTX_DEVICE float name(float value, int32 parameter INFCTX_AND_PLACE) {                     \
        return bits_float(name(float_bits(value), parameter INFCTX_PASS_PLACE));                  \
    }
INFCTX_SHUFFLE(shuffle_xor)
INFCTX_SHUFFLE(shuffle_up)
INFCTX_SHUFFLE(shuffle_down)
INFCTX_SHUFFLE(shuffle_from)
#undef INFCTX_SHUFFLE
#undef INFCTX_PASS_PLACE
