// As much of CUDA as csrc/cuda uses, on the CPU. Every thread is a fiber (schedule.cpp), and what
// the threads do to memory can be checked for order (happens_before.h).
//
// So the kernels' own sources are tested without a GPU: barriers, shuffles, atomics and fences.
// What this cannot show: what nvcc makes of them, and speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
// Blocks take turns, and with each turn these contents are exchanged for the block's own. All run
// in one thread of the CPU; what is local to it lies in one piece.
#define __shared__ static thread_local

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

namespace on_host {

// A line of the sources, by which the tests take away what stands there.
struct Place {
  const char* file;
  int line;
};

// CUDA's variables for the thread that runs.
struct Indices {
  dim3 thread, block, grid;
};
extern Indices indices;
extern int num_processors;

uint32_t* dynamic_shared();
void sync_threads(Place place);
void thread_fence(Place place);
uint32_t atomic_add(uint32_t* pointer, uint32_t value, Place place);
// A plain load, as CUDA has it: the cache operator says where to look first and orders nothing.
uint32_t load(const void* pointer);
uint32_t exchange(uint32_t value, int source_lane);
int reduce_add(int value);
int lane();

// Runs `call(context)` in every thread of every block.
cudaError_t run_grid(void (*call)(const void*), const void* context, dim3 grid,
                     size_t shared_bytes);

// A kernel and its parameters. What the launch does itself is no thread's access.
template <typename Params>
struct Call {
  void (*kernel)(Params);
  const Params* params;

  __attribute__((no_sanitize("thread"))) static void run(const void* call) {
    const Call* self = static_cast<const Call*>(call);
    self->kernel(*self->params);
  }
};

}  // namespace on_host

#define threadIdx (::on_host::indices.thread)
#define blockIdx (::on_host::indices.block)
#define gridDim (::on_host::indices.grid)
#define __syncthreads() (::on_host::sync_threads({__FILE__, __LINE__}))
#define __threadfence() (::on_host::thread_fence({__FILE__, __LINE__}))
#define atomicAdd(pointer, value) (::on_host::atomic_add(pointer, value, {__FILE__, __LINE__}))

inline int __shfl_sync(unsigned, int value, int lane) {
  return static_cast<int>(on_host::exchange(static_cast<uint32_t>(value), lane));
}

inline int __shfl_up_sync(unsigned, int value, int distance) {
  const int lane = on_host::lane();
  const int source = lane < distance ? lane : lane - distance;
  return static_cast<int>(on_host::exchange(static_cast<uint32_t>(value), source));
}

inline int __reduce_add_sync(unsigned, int value) {
  return on_host::reduce_add(value);
}

template <typename T>
T __ldcg(const T* pointer) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  return static_cast<T>(on_host::load(pointer));
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
  *value = on_host::num_processors;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t num_bytes, cudaStream_t) {
  std::memset(pointer, value, num_bytes);
  return cudaSuccess;
}

namespace kvcompress {

inline uint32_t* dynamic_shared() {
  return on_host::dynamic_shared();
}

template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, size_t shared_bytes, cudaStream_t,
                   const Params& params) {
  const on_host::Call<Params> call = {kernel, &params};
  return on_host::run_grid(&on_host::Call<Params>::run, &call, grid, shared_bytes);
}

}  // namespace kvcompress
