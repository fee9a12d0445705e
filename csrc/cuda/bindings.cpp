// The CUDA ops for torch, on its stable ABI alone; schemas are in vllm_kvcompress/ops/native.py.
//
// Launchers check what would make a kernel read or write in a wrong place: devices, types, shapes,
// strides. Values are not looked at, since that would make the host wait.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using kvcompress::ROW_WIDTH;
using torch::stable::Tensor;

constexpr int64_t MAX_STREAMS = 8192;
constexpr int64_t MAX_REQUESTS = 65535;

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "] " + torch::headeronly::toString(tensor.scalar_type());
}

// The first tensor of an op says where the others must be.
void check_on_cuda(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cuda(), name, " must be on a CUDA device, got ", shape_of(tensor),
                  " elsewhere");
}

// Refuse a tensor that has not these sizes and this type, is not on the device of the others, or
// whose last dimension is not dense.
void check_tensor(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                  ScalarType type, const Tensor& like) {
  bool is_right =
      tensor.dim() == static_cast<int64_t>(sizes.size()) && tensor.scalar_type() == type;
  std::string wanted;
  int64_t dimension = 0;
  for (const int64_t size : sizes) {
    wanted += (dimension > 0 ? ", " : "") + std::to_string(size);
    is_right = is_right && tensor.size(dimension) == size;
    ++dimension;
  }
  STD_TORCH_CHECK(is_right, "want ", name, " [", wanted, "] ", torch::headeronly::toString(type),
                  ", got ", shape_of(tensor));
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                  " must be on CUDA device ", like.get_device_index(), ", got device ",
                  tensor.get_device_index());
}

void check_contiguous(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous, got strides starting with ",
                  tensor.dim() > 0 ? tensor.stride(0) : 0, " for ", shape_of(tensor));
}

// Rows may lie anywhere, but each in one piece.
void check_dense_rows(const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.size(last) <= 1 || tensor.stride(last) == 1, name,
                  " must have a last stride of 1, got ", tensor.stride(last));
}

int to_int(const char* name, int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= std::numeric_limits<int>::max(), name, " is ", number,
                  ", want 0 to ", std::numeric_limits<int>::max());
  return static_cast<int>(number);
}

void check_page_size(const char* name, int64_t page_size) {
  STD_TORCH_CHECK(page_size >= 1 && page_size <= 128 && (page_size & (page_size - 1)) == 0, name,
                  " is ", page_size, ", want a power of two from 1 to 128");
}

kvcompress::Scores checked_scores(const Tensor& scores, const Tensor& num_entries,
                                  int64_t page_size) {
  STD_TORCH_CHECK(scores.dim() == 3 && scores.scalar_type() == ScalarType::Float,
                  "want scores [R, S, N] Float, got ", shape_of(scores));
  check_on_cuda("scores", scores);
  check_dense_rows("scores", scores);
  const int64_t num_requests = scores.size(0);
  const int64_t num_streams = scores.size(1);
  STD_TORCH_CHECK(num_streams >= 1 && num_streams <= MAX_STREAMS, "1 to ", MAX_STREAMS,
                  " streams can be selected from, not ", num_streams);
  STD_TORCH_CHECK(num_requests <= MAX_REQUESTS, "at most ", MAX_REQUESTS, " requests, not ",
                  num_requests);
  check_tensor("num_entries", num_entries, {num_requests}, ScalarType::Int, scores);
  check_contiguous("num_entries", num_entries);
  check_page_size("page_size", page_size);
  return {static_cast<const uint32_t*>(scores.const_data_ptr()),
          num_entries.const_data_ptr<int32_t>(),
          scores.stride(0),
          scores.stride(1),
          static_cast<int>(num_requests),
          static_cast<int>(num_streams),
          to_int("N", scores.size(2)),
          static_cast<int>(page_size)};
}

kvcompress::Selection checked_selection(const Tensor& scores, const Tensor& num_entries,
                                        const Tensor& num_pages, const Tensor& page_offsets,
                                        const Tensor& indices, int64_t page_size) {
  const kvcompress::Scores checked = checked_scores(scores, num_entries, page_size);
  const int64_t num_requests = checked.num_requests;
  const int64_t num_streams = checked.num_streams;
  check_tensor("num_pages", num_pages, {num_requests, num_streams}, ScalarType::Int, scores);
  check_contiguous("num_pages", num_pages);
  check_tensor("page_offsets", page_offsets, {num_requests, num_streams + 1}, ScalarType::Int,
               scores);
  check_contiguous("page_offsets", page_offsets);
  const int64_t num_indices = indices.dim() == 2 ? indices.size(1) : 0;
  check_tensor("indices", indices, {num_requests, num_indices}, ScalarType::Int, scores);
  check_dense_rows("indices", indices);
  return {checked, num_pages.const_data_ptr<int32_t>(), page_offsets.mutable_data_ptr<int32_t>(),
          indices.mutable_data_ptr<int32_t>(), indices.stride(0)};
}

