// The ops that score prompts, for torch; schemas are in vllm_kvcompress/ops/native.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "tensor_checks.h"
#include "torch_threads.h"

namespace kvcompress {
namespace {

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
                   const std::optional<Tensor>& key_offsets, const std::optional<Tensor>& key_scale,
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
  run_units(*instruction_set_in_use().window, params, num_requests * num_heads);
}

void paged_value_effect(const Tensor& pool, const Tensor& output_root, const Tensor& rows,
                        const Tensor& block_table, const Tensor& num_rated,
                        const std::optional<Tensor>& value_offsets,
                        const std::optional<Tensor>& value_scale, const Tensor& effect,
                        int64_t layer, int64_t num_layers) {
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
  run_units(*instruction_set_in_use().effect, params,
            num_requests * num_kv_heads * effect_parts(params));
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
  run_units(*instruction_set_in_use().join, params,
            static_cast<int64_t>(params.num_requests) * params.num_kv_heads);
}

}  // namespace
}  // namespace kvcompress

STABLE_TORCH_LIBRARY_IMPL(vllm_kvcompress, CPU, m) {
  m.impl("window_scores", TORCH_BOX(&kvcompress::window_scores));
  m.impl("paged_value_effect", TORCH_BOX(&kvcompress::paged_value_effect));
  m.impl("join_scores", TORCH_BOX(&kvcompress::join_scores));
}
