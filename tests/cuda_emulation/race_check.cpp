// Races in shared and global memory: who touched what since the last barrier. See cuda_runtime.h.
//
// Time is counted in intervals: a block begins one, and so does each of its barriers; within an interval, __syncwarp
// begins another turn of a warp's threads. For every two bytes the last writer and the readers since are kept. An
// access races where another thread's came in the same interval, not in an earlier turn of the same warp; or where it
// came from another block of the same launch; and one of the two is a write.
#include "cuda_runtime.h"
#include "scheduler.h"

#include <atomic>
#include <dlfcn.h>
#include <unordered_map>
#include <vector>

namespace emulation {
namespace {
constexpr int NOBODY = -1, SEVERAL = -2; // SEVERAL readers of one warp; of many warps where reader_warp says NOBODY.

struct Cell {
    uint32_t written = 0, read = 0, first_read = 0; // Intervals; 0 before any. first_read: of the launch.
    uint32_t write_turn = 0, read_turn = 0;
    int16_t writer = NOBODY, reader = NOBODY, reader_warp = NOBODY;
};

constexpr uintptr_t PAGE_BYTES = 4096;
using Page = std::vector<Cell>;
std::unordered_map<uintptr_t, Page> pages;
uintptr_t last_page_number = 0;
Page* last_page = nullptr;

uint32_t interval = 0, launch_began = 0, block_began = 0;
uint32_t turns[1024];

Cell& cell_of(uintptr_t address) {
    const uintptr_t number = address / PAGE_BYTES;
    if (number != last_page_number) {
        Page& page = pages[number];
        if (page.empty())
            page.resize(PAGE_BYTES / 2);
        last_page_number = number, last_page = &page;
    }
    return (*last_page)[address % PAGE_BYTES / 2];
}

bool in_another_block(uint32_t then) { return then >= launch_began && then < block_began; }

// Whether what `other` did in interval `then` and turn `turn` may happen at the same time as what this thread does.
bool concurrent(uint32_t then, int other, int other_warp, uint32_t turn) {
    if (then != interval || other == thread)
        return false;
    return other_warp != thread / 32 || turn >= turns[thread];
}

void touch_cell(uintptr_t address, bool is_write, bool in_shared, void* code) {
    Cell& cell = cell_of(address);
    if (in_shared && cell.written < block_began && !is_write)
        fail("shared memory is read before it is written");
    const bool write_apart = !in_shared && in_another_block(cell.written);
    const bool read_apart = !in_shared && is_write && in_another_block(cell.first_read);
    const bool write_races = write_apart || concurrent(cell.written, cell.writer, cell.writer / 32, cell.write_turn);
    const bool read_races =
        is_write && (read_apart || concurrent(cell.read, cell.reader, cell.reader_warp, cell.read_turn));
    if (write_races || read_races) {
        Dl_info library{};
        dladdr(code, &library);
        const int who = write_races ? cell.writer : cell.reader >= 0 ? cell.reader : cell.reader_warp;
        const char* kind = write_races || cell.reader >= 0 ? "thread" : who >= 0 ? "several of warp" : "several warps,";
        fail("race in %s memory: thread %d %s what %s %d %s%s; the code is at 0x%tx of %s",
             in_shared ? "shared" : "global", thread, is_write ? "writes" : "reads", kind, who,
             write_races ? "wrote" : "read", (write_races ? write_apart : read_apart) ? " in another block" : "",
             static_cast<char*>(code) - static_cast<char*>(library.dli_fbase),
             library.dli_fname ? library.dli_fname : "?");
    }
    if (is_write) {
        cell.written = interval, cell.writer = thread, cell.write_turn = turns[thread];
        return;
    }
    if (cell.first_read < launch_began)
        cell.first_read = interval;
    if (cell.read != interval) {
        cell.read = interval, cell.reader = thread, cell.reader_warp = thread / 32, cell.read_turn = turns[thread];
    } else if (cell.reader != thread) {
        cell.reader = SEVERAL;
        if (cell.reader_warp != thread / 32)
            cell.reader_warp = NOBODY;
        cell.read_turn = std::max(cell.read_turn, turns[thread]);
    } else {
        cell.read_turn = turns[thread];
    }
}

void touch_at(const void* address, size_t bytes, bool is_write, void* code) {
    if (thread < 0 || is_private(address))
        return;
    check_shared(address, bytes);
    const bool in_shared = is_shared(address);
    const auto first = reinterpret_cast<uintptr_t>(address);
    for (uintptr_t place = first & ~uintptr_t{1}; place < first + bytes; place += 2)
        touch_cell(place, is_write, in_shared, code);
}
} // namespace

void touch(const void* address, size_t bytes, bool is_write) {
    touch_at(address, bytes, is_write, __builtin_return_address(0));
}

void next_interval() { ++interval; }
void start_launch() {
    ++interval;
    launch_began = interval;
}
void start_block() {
    ++interval;
    block_began = interval;
    std::fill(std::begin(turns), std::end(turns), 0);
}
unsigned warp_turn() { return turns[thread]; }
void set_warp_turn(unsigned turn) { turns[thread] = turn; }
} // namespace emulation

