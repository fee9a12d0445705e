// As much of CUDA as csrc/cuda uses, on the CPU: blocks one after another, and every thread of a
// block as a fiber that runs until it waits for others.
//
// So the kernels' own sources are tested without a GPU, barriers and shuffles included. The order
// of blocks, and how warps get ahead of each other between barriers, is drawn from a seed: what is
// right in one order only (a missing barrier) is wrong in another. A barrier that some thread never
// reaches stops the program. What this cannot show: the GPU's memory order between blocks, and
// speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
// One block runs at a time. Values of the block before are still there, which is no worse than what
// a GPU leaves.
#define __shared__ static

using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace on_host {

constexpr int NUM_THREADS = 512;
constexpr int WARP_SIZE = 32;
constexpr size_t STACK_BYTES = 64 * 1024;
// What dynamic shared memory holds before a block has written to it.
constexpr unsigned char POISON = 0xA5;

struct Barrier {
  int num_expected = 0;
  int num_waiting = 0;
  unsigned generation = 0;
};

// Settings and state of the one grid that runs.
struct Machine {
  // Set by the tests.
  uint64_t seed = 0;
  int num_processors = 4;

  std::vector<uint32_t> shared;
  jmp_buf scheduler;
  int running = 0;
  bool has_progressed = false;
  Barrier block_barrier;
  Barrier warp_barriers[NUM_THREADS / WARP_SIZE];
  uint64_t exchanged[NUM_THREADS] = {};
};

inline Machine machine;
inline dim3 thread_index, block_index, grid_size;

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool is_new = true;
  bool is_done = false;
  // It waits until this barrier is past this generation.
  const Barrier* barrier = nullptr;
  unsigned generation = 0;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
};

inline std::vector<Fiber> fibers(NUM_THREADS);
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "%s\n", message);
  std::abort();
}

inline void wait_at(Barrier& barrier) {
  machine.has_progressed = true;
  if (++barrier.num_waiting == barrier.num_expected) {
    barrier.num_waiting = 0;
    ++barrier.generation;
    return;
  }
  Fiber& fiber = fibers[machine.running];
  fiber.barrier = &barrier;
  fiber.generation = barrier.generation;
  if (!_setjmp(fiber.place)) _longjmp(machine.scheduler, 1);
  fiber.barrier = nullptr;
}

inline void run_fiber() {
  body();
  fibers[machine.running].is_done = true;
  machine.has_progressed = true;
  _longjmp(machine.scheduler, 1);
}

inline void run_block(std::mt19937_64& random) {
  machine.block_barrier = {NUM_THREADS};
  for (Barrier& barrier : machine.warp_barriers) barrier = {WARP_SIZE};
  std::memset(machine.shared.data(), POISON, machine.shared.size() * sizeof(uint32_t));
  std::vector<int> order(NUM_THREADS);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (Fiber& fiber : fibers) {
    fiber.is_new = true;
    fiber.is_done = false;
    fiber.barrier = nullptr;
  }
  // Half of the warps sleep until the others are stuck, which so get as far ahead as they can.
  uint64_t asleep = 0;
  for (int num_done = 0; num_done < NUM_THREADS;) {
    machine.has_progressed = false;
    num_done = 0;
    for (const int thread : order) {
      Fiber& fiber = fibers[thread];
      const bool is_waiting = fiber.barrier && fiber.barrier->generation == fiber.generation;
      if (!fiber.is_done && !is_waiting && !(asleep >> thread / WARP_SIZE & 1)) {
        machine.running = thread;
        thread_index.x = thread;
        if (!_setjmp(machine.scheduler)) {
          if (!fiber.is_new) _longjmp(fiber.place, 1);
          fiber.is_new = false;
          getcontext(&fiber.start);
          fiber.start.uc_stack.ss_sp = fiber.stack.get();
          fiber.start.uc_stack.ss_size = STACK_BYTES;
          makecontext(&fiber.start, run_fiber, 0);
          setcontext(&fiber.start);
        }
      }
      num_done += fibers[thread].is_done;
    }
    if (!machine.has_progressed && asleep == 0) {
      fail("threads wait at a barrier that others never reach");
    }
    if (!machine.has_progressed) {
      asleep = 0;
    } else if (asleep == 0) {
      asleep = random();
    }
  }
}

template <typename T>
T exchange(T value, int source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Barrier& barrier = machine.warp_barriers[machine.running / WARP_SIZE];
  std::memcpy(&machine.exchanged[machine.running], &value, sizeof(T));
  wait_at(barrier);
  T result;
  const int source = machine.running / WARP_SIZE * WARP_SIZE + source_lane;
  std::memcpy(&result, &machine.exchanged[source], sizeof(T));
  wait_at(barrier);
  return result;
}

}  // namespace on_host

#define threadIdx (::on_host::thread_index)
#define blockIdx (::on_host::block_index)
#define gridDim (::on_host::grid_size)

inline void __syncthreads() {
  on_host::wait_at(on_host::machine.block_barrier);
}
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return on_host::exchange(value, lane);
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = on_host::machine.running % on_host::WARP_SIZE;
  return on_host::exchange(value, lane < distance ? lane : lane - distance);
}

inline int __reduce_add_sync(unsigned, int value) {
  on_host::Machine& machine = on_host::machine;
  on_host::Barrier& barrier = machine.warp_barriers[machine.running / on_host::WARP_SIZE];
  machine.exchanged[machine.running] = static_cast<uint32_t>(value);
  on_host::wait_at(barrier);
  const int first = machine.running / on_host::WARP_SIZE * on_host::WARP_SIZE;
  uint32_t sum = 0;
  for (int lane = 0; lane < on_host::WARP_SIZE; ++lane) {
    sum += static_cast<uint32_t>(machine.exchanged[first + lane]);
  }
  on_host::wait_at(barrier);
  return static_cast<int>(sum);
}

template <typename T>
T atomicAdd(T* pointer, T value) {
  const T before = *pointer;
  *pointer += value;
  return before;
}

template <typename T>
T __ldcg(const T* pointer) {
  return *pointer;
}

inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = on_host::machine.num_processors;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t num_bytes, cudaStream_t) {
  std::memset(pointer, value, num_bytes);
  return cudaSuccess;
}

namespace kvcompress {

inline uint32_t* dynamic_shared() {
  return on_host::machine.shared.data();
}

template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, size_t shared_bytes, cudaStream_t,
                   const Params& params) {
  on_host::grid_size = grid;
  on_host::machine.shared.resize((shared_bytes + 3) / 4);
  on_host::body = [&] { kernel(params); };
  std::mt19937_64 random(on_host::machine.seed);
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  for (const unsigned block : order) {
    on_host::block_index = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
    on_host::run_block(random);
  }
  return cudaSuccess;
}

}  // namespace kvcompress
