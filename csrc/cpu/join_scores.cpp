// One score per token or page of a KV head, from those of its query heads.
#include "scoring.h"

namespace {

using namespace kvcompress;

constexpr float SMALLEST_NORMAL = 1.17549435e-38f;
// Places around a row, at least half of the widest pooling and a vector.
constexpr int PAD = 32;

static_assert(PAD >= MAX_POOL_KERNEL / 2 + WIDTH, "a pooling reads past the last vector");

// Three rows of tokens.
int64_t row_stride(const JoinScores& params) {
  return round_up(params.max_rated, 16) + 2 * PAD;
}

struct Pooling {
  int64_t half;
  bool is_max;
};

void fill(float* row, int64_t from, int64_t to, float value) {
  for (int64_t t = from; t < to; ++t) row[t] = value;
}

// to[t] = the largest, or the mean, of from[t - half .. t + half]; `from` has room around it.
void pool(float* from, float* to, int64_t count, Pooling pooling) {
  const float outside = pooling.is_max ? -__builtin_inff() : 0.0f;
  fill(from, -PAD, 0, outside);
  fill(from, count, round_up(count, WIDTH) + PAD - WIDTH, outside);
  const float kernel = static_cast<float>(2 * pooling.half + 1);
  for (int64_t t = 0; t < count; t += WIDTH) {
    Floats joined = load(from + t - pooling.half);
    for (int64_t shift = 1 - pooling.half; shift <= pooling.half; ++shift) {
      const Floats next = load(from + t + shift);
      joined = pooling.is_max ? maximum(joined, next) : joined + next;
    }
    store(to + t, pooling.is_max ? joined : joined / kernel);
  }
}

void join_group(const JoinScores& params, const float* from, bool is_first, float* joined,
                int64_t count) {
  for (int64_t t = 0; t < count; ++t) {
    if (is_first) {
      joined[t] = from[t];
    } else if (params.group_reduce == GroupReduction::MAX) {
      joined[t] = maximum(joined[t], from[t]);
    } else {
      joined[t] += from[t];
    }
  }
}

float mean_of(const float* row, int64_t count) {
  Floats sums = splat(0.0f);
  float rest = 0.0f;
  int64_t t = 0;
  for (; t + WIDTH <= count; t += WIDTH) sums += load(row + t);
  for (; t < count; ++t) rest += row[t];
  return (sum_of(sums) + rest) / static_cast<float>(count);
}

// Times this head's share of the values' effect, which the KV heads sum to 1.
void weigh(const JoinScores& params, int64_t request, int64_t head, float* row, int64_t count) {
  const float* first = params.effect + request * params.effect_request_stride;
  const float* own = first + head * params.effect_head_stride;
  for (int64_t t = 0; t < count; ++t) {
    float total = 0.0f;
    for (int64_t other = 0; other < params.num_kv_heads; ++other) {
      total += first[other * params.effect_head_stride + t];
    }
    row[t] *= own[t] / maximum(total, SMALLEST_NORMAL);
  }
}

float page_score(PageReduction reduce, const float* tokens, int64_t count) {
  float best = tokens[0];
  for (int64_t t = 1; t < count; ++t) best = maximum(best, tokens[t]);
  if (reduce == PageReduction::MAX) return best;
  const bool is_rms = reduce == PageReduction::RMS;
  // Relative to the best, since squares of small scores would underflow.
  const float unit = is_rms && best > 0.0f && best < __builtin_inff() ? best : 1.0f;
  float sum = 0.0f;
  for (int64_t t = 0; t < count; ++t) {
    const float score = tokens[t] / unit;
    sum += is_rms ? score * score : score;
  }
  const float mean = sum / static_cast<float>(count);
  return is_rms ? unit * __builtin_sqrtf(mean) : mean;
}

size_t join_scratch_bytes(const JoinScores& params) {
  return 3 * row_stride(params) * 4;
}

void join_unit(const JoinScores& params, int64_t number, void* scratch) {
  const int64_t request = number / params.num_kv_heads;
  const int64_t head = number % params.num_kv_heads;
  const int64_t stride = row_stride(params);
  const int64_t rated = params.num_rated[request];
  float* rows[3];
  for (int i = 0; i < 3; ++i) rows[i] = static_cast<float*>(scratch) + i * stride + PAD;
  float* joined = rows[0];
  float* spare = rows[1];
  const float* scores = params.scores + request * params.request_stride + head * params.head_stride;
  const Pooling pooling = {params.pool_kernel / 2, params.pool_kind == PoolKind::MAX};
  for (int64_t g = 0; g < params.num_groups; ++g) {
    const float* own = scores + g * params.group_stride;
    if (params.pool_first && pooling.half > 0) {
      __builtin_memcpy(rows[2], own, rated * sizeof(float));
      pool(rows[2], spare, rated, pooling);
      own = spare;
    }
    join_group(params, own, g == 0, joined, rated);
  }
  if (params.group_reduce == GroupReduction::MEAN) {
    const float size = static_cast<float>(params.num_groups);
    for (int64_t t = 0; t < rated; ++t) joined[t] /= size;
  }
  if (!params.pool_first && pooling.half > 0) {
    pool(joined, spare, rated, pooling);
    joined = spare;
    spare = rows[0];
  }
  if (params.floor_at_mean && rated > 0) {
    const float mean = mean_of(joined, rated);
    for (int64_t t = 0; t < rated; ++t) joined[t] = maximum(joined[t], mean);
  }
  if (params.effect != nullptr) weigh(params, request, head, joined, rated);
  if (params.span_kernel > 1) {
    pool(joined, spare, rated, {params.span_kernel / 2, true});
    joined = spare;
  }
  float* out = params.out + number * params.width;
  const int64_t candidates = params.num_candidates[request];
  if (params.page_reduce == PageReduction::TOKEN) {
    __builtin_memcpy(out, joined, candidates * sizeof(float));
    return;
  }
  for (int64_t page = 0; page < candidates / params.page_size; ++page) {
    out[page] = page_score(params.page_reduce, joined + page * params.page_size, params.page_size);
  }
}

}  // namespace

namespace kvcompress {

extern const UnitKernel<JoinScores> KVC_NAMED(join_kernel);
const UnitKernel<JoinScores> KVC_NAMED(join_kernel) = {join_scratch_bytes, join_unit};

}  // namespace kvcompress