kvcompress::Pages checked_pages(const Tensor& pool, const Tensor& rows, const Tensor& block_table,
                                const std::optional<Tensor>& key_offsets,
                                const std::optional<Tensor>& value_offsets, int64_t num_streams,
                                int64_t max_region_blocks, int64_t entries_per_page) {
  STD_TORCH_CHECK(!key_offsets.has_value() && !value_offsets.has_value(),
                  "pages on CUDA are plain, so key_offsets and value_offsets must be None, got ",
                  key_offsets.has_value() ? shape_of(*key_offsets) : "None", " and ",
                  value_offsets.has_value() ? shape_of(*value_offsets) : "None");
  const int64_t element_bytes = static_cast<int64_t>(pool.element_size());
  STD_TORCH_CHECK(
      pool.dim() == 3 && (element_bytes == 1 || element_bytes == 2 || element_bytes == 4),
      "want a pool [pages, block size, 2 d] of 1, 2 or 4 bytes, got ", shape_of(pool));
  check_on_cuda("pool", pool);
  check_contiguous("pool", pool);
  STD_TORCH_CHECK(num_streams >= 1 && pool.size(0) % num_streams == 0, "a pool of ", pool.size(0),
                  " pages is not whole blocks of ", num_streams, " streams");
  const int64_t block_size = pool.size(1);
  check_page_size("block size", block_size);
  STD_TORCH_CHECK(entries_per_page == 1 || entries_per_page == block_size, "entries per page are ",
                  entries_per_page, ", want 1 or the block size ", block_size);
  // Kernels number a pool's tokens with 32 bits; addresses have 64.
  STD_TORCH_CHECK(pool.size(0) * block_size <= std::numeric_limits<uint32_t>::max(), "a pool of ",
                  pool.size(0), " pages of ", block_size, " tokens has more tokens than ",
                  std::numeric_limits<uint32_t>::max());
  const int64_t num_requests = rows.dim() == 2 ? rows.size(0) : 0;
  STD_TORCH_CHECK(num_requests <= MAX_REQUESTS, "at most ", MAX_REQUESTS, " requests, not ",
                  num_requests);
  check_tensor("rows", rows, {num_requests, ROW_WIDTH}, ScalarType::Int, pool);
  check_contiguous("rows", rows);
  const int64_t width = block_table.dim() == 2 ? block_table.size(1) : 0;
  check_tensor("block_table", block_table, {num_requests, width}, ScalarType::Int, pool);
  check_dense_rows("block_table", block_table);
  // Virtual pages, and tokens of them, are counted with 31 bits.
  to_int("entries of a region", max_region_blocks * num_streams * entries_per_page);
  return {pool.mutable_data_ptr(),
          rows.const_data_ptr<int32_t>(),
          block_table.const_data_ptr<int32_t>(),
          block_table.stride(0),
          static_cast<int>(num_requests),
          static_cast<int>(num_streams),
          static_cast<int>(block_size),
          to_int("bytes per token", pool.size(2) * element_bytes),
          static_cast<int>(entries_per_page),
          to_int("max_region_blocks", max_region_blocks)};
}

// Room for the entries of the largest region.
void check_num_indices(const Tensor& indices, const kvcompress::Pages& pages) {
  const int64_t least =
      int64_t{pages.max_region_blocks} * pages.num_streams * pages.entries_per_page;
  STD_TORCH_CHECK(indices.size(1) >= least, "want at least ", least, " indices per request, got ",
                  indices.size(1));
}

// Makes a tensor's device the current one, and has the stream that torch uses there.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

