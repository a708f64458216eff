// The sanitized build is a separate program, so that no other allocations are mixed in: one launch, read from standard
// input as emulator.py writes it.  Each buffer is allocated to the byte, so that ASan sees any other access.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "inside.h"

namespace {

constexpr size_t alignment = 512;  // of torch's allocations on a GPU

struct Buffer {
    size_t offset = 0;  // of the first byte from an aligned address
    size_t bytes = 0;
    unsigned char* start = nullptr;
};

[[noreturn]] void stop(const char* message) {
    fprintf(stderr, "EMULATOR: %s\n", message);
    fflush(nullptr);
    _Exit(3);
}

void require(bool condition) {
    if (!condition) stop("the request is not whole");
}

void allocate(Buffer& buffer) {
    void* memory = nullptr;
    require(posix_memalign(&memory, alignment, buffer.offset + buffer.bytes + (buffer.bytes == 0)) == 0);
    buffer.start = static_cast<unsigned char*>(memory) + buffer.offset;
    require(fread(buffer.start, 1, buffer.bytes, stdin) == buffer.bytes);
    __asan_poison_memory_region(memory, buffer.offset);
    if (!buffer.bytes) __asan_poison_memory_region(buffer.start, 1);
}

void say_where() {
    fprintf(stderr, "EMULATOR: %s\n", emulator::where_now().c_str());
    if (!__asan_report_present()) return;
    const std::string beside = emulator::place_beside_shared(__asan_get_report_address());
    if (!beside.empty()) fprintf(stderr, "EMULATOR: %s\n", beside.c_str());
}

}  // namespace

// Fibers of a failed launch are not leaks.
EMULATOR_EXPORT const char* __asan_default_options() { return "detect_leaks=0:detect_stack_use_after_return=0"; }

// UBSan calls this; ASan calls the death callback.
EMULATOR_EXPORT void __ubsan_on_report() { say_where(); }

int main(int argc, char** argv) {
    if (argc > 1 && !strcmp(argv[1], "kernels")) return fputs(emulator_kernels(), stdout) < 0;
    __sanitizer_set_death_callback(say_where);
    char name[256], message[4096];
    unsigned grid[3], block[3];
    size_t shared_bytes, num_buffers, num_arguments;
    int order, tf32;
    unsigned long long seed;
    require(scanf("%255s %u %u %u %u %u %u %zu %d %llu %d %zu %zu", name, &grid[0], &grid[1], &grid[2], &block[0],
                  &block[1], &block[2], &shared_bytes, &order, &seed, &tf32, &num_buffers, &num_arguments) == 13);
    std::vector<Buffer> buffers(num_buffers);
    for (Buffer& buffer : buffers) require(scanf("%zu %zu", &buffer.offset, &buffer.bytes) == 2);
    // An argument is a place in a buffer, or bits (-1 and a number).
    std::vector<std::pair<int, unsigned long long>> places(num_arguments);
    for (auto& [buffer, number] : places) require(scanf("%d %llu", &buffer, &number) == 2);
    require(getchar() == '\n');
    for (Buffer& buffer : buffers) allocate(buffer);

    std::vector<void*> values(num_arguments), arguments(num_arguments);
    for (size_t i = 0; i < num_arguments; ++i) {
        const auto [buffer, number] = places[i];
        if (buffer < 0)
            memcpy(&values[i], &number, 8);
        else
            values[i] = buffers.at(buffer).start + number;
        arguments[i] = &values[i];
    }
    if (emulator_launch(name, grid, block, shared_bytes, arguments.data(), order, seed, tf32, message, sizeof message))
        stop(message);
    for (const Buffer& buffer : buffers) require(fwrite(buffer.start, 1, buffer.bytes, stdout) == buffer.bytes);
    return fflush(stdout);
}
