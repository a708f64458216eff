// What the emulator's own files share: emulator.cpp runs the threads, device.cpp does what the primitives say.

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

// One lane's part in a warp primitive: what it brings, and what it is given once all 32 lanes are there.
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

// A thread's copies under way, oldest first: `ends` are the lengths of the list at the commits.
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

// ---- shared memory: device.cpp ----

void prepare_shared(size_t bytes);
void poison_shared();
// What a block did to the guard zones, or nothing.
std::string damage_to_shared();
// Where an address beside dynamic shared memory lies, or nothing.
std::string place_beside_shared(const void* address);

}  // namespace emulator

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

// Runs a kernel to its end; 0, or 1 with a message.  `order`: 0 forward, 1 reverse, 2 random.
EMULATOR_EXPORT int emulator_launch(const char* name, const unsigned* grid, const unsigned* block, size_t shared_bytes,
                                    void** arguments, int order, unsigned long long seed, char* message,
                                    size_t message_bytes);

// One line a kernel: its name and its parameters.
EMULATOR_EXPORT const char* emulator_kernels();