void joint_page_counts(const Tensor& scores, const Tensor& num_entries, const Tensor& total_pages,
                       const Tensor& guaranteed, const Tensor& num_pages, int64_t page_size) {
  kvcompress::JointCounts params = {};
  params.scores = checked_scores(scores, num_entries, page_size);
  const int64_t num_requests = params.scores.num_requests;
  const int64_t num_streams = params.scores.num_streams;
  const int64_t num_groups = total_pages.dim() == 2 ? total_pages.size(1) : 0;
  STD_TORCH_CHECK(num_groups > 0 && num_streams % num_groups == 0, num_streams, " streams are not ",
                  num_groups, " equal groups");
  // Entries of a group are counted with 31 bits.
  to_int("entries of a group", num_streams / num_groups * scores.size(2));
  check_tensor("total_pages", total_pages, {num_requests, num_groups}, ScalarType::Int, scores);
  check_contiguous("total_pages", total_pages);
  check_tensor("guaranteed", guaranteed, {num_requests, num_groups}, ScalarType::Int, scores);
  check_contiguous("guaranteed", guaranteed);
  check_tensor("num_pages", num_pages, {num_requests, num_streams}, ScalarType::Int, scores);
  check_contiguous("num_pages", num_pages);
  params.total_pages = total_pages.const_data_ptr<int32_t>();
  params.guaranteed = guaranteed.const_data_ptr<int32_t>();
  params.num_pages = num_pages.mutable_data_ptr<int32_t>();
  params.num_groups = static_cast<int>(num_groups);
  const Launch launch(scores);
  const int64_t num_bytes = static_cast<int64_t>(kvcompress::joint_workspace_bytes(
      params.scores.num_requests, params.scores.num_streams, params.num_groups));
  // Freed when this returns; torch hands it to later work on the same stream only.
  const Tensor workspace = torch::stable::new_empty(scores, {num_bytes}, ScalarType::Byte);
  params.workspace = workspace.mutable_data_ptr();
  STD_CUDA_CHECK(kvcompress::launch_joint_page_counts(params, launch.stream()));
}

void select_entries(const Tensor& scores, const Tensor& num_entries, const Tensor& num_pages,
                    const Tensor& page_offsets, const Tensor& indices, int64_t page_size) {
  const kvcompress::Selection selection =
      checked_selection(scores, num_entries, num_pages, page_offsets, indices, page_size);
  const Launch launch(scores);
  STD_CUDA_CHECK(kvcompress::launch_select_entries(selection, launch.stream()));
}

void compact(const Tensor& pool, const Tensor& rows, const Tensor& block_table,
             const Tensor& page_offsets, const Tensor& indices,
             const std::optional<Tensor>& key_offsets, const std::optional<Tensor>& value_offsets,
             int64_t max_region_blocks, int64_t entries_per_page) {
  const int64_t num_streams = page_offsets.dim() == 2 ? page_offsets.size(1) - 1 : 0;
  const kvcompress::Pages pages = checked_pages(pool, rows, block_table, key_offsets, value_offsets,
                                                num_streams, max_region_blocks, entries_per_page);
  const int64_t num_requests = pages.num_requests;
  check_tensor("page_offsets", page_offsets, {num_requests, num_streams + 1}, ScalarType::Int,
               pool);
  check_contiguous("page_offsets", page_offsets);
  const int64_t num_indices = indices.dim() == 2 ? indices.size(1) : 0;
  check_tensor("indices", indices, {num_requests, num_indices}, ScalarType::Int, pool);
  check_dense_rows("indices", indices);
  check_num_indices(indices, pages);
  const Launch launch(pool);
  STD_CUDA_CHECK(kvcompress::launch_compact({pages, page_offsets.const_data_ptr<int32_t>(),
                                             indices.const_data_ptr<int32_t>(), indices.stride(0)},
                                            launch.stream()));
}

void select_and_compact(const Tensor& scores, const Tensor& num_entries, const Tensor& num_pages,
                        const Tensor& page_offsets, const Tensor& indices, const Tensor& pool,
                        const Tensor& rows, const Tensor& block_table,
                        const std::optional<Tensor>& key_offsets,
                        const std::optional<Tensor>& value_offsets, int64_t max_region_blocks,
                        int64_t page_size) {
  const kvcompress::Selection selection =
      checked_selection(scores, num_entries, num_pages, page_offsets, indices, page_size);
  const kvcompress::Pages pages =
      checked_pages(pool, rows, block_table, key_offsets, value_offsets,
                    selection.scores.num_streams, max_region_blocks, page_size);
  check_tensor("rows", rows, {selection.scores.num_requests, ROW_WIDTH}, ScalarType::Int, scores);
  check_num_indices(indices, pages);
  const Launch launch(scores);
  STD_CUDA_CHECK(kvcompress::launch_select_and_compact({selection, pages}, launch.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vllm_kvcompress, CUDA, m) {
  m.impl("joint_page_counts", TORCH_BOX(&joint_page_counts));
  m.impl("select_entries", TORCH_BOX(&select_entries));
  m.impl("compact", TORCH_BOX(&compact));
  m.impl("select_and_compact", TORCH_BOX(&select_and_compact));
}

// Why the current device cannot run the kernels; null if it can. Read by ctypes.
extern "C" __attribute__((visibility("default"))) const char* kvc_device_problem() {
  const cudaError_t error = kvcompress::check_device();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
