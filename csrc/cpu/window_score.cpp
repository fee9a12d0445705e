// Window scores, straight from pages: products, softmax and the reduction over the window.
//
// One unit is one query head. Its logits, [w, n], are the only thing that is ever written down;
// for usual windows and prompts they stay in a core's cache.
#include "scoring.h"

namespace {

using namespace kvcompress;

// Rows of queries that are multiplied at a time: as many as registers hold two vectors of sums for.
constexpr int ROWS = WIDTH == 16 ? 8 : 4;
constexpr int TILE = 2 * WIDTH;
// Zeros around the logits of a row, at least half of the widest pooling.
constexpr int PAD = 16;

static_assert(PAD >= MAX_POOL_KERNEL / 2 && 2 * PAD % TILE == 0, "rows are padded by whole tiles");

// How a unit's scratch is cut.
struct Layout {
  int64_t rows;
  int64_t row_stride;
  int64_t logits_bytes;
  int64_t query_bytes;
  int64_t tile_bytes;
};

Layout layout_of(const WindowScores& params) {
  const int64_t rows = round_up(params.window, ROWS);
  const int64_t columns = round_up(params.max_tokens, 2 * PAD) + 2 * PAD;
  // An odd number of cache lines, so that the rows of one column do not fight for one set.
  const int64_t lines = columns / PAD + (columns / PAD + 1) % 2;
  const int64_t head_size = params.pages.head_size;
  return {rows, lines * PAD, rows * lines * PAD * 4, round_up(rows * head_size * 4, 64),
          round_up(head_size + 1, 2) * TILE * 4};
}

struct Unit {
  const WindowScores& params;
  int64_t request;
  // Query head, of all H * g.
  int64_t query_head;
  int64_t kv_head;
  // Of the prompt, n.
  int64_t num_tokens;
  int64_t num_rated;
  // [rows, row_stride], PAD zeros before the first token.
  float* logits;
  int64_t row_stride;
};

// Products of float32 queries [ROWS, d] and keys [d, TILE].
struct FloatDot {
  using Query = float;

  template <class Type>
  static void load_query(const WindowScores& params, const void* from, Query* to) {
    for (int64_t e = 0; e < params.pages.head_size; ++e) {
      to[e] = Type::one(static_cast<const typename Type::Stored*>(from) + e);
    }
  }

  template <class Type>
  static void pack(const Unit& unit, int64_t first, float* tile) {
    pack_tile<Type, TILE>(unit.params.pages, unit.request, unit.kv_head, first, unit.num_tokens,
                          tile);
  }

  static void dot(const Query* query, const float* tile, int64_t head_size,
                  Floats (&sums)[ROWS][2]) {
    for (int64_t e = 0; e < head_size; ++e) {
      const Floats left = load(tile + e * TILE);
      const Floats right = load(tile + e * TILE + WIDTH);
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row) {
        sums[row][0] += left * query[row * head_size + e];
        sums[row][1] += right * query[row * head_size + e];
      }
    }
  }
};

#ifdef KVC_BFLOAT16_DOT
// The same of bfloat16 pairs: keys [d / 2, TILE], a word being two neighbouring elements of one
// token. Products are exact and sums float32, as above, with half the instructions.
struct PairDot {
  using Query = uint16_t;

  template <class Type>
  static void load_query(const WindowScores& params, const void* from, Query* to) {
    __builtin_memcpy(to, from, params.pages.head_size * sizeof(Query));
  }

  template <class Type>
  static void pack(const Unit& unit, int64_t first, float* tile) {
    pack_pairs<TILE>(unit.params.pages, unit.request, unit.kv_head, first, unit.num_tokens,
                     reinterpret_cast<uint32_t*>(tile));
  }

  static void dot(const Query* query, const float* tile, int64_t head_size,
                  Floats (&sums)[ROWS][2]) {
    for (int64_t e = 0; e < head_size; e += 2) {
      const __m512bh left = (__m512bh)_mm512_loadu_ps(tile + e * WIDTH);
      const __m512bh right = (__m512bh)_mm512_loadu_ps(tile + e * WIDTH + WIDTH);
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row) {
        int pair;
        __builtin_memcpy(&pair, query + row * head_size + e, sizeof(pair));
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        sums[row][0] = (Floats)_mm512_dpbf16_ps((__m512)sums[row][0], left, both);
        sums[row][1] = (Floats)_mm512_dpbf16_ps((__m512)sums[row][1], right, both);
      }
    }
  }
};
#endif

