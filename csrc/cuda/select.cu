// Which entries each stream keeps, and, where wanted, copying them to the request's region at once.
#include "copy.cuh"
#include "digits.cuh"

namespace kvcompress {

// Entries that the block goes over between two sums.
constexpr int TILE_ENTRIES = 4 * NUM_THREADS;
static_assert(2 * TILE_ENTRIES <= LIST_ENTRIES, "a tile is added to a list that is not yet full");
static_assert(TILE_ENTRIES < 1 << 15, "two counts of a tile are packed into one int");
// Most blocks that copy one stream's pages.
constexpr int MAX_PARTS = 16;
// Bytes that make a block of its own worth while: it selects anew what another has selected.
constexpr int MIN_PART_BYTES = 64 * 1024;
// Bytes that it must copy per byte of scores that it reads again.
constexpr int COPIED_PER_SCORE = 4;

// What a stream keeps: all entries above a key, and the first few of those equal to it.
struct Cut {
  uint32_t key;
  int num_equal;
};

// One digit of the search for a cut; true if the cut is known.
template <int DIGIT>
__device__ bool narrow(const Row& row, uint32_t* histogram, Cut* cut, int* wanted) {
  uint32_t prefix = 0;
  if constexpr (DIGIT > 0) prefix = cut->key >> digit_shift(DIGIT - 1);
  clear_bins<DIGIT>(histogram);
  __syncthreads();
  count_digits<DIGIT>(row, prefix, histogram);
  __syncthreads();
  OwnBins<DIGIT> own;
#pragma unroll
  for (int i = 0; i < own.PER_THREAD; ++i) own.count[i] = histogram[own.bin(i)];
  const Reached reached = reach<DIGIT>(own, 0, *wanted);
  cut->key |= static_cast<uint32_t>(reached.digit) << digit_shift(DIGIT);
  *wanted -= reached.num_above;
  return *wanted == reached.num_in_bin;
}

// The cut at which `wanted` entries are kept, 1 or more. Radix selection; ends as soon as a digit
// separates what is kept from the rest, mostly after the second. All threads call.
__device__ Cut find_cut(const Row& row, int wanted, uint32_t* histogram) {
  Cut cut = {0, 0};
  // All entries from the key on, whatever follows the digits that are known.
  const bool is_exact =
      narrow<0>(row, histogram, &cut, &wanted) || narrow<1>(row, histogram, &cut, &wanted);
  if (is_exact) {
    cut.num_equal = row.num_entries;
  } else {
    narrow<2>(row, histogram, &cut, &wanted);
    cut.num_equal = wanted;
  }
  return cut;
}

struct SelectParams {
  Selection selection;
  Pages pages;
  // Pages from which on a stream's copy is shared among several blocks.
  int pages_per_part;
};

// One stream's best entries in ascending order, and where they start among its request's.
//
// Grid: streams, requests, parts. With `Unit` other than void the block also copies its part of the
// stream's pages; it finds the stream's cut by itself, so that blocks need not wait for each other,
// and the first one writes the results. Shared memory: the copy list.
template <typename Unit>
__global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
    select_kernel(const __grid_constant__ SelectParams params) {
  constexpr bool COPIES = !std::is_void_v<Unit>;
  const Selection& selection = params.selection;
  const Scores& scores = selection.scores;
  const int stream = blockIdx.x;
  const int request = blockIdx.y;
  const int part = blockIdx.z;
  const int num_streams = scores.num_streams;
  const int page_size = scores.page_size;
  const int32_t* request_pages = selection.num_pages + static_cast<int64_t>(request) * num_streams;
  const int num_pages = request_pages[stream];

  // Places among the stream's chosen entries that this block copies.
  int copy_begin = 0;
  int copy_end = 0;
  RowPages row_of_pages = {};
  if constexpr (COPIES) {
    row_of_pages = row_pages(params.pages, request);
    if (row_of_pages.num_region_blocks > 0) {
      const int num_parts =
          min(max((num_pages + params.pages_per_part - 1) / params.pages_per_part, 1),
              static_cast<int>(gridDim.z));
      if (part >= num_parts) return;
      copy_begin = part * num_pages / num_parts * page_size;
      copy_end = (part + 1) * num_pages / num_parts * page_size;
    } else if (part > 0) {
      return;
    }
  }

  int first_page = 0;
#pragma unroll 4
  for (int s = threadIdx.x; s < stream; s += NUM_THREADS) first_page += request_pages[s];
  first_page = block_sum(first_page);
  if (part == 0 && threadIdx.x == 0) {
    int32_t* offsets = selection.page_offsets + static_cast<int64_t>(request) * (num_streams + 1);
    offsets[stream] = first_page;
    if (stream == num_streams - 1) offsets[num_streams] = first_page + num_pages;
  }
  if (num_pages == 0) return;

  const int wanted = num_pages * page_size;
  const Row row = row_of(scores, request, stream);
  // The list of copies begins when the counters are no longer needed.
  uint32_t* shared = dynamic_shared();
  const CopyList list = copy_list(shared);
  const Cut cut = find_cut(row, wanted, shared);
  int32_t* chosen = selection.indices + request * selection.indices_stride +
                    static_cast<int64_t>(first_page) * page_size;
  const int last_place = part == 0 ? wanted : copy_end;
  int list_begin = copy_begin;
  int num_above = 0;
  int num_equal = 0;
  Entries next = row.load(4 * threadIdx.x);
  for (int start = 4 * threadIdx.x;; start += TILE_ENTRIES) {
    const Entries entries = next;
    // One tile ahead, so that memory works while the block adds up. Not over a copy, which needs
    // the registers.
    if constexpr (!COPIES) next = row.load(start + TILE_ENTRIES);
    int above_here = 0;
    int equal_here = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      above_here += entries.is_valid(i) && entries.key(i) > cut.key;
      equal_here += entries.is_valid(i) && entries.key(i) == cut.key;
    }
    int in_tile;
    const int before = block_exclusive_sum(above_here | equal_here << 16, &in_tile);
    int above_seen = num_above + (before & 0xFFFF);
    int equal_seen = num_equal + (before >> 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!entries.is_valid(i) || entries.key(i) < cut.key) continue;
      const bool is_equal = entries.key(i) == cut.key;
      const int place = above_seen + min(equal_seen, cut.num_equal);
      const bool is_kept = !is_equal || equal_seen < cut.num_equal;
      above_seen += !is_equal;
      equal_seen += is_equal;
      if (!is_kept) continue;
      const int index = entries.first + i;
      if (part == 0) chosen[place] = index;
      if constexpr (COPIES) {
        if (place >= copy_begin && place < copy_end) list.source[place - list_begin] = index;
      }
    }
    num_above += in_tile & 0xFFFF;
    num_equal += in_tile >> 16;
    const int num_kept = num_above + min(num_equal, cut.num_equal);
    const bool is_end =
        num_kept >= last_place ||
        start - 4 * static_cast<int>(threadIdx.x) + TILE_ENTRIES >= row.num_places();
    if constexpr (COPIES) {
      const int num_listed = min(num_kept, copy_end) - list_begin;
      if (num_listed > 0 && (is_end || num_listed > LIST_ENTRIES - TILE_ENTRIES)) {
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < num_listed; i += NUM_THREADS) {
          list.source[i] = row_of_pages.source(stream, list.source[i]);
          list.target[i] = row_of_pages.target(first_page * page_size + list_begin + i);
        }
        __syncthreads();
        copy_entries<Unit>(params.pages.pool, list, num_listed,
                           entry_bytes(params.pages) / sizeof(Unit));
        // Written anew behind the barriers of the next sum.
        list_begin += num_listed;
      }
    }
    if (is_end) return;
    if constexpr (COPIES) next = row.load(start + TILE_ENTRIES);
  }
}

