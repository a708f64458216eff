// Runs kernels: one fiber per CUDA thread, the order of threads, barriers and warp primitives, reports of divergence.
//
// Fibers are entered once by setcontext and switched by _setjmp/_longjmp, which make no system call.

#include <setjmp.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>

#include "inside.h"

emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t most_threads = 1024;      // of a block, all architectures
constexpr size_t most_shared = 99 * 1024;  // dynamic shared memory of a block that sm_80 to sm_120 all have
constexpr size_t stack_bytes = 256 * 1024;
constexpr size_t page_bytes = 64 * 1024;  // a multiple of every page size in use

const char* const block_barrier = "sync_block";
const char* const roles_barrier = "sync_roles";
const char* const role_barrier = "sync_role";
constexpr int most_barriers = 16;

enum class State { ready, at_barrier, at_role_barrier, at_primitive, exited };
enum class Order { forward, reverse, random };

struct Stack {
    void* bottom = nullptr;
    size_t bytes = 0;
};

struct Thread {
    Index index;
    State state = State::ready;
    bool entered = false;  // its stack holds a place to resume from
    ucontext_t entry;
    jmp_buf position;
    Stack stack;

    const char* primitive = nullptr;  // the primitive it waits at, and where
    Place place = {};
    int barrier = 0, barrier_threads = 0;  // of its role, for how many threads
    Operation operation = nullptr;
    Exchange exchange;
    Copies copies;
};

struct Launch {
    const Kernel* kernel = nullptr;
    void** arguments = nullptr;
    std::vector<std::unique_ptr<Thread>> threads;  // kept from launch to launch for their stacks
    size_t num_threads = 0;
    Order order = Order::forward;
    std::mt19937_64 random;
    Thread* current = nullptr;
    std::string failure;
    jmp_buf scheduler;
    Stack scheduler_stack;
};

Launch launch;

std::vector<Kernel>& kernels() {
    static std::vector<Kernel> all;
    return all;
}

// ---- fibers ----

#ifdef __SANITIZE_ADDRESS__
// ASan has to know which stack is in use.
void leave_for(const Stack& stack) { __sanitizer_start_switch_fiber(nullptr, stack.bottom, stack.bytes); }

void arrive(Stack* from) {
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (from) *from = {const_cast<void*>(bottom), bytes};
}
#else
void leave_for(const Stack&) {}
void arrive(Stack*) {}
#endif

void to_scheduler() {
    Thread& self = *launch.current;
    if (_setjmp(self.position) == 0) {
        leave_for(launch.scheduler_stack);
        _longjmp(launch.scheduler, 1);
    }
    arrive(nullptr);
}

// A fiber runs thread after thread: one of each block.
void fiber() {
    arrive(&launch.scheduler_stack);
    for (;;) {
        launch.kernel->call(launch.kernel->function, launch.arguments);
        Thread& self = *launch.current;
        if (!self.copies.list.empty())
            fail(self.copies.list.front().place, "the thread ended without waiting for this cp_async_16");
        self.state = State::exited;
        to_scheduler();
    }
}

void resume(Thread& thread) {
    launch.current = &thread;
    threadIdx = thread.index;
    if (_setjmp(launch.scheduler) == 0) {
        leave_for(thread.stack);
        if (thread.entered) _longjmp(thread.position, 1);
        thread.entered = true;
        setcontext(&thread.entry);
    }
    arrive(nullptr);
    launch.current = nullptr;
    if (!launch.failure.empty()) throw std::runtime_error(launch.failure);
}

