// Shared by the emulator's files: emulator.cpp runs the threads, device.cpp has the primitives.

#pragma once

#include <string>
#include <vector>

#include "emulator.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

constexpr int warp_size = 32;

// One lane's part in a warp primitive: its input, and its result once all 32 lanes are there.
struct Exchange {
    unsigned given[10];
    unsigned taken[4];
};

using Operation = void (*)(Exchange* const* lanes);

// Waits until all lanes of the warp are at the same primitive of the same line.
void meet_warp(const char* name, Operation operation, Place place);

Exchange& this_exchange();

// Ends the launch; the message is completed with the kernel, the block and the thread.
[[noreturn]] void fail(Place place, const std::string& what);

std::string describe(Place place);

// Kernel, block and thread that run now.
std::string where_now();

// A thread's copies in flight, oldest first: `ends` are the lengths of the list at the commits.
struct Copies {
    struct Copy {
        void* shared;
        const void* global;
        Place place;
    };
    std::vector<Copy> list;
    std::vector<size_t> ends;
};

Copies& this_thread_copies();

// ---- device.cpp ----

void set_tf32(int model);

void prepare_shared(size_t bytes);
void poison_shared();
// Describes damage to the guard zones by a block, or is empty.
std::string damage_to_shared();
// Describes an address outside dynamic shared memory, or is empty.
std::string place_beside_shared(const void* address);

}  // namespace emulator

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

// Runs a kernel to its end; 0, or 1 with a message.  `order`: 0 forward, 1 reverse, 2 random; `tf32` is the model of an
// operand.
EMULATOR_EXPORT int emulator_launch(const char* name, const unsigned* grid, const unsigned* block, size_t shared_bytes,
                                    void** arguments, int order, unsigned long long seed, int tf32, char* message,
                                    size_t message_bytes);

// One line per kernel: its name and parameters.
EMULATOR_EXPORT const char* emulator_kernels();