cudaError_t launch_select_entries(const Selection& selection, cudaStream_t stream) {
  const Scores& scores = selection.scores;
  if (scores.num_requests == 0) return cudaSuccess;
  const dim3 grid(scores.num_streams, scores.num_requests);
  return launch(select_kernel<void>, grid, MAX_BINS * sizeof(uint32_t), stream,
                SelectParams{selection, Pages{}, 1});
}

cudaError_t launch_select_and_compact(const SelectionWithCompaction& params, cudaStream_t stream) {
  const Scores& scores = params.selection.scores;
  const Pages& pages = params.pages;
  if (pages.max_region_blocks == 0) return launch_select_entries(params.selection, stream);
  if (scores.num_requests == 0) return cudaSuccess;
  int device = 0;
  int num_processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&num_processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  // Enough blocks for all processors however uneven the streams are: eight for each.
  const int64_t page_bytes = static_cast<int64_t>(pages.block_size) * pages.token_bytes;
  const int64_t max_pages = static_cast<int64_t>(pages.max_region_blocks) * scores.num_streams;
  const int64_t even = max_pages * scores.num_requests / (8 * num_processors);
  const int64_t least = (MIN_PART_BYTES + page_bytes - 1) / page_bytes;
  const int64_t pages_per_part = even > least ? even : least;
  // One stream can have no more pages than the prompt and the region.
  const int64_t prompt_pages = scores.max_entries / scores.page_size;
  const int64_t stream_pages = prompt_pages < max_pages ? prompt_pages : max_pages;
  const int64_t num_parts = (stream_pages + pages_per_part - 1) / pages_per_part;
  // A part reads its stream's scores four times. Prompts whose scores are many beside what is
  // copied are better selected once.
  const int64_t score_bytes = 4 * static_cast<int64_t>(sizeof(uint32_t)) * scores.max_entries;
  if (num_parts > 1 && pages_per_part * page_bytes < COPIED_PER_SCORE * score_bytes) {
    error = launch_select_entries(params.selection, stream);
    const Compaction chosen = {pages, params.selection.page_offsets, params.selection.indices,
                               params.selection.indices_stride};
    return error == cudaSuccess ? launch_compact(chosen, stream) : error;
  }
  const dim3 grid(scores.num_streams, scores.num_requests,
                  static_cast<unsigned>(num_parts < 1           ? 1
                                        : num_parts > MAX_PARTS ? MAX_PARTS
                                                                : num_parts));
  const SelectParams all = {params.selection, pages, static_cast<int>(pages_per_part)};
  return with_unit(pages, [&](auto unit) {
    return launch(select_kernel<decltype(unit)>, grid, COPY_LIST_BYTES, stream, all);
  });
}

}  // namespace kvcompress