void make_fiber(Thread& thread) {
    if (!thread.stack.bottom) {
        // The lowest page stays closed: a stack overflow is a fault, not wrong numbers in another stack.
        void* memory = mmap(nullptr, page_bytes + stack_bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of the threads");
        mprotect(memory, page_bytes, PROT_NONE);
        thread.stack = {static_cast<char*>(memory) + page_bytes, stack_bytes};
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(thread.stack.bottom, thread.stack.bytes);
#endif
    getcontext(&thread.entry);
    thread.entry.uc_stack.ss_sp = thread.stack.bottom;
    thread.entry.uc_stack.ss_size = thread.stack.bytes;
    thread.entry.uc_link = nullptr;
    makecontext(&thread.entry, fiber, 0);
}

// ---- reports ----

std::string text(Index index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string where() { return std::string("kernel ") + launch.kernel->name + ", block " + text(blockIdx); }

// 0-31, 64, 70-95
std::string ranges(const std::vector<size_t>& numbers) {
    std::string result;
    for (size_t first = 0, last; first < numbers.size(); first = last + 1) {
        for (last = first; last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1;) ++last;
        result += (first ? ", " : "") + std::to_string(numbers[first]);
        if (last > first) result += "-" + std::to_string(numbers[last]);
    }
    return result;
}

// No thread can continue: reports where each waits.
[[noreturn]] void report_divergence() {
    bool in_warp = false;
    std::map<std::string, std::vector<size_t>> groups;
    for (size_t i = 0; i < launch.num_threads; ++i) {
        const Thread& thread = *launch.threads[i];
        in_warp |= thread.state == State::at_primitive;
        const bool ended = thread.state == State::exited;
        groups[ended ? "have ended" : std::string("wait at ") + thread.primitive + " of " + describe(thread.place)]
            .push_back(i);
    }
    std::string message = in_warp ? "divergent warp primitive: " : "divergent barrier: ";
    for (const auto& [what, threads] : groups)
        message += (&threads == &groups.begin()->second ? "" : "; ") + std::to_string(threads.size()) + " of " +
                   std::to_string(launch.num_threads) + " threads " + what + " (" + ranges(threads) + ")";
    if (in_warp && launch.num_threads % warp_size) message += "; the last warp has no 32 lanes";
    throw std::runtime_error(where() + ": " + message);
}

// ---- order ----

template <class Iterator>
void put_in_order(Iterator begin, Iterator end) {
    if (launch.order == Order::random) std::shuffle(begin, end, launch.random);
}

template <class Number>
std::vector<Number> in_order(Number count) {
    std::vector<Number> numbers(count);
    std::iota(numbers.begin(), numbers.end(), Number(0));
    if (launch.order == Order::reverse) std::reverse(numbers.begin(), numbers.end());
    put_in_order(numbers.begin(), numbers.end());
    return numbers;
}

bool same_place(Place one, Place other) {
    return one.line == other.line && (one.file == other.file || !strcmp(one.file, other.file));
}

// Lets each lane that can continue do so once; then runs the primitive at which all have met, if they have.
bool run_warp(size_t first, std::vector<size_t>& lanes) {
    put_in_order(lanes.begin(), lanes.end());
    bool went_on = false;
    size_t met = 0;
    const size_t count = std::min<size_t>(warp_size, launch.num_threads - first);
    const Thread& one = *launch.threads[first];
    for (size_t lane : lanes) {
        if (lane >= count) continue;
        Thread& thread = *launch.threads[first + lane];
        if (thread.state == State::ready) {
            resume(thread);
            went_on = true;
        }
    }
    for (size_t lane = 0; lane < count; ++lane) {
        const Thread& thread = *launch.threads[first + lane];
        met += thread.state == State::at_primitive && thread.operation == one.operation &&
               same_place(thread.place, one.place);
    }
    if (met == warp_size) {
        Exchange* exchanges[warp_size];
        for (size_t lane = 0; lane < warp_size; ++lane) {
            exchanges[lane] = &launch.threads[first + lane]->exchange;
            launch.threads[first + lane]->state = State::ready;
        }
        one.operation(exchanges);
    }
    return went_on;
}

// Opens the barrier if all threads are at the same one; the barrier of roles counts as the same wherever a whole warp
// meets it.  Returns false if all threads have ended.
bool open_barrier() {
    const Thread& one = *launch.threads[0];
    const auto end = launch.threads.begin() + launch.num_threads;
    const bool any_place = one.state == State::at_barrier && one.primitive == roles_barrier;
    const bool same = std::all_of(launch.threads.begin(), end, [&](const auto& thread) {
        if (thread->state != one.state || one.state == State::exited) return thread->state == one.state;
        const size_t in_warp = (&thread - &launch.threads[0]) / warp_size * warp_size;
        const Place place = any_place ? launch.threads[in_warp]->place : one.place;
        return thread->primitive == one.primitive && same_place(thread->place, place);
    });
    if (!same || one.state == State::at_primitive || one.state == State::at_role_barrier) report_divergence();
    if (one.state == State::exited) return false;
    std::for_each(launch.threads.begin(), end, [](const auto& thread) { thread->state = State::ready; });
    return true;
}

// Opens the barriers of roles at which as many threads as they are for have met.
bool open_role_barriers() {
    int met[most_barriers] = {}, wanted[most_barriers] = {};
    for (size_t i = 0; i < launch.num_threads; ++i) {
        const Thread& thread = *launch.threads[i];
        if (thread.state != State::at_role_barrier) continue;
        ++met[thread.barrier], wanted[thread.barrier] = thread.barrier_threads;
    }
    bool opened = false;
    for (size_t i = 0; i < launch.num_threads; ++i) {
        Thread& thread = *launch.threads[i];
        if (thread.state != State::at_role_barrier || met[thread.barrier] != wanted[thread.barrier]) continue;
        thread.state = State::ready, opened = true;
    }
    return opened;
}

// A warp runs until all its lanes are at the barrier before the next warp starts, so a missing barrier shows in either
// the forward or the reverse order.  The random order switches earlier, after any number of warp primitives.
void run_block() {
    for (size_t i = 0; i < launch.num_threads; ++i) {
        launch.threads[i]->state = State::ready;
        launch.threads[i]->copies = {};
    }
    poison_shared();
    std::vector<size_t> lanes = in_order<size_t>(warp_size);
    std::vector<size_t> warps = in_order<size_t>((launch.num_threads + warp_size - 1) / warp_size);
    do {
        for (bool went_on = true; went_on;) {
            went_on = false;
            put_in_order(warps.begin(), warps.end());
            for (size_t warp : warps) {
                while (run_warp(warp * warp_size, lanes)) {
                    went_on = true;
                    if (launch.order == Order::random && launch.random() % 16 == 0) break;
                }
                // Then the role continues in the same order: before the roles after it have begun.
                if (open_role_barriers() && (went_on = true)) break;
            }
        }
    } while (open_barrier());
    const std::string damage = damage_to_shared();
    if (!damage.empty()) throw std::runtime_error(where() + ": " + damage);
}

void run_grid(const char* name, const unsigned* grid, const unsigned* block, size_t shared_bytes) {
    const auto is_named = [&](const Kernel& kernel) { return !strcmp(kernel.name, name); };
    const auto kernel = std::find_if(kernels().begin(), kernels().end(), is_named);
    if (kernel == kernels().end()) throw std::runtime_error(std::string("no kernel ") + name);
    launch.kernel = &*kernel;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    launch.num_threads = size_t(block[0]) * block[1] * block[2];
    const size_t num_blocks = size_t(grid[0]) * grid[1] * grid[2];
    if (!launch.num_threads || launch.num_threads > most_threads || !num_blocks)
        throw std::runtime_error(std::string("kernel ") + name + ": a grid of " + text(gridDim) + " blocks of " +
                                 text(blockDim) + " threads; a block has 1 to 1024 threads, a grid a block at least");
    if (shared_bytes > most_shared)
        throw std::runtime_error(std::string("kernel ") + name + ": " + std::to_string(shared_bytes) +
                                 " bytes of dynamic shared memory; every architecture has 101376");
    prepare_shared(shared_bytes);
    while (launch.threads.size() < launch.num_threads) launch.threads.push_back(std::make_unique<Thread>());
    for (size_t i = 0; i < launch.num_threads; ++i) {
        Thread& thread = *launch.threads[i];
        thread.index = {unsigned(i % block[0]), unsigned(i / block[0] % block[1]), unsigned(i / block[0] / block[1])};
        if (!thread.entered) make_fiber(thread);
    }
    for (size_t i : in_order(num_blocks)) {
        blockIdx = {unsigned(i % grid[0]), unsigned(i / grid[0] % grid[1]), unsigned(i / grid[0] / grid[1])};
        run_block();
    }
}

void wait_at(State state, const char* primitive, Operation operation, Place place) {
    Thread& self = *launch.current;
    self.state = state;
    self.primitive = primitive;
    self.operation = operation;
    self.place = place;
    to_scheduler();
}

}  // namespace

void sync_block(Place place) { wait_at(State::at_barrier, block_barrier, nullptr, place); }
void sync_roles(Place place) { wait_at(State::at_barrier, roles_barrier, nullptr, place); }
void sync_role(int barrier, int threads, Place place) {
    if (barrier < 1 || barrier >= most_barriers) fail(place, "a role's barrier is 1 to 15");
    launch.current->barrier = barrier, launch.current->barrier_threads = threads;
    wait_at(State::at_role_barrier, role_barrier, nullptr, place);
}

void meet_warp(const char* name, Operation operation, Place place) {
    wait_at(State::at_primitive, name, operation, place);
}

Exchange& this_exchange() { return launch.current->exchange; }

Copies& this_thread_copies() { return launch.current->copies; }

std::string describe(Place place) {
    const char* slash = strrchr(place.file, '/');
    return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

void fail(Place place, const std::string& what) {
    launch.failure = where() + ", thread " + text(threadIdx) + ": " + describe(place) + ": " + what;
    to_scheduler();
    __builtin_unreachable();
}

std::string where_now() { return launch.current ? where() + ", thread " + text(threadIdx) : "outside of a kernel"; }

void add_kernel(const Kernel& kernel) { kernels().push_back(kernel); }

}  // namespace emulator

extern "C" int emulator_launch(const char* name, const unsigned* grid, const unsigned* block, size_t shared_bytes,
                               void** arguments, int order, unsigned long long seed, int tf32, char* message,
                               size_t message_bytes) {
    using emulator::launch;
    emulator::set_tf32(tf32);
    launch.arguments = arguments;
    launch.order = static_cast<emulator::Order>(order);
    launch.random.seed(seed);
    launch.failure.clear();
    try {
        emulator::run_grid(name, grid, block, shared_bytes);
        return 0;
    } catch (const std::exception& error) {
        snprintf(message, message_bytes, "%s", error.what());
    }
    for (auto& thread : launch.threads) thread->entered = false;  // they hang in the middle of the kernel
    launch.current = nullptr;
    return 1;
}

extern "C" const char* emulator_kernels() {
    static std::string lines;
    lines.clear();
    for (const auto& kernel : emulator::kernels()) lines += std::string(kernel.name) + " " + kernel.parameters + "\n";
    return lines.c_str();
}
