// Which accesses to memory the CUDA model orders, whatever a schedule did.
//
// Two accesses conflict if they touch the same byte, one of them writes, and not both are atomic.
// Conflicting accesses of two threads must be ordered, else their outcome is left to the GPU. Order
// comes, as in PTX's memory consistency model, from
//   - a thread's own program order;
//   - a barrier of a block, for its threads;
//   - a fence, then an atomic on some address, then an atomic of another thread on that address
//   that
//     comes later, then that thread's fence. Between a thread's fence and its atomic there may be
//     more, but only what comes before the fence is passed on: also what others have passed on to
//     this thread.
// Atomics alone, shuffles and reductions of a warp order nothing.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace on_host {

enum class Kind { READ, WRITE, ATOMIC };

constexpr int NOBODY = -1;
constexpr int SEVERAL = -2;

struct Thread {
  int block;
  int number;
};

// The last access of a block's threads, or of one of them.
struct Access {
  Thread thread = {NOBODY, NOBODY};
  // Barriers and fences that had been passed.
  uint32_t epoch = 0;
  uint32_t time = 0;
  Kind kind = Kind::READ;
  // Address of the code.
  uintptr_t code = 0;
};

// The latest reads, or atomics, of a byte: one per block stands for all that are ordered before it.
// Those of several threads between two barriers are one too.
struct Accesses {
  Access first;
  std::unique_ptr<std::vector<Access>> more;
};

struct Byte {
  Access write;
  Accesses reads;
  Accesses atomics;
};

// What a thread knows of others: their accesses before a number of barriers of a block, and before
// a number of fences of a thread.
struct Clock {
  std::map<int, uint32_t> epochs;
  std::map<std::pair<int, int>, uint32_t> times;
};
using ClockPtr = std::shared_ptr<const Clock>;

// The order in one grid.
class HappensBefore {
 public:
  HappensBefore(int num_blocks, int threads_per_block);

  // Note an access to one byte. Returns an earlier one that it is in conflict with, or null.
  const Access* access(uint64_t address, Kind kind, Thread thread, uintptr_t code);

  // All threads of a block have come to a barrier.
  void pass_barrier(int block);
  void fence(Thread thread);
  // An atomic passes on what the thread's last fence released; its next fence takes over the rest.
  void pass_atomic(uint64_t address, Thread thread);

 private:
  struct ThreadClocks {
    uint32_t time = 0;
    // Taken over since the last barrier, to be taken over by the next fence, and passed on.
    ClockPtr acquired;
    ClockPtr pending;
    ClockPtr released;
  };
  struct BlockClocks {
    uint32_t epoch = 0;
    ClockPtr acquired;
    std::vector<ThreadClocks> threads;
  };

  bool is_ordered(const Access& before, Thread thread) const;
  const Access* find_unordered(const Accesses& accesses, Thread thread) const;
  static void add(Accesses* accesses, const Access& access);
  Byte* byte_at(uint64_t address);
  ThreadClocks& clocks_of(Thread thread) { return blocks_[thread.block].threads[thread.number]; }

  static constexpr uint64_t PAGE_BYTES = 1024;
  std::vector<BlockClocks> blocks_;
  std::unordered_map<uint64_t, ClockPtr> passed_on_;
  std::unordered_map<uint64_t, std::unique_ptr<Byte[]>> pages_;
  uint64_t last_page_number_ = ~uint64_t{0};
  Byte* last_page_ = nullptr;
};

}  // namespace on_host
