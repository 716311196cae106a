// The threads of a block as fibers, barriers, and what the lanes of a warp do together. See cuda_runtime.h.
//
// A fiber starts on a stack of its own by makecontext; from then on setjmp and longjmp switch in a few nanoseconds.
#include "scheduler.h"
#include "cuda_runtime.h"

#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

namespace emulation {
Place place;

namespace {
constexpr int MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 256 * 1024, MAX_SHARED_BYTES = 227 * 1024;

enum class State { READY, AT_BARRIER, IN_WARP, RETURNED };

struct Fiber {
    State state;
    bool started;
    dim3 index;
    const char* doing; // In a warp: what, with whom, with which operands.
    unsigned mask;
    void* payload;
    jmp_buf context;
};

std::mutex one_launch;
Fiber fibers[MAX_THREADS];
char* stacks;
char* shared;
size_t shared_size;
jmp_buf scheduler;
int threads, arrived, votes, votes_of_all;
void (*body)(void*);
void* argument;
std::string failure;

// Back to the scheduler, until it resumes this fiber.
void leave() {
    if (!_setjmp(fibers[thread].context))
        _longjmp(scheduler, 1);
}

void fiber_main() {
    for (;;) {
        body(argument);
        fibers[thread].state = State::RETURNED;
        leave();
    }
}

void start(Fiber& fiber) {
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + (&fiber - fibers) * STACK_BYTES;
    context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&context, fiber_main, 0);
    fiber.started = true;
    setcontext(&context);
}

void resume(int next) {
    thread = next;
    place.thread = fibers[next].index;
    if (!_setjmp(scheduler)) {
        if (fibers[next].started)
            _longjmp(fibers[next].context, 1);
        start(fibers[next]);
    }
    thread = -1;
}

std::string who_waits() {
    int at_barrier = 0, returned = 0;
    std::string text;
    for (int i = 0; i < threads; ++i) {
        at_barrier += fibers[i].state == State::AT_BARRIER;
        returned += fibers[i].state == State::RETURNED;
        if (fibers[i].state == State::IN_WARP && text.size() < 200)
            text += ", thread " + std::to_string(i) + " in " + fibers[i].doing;
    }
    return std::to_string(at_barrier) + " of " + std::to_string(threads) + " threads wait at a barrier, " +
           std::to_string(returned) + " have returned" + text;
}

void run_block() {
    arrived = votes = 0;
    for (int i = 0; i < threads; ++i)
        fibers[i].state = State::READY;
    for (bool all_returned = false; !all_returned;) {
        bool progress = false;
        all_returned = true;
        for (int i = 0; i < threads; ++i) {
            if (fibers[i].state == State::READY) {
                resume(i);
                progress = true;
                if (!failure.empty())
                    return;
            }
            all_returned &= fibers[i].state == State::RETURNED;
        }
        if (!progress && !all_returned) {
            failure = "threads wait for others that never come: " + who_waits();
            return;
        }
    }
}

void allocate() {
    auto* memory = mmap(nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        throw std::runtime_error("cuda emulation: no memory for stacks");
    stacks = static_cast<char*>(memory);
    shared = static_cast<char*>(std::aligned_alloc(1024, MAX_SHARED_BYTES + 1024));
}
} // namespace

int thread = -1;

bool is_private(const void* address) {
    const auto* byte = static_cast<const char*>(address);
    const auto* here = reinterpret_cast<const char*>(&place);
    return (byte >= stacks && byte < stacks + MAX_THREADS * STACK_BYTES) ||
           (byte >= here && byte < here + sizeof place);
}

char* shared_memory() { return shared; }

void check_shared(const void* address, size_t bytes) {
    const auto offset = static_cast<const char*>(address) - shared;
    if (offset >= 0 && static_cast<size_t>(offset) <= MAX_SHARED_BYTES && offset + bytes > shared_size)
        fail("byte %td of %zu bytes of shared memory is touched", offset + bytes - 1, shared_size);
}

bool is_shared(const void* address) {
    const auto* byte = static_cast<const char*>(address);
    return byte >= shared && byte < shared + MAX_SHARED_BYTES;
}

void fail(const char* format, ...) {
    char text[600];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    const auto& [t, b, size, grid] = place;
    char where[120];
    std::snprintf(where, sizeof where, " (thread %u,%u,%u of block %u,%u,%u)", t.x, t.y, t.z, b.x, b.y, b.z);
    failure = std::string(text) + where;
    _longjmp(scheduler, 1);
}

int block_barrier(bool predicate) {
    fibers[thread].state = State::AT_BARRIER;
    votes += predicate;
    if (++arrived < threads) {
        leave();
        return votes_of_all;
    }
    for (int i = 0; i < threads; ++i)
        fibers[i].state = State::READY;
    votes_of_all = votes;
    arrived = votes = 0;
    next_interval();
    return votes_of_all;
}

void warp_collective(unsigned mask, const char* name, void* payload, Combine combine) {
    Fiber* const warp = &fibers[thread & ~31];
    Fiber& mine = fibers[thread];
    if (!(mask >> (thread & 31) & 1))
        fail("%s with mask %08x, which does not name the lane itself", name, mask);
    mine.state = State::IN_WARP;
    mine.doing = name, mine.mask = mask, mine.payload = payload;
    void* lanes[32] = {};
    for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1))
            continue;
        if ((thread & ~31) + lane >= threads)
            fail("%s with mask %08x names lanes beyond the block", name, mask);
        const Fiber& other = warp[lane];
        if (other.state != State::IN_WARP)
            return leave();
        if (other.mask != mask || std::strcmp(other.doing, name) != 0)
            fail("%s with mask %08x meets %s with mask %08x", name, mask, other.doing, other.mask);
        lanes[lane] = other.payload;
    }
    combine(lanes, mask);
    for (int lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1)
            warp[lane].state = State::READY;
}

void warp_barrier(unsigned mask) {
    unsigned turn = warp_turn();
    warp_collective(mask, "__syncwarp", &turn, [](void* const* lanes, unsigned) {
        unsigned latest = 0;
        for (int lane = 0; lane < 32; ++lane)
            if (lanes[lane])
                latest = std::max(latest, *static_cast<unsigned*>(lanes[lane]));
        for (int lane = 0; lane < 32; ++lane)
            if (lanes[lane])
                *static_cast<unsigned*>(lanes[lane]) = latest + 1;
    });
    set_warp_turn(turn);
}

void run(dim3 grid, dim3 block, size_t shared_bytes, void (*run_body)(void*), void* run_argument) {
    const std::lock_guard<std::mutex> guard(one_launch);
    if (!stacks)
        allocate();
    if (block.x * block.y * block.z > MAX_THREADS || block.x * block.y * block.z == 0 || grid.y > 65535 ||
        grid.z > 65535 || grid.x * grid.y * grid.z == 0 || shared_bytes > MAX_SHARED_BYTES)
        throw std::runtime_error("cuda emulation: a launch of this grid, block or shared memory is not possible");
    threads = block.x * block.y * block.z;
    body = run_body, argument = run_argument, shared_size = shared_bytes;
    place.block_size = block, place.grid_size = grid;
    for (int i = 0; i < threads; ++i)
        fibers[i].index = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
    failure.clear();
    start_launch();
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                place.block = dim3(x, y, z);
                start_block();
                std::memset(shared, 0xff, shared_size);
                run_block();
                if (failure.empty())
                    continue;
                // The other fibers stand in the middle of the kernel: they start anew.
                for (Fiber& fiber : fibers)
                    fiber.started = false;
                throw std::runtime_error("cuda emulation: " + failure);
            }
}
} // namespace emulation
