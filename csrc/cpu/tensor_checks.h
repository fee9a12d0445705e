// What the launchers of all CPU ops check of their tensors and numbers.
//
// They refuse what would make a kernel read or write in a wrong place: types, shapes, strides, and
// those counts that are cheap to sum. Block ids and chosen entries are not looked at.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

#include "kernels.h"

namespace kvcompress {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "] " + torch::headeronly::toString(tensor.scalar_type());
}

// Refuse a tensor that has not these sizes and this type; -1 is any size.
inline void check_tensor(const char* name, const Tensor& tensor,
                         std::initializer_list<int64_t> sizes, ScalarType type) {
  bool is_right =
      tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.scalar_type() == type;
  std::string wanted;
  int64_t dimension = 0;
  for (const int64_t size : sizes) {
    wanted += (dimension > 0 ? ", " : "") + (size < 0 ? "any" : std::to_string(size));
    is_right = is_right && (size < 0 || tensor.size(dimension) == size);
    ++dimension;
  }
  STD_TORCH_CHECK(is_right, "want ", name, " [", wanted, "] ", torch::headeronly::toString(type),
                  ", got ", shape_of(tensor));
}

inline void check_contiguous(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous, got strides starting with ",
                  tensor.dim() > 0 ? tensor.stride(0) : 0, " for ", shape_of(tensor));
}

// Rows may lie anywhere, but each in one piece.
inline void check_dense_rows(const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(last >= 0 && (tensor.size(last) <= 1 || tensor.stride(last) == 1), name,
                  " must have a last stride of 1, got ", last >= 0 ? tensor.stride(last) : 0);
}

inline int to_int(const char* name, int64_t number, int64_t least = 0) {
  STD_TORCH_CHECK(number >= least && number <= std::numeric_limits<int>::max(), name, " is ",
                  number, ", want ", least, " to ", std::numeric_limits<int>::max());
  return static_cast<int>(number);
}

// Offsets [b, d] inside a page, as strides if they are regular; plain ones where there are none.
inline ElementOrder order_of(const char* name, const std::optional<Tensor>& offsets,
                             int64_t block_size, int64_t head_size, int64_t plain_first,
                             int64_t page_elements) {
  if (!offsets.has_value()) return {nullptr, plain_first, 2 * head_size, 1};
  check_tensor(name, *offsets, {block_size, head_size}, ScalarType::Long);
  check_contiguous(name, *offsets);
  const int64_t* all = offsets->const_data_ptr<int64_t>();
  const int64_t count = block_size * head_size;
  const auto [least, most] = std::minmax_element(all, all + count);
  STD_TORCH_CHECK(count > 0 && *least >= 0 && *most < page_elements, name, " are not those of a ",
                  "page of ", page_elements, " elements");
  const ElementOrder regular = {nullptr, all[0], block_size > 1 ? all[head_size] - all[0] : 1,
                                head_size > 1 ? all[1] - all[0] : 1};
  for (int64_t i = 0; i < count; ++i) {
    if (all[i] != offset_of(regular, i / head_size, i % head_size, head_size)) {
      return {all, 0, 0, 0};
    }
  }
  return regular;
}

inline void check_prompts(const Tensor& rows, const Tensor& block_table, int64_t num_requests) {
  check_tensor("rows", rows, {num_requests, ROW_WIDTH}, ScalarType::Int);
  check_contiguous("rows", rows);
  check_tensor("block_table", block_table, {num_requests, -1}, ScalarType::Int);
  check_dense_rows("block_table", block_table);
}

}  // namespace kvcompress
