// Reading a row of scores as sortable numbers, and counting their digits.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace kvcompress {

// A number is read as three digits, the highest first. Eleven bits make one pass fewer than eight,
// and the first digit has the whole exponent: scores of attention lie within few powers of two, and
// eight bits would put nearly all of them into a few counters.
constexpr int NUM_DIGITS = 3;

__host__ __device__ constexpr int digit_bits(int digit) {
  return digit == 2 ? 10 : 11;
}
__host__ __device__ constexpr int num_bins(int digit) {
  return 1 << digit_bits(digit);
}
// Bits below a digit.
__host__ __device__ constexpr int digit_shift(int digit) {
  return digit == 0 ? 21 : digit == 1 ? 10 : 0;
}
constexpr int MAX_BINS = 1 << 11;

// uint32 in the order of the float32 with these bits. NaN equals -infinity, and -0 equals 0.
__host__ __device__ inline uint32_t order_key(uint32_t bits) {
  constexpr uint32_t SIGN = 0x80000000u;
  constexpr uint32_t INFINITY_BITS = 0x7F800000u;
  if ((bits & ~SIGN) > INFINITY_BITS) bits = SIGN | INFINITY_BITS;
  if (bits == SIGN) bits = 0;
  return bits & SIGN ? ~bits : bits ^ SIGN;
}

// Four numbers that are read or written by one instruction.
struct alignas(16) Quad {
  uint32_t word[4];
};

// Up to four neighbouring entries of a row, as they were read: whoever needs the keys waits for
// them, not who asks for the next ones.
struct Entries {
  // Entry number of the first; may be negative, is_valid then says from which on there are any.
  int first;
  unsigned valid;
  Quad bits;

  __device__ bool is_valid(int i) const { return valid >> i & 1; }
  __device__ uint32_t key(int i) const { return order_key(bits.word[i]); }
};

// One stream's scores. A row may start anywhere; quads are cut where addresses are aligned.
struct Row {
  const uint32_t* bits;
  int num_entries;
  // Entries from the last aligned address to the row's first.
  int lead;

  // Places to go over: a multiple of four belongs to each quad.
  __device__ int num_places() const { return num_entries + lead; }

  // The quad at a place, a multiple of four. Past the end it has no valid entries.
  __device__ Entries load(int place) const {
    Entries entries;
    entries.first = place - lead;
    entries.valid = 15;
    if (entries.first >= 0 && entries.first + 4 <= num_entries) {
      entries.bits = *reinterpret_cast<const Quad*>(bits + entries.first);
      return entries;
    }
    entries.valid = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int entry = entries.first + i;
      if (entry < 0 || entry >= num_entries) continue;
      entries.bits.word[i] = bits[entry];
      entries.valid |= 1u << i;
    }
    return entries;
  }
};

__device__ inline Row row_of(const Scores& scores, int request, int stream) {
  const uint32_t* bits =
      scores.bits + request * scores.request_stride + stream * scores.stream_stride;
  const int lead = static_cast<int>(reinterpret_cast<uintptr_t>(bits) / sizeof(uint32_t) % 4);
  return {bits, scores.num_entries[request], lead};
}

// Set the counters of a digit to 0. All threads call; no barrier.
template <int DIGIT>
__device__ void clear_bins(uint32_t* histogram) {
  for (int quad = threadIdx.x; quad < num_bins(DIGIT) / 4; quad += NUM_THREADS) {
    reinterpret_cast<Quad*>(histogram)[quad] = Quad{};
  }
}

// Add the digit of every entry whose higher digits are `prefix` to the block's counters.
//
// Args:
//   histogram: [num_bins(DIGIT)] in shared memory, aligned to 16. The hardware adds equal bins of a
//     warp in one step (ATOMS.POPC.INC), so equal scores do not queue up.
//
// Returns this thread's number of entries above the prefix. All threads call; no barrier.
template <int DIGIT>
__device__ int count_digits(const Row& row, uint32_t prefix, uint32_t* histogram) {
  // Quads that a thread has on the way at once.
  constexpr int NUM_QUADS = 4;
  constexpr uint32_t DIGIT_MASK = num_bins(DIGIT) - 1;
  int num_above = 0;
#pragma unroll 1
  for (int start = 4 * threadIdx.x; start < row.num_places();
       start += NUM_QUADS * 4 * NUM_THREADS) {
    Entries entries[NUM_QUADS];
#pragma unroll
    for (int q = 0; q < NUM_QUADS; ++q) entries[q] = row.load(start + q * 4 * NUM_THREADS);
#pragma unroll
    for (int q = 0; q < NUM_QUADS; ++q) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!entries[q].is_valid(i)) continue;
        const uint32_t key = entries[q].key(i);
        if constexpr (DIGIT == 0) {
          atomicAdd(histogram + (key >> digit_shift(0)), 1u);
        } else {
          const uint32_t higher = key >> digit_shift(DIGIT - 1);
          if (higher == prefix) {
            atomicAdd(histogram + (key >> digit_shift(DIGIT) & DIGIT_MASK), 1u);
          }
          num_above += higher > prefix;
        }
      }
    }
  }
  return num_above;
}

// Bins of a digit as threads own them in sums from the highest bin down: thread 0 has the highest.
template <int DIGIT>
struct OwnBins {
  static constexpr int PER_THREAD = num_bins(DIGIT) / NUM_THREADS;
  uint32_t count[PER_THREAD];

  // Number of the i-th bin of this thread; descends with i.
  __device__ static int bin(int i) {
    return num_bins(DIGIT) - 1 - (static_cast<int>(threadIdx.x) * PER_THREAD + i);
  }

  __device__ int sum() const {
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i) sum += count[i];
    return static_cast<int>(sum);
  }
};

// The digit at which a number of entries is reached, counted from the highest digit down.
struct Reached {
  int digit;
  // Entries of higher digits, and of this one.
  int num_above;
  int num_in_bin;
};

// Greatest digit from which on there are at least `wanted` entries, `num_above` of them above all
// digits. The lowest if there is none, the highest if no bin is needed. All threads call.
template <int DIGIT>
__device__ Reached reach(const OwnBins<DIGIT>& own, int num_above, int wanted) {
  __shared__ Reached reached;
  int total;
  int before = num_above + block_exclusive_sum(own.sum(), &total);
  if (threadIdx.x == 0 && before >= wanted) {
    reached = {num_bins(DIGIT) - 1, before, static_cast<int>(own.count[0])};
  } else if (threadIdx.x == NUM_THREADS - 1 && num_above + total < wanted) {
    constexpr int LAST = OwnBins<DIGIT>::PER_THREAD - 1;
    const int lowest = static_cast<int>(own.count[LAST]);
    reached = {0, num_above + total - lowest, lowest};
  }
#pragma unroll
  for (int i = 0; i < OwnBins<DIGIT>::PER_THREAD; ++i) {
    const int through = before + static_cast<int>(own.count[i]);
    if (before < wanted && through >= wanted) {
      reached = {OwnBins<DIGIT>::bin(i), before, static_cast<int>(own.count[i])};
    }
    before = through;
  }
  // The next call writes it behind the barriers of its sum.
  __syncthreads();
  return reached;
}

}  // namespace kvcompress
