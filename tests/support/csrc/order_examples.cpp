// Small kernels that show what the emulation notices: right ones, and each with one fault.
#include "device.cuh"

using namespace kvcompress;

namespace {

struct Handover {
  // [blocks * NUM_THREADS], one number per thread; [1]; [1], written by the last block.
  uint32_t* data;
  uint32_t* ticket;
  uint32_t* sum;
  // What is done, in this order.
  bool all_fence_first;
  bool barrier_before;
  bool fence_before;
  bool fence_after;
  bool barrier_after;
  bool all_fence_last;
};

// The last block adds up what all have written.
__global__ void handover(const __grid_constant__ Handover way) {
  __shared__ bool is_last;
  way.data[blockIdx.x * NUM_THREADS + threadIdx.x] = threadIdx.x;
  if (way.all_fence_first) __threadfence();
  if (way.barrier_before) __syncthreads();
  if (threadIdx.x == 0) {
    if (way.fence_before) __threadfence();
    is_last = atomicAdd(way.ticket, 1u) + 1 == gridDim.x;
    if (way.fence_after) __threadfence();
  }
  if (way.barrier_after) __syncthreads();
  if (!is_last) return;
  if (way.all_fence_last) __threadfence();
  uint32_t sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) {
    sum += way.data[block * NUM_THREADS + threadIdx.x];
  }
  atomicAdd(way.sum, sum);
}

enum Fault : int {
  NO_FAULT,
  SHUFFLE_FOR_BARRIER,
  PLAIN_ADD,
  PAST_THE_END,
  GONE_EARLY,
  TWO_BARRIERS,
  NO_END,
};

struct Example {
  // [1].
  uint32_t* number;
  Fault fault;
};

// Every block adds the sum of its second lanes' numbers.
__global__ void example(const __grid_constant__ Example params) {
  __shared__ uint32_t numbers[NUM_THREADS];
  const Fault fault = params.fault;
  uint32_t* number = params.number;
  const unsigned thread = threadIdx.x;
  numbers[thread] = thread;
  if (fault == GONE_EARLY && thread == 0) return;
  if (fault == SHUFFLE_FOR_BARRIER) {
    __shfl_sync(ALL_LANES, 0, 0);
  } else if (fault == TWO_BARRIERS && thread < WARP_SIZE) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  const uint32_t other = numbers[thread / WARP_SIZE * WARP_SIZE + (thread + 1) % WARP_SIZE];
  if (fault == PLAIN_ADD) {
    *number += other;
  } else if (lane_index() == 0) {
    atomicAdd(number, other);
  }
  if (fault == PAST_THE_END) number[1] = 0;
  while (fault == NO_END) atomicAdd(number, 0u);
}

struct Ticket {
  // [2]: blocks that have taken one, and blocks that were last.
  uint32_t* taken;
  bool in_two;
};

// Every block takes a ticket, in one atomic or in two.
__global__ void ticket(const __grid_constant__ Ticket params) {
  if (threadIdx.x > 0) return;
  uint32_t before;
  if (params.in_two) {
    before = atomicAdd(params.taken, 0u);
    atomicAdd(params.taken, 1u);
  } else {
    before = atomicAdd(params.taken, 1u);
  }
  if (before + 1 == gridDim.x) atomicAdd(params.taken + 1, 1u);
}

}  // namespace

extern "C" {

int run_handover(const Handover* way, int num_blocks) {
  return launch(handover, dim3(num_blocks), 0, nullptr, *way);
}

int run_example(uint32_t* number, int fault, int num_blocks) {
  return launch(example, dim3(num_blocks), 0, nullptr, Example{number, Fault(fault)});
}

int run_ticket(uint32_t* taken, bool in_two, int num_blocks) {
  return launch(ticket, dim3(num_blocks), 0, nullptr, Ticket{taken, in_two});
}

}  // extern "C"