// What -fsanitize=thread calls.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}

#define ANNOUNCED(bytes)                                                                                               \
    void __tsan_read##bytes(void* p) { emulation::touch_at(p, bytes, false, __builtin_return_address(0)); }            \
    void __tsan_write##bytes(void* p) { emulation::touch_at(p, bytes, true, __builtin_return_address(0)); }            \
    void __tsan_unaligned_read##bytes(void* p) { emulation::touch_at(p, bytes, false, __builtin_return_address(0)); }  \
    void __tsan_unaligned_write##bytes(void* p) { emulation::touch_at(p, bytes, true, __builtin_return_address(0)); }
ANNOUNCED(1)
ANNOUNCED(2)
ANNOUNCED(4)
ANNOUNCED(8)
ANNOUNCED(16)
void __tsan_read_range(void* p, size_t n) { emulation::touch_at(p, n, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { emulation::touch_at(p, n, true, __builtin_return_address(0)); }

// Atomics of the host's headers.
#define ATOMIC(bits)                                                                                                   \
    using Bits##bits = uint##bits##_t;                                                                                 \
    Bits##bits __tsan_atomic##bits##_load(Bits##bits* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }         \
    void __tsan_atomic##bits##_store(Bits##bits* p, Bits##bits v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }   \
    Bits##bits __tsan_atomic##bits##_exchange(Bits##bits* p, Bits##bits v, int) {                                      \
        return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                            \
    }                                                                                                                  \
    Bits##bits __tsan_atomic##bits##_fetch_add(Bits##bits* p, Bits##bits v, int) {                                     \
        return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                             \
    }                                                                                                                  \
    Bits##bits __tsan_atomic##bits##_fetch_sub(Bits##bits* p, Bits##bits v, int) {                                     \
        return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                             \
    }                                                                                                                  \
    bool __tsan_atomic##bits##_compare_exchange_strong(Bits##bits* p, Bits##bits* e, Bits##bits v, int, int) {         \
        return __atomic_compare_exchange_n(p, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                        \
    }
ATOMIC(8)
ATOMIC(32)
ATOMIC(64)

// What -fsanitize=alignment,bounds call, each with where it stands in the source.
struct SourceLocation {
    const char* file;
    uint32_t line, column;
};
void __ubsan_handle_type_mismatch_v1(SourceLocation* at, void* address) {
    if (emulation::thread >= 0)
        emulation::fail("%s:%u: crooked address %p", at->file, at->line, address);
}
void __ubsan_handle_out_of_bounds(SourceLocation* at, void* index) {
    if (emulation::thread >= 0)
        emulation::fail("%s:%u: index %zd is outside", at->file, at->line, (ptrdiff_t)index);
}
}
