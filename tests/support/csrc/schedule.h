// The grid that runs: which blocks are there at once, whose turn it is, and what its threads may
// do.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_on_host.h"
#include "happens_before.h"

namespace on_host {

// Settings of all grids from now on.
struct Settings {
  uint64_t seed = 0;
  // Whether accesses are checked; those that are plain are seen in an instrumented build only.
  bool is_checked = false;
  // What to leave out: a barrier, a fence, or that an atomic is one. No line if nothing.
  char without_file[64] = "";
  int without_line = 0;
};
extern Settings settings;

// Memory that kernels may touch, beside what is shared in a block.
void allow_memory(const void* start, size_t num_bytes);
void forget_memory();

// What was wrong in the last grid; empty if nothing.
const char* last_fault();

// Called before a thread touches memory: others may have their turn first.
void before_access(const void* pointer, size_t num_bytes, Kind kind, uintptr_t code);

}  // namespace on_host
