// What values do to a layer's output: the L2 norm of each value times its head's [d, d] root.
#include "scoring.h"

namespace {

using namespace kvcompress;

// Tokens that are multiplied at a time, and output elements of each.
constexpr int ROWS = WIDTH == 16 ? 8 : 4;
constexpr int COLUMNS = 2 * WIDTH;

struct Layout {
  // The root's columns, with zeros up to whole COLUMNS.
  int64_t width;
  int64_t root_bytes;
  int64_t values_bytes;
};

Layout layout_of(const ValueEffect& params) {
  const int64_t head_size = params.pages.head_size;
  const int64_t width = round_up(head_size, COLUMNS);
  return {width, head_size * width * 4, round_up(ROWS * head_size * 4, 64)};
}

template <class Type>
void load_root(const ValueEffect& params, int64_t head, int64_t width, float* root) {
  const int64_t head_size = params.pages.head_size;
  const auto* from =
      static_cast<const typename Type::Stored*>(params.output_root) + head * head_size * head_size;
  for (int64_t i = 0; i < head_size; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      root[i * width + j] = j < head_size ? Type::one(from + i * head_size + j) : 0.0f;
    }
  }
}

// Values of tokens [first, first + ROWS) as float32 [ROWS, d]; those past `end` are 0.
template <class Type>
void load_values(const ValueEffect& params, int64_t request, int64_t head, int64_t first,
                 int64_t end, float* values) {
  const PagedLayer& pages = params.pages;
  const auto* pool = static_cast<const typename Type::Stored*>(pages.pool);
  const int64_t head_size = pages.head_size;
  for (int64_t row = 0; row < ROWS; ++row, values += head_size) {
    const int64_t token = first + row;
    if (token >= end) {
      __builtin_memset(values, 0, head_size * sizeof(float));
      continue;
    }
    const auto* page = pool + page_start(pages, request, head, token);
    const int64_t slot = token % pages.block_size;
    const ElementOrder& order = pages.order;
    int64_t e = 0;
    if (order.offsets == nullptr && order.element_stride == 1) {
      const auto* from = page + order.first + slot * order.token_stride;
      for (; e + WIDTH <= head_size; e += WIDTH) store(values + e, Type::many(from + e));
    }
    for (; e < head_size; ++e) {
      values[e] = Type::one(page + offset_of(order, slot, e, head_size));
    }
  }
}

void norms(const float* values, const float* root, int64_t head_size, int64_t width,
           float (&out)[ROWS]) {
  Floats squares[ROWS] = {};
  for (int64_t j = 0; j < width; j += COLUMNS) {
    Floats sums[ROWS][2] = {};
    for (int64_t i = 0; i < head_size; ++i) {
      const Floats left = load(root + i * width + j);
      const Floats right = load(root + i * width + j + WIDTH);
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row) {
        sums[row][0] += left * values[row * head_size + i];
        sums[row][1] += right * values[row * head_size + i];
      }
    }
    for (int row = 0; row < ROWS; ++row) {
      squares[row] += sums[row][0] * sums[row][0] + sums[row][1] * sums[row][1];
    }
  }
  for (int row = 0; row < ROWS; ++row) out[row] = __builtin_sqrtf(sum_of(squares[row]));
}

template <class Type>
void part(const ValueEffect& params, int64_t number, const float* root, float* values) {
  const int64_t num_parts = effect_parts(params);
  const int64_t stream = number / num_parts;
  const int64_t request = stream / params.pages.num_kv_heads;
  const int64_t head = stream % params.pages.num_kv_heads;
  const int64_t start = number % num_parts * EFFECT_TOKENS;
  const int64_t end = minimum(start + EFFECT_TOKENS, params.num_rated[request]);
  const Layout layout = layout_of(params);
  const float scale = __builtin_fabsf(scale_of(params.value_scale, params.pages, head));
  for (int64_t first = start; first < end; first += ROWS) {
    load_values<Type>(params, request, head, first, end, values);
    float found[ROWS];
    norms(values, root, params.pages.head_size, layout.width, found);
    float* out = params.effect + stream * params.max_rated + first;
    for (int64_t row = 0; row < minimum(ROWS, end - first); ++row) out[row] = found[row] * scale;
  }
}

size_t effect_scratch_bytes(const ValueEffect& params) {
  const Layout layout = layout_of(params);
  return layout.root_bytes + layout.values_bytes;
}

void effect_unit(const ValueEffect& params, int64_t number, void* scratch) {
  const Layout layout = layout_of(params);
  auto* root = static_cast<float*>(scratch);
  auto* values = root + layout.root_bytes / 4;
  const int64_t head = number / effect_parts(params) % params.pages.num_kv_heads;
  switch (params.root_type) {
    case Element::FLOAT32:
      load_root<Float32>(params, head, layout.width, root);
      break;
    case Element::BFLOAT16:
      load_root<BFloat16>(params, head, layout.width, root);
      break;
    case Element::FLOAT16:
      load_root<Float16>(params, head, layout.width, root);
      break;
  }
  switch (params.pages.type) {
    case Element::FLOAT32:
      return part<Float32>(params, number, root, values);
    case Element::BFLOAT16:
      return part<BFloat16>(params, number, root, values);
    case Element::FLOAT16:
      return part<Float16>(params, number, root, values);
  }
}

}  // namespace

namespace kvcompress {

extern const UnitKernel<ValueEffect> KVC_NAMED(effect_kernel);
const UnitKernel<ValueEffect> KVC_NAMED(effect_kernel) = {effect_scratch_bytes, effect_unit};

}  // namespace kvcompress
