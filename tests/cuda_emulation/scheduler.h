// What the emulation's two halves know of each other: the fibers (scheduler.cpp) and their memory (race_check.cpp).
#pragma once

#include <cstddef>

namespace emulation {
extern int thread; // Which thread of its block runs, -1 outside kernels.

bool is_private(const void* address);
bool is_shared(const void* address);
void check_shared(const void* address, size_t bytes);

void start_launch();
void start_block();
void next_interval();
unsigned warp_turn();
void set_warp_turn(unsigned turn);
} // namespace emulation