template <class Dot, class QueryType, class KeyType>
void fill_logits(const Unit& unit, const Layout& layout, void* query_scratch, float* tile) {
  const WindowScores& params = unit.params;
  const PagedLayer& pages = params.pages;
  auto* queries = static_cast<typename Dot::Query*>(query_scratch);
  const int64_t head_size = pages.head_size;
  __builtin_memset(queries, 0, layout.query_bytes);
  for (int64_t row = 0; row < params.window; ++row) {
    const int64_t start = unit.request * params.query_request_stride +
                          row * params.query_token_stride +
                          unit.query_head * params.query_head_stride;
    const auto* from = static_cast<const typename QueryType::Stored*>(params.query) + start;
    Dot::template load_query<QueryType>(params, from, queries + row * head_size);
  }
  const float factor = params.scale * scale_of(params.key_scale, pages, unit.kv_head);
  const float cap = params.logits_soft_cap;
  for (int64_t first = 0; first < unit.num_tokens; first += TILE) {
    Dot::template pack<KeyType>(unit, first, tile);
    for (int64_t row = 0; row < params.window; row += ROWS) {
      Floats sums[ROWS][2] = {};
      Dot::dot(queries + row * head_size, tile, head_size, sums);
      for (int i = 0; i < ROWS; ++i) {
        float* to = unit.logits + (row + i) * unit.row_stride + first;
        for (int half = 0; half < 2; ++half) {
          Floats logits = sums[i][half] * factor;
          if (cap > 0) logits = tanh_of(logits / cap) * cap;
          store(to + half * WIDTH, logits);
        }
      }
    }
  }
}

// Turn a row's logits into e^(logit - shift), zeros where its query may not look or nothing is
// rated; returns what they must be multiplied by to be attention weights.
float exponentials(const Unit& unit, int64_t row) {
  const WindowScores& params = unit.params;
  float* logits = unit.logits + row * unit.row_stride;
  const int64_t position = unit.num_tokens - params.window + row;
  const int64_t num_visible = position + 1;
  const int64_t end = round_up(unit.num_tokens, TILE);
  for (int64_t t = num_visible; t < end; ++t) logits[t] = -__builtin_inff();
  const bool has_sink = params.sinks != nullptr;
  const float sink = has_sink ? params.sinks[unit.query_head] : 0.0f;
  float shift;
  if (params.lse != nullptr) {
    const int64_t num_heads = static_cast<int64_t>(params.pages.num_kv_heads) * params.group;
    shift = params.lse[(unit.request * params.window + row) * num_heads + unit.query_head];
  } else {
    Floats best = load(logits);
    for (int64_t t = WIDTH; t < end; t += WIDTH) best = maximum(best, load(logits + t));
    shift = maximum_of(best);
    if (has_sink) shift = maximum(shift, sink);
  }
  Floats left = splat(0.0f);
  Floats right = splat(0.0f);
  for (int64_t t = 0; t < end; t += TILE) {
    const Floats one = exp_of(load(logits + t) - shift);
    const Floats other = exp_of(load(logits + t + WIDTH) - shift);
    store(logits + t, one);
    store(logits + t + WIDTH, other);
    left += one;
    right += other;
  }
  const int64_t num_counted = position + 1 - params.near_tokens;
  const int64_t first_hidden = minimum(unit.num_rated, num_counted > 0 ? num_counted : 0);
  // As far as a pooling or a vector that starts at a rated token may look.
  const int64_t last = round_up(unit.num_rated, TILE) + PAD;
  for (int64_t t = first_hidden; t < last; ++t) logits[t] = 0.0f;
  if (params.lse != nullptr) return 1.0f;
  const float total = sum_of(left + right) + (has_sink ? exp_of(sink - shift) : 0.0f);
  return 1.0f / total;
}

// What the mean-pooled row must be multiplied by to have the sum that it had.
float restored_sum(const Unit& unit, const float* weights) {
  const int64_t half = unit.params.pool_kernel / 2;
  const int64_t rated = unit.num_rated;
  // Tokens whose share is not counted `pool_kernel` times.
  const int64_t first_end = minimum(half, rated);
  const int64_t last_start = rated - half > first_end ? rated - half : first_end;
  float old_sum = 0.0f;
  float new_sum = 0.0f;
  const auto at_the_edge = [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) {
      const int64_t before = minimum(half, t);
      const int64_t after = minimum(half, rated - 1 - t);
      old_sum += weights[t];
      new_sum += weights[t] * static_cast<float>(before + after + 1);
    }
  };
  at_the_edge(0, first_end);
  at_the_edge(last_start, rated);
  Floats sums = splat(0.0f);
  float inside = 0.0f;
  int64_t t = first_end;
  for (; t + WIDTH <= last_start; t += WIDTH) sums += load(weights + t);
  for (; t < last_start; ++t) inside += weights[t];
  inside += sum_of(sums);
  old_sum += inside;
  new_sum += inside * static_cast<float>(unit.params.pool_kernel);
  return new_sum > 0.0f ? old_sum / new_sum : 0.0f;
}

