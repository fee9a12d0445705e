// Runs the units of a kernel on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

#include "kernels.h"

namespace kvcompress {

constexpr std::align_val_t CACHE_LINE{64};

// Call work(next) on torch's threads, each of which asks next() for units until there are no more
// (-1). So a thread that the system has put aside keeps the others waiting for one unit at most.
template <class Work>
inline void on_threads(int64_t count, const Work& work) {
  std::atomic<int64_t> taken{0};
  const auto next = [&] {
    const int64_t unit = taken.fetch_add(1, std::memory_order_relaxed);
    return unit < count ? unit : -1;
  };
  const int64_t num_threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) { work(next); });
}

class TorchWorkers : public Workers {
 public:
  void run(int64_t count, void (*unit)(void* context, int64_t i), void* context) override {
    on_threads(count, [=](const auto& next) {
      for (int64_t i = next(); i >= 0; i = next()) unit(context, i);
    });
  }
};

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, CACHE_LINE); }
};

template <class Params>
inline void run_units(const UnitKernel<Params>& kernel, const Params& params, int64_t count) {
  on_threads(count, [&](const auto& next) {
    int64_t i = next();
    if (i < 0) return;
    const std::unique_ptr<void, FreeAligned> scratch(
        ::operator new(kernel.scratch_bytes(params), CACHE_LINE));
    for (; i >= 0; i = next()) kernel.unit(params, i, scratch.get());
  });
}

}  // namespace kvcompress
