// Copies what prompts keep into their regions: whole pages, or single tokens in the page's order.
// Copies entries from anywhere to anywhere.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace kvcompress {
namespace {

// Token `slots[i]` of page `sources[i]` becomes token i of the target page.
template <class Stored>
void fill_page(const Compaction& params, const ElementOrder& order,
               const std::vector<const Stored*>& sources, const std::vector<int64_t>& slots,
               Stored* target) {
  const int64_t head_size = params.head_size;
  const int64_t block_size = params.block_size;
  if (order.offsets == nullptr && order.element_stride == 1) {
    for (int64_t token = 0; token < block_size; ++token) {
      std::memcpy(target + offset_of(order, token, 0, head_size),
                  sources[token] + offset_of(order, slots[token], 0, head_size),
                  head_size * sizeof(Stored));
    }
    return;
  }
  // Elements first: where they are apart, the tokens of one are together.
  for (int64_t e = 0; e < head_size; ++e) {
    for (int64_t token = 0; token < block_size; ++token) {
      target[offset_of(order, token, e, head_size)] =
          sources[token][offset_of(order, slots[token], e, head_size)];
    }
  }
}

template <class Stored>
void compact_stream(const Compaction& params, int64_t request, int64_t stream) {
  const int64_t num_streams = params.num_streams;
  const int64_t block_size = params.block_size;
  const int32_t* row = row_of(params.rows, request);
  const int32_t* table = params.block_table + request * params.table_stride;
  const int32_t* offsets = params.page_offsets + request * (num_streams + 1) + stream;
  const int32_t* indices = params.indices + request * params.indices_stride;
  const auto page_of = [&](int64_t block, int64_t slot) {
    return static_cast<Stored*>(params.pool) + (block * num_streams + slot) * params.page_elements;
  };
  std::vector<const Stored*> sources(block_size);
  std::vector<int64_t> slots(block_size);
  for (int64_t page = offsets[0]; page < offsets[1]; ++page) {
    Stored* target = page_of(table[row[ROW_REGION_COLUMN] + page / num_streams], page % num_streams);
    if (params.entries_per_page == 1) {
      std::memcpy(target, page_of(table[indices[page]], stream),
                  params.page_elements * sizeof(Stored));
      continue;
    }
    for (int64_t i = 0; i < block_size; ++i) {
      const int64_t token = indices[page * block_size + i];
      sources[i] = page_of(table[token / block_size], stream);
      slots[i] = token % block_size;
    }
    fill_page(params, params.key_order, sources, slots, target);
    fill_page(params, params.value_order, sources, slots, target);
  }
}

}  // namespace

void compact_unit(const Compaction& params, int64_t unit) {
  const int64_t request = unit / params.num_streams;
  const int64_t stream = unit % params.num_streams;
  if (row_of(params.rows, request)[ROW_NUM_REGION_BLOCKS] == 0) return;
  switch (params.element_bytes) {
    case 1:
      return compact_stream<uint8_t>(params, request, stream);
    case 2:
      return compact_stream<uint16_t>(params, request, stream);
    default:
      return compact_stream<uint32_t>(params, request, stream);
  }
}

void move_unit(const Moves& params, int64_t unit) {
  const int64_t end = std::min((unit + 1) * MOVES_PER_UNIT, params.num_moves);
  for (int64_t i = unit * MOVES_PER_UNIT; i < end; ++i) {
    const int64_t source = params.source_index[i];
    const int64_t target = params.target_index[i];
    if (source < 0 || target < 0) continue;
    std::memcpy(params.target + target * params.entry_bytes,
                params.source + source * params.entry_bytes, params.entry_bytes);
  }
}

}  // namespace kvcompress
