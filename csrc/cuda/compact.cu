// Copies of what is kept from prompts' pages into their regions, all layers and heads at once.
#include "copy.cuh"

namespace kvcompress {

// Bytes that a block copies, about.
constexpr int BLOCK_BYTES = 128 * 1024;

struct CompactParams {
  Compaction compaction;
  // Virtual pages per block.
  int pages_per_block;
};

// Last of a request's streams that starts at or before a virtual page.
__device__ inline int stream_of_page(const int32_t* offsets, int num_streams, int page) {
  int stream = 0;
  int end = num_streams;
  while (end - stream > 1) {
    const int middle = (stream + end) / 2;
    if (offsets[middle] <= page) {
      stream = middle;
    } else {
      end = middle;
    }
  }
  return stream;
}

// Grid: parts of the regions, requests. Shared memory: the copy list.
template <typename Unit>
__global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
    compact_kernel(const __grid_constant__ CompactParams params) {
  const Pages& pages = params.compaction.pages;
  const int request = blockIdx.y;
  const int num_streams = pages.num_streams;
  const int page_entries = pages.entries_per_page;
  const RowPages row = row_pages(pages, request);
  const int first_page = static_cast<int>(blockIdx.x) * params.pages_per_block;
  const int num_pages =
      min(row.num_region_blocks * num_streams - first_page, params.pages_per_block);
  if (num_pages <= 0) return;
  const int32_t* offsets =
      params.compaction.page_offsets + static_cast<int64_t>(request) * (num_streams + 1);
  const int32_t* indices = params.compaction.indices + request * params.compaction.indices_stride +
                           static_cast<int64_t>(first_page) * page_entries;
  const CopyList list = copy_list(dynamic_shared());
  for (int entry = threadIdx.x; entry < num_pages * page_entries; entry += NUM_THREADS) {
    const int page = first_page + (entry >> row.page_shift);
    list.source[entry] = row.source(stream_of_page(offsets, num_streams, page), indices[entry]);
    list.target[entry] = row.target(first_page * page_entries + entry);
  }
  __syncthreads();
  copy_entries<Unit>(pages.pool, list, num_pages * page_entries, entry_bytes(pages) / sizeof(Unit));
}

cudaError_t launch_compact(const Compaction& compaction, cudaStream_t stream) {
  const Pages& pages = compaction.pages;
  const int64_t max_pages = static_cast<int64_t>(pages.max_region_blocks) * pages.num_streams;
  if (pages.num_requests == 0 || max_pages == 0) return cudaSuccess;
  const int page_bytes = pages.block_size * pages.token_bytes;
  const int whole = BLOCK_BYTES / page_bytes;
  const int listed = LIST_ENTRIES / pages.entries_per_page;
  const int fitting = whole < listed ? whole : listed;
  const int pages_per_block = fitting < 1 ? 1 : fitting;
  const int64_t num_blocks = (max_pages + pages_per_block - 1) / pages_per_block;
  const dim3 grid(static_cast<unsigned>(num_blocks), pages.num_requests);
  return with_unit(pages, [&](auto unit) {
    return launch(compact_kernel<decltype(unit)>, grid, COPY_LIST_BYTES, stream,
                  CompactParams{compaction, pages_per_block});
  });
}

}  // namespace kvcompress
