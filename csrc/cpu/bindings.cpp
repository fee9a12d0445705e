// The CPU ops for torch, on its stable ABI alone; schemas are in vllm_kvcompress/ops/native.py.
//
// Launchers check what would make a kernel read or write in a wrong place: types, shapes, strides,
// and those counts that are cheap to sum. Block ids and chosen entries are not looked at.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <string>

#include "kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace kvcompress;

constexpr std::align_val_t CACHE_LINE{64};

const InstructionSet* best_instruction_set() {
  const InstructionSet* best = INSTRUCTION_SETS;
  while (!best->is_supported()) ++best;
  return best;
}

const InstructionSet* instruction_set = best_instruction_set();

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "] " + torch::headeronly::toString(tensor.scalar_type());
}

// Refuse a tensor that has not these sizes and this type; -1 is any size.
void check_tensor(const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                  ScalarType type) {
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

void check_contiguous(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous, got strides starting with ",
                  tensor.dim() > 0 ? tensor.stride(0) : 0, " for ", shape_of(tensor));
}

// Rows may lie anywhere, but each in one piece.
void check_dense_rows(const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(last >= 0 && (tensor.size(last) <= 1 || tensor.stride(last) == 1), name,
                  " must have a last stride of 1, got ", last >= 0 ? tensor.stride(last) : 0);
}

int to_int(const char* name, int64_t number, int64_t least = 0) {
  STD_TORCH_CHECK(number >= least && number <= std::numeric_limits<int>::max(), name, " is ",
                  number, ", want ", least, " to ", std::numeric_limits<int>::max());
  return static_cast<int>(number);
}

int to_kernel(const char* name, int64_t width) {
  STD_TORCH_CHECK(width >= 1 && width <= MAX_POOL_KERNEL && width % 2 == 1, name, " is ", width,
                  ", want an odd number from 1 to ", MAX_POOL_KERNEL);
  return static_cast<int>(width);
}

template <class Enum>
Enum to_enum(const char* name, int64_t number, Enum last) {
  STD_TORCH_CHECK(number >= 0 && number <= static_cast<int64_t>(last), name, " is ", number,
                  ", want 0 to ", static_cast<int64_t>(last));
  return static_cast<Enum>(number);
}

Element element_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::FLOAT32;
    case ScalarType::BFloat16:
      return Element::BFLOAT16;
    case ScalarType::Half:
      return Element::FLOAT16;
    default:
      STD_TORCH_CHECK(false, "want ", name, " of bf16, fp16 or fp32, got ", shape_of(tensor));
  }
}

