// The ops that select entries, and those that move what was selected, for torch; schemas are in
// vllm_kvcompress/ops/native.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "tensor_checks.h"
#include "torch_threads.h"

namespace kvcompress {
namespace {

int64_t largest(const Tensor& numbers) {
  const int32_t* all = numbers.const_data_ptr<int32_t>();
  return numbers.numel() > 0 ? *std::max_element(all, all + numbers.numel()) : 0;
}

Scores checked_scores(const Tensor& scores, const Tensor& num_entries, int64_t page_size) {
  check_tensor("scores", scores, {-1, -1, -1}, ScalarType::Float);
  check_dense_rows("scores", scores);
  const int64_t num_requests = scores.size(0);
  check_tensor("num_entries", num_entries, {num_requests}, ScalarType::Int);
  check_contiguous("num_entries", num_entries);
  STD_TORCH_CHECK(largest(num_entries) <= scores.size(2), largest(num_entries),
                  " entries do not fit ", shape_of(scores));
  return {scores.const_data_ptr<float>(),
          num_entries.const_data_ptr<int32_t>(),
          scores.stride(0),
          scores.stride(1),
          to_int("requests", num_requests),
          to_int("streams", scores.size(1), 1),
          to_int("page_size", page_size, 1)};
}

void joint_page_counts(const Tensor& scores, const Tensor& num_entries, const Tensor& total_pages,
                       const Tensor& guaranteed, const Tensor& num_pages, int64_t page_size) {
  JointCounts params = {};
  params.scores = checked_scores(scores, num_entries, page_size);
  const int64_t num_requests = params.scores.num_requests;
  const int64_t num_streams = params.scores.num_streams;
  const int64_t num_groups = total_pages.dim() == 2 ? total_pages.size(1) : 0;
  STD_TORCH_CHECK(num_groups > 0 && num_streams % num_groups == 0, num_streams, " streams are not ",
                  num_groups, " equal groups");
  check_tensor("total_pages", total_pages, {num_requests, num_groups}, ScalarType::Int);
  check_contiguous("total_pages", total_pages);
  check_tensor("guaranteed", guaranteed, {num_requests, num_groups}, ScalarType::Int);
  check_contiguous("guaranteed", guaranteed);
  check_tensor("num_pages", num_pages, {num_requests, num_streams}, ScalarType::Int);
  check_contiguous("num_pages", num_pages);
  params.total_pages = total_pages.const_data_ptr<int32_t>();
  params.guaranteed = guaranteed.const_data_ptr<int32_t>();
  params.num_pages = num_pages.mutable_data_ptr<int32_t>();
  params.num_groups = static_cast<int>(num_groups);
  TorchWorkers workers;
  count_joint_pages(params, workers);
}

// Checks a selection and fills its page offsets.
Selection prepared_selection(const Tensor& scores, const Tensor& num_entries,
                             const Tensor& num_pages, const Tensor& page_offsets,
                             const Tensor& indices, int64_t page_size) {
  const Scores checked = checked_scores(scores, num_entries, page_size);
  const int64_t num_requests = checked.num_requests;
  const int64_t num_streams = checked.num_streams;
  check_tensor("num_pages", num_pages, {num_requests, num_streams}, ScalarType::Int);
  check_contiguous("num_pages", num_pages);
  check_tensor("page_offsets", page_offsets, {num_requests, num_streams + 1}, ScalarType::Int);
  check_contiguous("page_offsets", page_offsets);
  check_tensor("indices", indices, {num_requests, -1}, ScalarType::Int);
  check_dense_rows("indices", indices);
  const int32_t* pages = num_pages.const_data_ptr<int32_t>();
  int32_t* offsets = page_offsets.mutable_data_ptr<int32_t>();
  for (int64_t r = 0; r < num_requests; ++r, pages += num_streams, offsets += num_streams + 1) {
    int64_t total = 0;
    offsets[0] = 0;
    for (int64_t s = 0; s < num_streams; ++s) {
      STD_TORCH_CHECK(pages[s] >= 0 && pages[s] * page_size <= checked.num_entries[r], "stream ", s,
                      " has ", checked.num_entries[r], " entries, not ", pages[s], " pages of ",
                      page_size);
      total += pages[s];
      STD_TORCH_CHECK(total * page_size <= indices.size(1), total, " pages of ", page_size,
                      " entries do not fit ", shape_of(indices));
      offsets[s + 1] = static_cast<int32_t>(total);
    }
  }
  return {checked, num_pages.const_data_ptr<int32_t>(), page_offsets.const_data_ptr<int32_t>(),
          indices.mutable_data_ptr<int32_t>(), indices.stride(0)};
}

void select_entries(const Tensor& scores, const Tensor& num_entries, const Tensor& num_pages,
                    const Tensor& page_offsets, const Tensor& indices, int64_t page_size) {
  const Selection selection =
      prepared_selection(scores, num_entries, num_pages, page_offsets, indices, page_size);
  TorchWorkers workers;
  workers.each(num_pages.numel(), [&](int64_t unit) { select_unit(selection, unit); });
}

Compaction checked_compaction(const Tensor& pool, const Tensor& rows, const Tensor& block_table,
                              const Tensor& page_offsets, const Tensor& indices,
                              const std::optional<Tensor>& key_offsets,
                              const std::optional<Tensor>& value_offsets, int64_t max_region_blocks,
                              int64_t entries_per_page) {
  const int64_t element_bytes = static_cast<int64_t>(pool.element_size());
  STD_TORCH_CHECK(pool.dim() == 3 && pool.size(2) % 2 == 0 &&
                      (element_bytes == 1 || element_bytes == 2 || element_bytes == 4),
                  "want a pool [pages, block size, 2 d] of 1, 2 or 4 bytes, got ", shape_of(pool));
  check_contiguous("pool", pool);
  const int64_t num_requests = rows.dim() == 2 ? rows.size(0) : 0;
  check_prompts(rows, block_table, num_requests);
  const int64_t num_streams = page_offsets.dim() == 2 ? page_offsets.size(1) - 1 : 0;
  check_tensor("page_offsets", page_offsets, {num_requests, num_streams + 1}, ScalarType::Int);
  check_contiguous("page_offsets", page_offsets);
  STD_TORCH_CHECK(num_streams >= 1 && pool.size(0) % num_streams == 0, "a pool of ", pool.size(0),
                  " pages is not whole blocks of ", num_streams, " streams");
  const int64_t block_size = pool.size(1);
  const int64_t head_size = pool.size(2) / 2;
  STD_TORCH_CHECK(entries_per_page == 1 || entries_per_page == block_size, "entries per page are ",
                  entries_per_page, ", want 1 or the block size ", block_size);
  check_tensor("indices", indices, {num_requests, -1}, ScalarType::Int);
  check_dense_rows("indices", indices);
  const int64_t least = max_region_blocks * num_streams * entries_per_page;
  STD_TORCH_CHECK(indices.size(1) >= least, "want at least ", least, " indices per request, got ",
                  indices.size(1));
  STD_TORCH_CHECK(key_offsets.has_value() == value_offsets.has_value(),
                  "key and value offsets go together");
  const int64_t page_elements = 2 * block_size * head_size;
  return {pool.mutable_data_ptr(),
          static_cast<int>(element_bytes),
          page_elements,
          order_of("key_offsets", key_offsets, block_size, head_size, 0, page_elements),
          order_of("value_offsets", value_offsets, block_size, head_size, head_size, page_elements),
          rows.const_data_ptr<int32_t>(),
          block_table.const_data_ptr<int32_t>(),
          block_table.stride(0),
          static_cast<int>(num_requests),
          to_int("streams", num_streams),
          to_int("block size", block_size, 1),
          to_int("head size", head_size, 1),
          static_cast<int>(entries_per_page),
          page_offsets.const_data_ptr<int32_t>(),
          indices.const_data_ptr<int32_t>(),
          indices.stride(0)};
}

void compact(const Tensor& pool, const Tensor& rows, const Tensor& block_table,
             const Tensor& page_offsets, const Tensor& indices,
             const std::optional<Tensor>& key_offsets, const std::optional<Tensor>& value_offsets,
             int64_t max_region_blocks, int64_t entries_per_page) {
  const Compaction params =
      checked_compaction(pool, rows, block_table, page_offsets, indices, key_offsets, value_offsets,
                         max_region_blocks, entries_per_page);
  TorchWorkers workers;
  workers.each(static_cast<int64_t>(params.num_requests) * params.num_streams,
               [&](int64_t unit) { compact_unit(params, unit); });
}

void select_and_compact(const Tensor& scores, const Tensor& num_entries, const Tensor& num_pages,
                        const Tensor& page_offsets, const Tensor& indices, const Tensor& pool,
                        const Tensor& rows, const Tensor& block_table,
                        const std::optional<Tensor>& key_offsets,
                        const std::optional<Tensor>& value_offsets, int64_t max_region_blocks,
                        int64_t page_size) {
  const Compaction compaction =
      checked_compaction(pool, rows, block_table, page_offsets, indices, key_offsets, value_offsets,
                         max_region_blocks, page_size);
  const Selection selection =
      prepared_selection(scores, num_entries, num_pages, page_offsets, indices, page_size);
  TorchWorkers workers;
  workers.each(num_pages.numel(), [&](int64_t unit) {
    select_unit(selection, unit);
    compact_unit(compaction, unit);
  });
}

void move_entries(const Tensor& source, const Tensor& source_index, const Tensor& target,
                  const Tensor& target_index) {
  STD_TORCH_CHECK(source.dim() == 2, "want a source [entries, elements], got ", shape_of(source));
  check_contiguous("source", source);
  check_tensor("target", target, {-1, source.size(1)}, source.scalar_type());
  check_contiguous("target", target);
  const int64_t num_moves = source_index.numel();
  check_tensor("source_index", source_index, {num_moves}, ScalarType::Long);
  check_contiguous("source_index", source_index);
  check_tensor("target_index", target_index, {num_moves}, ScalarType::Long);
  check_contiguous("target_index", target_index);
  const Moves params = {static_cast<const char*>(source.const_data_ptr()),
                        static_cast<char*>(target.mutable_data_ptr()),
                        source.size(1) * static_cast<int64_t>(source.element_size()),
                        source_index.const_data_ptr<int64_t>(),
                        target_index.const_data_ptr<int64_t>(),
                        num_moves};
  TorchWorkers workers;
  workers.each((num_moves + MOVES_PER_UNIT - 1) / MOVES_PER_UNIT,
               [&](int64_t unit) { move_unit(params, unit); });
}

}  // namespace
}  // namespace kvcompress

STABLE_TORCH_LIBRARY_IMPL(vllm_kvcompress, CPU, m) {
  m.impl("joint_page_counts", TORCH_BOX(&kvcompress::joint_page_counts));
  m.impl("select_entries", TORCH_BOX(&kvcompress::select_entries));
  m.impl("compact", TORCH_BOX(&kvcompress::compact));
  m.impl("select_and_compact", TORCH_BOX(&kvcompress::select_and_compact));
  m.impl("move_entries", TORCH_BOX(&kvcompress::move_entries));
}
