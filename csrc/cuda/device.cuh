// CUDA as the kernels see it: the only header of the device code that knows how it is compiled.
//
// With KVC_ON_HOST the same sources are plain C++; a header of the tests then runs every thread of
// a block as a fiber.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef KVC_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

namespace kvcompress {

// Of every kernel here: a tile of a row is 2048 entries, which is a short prompt's pages.
constexpr int NUM_THREADS = 512;
// Blocks that an SM can hold at least, as far as registers go (at most 64 per thread).
constexpr int MIN_BLOCKS = 2;
constexpr int WARP_SIZE = 32;
constexpr int NUM_WARPS = NUM_THREADS / WARP_SIZE;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;

#ifndef KVC_ON_HOST
// Shared memory whose size the launch gives, aligned to 16 bytes.
__device__ inline uint32_t* dynamic_shared() {
  extern __shared__ uint4 shared_words[];
  return reinterpret_cast<uint32_t*>(shared_words);
}

// Run a kernel of one parameter struct. Blocks have NUM_THREADS threads.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, size_t shared_bytes, cudaStream_t stream,
                   const Params& params) {
  // More than 48 KiB a kernel gets only if it has asked; it has some of its own beside this.
  constexpr size_t WITHOUT_ASKING = 47 * 1024;
  if (shared_bytes > WITHOUT_ASKING) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, NUM_THREADS, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}
#endif

__device__ inline int lane_index() {
  return static_cast<int>(threadIdx.x) % WARP_SIZE;
}
__device__ inline int warp_index() {
  return static_cast<int>(threadIdx.x) / WARP_SIZE;
}

// What another block has written in this kernel, past this SM's own cache.
template <typename T>
__device__ T load_fresh(const T* pointer) {
  return __ldcg(pointer);
}

// Sum of `x` over the warp's lanes up to this one.
__device__ inline int warp_inclusive_sum(int x) {
#pragma unroll
  for (int distance = 1; distance < WARP_SIZE; distance *= 2) {
    const int other = __shfl_up_sync(ALL_LANES, x, distance);
    if (lane_index() >= distance) x += other;
  }
  return x;
}

// Sum of `x` over the block's threads before this one; `total` is that over all. All threads call.
__device__ inline int block_exclusive_sum(int x, int* total) {
  __shared__ int warp_sums[NUM_WARPS];
  const int through = warp_inclusive_sum(x);
  if (lane_index() == WARP_SIZE - 1) warp_sums[warp_index()] = through;
  __syncthreads();
  // Every warp adds up all warps' sums: cheaper than one that does and tells the others.
  const int warps = warp_inclusive_sum(lane_index() < NUM_WARPS ? warp_sums[lane_index()] : 0);
  *total = __shfl_sync(ALL_LANES, warps, NUM_WARPS - 1);
  const int warps_before =
      __shfl_sync(ALL_LANES, warps, (warp_index() + WARP_SIZE - 1) % WARP_SIZE);
  // The next call may write warp_sums.
  __syncthreads();
  return (warp_index() == 0 ? 0 : warps_before) + through - x;
}

// Sum of `x` over the block, in every thread. All threads call.
__device__ inline int block_sum(int x) {
  __shared__ int warp_sums[NUM_WARPS];
  const int warp_sum = __reduce_add_sync(ALL_LANES, x);
  if (lane_index() == 0) warp_sums[warp_index()] = warp_sum;
  __syncthreads();
  const int sum =
      __reduce_add_sync(ALL_LANES, lane_index() < NUM_WARPS ? warp_sums[lane_index()] : 0);
  __syncthreads();
  return sum;
}

}  // namespace kvcompress
