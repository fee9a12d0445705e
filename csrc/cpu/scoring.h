// What the scoring kernels share: rows of vectors, and reading tiles of pages as float32.
#pragma once

#ifdef KVC_BFLOAT16_DOT
#include <immintrin.h>
#endif

#include "kernels.h"
#include "vec.h"

// A name of its own for each instruction set, such as window_kernel_avx2.
#define KVC_JOINED(name, isa) name##_##isa
#define KVC_EXPANDED(name, isa) KVC_JOINED(name, isa)
#define KVC_NAMED(name) KVC_EXPANDED(name, KVC_ISA)

namespace {

inline int64_t minimum(int64_t a, int64_t b) {
  return a < b ? a : b;
}

inline int64_t round_up(int64_t number, int64_t unit) {
  return (number + unit - 1) / unit * unit;
}

// The first `count` of a vector; all of them if there are as many.
inline void store_some(float* to, Floats values, int64_t count) {
  if (count >= WIDTH) return store(to, values);
  for (int64_t i = 0; i < count; ++i) to[i] = values[i];
}

// Call visit(column, page, slot, length) for every run of tokens [first, first + TILE) below
// num_tokens that lies in one page; returns how many tokens that are.
template <int TILE, class Visit>
inline int64_t each_run(const kvcompress::PagedLayer& pages, int64_t request, int64_t head,
                        int64_t first, int64_t num_tokens, const Visit& visit) {
  const int64_t count = minimum(TILE, num_tokens - first);
  for (int64_t done = 0; done < count;) {
    const int64_t token = first + done;
    const int64_t slot = token % pages.block_size;
    const int64_t length = minimum(count - done, pages.block_size - slot);
    visit(done, page_start(pages, request, head, token), slot, length);
    done += length;
  }
  return count;
}

// Tokens [first, first + TILE) of a head as float32 [d, TILE]; columns past num_tokens are 0.
template <class Type, int TILE>
inline void pack_tile(const kvcompress::PagedLayer& pages, int64_t request, int64_t head,
                      int64_t first, int64_t num_tokens, float* tile) {
  const auto* pool = static_cast<const typename Type::Stored*>(pages.pool);
  const kvcompress::ElementOrder& order = pages.order;
  const int64_t head_size = pages.head_size;
  const bool has_tokens_in_a_row = order.offsets == nullptr && order.token_stride == 1;
  const auto read = [&](int64_t column, int64_t page, int64_t slot, int64_t length) {
    if (has_tokens_in_a_row && length % WIDTH == 0) {
      const auto* from = pool + page + order.first + slot;
      for (int64_t e = 0; e < head_size; ++e, from += order.element_stride) {
        for (int64_t i = 0; i < length; i += WIDTH) {
          store(tile + e * TILE + column + i, Type::many(from + i));
        }
      }
      return;
    }
    for (int64_t i = 0; i < length; ++i) {
      for (int64_t e = 0; e < head_size; ++e) {
        const int64_t offset = offset_of(order, slot + i, e, head_size);
        tile[e * TILE + column + i] = Type::one(pool + page + offset);
      }
    }
  };
  const int64_t count = each_run<TILE>(pages, request, head, first, num_tokens, read);
  for (int64_t e = 0; count < TILE && e < head_size; ++e) {
    for (int64_t i = count; i < TILE; ++i) tile[e * TILE + i] = 0.0f;
  }
}

// The same of 2-byte elements, as words [d / 2, TILE] of two neighbouring elements of a token.
template <int TILE>
inline void pack_pairs(const kvcompress::PagedLayer& pages, int64_t request, int64_t head,
                       int64_t first, int64_t num_tokens, uint32_t* tile) {
  const auto* pool = static_cast<const uint16_t*>(pages.pool);
  const kvcompress::ElementOrder& order = pages.order;
  const int64_t head_size = pages.head_size;
  const bool has_tokens_in_a_row = order.offsets == nullptr && order.token_stride == 1;
  const auto read = [&](int64_t column, int64_t page, int64_t slot, int64_t length) {
    if (has_tokens_in_a_row && length % WIDTH == 0) {
      const auto* from = pool + page + order.first + slot;
      for (int64_t e = 0; e < head_size; e += 2, from += 2 * order.element_stride) {
        for (int64_t i = 0; i < length; i += WIDTH) {
          const Words pairs = load_words(from + i) | load_words(from + order.element_stride + i)
                                                         << 16;
          __builtin_memcpy(tile + e / 2 * TILE + column + i, &pairs, sizeof(pairs));
        }
      }
      return;
    }
    for (int64_t i = 0; i < length; ++i) {
      for (int64_t e = 0; e < head_size; e += 2) {
        const uint32_t low = pool[page + offset_of(order, slot + i, e, head_size)];
        const uint32_t high = pool[page + offset_of(order, slot + i, e + 1, head_size)];
        tile[e / 2 * TILE + column + i] = low | high << 16;
      }
    }
  };
  const int64_t count = each_run<TILE>(pages, request, head, first, num_tokens, read);
  for (int64_t e = 0; count < TILE && e < head_size / 2; ++e) {
    for (int64_t i = count; i < TILE; ++i) tile[e * TILE + i] = 0;
  }
}

}  // namespace