template <WindowReduction REDUCE, int POWER>
void reduce_rows(const Unit& unit, const float* factors, float* out) {
  const int64_t window = unit.params.window;
  const int64_t half = unit.params.pool_kernel / 2;
  // Two vectors at a time are one or two whole cache lines of every row.
  for (int64_t first = 0; first < unit.num_rated; first += TILE) {
    Floats joined[2] = {splat(0.0f), splat(0.0f)};
    for (int64_t row = 0; row < window; ++row) {
      const float* weights = unit.logits + row * unit.row_stride + first;
      for (int i = 0; i < 2; ++i) {
        Floats weight;
        if (REDUCE == WindowReduction::DEFENSIVE) {
          weight = load(weights + i * WIDTH - half);
          for (int64_t shift = 1 - half; shift <= half; ++shift) {
            weight += load(weights + i * WIDTH + shift);
          }
          weight *= factors[row];
        } else {
          weight = load(weights + i * WIDTH) * factors[row];
          if (POWER == 2) weight *= weight;
        }
        if (REDUCE == WindowReduction::MEAN || REDUCE == WindowReduction::SUM) {
          joined[i] += weight;
        } else {
          joined[i] = maximum(joined[i], weight);
        }
      }
    }
    for (int i = 0; i < 2; ++i) {
      if (REDUCE == WindowReduction::MEAN) joined[i] /= static_cast<float>(window);
      store_some(out + first + i * WIDTH, joined[i], unit.num_rated - first - i * WIDTH);
    }
  }
}

void reduce(const Unit& unit, const float* factors, float* out) {
  const bool squares = unit.params.power == 2;
  switch (unit.params.reduce) {
    case WindowReduction::MEAN:
      return squares ? reduce_rows<WindowReduction::MEAN, 2>(unit, factors, out)
                     : reduce_rows<WindowReduction::MEAN, 1>(unit, factors, out);
    case WindowReduction::SUM:
      return squares ? reduce_rows<WindowReduction::SUM, 2>(unit, factors, out)
                     : reduce_rows<WindowReduction::SUM, 1>(unit, factors, out);
    case WindowReduction::MAX:
      return squares ? reduce_rows<WindowReduction::MAX, 2>(unit, factors, out)
                     : reduce_rows<WindowReduction::MAX, 1>(unit, factors, out);
    case WindowReduction::DEFENSIVE:
      return reduce_rows<WindowReduction::DEFENSIVE, 1>(unit, factors, out);
  }
}

template <class QueryType>
void fill_logits_from(const Unit& unit, const Layout& layout, void* query_scratch, float* tile) {
  switch (unit.params.pages.type) {
    case Element::FLOAT32:
      return fill_logits<FloatDot, QueryType, Float32>(unit, layout, query_scratch, tile);
    case Element::BFLOAT16:
      return fill_logits<FloatDot, QueryType, BFloat16>(unit, layout, query_scratch, tile);
    case Element::FLOAT16:
      return fill_logits<FloatDot, QueryType, Float16>(unit, layout, query_scratch, tile);
  }
}

size_t window_scratch_bytes(const WindowScores& params) {
  const Layout layout = layout_of(params);
  return layout.logits_bytes + layout.query_bytes + layout.tile_bytes +
         round_up(layout.rows * 4, 64);
}

void window_unit(const WindowScores& params, int64_t number, void* scratch) {
  const Layout layout = layout_of(params);
  const int64_t num_heads = static_cast<int64_t>(params.pages.num_kv_heads) * params.group;
  const int64_t request = number / num_heads;
  const int64_t query_head = number % num_heads;
  auto* bytes = static_cast<char*>(scratch);
  auto* logits = reinterpret_cast<float*>(bytes) + PAD;
  void* queries = bytes + layout.logits_bytes;
  auto* tile = reinterpret_cast<float*>(bytes + layout.logits_bytes + layout.query_bytes);
  auto* factors = reinterpret_cast<float*>(bytes + layout.logits_bytes + layout.query_bytes +
                                           layout.tile_bytes);
  const Unit unit = {params,
                     request,
                     query_head,
                     query_head / params.group,
                     row_of(params.pages.rows, request)[ROW_SEQ_LEN],
                     params.num_rated[request],
                     logits,
                     layout.row_stride};
#ifdef KVC_BFLOAT16_DOT
  const bool are_pairs = params.query_type == Element::BFLOAT16 &&
                         params.pages.type == Element::BFLOAT16 && params.pages.head_size % 2 == 0;
#else
  constexpr bool are_pairs = false;
#endif
  if (are_pairs) {
#ifdef KVC_BFLOAT16_DOT
    fill_logits<PairDot, BFloat16, BFloat16>(unit, layout, queries, tile);
#endif
  } else if (params.query_type == Element::FLOAT32) {
    fill_logits_from<Float32>(unit, layout, queries, tile);
  } else if (params.query_type == Element::BFLOAT16) {
    fill_logits_from<BFloat16>(unit, layout, queries, tile);
  } else {
    fill_logits_from<Float16>(unit, layout, queries, tile);
  }
  for (int64_t row = 0; row < params.window; ++row) {
    float* weights = logits + row * layout.row_stride;
    __builtin_memset(weights - PAD, 0, PAD * sizeof(float));
    factors[row] = exponentials(unit, row);
    if (params.reduce == WindowReduction::DEFENSIVE) factors[row] *= restored_sum(unit, weights);
  }
  reduce(unit, factors, params.scores + number * params.max_rated);
}

}  // namespace

namespace kvcompress {

extern const UnitKernel<WindowScores> KVC_NAMED(window_kernel);
const UnitKernel<WindowScores> KVC_NAMED(window_kernel) = {window_scratch_bytes, window_unit};

}  // namespace kvcompress
