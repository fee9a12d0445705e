// Copying kept entries (pages, or tokens of them) into regions.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace kvcompress {

// Entries that a block has in its list at once.
constexpr int LIST_ENTRIES = 4096;

// What a block has to copy: for each entry its number in the pool, which is that of a page, or of a
// token (page * b + place). 32 bits reach 549 GB of the smallest tokens; addresses have 64.
struct CopyList {
  // [LIST_ENTRIES] each, in shared memory.
  uint32_t* source;
  uint32_t* target;
};

constexpr size_t COPY_LIST_BYTES = 2 * LIST_ENTRIES * sizeof(uint32_t);

__device__ inline CopyList copy_list(uint32_t* shared) {
  return {shared, shared + LIST_ENTRIES};
}

// What every entry of a request's prompt and region is addressed by.
struct RowPages {
  const int32_t* block_table;
  int num_region_blocks;
  int region_column;
  unsigned num_streams;
  // Logarithm of the entries per page, a power of two: divisions cost registers.
  int page_shift;

  // Pool number of an entry of the prompt, given its index in the stream.
  __device__ uint32_t source(unsigned stream, unsigned index) const {
    const uint32_t block = block_table[index >> page_shift];
    return (block * num_streams + stream) << page_shift | (index & place_mask());
  }

  // Pool number of an entry of the region, counted from the region's first page on.
  __device__ uint32_t target(unsigned entry) const {
    const unsigned page = entry >> page_shift;
    const uint32_t block = block_table[region_column + page / num_streams];
    return (block * num_streams + page % num_streams) << page_shift | (entry & place_mask());
  }

  __device__ unsigned place_mask() const { return (1u << page_shift) - 1; }
};

__device__ inline RowPages row_pages(const Pages& pages, int request) {
  const int32_t* row = pages.rows + request * ROW_WIDTH;
  return {pages.block_table + request * pages.table_stride, row[ROW_NUM_REGION_BLOCKS],
          row[ROW_REGION_COLUMN], static_cast<unsigned>(pages.num_streams),
          __ffs(pages.entries_per_page) - 1};
}

// 16 bytes.
struct alignas(16) Vector {
  uint32_t word[4];
};

// Copy `num_entries` listed entries. All threads call, after a barrier that follows the list.
//
// Four units per thread are on the way before the first is stored: 32 KB per block, 64 KB and more
// per SM. Memory of 8 TB/s with a latency of 1 us needs 54 KB, so an asynchronous copy through
// shared memory (cp.async) would add a trip and save nothing but registers.
//
// Args:
//   units_per_entry: of type Unit.
template <typename Unit>
__device__ void copy_entries(void* pool, const CopyList& list, int num_entries,
                             unsigned units_per_entry) {
  constexpr int NUM_UNITS = 4;
  Unit* units = static_cast<Unit*>(pool);
  const auto unit_of = [&](uint32_t pool_entry, unsigned entry, unsigned unit) {
    return units + (static_cast<int64_t>(pool_entry) - entry) * units_per_entry + unit;
  };
  const unsigned num_units = num_entries * units_per_entry;
#pragma unroll 1
  for (unsigned start = threadIdx.x; start < num_units; start += NUM_UNITS * NUM_THREADS) {
    Unit moved[NUM_UNITS];
    unsigned entry[NUM_UNITS];
#pragma unroll
    for (int i = 0; i < NUM_UNITS; ++i) {
      const unsigned unit = start + i * NUM_THREADS;
      if (unit >= num_units) continue;
      entry[i] = unit / units_per_entry;
      moved[i] = *unit_of(list.source[entry[i]], entry[i], unit);
    }
#pragma unroll
    for (int i = 0; i < NUM_UNITS; ++i) {
      const unsigned unit = start + i * NUM_THREADS;
      if (unit < num_units) *unit_of(list.target[entry[i]], entry[i], unit) = moved[i];
    }
  }
}

__host__ __device__ inline int entry_bytes(const Pages& pages) {
  return pages.block_size / pages.entries_per_page * pages.token_bytes;
}

// Calls `run` with the widest unit that tokens and the pool's address are whole numbers of.
template <typename Run>
cudaError_t with_unit(const Pages& pages, const Run& run) {
  const uintptr_t both = reinterpret_cast<uintptr_t>(pages.pool) | pages.token_bytes;
  if (both % sizeof(Vector) == 0) return run(Vector{});
  if (both % sizeof(uint32_t) == 0) return run(uint32_t{});
  return run(uint8_t{});
}

}  // namespace kvcompress
