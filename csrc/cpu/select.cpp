// Which entries every stream keeps: radix selection on the bits of scores.
#include <algorithm>
#include <cstring>
#include <limits>
#include <queue>
#include <utility>
#include <vector>

#include "kernels.h"

namespace kvcompress {
namespace {

constexpr int DIGIT_BITS = 8;
constexpr int NUM_DIGITS = 1 << DIGIT_BITS;

// Bits that sort like the scores: NaN as -inf, -0.0 as 0.0.
uint32_t key_of(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  if (bits << 1 > 0xff000000u) bits = 0xff800000u;
  if (bits << 1 == 0) bits = 0;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// One digit's counters of the entries whose higher digits are `prefix`.
void count_digits(const float* scores, int64_t num_entries, int shift, uint32_t prefix,
                  uint32_t* counters) {
  std::fill_n(counters, NUM_DIGITS, 0u);
  if (shift + DIGIT_BITS == 32) {
    for (int64_t i = 0; i < num_entries; ++i) ++counters[key_of(scores[i]) >> shift];
    return;
  }
  for (int64_t i = 0; i < num_entries; ++i) {
    const uint32_t key = key_of(scores[i]);
    if (key >> (shift + DIGIT_BITS) == prefix) ++counters[key >> shift & (NUM_DIGITS - 1)];
  }
}

// Streams that compete for the entries of one request.
struct Group {
  const float* scores;
  int64_t stream_stride;
  int64_t num_entries;
  int64_t num_streams;
  int64_t guaranteed;
  // To give out.
  int64_t total;

  const float* stream(int64_t i) const { return scores + i * stream_stride; }
};

// Entries of each stream. The threshold is the greatest key at which the streams' entries from it
// on, but at least those guaranteed, are enough; of entries equal to it those that rank higher in
// their stream win, then those of lower streams.
std::vector<int64_t> joint_top_counts(const Group& group, Workers& workers) {
  const int64_t size = group.num_streams;
  std::vector<uint32_t> counters(size * NUM_DIGITS);
  std::vector<int64_t> above(size, 0);
  std::vector<int64_t> reached(size);
  uint32_t prefix = 0;
  uint32_t digit = 0;
  for (int shift = 32 - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
    workers.each(size, [&](int64_t i) {
      count_digits(group.stream(i), group.num_entries, shift, prefix, &counters[i * NUM_DIGITS]);
    });
    reached = above;
    for (digit = NUM_DIGITS; digit > 0;) {
      --digit;
      int64_t total = 0;
      for (int64_t i = 0; i < size; ++i) {
        reached[i] += counters[i * NUM_DIGITS + digit];
        total += std::max(reached[i], group.guaranteed);
      }
      if (total >= group.total) break;
    }
    for (int64_t i = 0; i < size; ++i) above[i] = reached[i] - counters[i * NUM_DIGITS + digit];
    prefix = prefix << DIGIT_BITS | digit;
  }
  // Ranks [counts, reached) of a stream are equal to the threshold.
  std::vector<int64_t> counts(size);
  int64_t missing = group.total;
  for (int64_t i = 0; i < size; ++i) {
    counts[i] = std::max(above[i], group.guaranteed);
    reached[i] = std::max(reached[i], counts[i]);
    missing -= counts[i];
  }
  const auto filled_to = [&](int64_t rank) {
    int64_t sum = 0;
    for (int64_t i = 0; i < size; ++i) {
      sum += std::min(std::max(rank, counts[i]), reached[i]) - counts[i];
    }
    return sum;
  };
  int64_t level = 0;
  int64_t too_high = group.num_entries + 1;
  while (too_high - level > 1) {
    const int64_t middle = (level + too_high) / 2;
    (filled_to(middle) <= missing ? level : too_high) = middle;
  }
  missing -= filled_to(level);
  for (int64_t i = 0; i < size; ++i) {
    const bool has_one_more = counts[i] <= level && level < reached[i];
    counts[i] = std::min(std::max(level, counts[i]), reached[i]);
    if (has_one_more && missing > 0) {
      ++counts[i];
      --missing;
    }
  }
  return counts;
}

// Whole pages close to counts / page_size that sum to `total`, by largest remainder; each from 1 to
// `most`, equal remainders to the lower stream.
void apportion(const std::vector<int64_t>& counts, int64_t total, int64_t page_size, int64_t most,
               int32_t* pages) {
  const int64_t size = static_cast<int64_t>(counts.size());
  int64_t missing = total;
  for (int64_t i = 0; i < size; ++i) {
    pages[i] = static_cast<int32_t>(std::min(std::max<int64_t>(counts[i] / page_size, 1), most));
    missing -= pages[i];
  }
  const int step = missing > 0 ? 1 : -1;
  // Entries that are still owed (or owed back), then the stream, negative.
  std::priority_queue<std::pair<int64_t, int64_t>> owed;
  const auto queue = [&](int64_t i) {
    if (step > 0 ? pages[i] < most : pages[i] > 1) {
      owed.emplace(step * (counts[i] - pages[i] * page_size), -i);
    }
  };
  for (int64_t i = 0; i < size; ++i) queue(i);
  for (; missing != 0 && !owed.empty(); missing -= step) {
    const int64_t best = -owed.top().second;
    owed.pop();
    pages[best] += step;
    queue(best);
  }
}

class OneWorker : public Workers {
 public:
  void run(int64_t count, void (*unit)(void* context, int64_t i), void* context) override {
    for (int64_t i = 0; i < count; ++i) unit(context, i);
  }
};

void group_page_counts(const JointCounts& params, int64_t number, Workers& workers) {
  const Scores& scores = params.scores;
  const int64_t request = number / params.num_groups;
  const int64_t size = scores.num_streams / params.num_groups;
  const int64_t first = number % params.num_groups * size;
  const int64_t num_entries = scores.num_entries[request];
  const int64_t total_pages = params.total_pages[number];
  const Group group = {
      scores.scores + request * scores.request_stride + first * scores.stream_stride,
      scores.stream_stride,
      num_entries,
      size,
      std::min<int64_t>(params.guaranteed[number], num_entries),
      std::min(total_pages * scores.page_size, num_entries * size)};
  const std::vector<int64_t> counts = joint_top_counts(group, workers);
  int32_t* pages = params.num_pages + request * scores.num_streams + first;
  if (scores.page_size == 1) {
    std::copy(counts.begin(), counts.end(), pages);
  } else {
    apportion(counts, total_pages, scores.page_size, num_entries / scores.page_size, pages);
  }
}

// Ascending places of the `count` best of `num_entries` scores, lower places first where equal.
void best_entries(const float* scores, int64_t num_entries, int64_t count, int32_t* out) {
  uint32_t counters[NUM_DIGITS];
  uint32_t lowest = 0;
  int64_t num_lowest = count;
  if (count < num_entries) {
    uint32_t prefix = 0;
    for (int shift = 32 - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
      count_digits(scores, num_entries, shift, prefix, counters);
      uint32_t digit = NUM_DIGITS - 1;
      for (; counters[digit] < num_lowest; --digit) num_lowest -= counters[digit];
      prefix = prefix << DIGIT_BITS | digit;
      lowest = prefix << shift;
      if (counters[digit] == num_lowest) {
        // All of them are kept, whatever their lower digits.
        num_lowest = num_entries;
        break;
      }
    }
  }
  for (int64_t i = 0, num_found = 0; num_found < count; ++i) {
    const uint32_t key = key_of(scores[i]);
    const bool is_lowest = key == lowest;
    const bool is_kept = key > lowest || (is_lowest && num_lowest > 0);
    num_lowest -= is_lowest;
    out[num_found] = static_cast<int32_t>(i);
    num_found += is_kept;
  }
}

}  // namespace

void count_joint_pages(const JointCounts& params, Workers& workers) {
  const int64_t num_groups = static_cast<int64_t>(params.scores.num_requests) * params.num_groups;
  if (num_groups == 1) return group_page_counts(params, 0, workers);
  workers.each(num_groups, [&](int64_t number) {
    OneWorker alone;
    group_page_counts(params, number, alone);
  });
}

void select_unit(const Selection& params, int64_t unit) {
  const Scores& scores = params.scores;
  const int64_t request = unit / scores.num_streams;
  const int64_t stream = unit % scores.num_streams;
  const int64_t first = params.page_offsets[unit + request];
  best_entries(scores.scores + request * scores.request_stride + stream * scores.stream_stride,
               scores.num_entries[request],
               static_cast<int64_t>(params.num_pages[unit]) * scores.page_size,
               params.indices + request * params.indices_stride + first * scores.page_size);
}

}  // namespace kvcompress
