// How many pages each stream gets when the streams of a group compete.
//
// A radix selection over the scores of a group with one peculiarity: a stream counts with at least
// what is guaranteed to it, so that each stream has counters of its own, and what it adds to the
// group's is max(count, guaranteed). Three launches, one per digit. In each, a block counts one
// stream, and the last block of a group to finish (by a ticket) chooses the group's digit; in the
// third launch it also shares out ties and rounds to pages.
//
// Three plain launches rather than one cooperative: a grid that waits for itself must fit the GPU
// as a whole, which 8192 streams of several requests do not. Nobody waits here, and short rows are
// in a cache when the second and the third launch read them.
#include "digits.cuh"

namespace kvcompress {

// What the streams of a group have told so far. All zero before the first digit.
struct alignas(16) GroupState {
  // By how much the group's count grows with each value of the digit at hand.
  uint32_t count[MAX_BINS];
  // The group's count above all of them.
  uint32_t num_above;
  // Streams that have been counted, of all digits so far.
  uint32_t num_done;
  // Digits chosen so far.
  uint32_t prefix;
};

constexpr int LAST_DIGIT = NUM_DIGITS - 1;
// Of the last digit, per stream: entries from each value on, then those above all values.
constexpr int ROW_COUNTS = num_bins(LAST_DIGIT) + 1;

struct JointParams {
  JointCounts counts;
  // [R * G]
  GroupState* states;
  // [R * S, ROW_COUNTS]
  int32_t* row_counts;
  int streams_per_group;
};

__device__ inline int clamp(int x, int lower, int upper) {
  return min(max(x, lower), upper);
}

// Give out `wanted` of the group's entries with the threshold's score.
//
// A stream's equal entries have the ranks base, base + 1, ...; lower ranks go first, then lower
// streams. The rank up to which all go is found by bisection.
//
// Args:
//   base, extra: [size] sure entries of each stream and equal ones. base is written: what it gets.
__device__ void share_by_rank(int* base, const int* extra, int size, int wanted, int max_rank) {
  int rank = 0;
  int num_sure = 0;
  for (int step = 1 << (31 - __clz(max_rank)); step > 0; step /= 2) {
    int taken = 0;
    for (int s = threadIdx.x; s < size; s += NUM_THREADS) {
      taken += clamp(rank + step - base[s], 0, extra[s]);
    }
    taken = block_sum(taken);
    if (taken <= wanted) {
      rank += step;
      num_sure = taken;
    }
  }
  int num_open = 0;
  for (int first = 0; first < size; first += NUM_THREADS) {
    const int s = first + threadIdx.x;
    const bool is_open = s < size && base[s] <= rank && rank < base[s] + extra[s];
    int num_here;
    const int place = num_open + block_exclusive_sum(is_open, &num_here);
    num_open += num_here;
    if (s < size) {
      base[s] += clamp(rank - base[s], 0, extra[s]) + (is_open && place < wanted - num_sure);
    }
  }
}

// One more page for `missing` streams: those with the largest remainders, then the lower streams.
__device__ void add_pages(int* pages, const int* entries, int size, int missing, int page_size) {
  // Greatest remainder that at least `missing` streams reach. It is positive, since remainders sum
  // to whole pages, `missing` of them.
  int least = 0;
  for (int step = page_size / 2; step > 0; step /= 2) {
    int num_reaching = 0;
    for (int s = threadIdx.x; s < size; s += NUM_THREADS) {
      num_reaching += entries[s] - pages[s] * page_size >= least + step;
    }
    if (block_sum(num_reaching) >= missing) least += step;
  }
  int num_over = 0;
  for (int s = threadIdx.x; s < size; s += NUM_THREADS) {
    num_over += entries[s] - pages[s] * page_size > least;
  }
  num_over = block_sum(num_over);
  int num_tied = 0;
  for (int first = 0; first < size; first += NUM_THREADS) {
    const int s = first + threadIdx.x;
    const int remainder = s < size ? entries[s] - pages[s] * page_size : -1;
    int num_here;
    const int place = num_tied + block_exclusive_sum(remainder == least, &num_here);
    num_tied += num_here;
    if (remainder > least || (remainder == least && place < missing - num_over)) ++pages[s];
  }
}

// A page less for some streams, `surplus` in all, where a page lies farthest above the stream's
// share, then in lower streams. No stream's only page.
//
// The n-th page of a stream (from 1) is whole and has a rest: entries - n * page_size of them are
// not in the first n pages. The smaller the rest, the farther above its share is the page. Only a
// page given to a stream with too few entries has a negative one, and that is its only page.
__device__ void remove_pages(int* pages, const int* entries, int size, int surplus, int page_size,
                             int max_entries) {
  // Of a stream: pages whose rest is below `limit`, all but the first page.
  const auto num_below = [&](int s, int limit) {
    const int first = max((entries[s] - limit + page_size) / page_size, 2);
    return max(pages[s] - first + 1, 0);
  };
  // Greatest limit that fewer than `surplus` pages are below.
  int limit = 0;
  int num_sure = 0;
  for (int step = 1 << (31 - __clz(max_entries)); step > 0; step /= 2) {
    int num_pages = 0;
    for (int s = threadIdx.x; s < size; s += NUM_THREADS) num_pages += num_below(s, limit + step);
    num_pages = block_sum(num_pages);
    if (num_pages < surplus) {
      limit += step;
      num_sure = num_pages;
    }
  }
  int num_tied = 0;
  for (int first = 0; first < size; first += NUM_THREADS) {
    const int s = first + threadIdx.x;
    // Has a page with just this rest, and it is not the first.
    const bool is_tied = s < size && num_below(s, limit + 1) > num_below(s, limit);
    int num_here;
    const int place = num_tied + block_exclusive_sum(is_tied, &num_here);
    num_tied += num_here;
    if (s < size) pages[s] -= num_below(s, limit) + (is_tied && place < surplus - num_sure);
  }
}

// Pages of every stream of a group whose threshold is known.
//
// Args:
//   row_counts: [size, ROW_COUNTS] of its streams, from other blocks.
//   digit: the last one of the threshold.
//   shared: [2 * size] ints.
//   num_pages: [size], written.
__device__ void share_pages(const int32_t* row_counts, int digit, int size, int sure, int total,
                            const Scores& scores, int* shared, int32_t* num_pages) {
  const int page_size = scores.page_size;
  // A thread reads and writes its own streams in both only.
  int* entries = shared;
  int* extra = shared + size;
  int num_sure = 0;
  int num_extra = 0;
  for (int s = threadIdx.x; s < size; s += NUM_THREADS) {
    const int32_t* counts = row_counts + static_cast<int64_t>(s) * ROW_COUNTS + digit;
    entries[s] = max(load_fresh(counts + 1), sure);
    extra[s] = max(load_fresh(counts), sure) - entries[s];
    num_sure += entries[s];
    num_extra += extra[s];
  }
  num_sure = block_sum(num_sure);
  num_extra = block_sum(num_extra);
  const int wanted = total * page_size - num_sure;
  if (wanted < num_extra) {
    share_by_rank(entries, extra, size, wanted, scores.max_entries);
  } else {
    for (int s = threadIdx.x; s < size; s += NUM_THREADS) entries[s] += extra[s];
  }
  int* pages = entries;
  if (page_size > 1) {
    pages = extra;
    int num_shared = 0;
    for (int s = threadIdx.x; s < size; s += NUM_THREADS) {
      pages[s] = max(entries[s] / page_size, 1);
      num_shared += pages[s];
    }
    const int missing = total - block_sum(num_shared);
    if (missing > 0) add_pages(pages, entries, size, missing, page_size);
    if (missing < 0) {
      remove_pages(pages, entries, size, -missing, page_size, scores.max_entries);
    }
  }
  for (int s = threadIdx.x; s < size; s += NUM_THREADS) num_pages[s] = pages[s];
}

// Grid: streams, requests. Shared memory: the digit's counters, and for the last digit at least two
// numbers per stream of a group.
template <int DIGIT>
__global__ void __launch_bounds__(NUM_THREADS, MIN_BLOCKS)
    joint_digit_kernel(const __grid_constant__ JointParams params) {
  const Scores& scores = params.counts.scores;
  const int stream = blockIdx.x;
  const int request = blockIdx.y;
  const int size = params.streams_per_group;
  const int group = request * params.counts.num_groups + stream / size;
  GroupState* state = params.states + group;
  const int sure = params.counts.guaranteed[group];
  uint32_t* histogram = dynamic_shared();

  clear_bins<DIGIT>(histogram);
  __syncthreads();
  const int above_here =
      count_digits<DIGIT>(row_of(scores, request, stream), state->prefix, histogram);
  // Also a barrier: all entries are counted.
  const int num_above = block_sum(above_here);

  OwnBins<DIGIT> own;
#pragma unroll
  for (int i = 0; i < own.PER_THREAD; ++i) own.count[i] = histogram[own.bin(i)];
  int num_in_row;
  int at_least = num_above + block_exclusive_sum(own.sum(), &num_in_row);
  int32_t* row_counts = params.row_counts +
                        (static_cast<int64_t>(request) * scores.num_streams + stream) * ROW_COUNTS;
#pragma unroll
  for (int i = 0; i < own.PER_THREAD; ++i) {
    const int more_than = at_least;
    at_least += static_cast<int>(own.count[i]);
    // Few values have any entries, and what is guaranteed adds at none.
    const int step = max(at_least, sure) - max(more_than, sure);
    if (step > 0) atomicAdd(state->count + own.bin(i), static_cast<uint32_t>(step));
    if constexpr (DIGIT == LAST_DIGIT) row_counts[own.bin(i)] = at_least;
  }
  if (threadIdx.x == 0) {
    atomicAdd(&state->num_above, static_cast<uint32_t>(max(num_above, sure)));
    if constexpr (DIGIT == LAST_DIGIT) row_counts[num_bins(DIGIT)] = num_above;
  }

  // A fence and an atomic pass on what their own thread knows, no more. So the block tells thread 0
  // at a barrier; it passes that on with the ticket, takes over what other blocks have passed on,
  // and tells the block.
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const uint32_t num_done = atomicAdd(&state->num_done, 1u) + 1;
    is_last = num_done == static_cast<uint32_t>((DIGIT + 1) * size);
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;

  OwnBins<DIGIT> group_bins;
#pragma unroll
  for (int i = 0; i < group_bins.PER_THREAD; ++i) {
    group_bins.count[i] = load_fresh(state->count + group_bins.bin(i));
  }
  const int group_above = static_cast<int>(load_fresh(&state->num_above));
  const int total = params.counts.total_pages[group];
  const Reached reached = reach<DIGIT>(group_bins, group_above, total * scores.page_size);
  if constexpr (DIGIT == LAST_DIGIT) {
    const int64_t first = static_cast<int64_t>(group) * size;
    share_pages(params.row_counts + first * ROW_COUNTS, reached.digit, size, sure, total, scores,
                reinterpret_cast<int*>(histogram), params.counts.num_pages + first);
  } else {
    // For the next digit, which is another launch.
#pragma unroll
    for (int i = 0; i < group_bins.PER_THREAD; ++i) state->count[group_bins.bin(i)] = 0;
    if (threadIdx.x == 0) {
      state->num_above = 0;
      state->prefix = state->prefix << digit_bits(DIGIT) | static_cast<uint32_t>(reached.digit);
    }
  }
}

template <int DIGIT>
cudaError_t launch_digit(const JointParams& params, cudaStream_t stream) {
  const Scores& scores = params.counts.scores;
  size_t shared_bytes = num_bins(DIGIT) * sizeof(uint32_t);
  if (DIGIT == LAST_DIGIT) {
    const size_t share_bytes = 2 * sizeof(int) * params.streams_per_group;
    if (share_bytes > shared_bytes) shared_bytes = share_bytes;
  }
  const dim3 grid(scores.num_streams, scores.num_requests);
  return launch(joint_digit_kernel<DIGIT>, grid, shared_bytes, stream, params);
}

#ifndef KVC_ON_HOST
cudaError_t check_device() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, joint_digit_kernel<0>);
}
#endif

size_t joint_workspace_bytes(int num_requests, int num_streams, int num_groups) {
  const size_t num_rows = static_cast<size_t>(num_requests) * num_streams;
  return static_cast<size_t>(num_requests) * num_groups * sizeof(GroupState) +
         num_rows * ROW_COUNTS * sizeof(int32_t);
}

cudaError_t launch_joint_page_counts(const JointCounts& counts, cudaStream_t stream) {
  const Scores& scores = counts.scores;
  if (scores.num_requests == 0) return cudaSuccess;
  const int num_states = scores.num_requests * counts.num_groups;
  GroupState* states = static_cast<GroupState*>(counts.workspace);
  const JointParams params = {counts, states, reinterpret_cast<int32_t*>(states + num_states),
                              scores.num_streams / counts.num_groups};
  cudaError_t error = cudaMemsetAsync(states, 0, num_states * sizeof(GroupState), stream);
  if (error == cudaSuccess) error = launch_digit<0>(params, stream);
  if (error == cudaSuccess) error = launch_digit<1>(params, stream);
  if (error == cudaSuccess) error = launch_digit<2>(params, stream);
  return error;
}

}  // namespace kvcompress