// Offsets [b, d] inside a page, as strides if they are regular; plain ones where there are none.
ElementOrder order_of(const char* name, const std::optional<Tensor>& offsets, int64_t block_size,
                      int64_t head_size, int64_t plain_first, int64_t page_elements) {
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

// Call work(next) on torch's threads, each of which asks next() for units until there are no more
// (-1). So a thread that the system has put aside keeps the others waiting for one unit at most.
template <class Work>
void on_threads(int64_t count, const Work& work) {
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
void run_units(const UnitKernel<Params>& kernel, const Params& params, int64_t count) {
  on_threads(count, [&](const auto& next) {
    int64_t i = next();
    if (i < 0) return;
    const std::unique_ptr<void, FreeAligned> scratch(
        ::operator new(kernel.scratch_bytes(params), CACHE_LINE));
    for (; i >= 0; i = next()) kernel.unit(params, i, scratch.get());
  });
}

int64_t largest(const Tensor& numbers) {
  const int32_t* all = numbers.const_data_ptr<int32_t>();
  return numbers.numel() > 0 ? *std::max_element(all, all + numbers.numel()) : 0;
}

void check_prompts(const Tensor& rows, const Tensor& block_table, int64_t num_requests) {
  check_tensor("rows", rows, {num_requests, ROW_WIDTH}, ScalarType::Int);
  check_contiguous("rows", rows);
  check_tensor("block_table", block_table, {num_requests, -1}, ScalarType::Int);
  check_dense_rows("block_table", block_table);
}

PagedLayer checked_layer(const Tensor& pool, const Tensor& rows, const Tensor& block_table,
                         const Tensor& num_rated, const std::optional<Tensor>& offsets,
                         int64_t layer, int64_t num_layers, int64_t num_kv_heads,
                         int64_t plain_first, int64_t max_rated) {
  STD_TORCH_CHECK(pool.dim() == 3 && pool.size(2) % 2 == 0,
                  "want a pool [pages, block size, 2 d], got ", shape_of(pool));
  check_contiguous("pool", pool);
  const int64_t num_requests = rows.dim() == 2 ? rows.size(0) : 0;
  check_prompts(rows, block_table, num_requests);
  check_tensor("num_rated", num_rated, {num_requests}, ScalarType::Int);
  check_contiguous("num_rated", num_rated);
  STD_TORCH_CHECK(num_kv_heads >= 1 && layer >= 0 && layer < num_layers, "layer ", layer,
                  " is not among ", num_layers, " of ", num_kv_heads, " KV heads");
  const int64_t block_size = pool.size(1);
  const int64_t head_size = pool.size(2) / 2;
  STD_TORCH_CHECK(block_size >= 1 && head_size >= 1, "a page has ", block_size, " tokens of ",
                  head_size, " elements");
  const int32_t* all_rows = rows.const_data_ptr<int32_t>();
  const int32_t* rated = num_rated.const_data_ptr<int32_t>();
  for (int64_t r = 0; r < num_requests; ++r) {
    const int64_t num_tokens = row_of(all_rows, r)[ROW_SEQ_LEN];
    const int64_t needed = (num_tokens + block_size - 1) / block_size;
    STD_TORCH_CHECK(num_tokens >= 1 && needed <= block_table.size(1), "a prompt of ", num_tokens,
                    " tokens does not fit ", block_table.size(1), " blocks of ", block_size);
    STD_TORCH_CHECK(rated[r] >= 0 && rated[r] <= std::min(num_tokens, max_rated), rated[r],
                    " rated tokens of a prompt of ", num_tokens, " do not fit ", max_rated);
  }
  const int64_t page_elements = 2 * block_size * head_size;
  return {pool.const_data_ptr(),
          element_of("pool", pool),
          page_elements,
          order_of("offsets", offsets, block_size, head_size, plain_first, page_elements),
          all_rows,
          block_table.const_data_ptr<int32_t>(),
          block_table.stride(0),
          static_cast<int>(num_requests),
          to_int("num_layers", num_layers),
          to_int("num_kv_heads", num_kv_heads),
          static_cast<int>(layer),
          to_int("block size", block_size),
          to_int("head size", head_size)};
}

const float* checked_scale(const char* name, const Tensor& scale, int64_t num_streams) {
  check_tensor(name, scale, {num_streams}, ScalarType::Float);
  check_contiguous(name, scale);
  return scale.const_data_ptr<float>();
}

void window_scores(const Tensor& query, const Tensor& pool, const Tensor& rows,
                   const Tensor& block_table, const Tensor& num_rated,
                   const std::optional<Tensor>& key_offsets,
                   const std::optional<Tensor>& key_scale,
                   const std::optional<Tensor>& lse, const std::optional<Tensor>& sinks,
                   const Tensor& scores, int64_t layer, int64_t num_layers, int64_t num_kv_heads,
                   double scale, double logits_soft_cap, int64_t reduce, int64_t power,
                   int64_t near_tokens, int64_t pool_kernel) {
  check_tensor("scores", scores, {-1, -1, -1, -1}, ScalarType::Float);
  check_contiguous("scores", scores);
  const int64_t max_rated = scores.size(3);
  WindowScores params = {};
  params.pages = checked_layer(pool, rows, block_table, num_rated, key_offsets, layer, num_layers,
                               num_kv_heads, 0, max_rated);
  const int64_t num_requests = params.pages.num_requests;
  const int64_t num_heads = query.dim() == 4 ? query.size(2) : 0;
  STD_TORCH_CHECK(query.dim() == 4 && query.size(0) == num_requests && query.size(1) >= 1 &&
                      num_heads >= 1 && num_heads % num_kv_heads == 0 &&
                      query.size(3) == params.pages.head_size,
                  "want a query [", num_requests, ", w, heads of ", num_kv_heads, ", ",
                  params.pages.head_size, "], got ", shape_of(query));
  check_dense_rows("query", query);
  const int64_t window = query.size(1);
  check_tensor("scores", scores, {num_requests, num_kv_heads, num_heads / num_kv_heads, max_rated},
               ScalarType::Float);
  for (int64_t r = 0; r < num_requests; ++r) {
    const int32_t num_tokens = row_of(params.pages.rows, r)[ROW_SEQ_LEN];
    STD_TORCH_CHECK(num_tokens >= window, "a prompt of ", num_tokens, " tokens has no window of ",
                    window);
    params.max_tokens = std::max(params.max_tokens, num_tokens);
  }
  params.query = query.const_data_ptr();
  params.query_type = element_of("query", query);
  params.query_request_stride = query.stride(0);
  params.query_token_stride = query.stride(1);
  params.query_head_stride = query.stride(2);
  params.window = to_int("window", window);
  params.group = to_int("group", num_heads / num_kv_heads);
  params.num_rated = num_rated.const_data_ptr<int32_t>();
  if (key_scale.has_value()) {
    params.key_scale = checked_scale("key_scale", *key_scale, num_layers * num_kv_heads);
  }
  if (lse.has_value()) {
    check_tensor("lse", *lse, {num_requests, window, num_heads}, ScalarType::Float);
    check_contiguous("lse", *lse);
    params.lse = lse->const_data_ptr<float>();
  }
  if (sinks.has_value()) params.sinks = checked_scale("sinks", *sinks, num_heads);
  params.scale = static_cast<float>(scale);
  params.logits_soft_cap = static_cast<float>(logits_soft_cap);
  params.reduce = to_enum("reduce", reduce, WindowReduction::DEFENSIVE);
  STD_TORCH_CHECK(power == 1 || power == 2, "power is ", power, ", want 1 or 2");
  params.power = static_cast<int>(power);
  params.near_tokens = to_int("near_tokens", near_tokens);
  params.pool_kernel = to_kernel("pool_kernel", pool_kernel);
  params.scores = scores.mutable_data_ptr<float>();
  params.max_rated = max_rated;
  run_units(*instruction_set->window, params, num_requests * num_heads);
}

void paged_value_effect(const Tensor& pool, const Tensor& output_root, const Tensor& rows,
                        const Tensor& block_table, const Tensor& num_rated,
                        const std::optional<Tensor>& value_offsets,
                        const std::optional<Tensor>& value_scale,
                        const Tensor& effect, int64_t layer, int64_t num_layers) {
  STD_TORCH_CHECK(output_root.dim() == 3, "want an output root [H, d, d], got ",
                  shape_of(output_root));
  check_contiguous("output_root", output_root);
  check_tensor("effect", effect, {-1, -1, -1}, ScalarType::Float);
  check_contiguous("effect", effect);
  const int64_t num_kv_heads = output_root.size(0);
  const int64_t head_size = output_root.size(1);
  ValueEffect params = {};
  params.max_rated = effect.size(2);
  params.pages = checked_layer(pool, rows, block_table, num_rated, value_offsets, layer, num_layers,
                               num_kv_heads, head_size, params.max_rated);
  params.root_type = element_of("output_root", output_root);
  STD_TORCH_CHECK(head_size == params.pages.head_size && output_root.size(2) == head_size,
                  "want an output root [H, ", params.pages.head_size, ", ", params.pages.head_size,
                  "], got ", shape_of(output_root));
  const int64_t num_requests = params.pages.num_requests;
  check_tensor("effect", effect, {num_requests, num_kv_heads, params.max_rated}, ScalarType::Float);
  params.output_root = output_root.const_data_ptr();
  params.num_rated = num_rated.const_data_ptr<int32_t>();
  if (value_scale.has_value()) {
    params.value_scale = checked_scale("value_scale", *value_scale, num_layers * num_kv_heads);
  }
  params.effect = effect.mutable_data_ptr<float>();
  run_units(*instruction_set->effect, params, num_requests * num_kv_heads * effect_parts(params));
}

void join_scores(const Tensor& scores, const Tensor& num_rated, const Tensor& num_candidates,
                 const std::optional<Tensor>& effect, const Tensor& out, int64_t group_reduce,
                 int64_t pool_kernel, int64_t pool_kind, bool pool_first, bool floor_at_mean,
                 int64_t span_kernel, int64_t page_reduce, int64_t page_size) {
  check_tensor("scores", scores, {-1, -1, -1, -1}, ScalarType::Float);
  check_dense_rows("scores", scores);
  JoinScores params = {};
  params.num_requests = to_int("requests", scores.size(0));
  params.num_kv_heads = to_int("heads", scores.size(1));
  params.num_groups = to_int("scores per head", scores.size(2), 1);
  params.max_rated = scores.size(3);
  check_tensor("num_rated", num_rated, {params.num_requests}, ScalarType::Int);
  check_contiguous("num_rated", num_rated);
  check_tensor("num_candidates", num_candidates, {params.num_requests}, ScalarType::Int);
  check_contiguous("num_candidates", num_candidates);
  check_tensor("out", out, {params.num_requests, params.num_kv_heads, -1}, ScalarType::Float);
  check_contiguous("out", out);
  params.width = out.size(2);
  params.page_reduce = to_enum("page_reduce", page_reduce, PageReduction::RMS);
  params.page_size = to_int("page_size", page_size, 1);
  params.num_rated = num_rated.const_data_ptr<int32_t>();
  params.num_candidates = num_candidates.const_data_ptr<int32_t>();
  const int64_t per_place = params.page_reduce == PageReduction::TOKEN ? 1 : page_size;
  for (int64_t r = 0; r < params.num_requests; ++r) {
    const int64_t rated = params.num_rated[r];
    const int64_t candidates = params.num_candidates[r];
    STD_TORCH_CHECK(candidates >= 0 && candidates <= rated && rated <= params.max_rated &&
                        candidates <= params.width * per_place,
                    candidates, " candidates and ", rated, " rated tokens do not fit ",
                    shape_of(scores), " and ", shape_of(out));
  }
  params.scores = scores.const_data_ptr<float>();
  params.request_stride = scores.stride(0);
  params.head_stride = scores.stride(1);
  params.group_stride = scores.stride(2);
  if (effect.has_value()) {
    check_tensor("effect", *effect, {params.num_requests, params.num_kv_heads, params.max_rated},
                 ScalarType::Float);
    check_dense_rows("effect", *effect);
    params.effect = effect->const_data_ptr<float>();
    params.effect_request_stride = effect->stride(0);
    params.effect_head_stride = effect->stride(1);
  }
  params.group_reduce = to_enum("group_reduce", group_reduce, GroupReduction::MAX);
  params.pool_kernel = to_kernel("pool_kernel", pool_kernel);
  params.pool_kind = to_enum("pool_kind", pool_kind, PoolKind::AVG);
  params.pool_first = pool_first;
  params.floor_at_mean = floor_at_mean;
  params.span_kernel = to_kernel("span_kernel", span_kernel);
  params.out = out.mutable_data_ptr<float>();
  run_units(*instruction_set->join, params,
            static_cast<int64_t>(params.num_requests) * params.num_kv_heads);
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

// Names of the instruction sets that the library has and this CPU too, best first, by number; null
// past the last. Read by ctypes.
extern "C" __attribute__((visibility("default"))) const char* kvc_instruction_set(int number) {
  for (int i = 0; i < NUM_INSTRUCTION_SETS; ++i) {
    if (INSTRUCTION_SETS[i].is_supported() && number-- == 0) return INSTRUCTION_SETS[i].name;
  }
  return nullptr;
}

// The name of the one in use.
extern "C" __attribute__((visibility("default"))) const char* kvc_instruction_set_in_use() {
  return instruction_set->name;
}

// Use one of them from now on; 0 if there is none of this name. Not while an op runs.
extern "C" __attribute__((visibility("default"))) int kvc_use_instruction_set(const char* name) {
  for (int i = 0; i < NUM_INSTRUCTION_SETS; ++i) {
    if (INSTRUCTION_SETS[i].is_supported() && std::strcmp(INSTRUCTION_SETS[i].name, name) == 0) {
      instruction_set = &INSTRUCTION_SETS[i];
      return 1;
    }
  }
  return 0;
}

STABLE_TORCH_LIBRARY_IMPL(vllm_kvcompress, CPU, m) {
  m.impl("window_scores", TORCH_BOX(&window_scores));
  m.impl("paged_value_effect", TORCH_BOX(&paged_value_effect));
  m.impl("join_scores", TORCH_BOX(&join_scores));
  m.impl("joint_page_counts", TORCH_BOX(&joint_page_counts));
  m.impl("select_entries", TORCH_BOX(&select_entries));
  m.impl("compact", TORCH_BOX(&compact));
  m.impl("select_and_compact", TORCH_BOX(&select_and_compact));
  m.impl("move_entries", TORCH_BOX(&move_entries));
}
