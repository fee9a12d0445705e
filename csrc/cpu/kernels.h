// What the CPU kernels take and do: plain C++, no torch.
//
// R requests, L layers, H KV heads, g query heads per KV head, S = L * H streams (layer, KV head),
// layer first; N entries, which are pages or tokens; b tokens per page, d the head size. What the
// values mean, and which are allowed, is written in vllm_kvcompress/ops/{window,select,move}/.
//
// Work is cut into units that do not depend on the number of threads, and nothing is summed over
// units. So results are the same to the bit for any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../row_fields.h"

namespace kvcompress {

// Widest pooling along tokens.
constexpr int MAX_POOL_KERNEL = 31;

enum class Element { FLOAT32, BFLOAT16, FLOAT16 };

// Where element e of the key (or value) of a page's token t lies, in elements from the page's
// start.
struct ElementOrder {
  // [b, d], or null where the order is first + t * token_stride + e * element_stride.
  const int64_t* offsets;
  int64_t first;
  int64_t token_stride;
  int64_t element_stride;
};

// Static, like every function here: object files for different instruction sets must not share one.
static inline int64_t offset_of(const ElementOrder& order, int64_t token, int64_t element,
                                int64_t head_size) {
  return order.offsets != nullptr
             ? order.offsets[token * head_size + element]
             : order.first + token * order.token_stride + element * order.element_stride;
}

static inline const int32_t* row_of(const int32_t* rows, int64_t request) {
  return rows + ROW_WIDTH * request;
}

// Column of a dense token block: before the newest region, or behind it.
static inline int64_t row_column(const int32_t* row, int64_t block) {
  const int64_t before = block + row[ROW_REGION_COLUMN] - row[ROW_BOUNDARY_BLOCK];
  return block >= row[ROW_BOUNDARY_BLOCK] ? before + row[ROW_NUM_REGION_BLOCKS] : before;
}

// One layer of prompts that lie in their pages.
struct PagedLayer {
  // [blocks, L, H, page_elements], read only.
  const void* pool;
  Element type;
  int64_t page_elements;
  ElementOrder order;
  // [R, ROW_WIDTH]
  const int32_t* rows;
  // [R, table_stride]: block ids.
  const int32_t* block_table;
  int64_t table_stride;
  int num_requests;
  int num_layers;
  int num_kv_heads;
  int layer;
  int block_size;
  int head_size;
};

// First element of the page that holds a token of a prompt.
static inline int64_t page_start(const PagedLayer& pages, int64_t request, int64_t head,
                                 int64_t token) {
  const int32_t* row = row_of(pages.rows, request);
  const int64_t column = row_column(row, token / pages.block_size);
  const int64_t block = pages.block_table[request * pages.table_stride + column];
  return ((block * pages.num_layers + pages.layer) * pages.num_kv_heads + head) *
         pages.page_elements;
}

// What a head's stored numbers are multiplied by, of [L * H] scales or null.
static inline float scale_of(const float* scales, const PagedLayer& pages, int64_t head) {
  return scales != nullptr ? scales[pages.layer * pages.num_kv_heads + head] : 1.0f;
}

// In the order of WINDOW_REDUCTIONS in ops/window/plan.py.
enum class WindowReduction { MEAN, SUM, MAX, DEFENSIVE };

struct WindowScores {
  PagedLayer pages;
  // [R, w, H * g, d], its strides in elements, that of d being 1. Read only.
  const void* query;
  Element query_type;
  int64_t query_request_stride;
  int64_t query_token_stride;
  int64_t query_head_stride;
  int window;
  int group;
  // [R]
  const int32_t* num_rated;
  // [L * H] or null.
  const float* key_scale;
  // [R, w, H * g] or null.
  const float* lse;
  // [H * g] or null.
  const float* sinks;
  float scale;
  float logits_soft_cap;
  WindowReduction reduce;
  int power;
  int near_tokens;
  int pool_kernel;
  // [R, H * g, max_rated], written up to each request's num_rated.
  float* scores;
  int64_t max_rated;
  // Longest prompt.
  int max_tokens;
};

struct ValueEffect {
  PagedLayer pages;
  // [H, d, d], read only.
  const void* output_root;
  Element root_type;
  // [R]
  const int32_t* num_rated;
  // [L * H] or null.
  const float* value_scale;
  // [R, H, max_rated], written up to each request's num_rated.
  float* effect;
  int64_t max_rated;
};

// In the order of GROUP_REDUCTIONS there, of 'max' and 'avg', and of PAGE_REDUCTIONS.
enum class GroupReduction { MEAN, SUM, MAX };
enum class PoolKind { MAX, AVG };
enum class PageReduction { TOKEN, MAX, MEAN, RMS };

struct JoinScores {
  // [R, H, G, N] and its strides in elements, that of N being 1. Read only.
  const float* scores;
  int64_t request_stride;
  int64_t head_stride;
  int64_t group_stride;
  int num_requests;
  int num_kv_heads;
  int num_groups;
  // [R] each.
  const int32_t* num_rated;
  const int32_t* num_candidates;
  // [R, H, N] with these strides, or null.
  const float* effect;
  int64_t effect_request_stride;
  int64_t effect_head_stride;
  GroupReduction group_reduce;
  int pool_kernel;
  PoolKind pool_kind;
  bool pool_first;
  bool floor_at_mean;
  int span_kernel;
  PageReduction page_reduce;
  int page_size;
  // [R, H, width], written up to each request's candidates.
  float* out;
  int64_t width;
  int64_t max_rated;
};

// A kernel that is compiled once per instruction set. Scratch is aligned to 64 bytes, belongs to
// one thread, and what it holds before and after means nothing.
template <class Params>
struct UnitKernel {
  size_t (*scratch_bytes)(const Params& params);
  void (*unit)(const Params& params, int64_t number, void* scratch);
};

constexpr int EFFECT_TOKENS = 512;

// Units of EFFECT_TOKENS tokens that each request and KV head has.
static inline int64_t effect_parts(const ValueEffect& params) {
  return (params.max_rated + EFFECT_TOKENS - 1) / EFFECT_TOKENS;
}

// An instruction set that the library was built for.
struct InstructionSet {
  const char* name;
  bool (*is_supported)();
  // R * H * g units: a request's query head.
  const UnitKernel<WindowScores>* window;
  // R * H * effect_parts() units.
  const UnitKernel<ValueEffect>* effect;
  // R * H units: a request's KV head.
  const UnitKernel<JoinScores>* join;
};

// The best one that this CPU has, unless another was chosen (instruction_sets.cpp).
const InstructionSet& instruction_set_in_use();

// Scores of the entries of all streams, read only.
struct Scores {
  // [R, S, N]; entries of a stream lie one after another. Strides in entries.
  const float* scores;
  // [R] entries that each of the request's streams can choose from.
  const int32_t* num_entries;
  int64_t request_stride;
  int64_t stream_stride;
  int num_requests;
  int num_streams;
  // Entries per page.
  int page_size;
};

struct JointCounts {
  Scores scores;
  // [R, G], read only: pages of every group of S / G streams, and entries sure to each stream.
  const int32_t* total_pages;
  const int32_t* guaranteed;
  // [R, S], written.
  int32_t* num_pages;
  int num_groups;
};

struct Selection {
  Scores scores;
  // [R, S], read only.
  const int32_t* num_pages;
  // [R, S + 1], filled by the caller: first virtual page of every stream.
  const int32_t* page_offsets;
  // [R, indices_stride], written: chosen entries of all streams, one stream after another.
  int32_t* indices;
  int64_t indices_stride;
};

struct Compaction {
  // [blocks, S, page_elements], written at the regions' pages only.
  void* pool;
  int element_bytes;
  int64_t page_elements;
  ElementOrder key_order;
  ElementOrder value_order;
  const int32_t* rows;
  const int32_t* block_table;
  int64_t table_stride;
  int num_requests;
  int num_streams;
  int block_size;
  int head_size;
  // 1 where whole pages are kept, b where tokens are.
  int entries_per_page;
  // [R, S + 1] and [R, indices_stride], read only.
  const int32_t* page_offsets;
  const int32_t* indices;
  int64_t indices_stride;
};

struct Moves {
  // [n, entry_bytes], read only, and [k, entry_bytes], written; may be the same.
  const char* source;
  char* target;
  int64_t entry_bytes;
  // [num_moves] each; a negative number in either moves nothing.
  const int64_t* source_index;
  const int64_t* target_index;
  int64_t num_moves;
};

constexpr int MOVES_PER_UNIT = 64;

// Runs unit(i) for every i below `count`, in any order and by any number of threads.
class Workers {
 public:
  virtual ~Workers() = default;
  virtual void run(int64_t count, void (*unit)(void* context, int64_t i), void* context) = 0;

  template <class Function>
  void each(int64_t count, Function&& function) {
    run(count, [](void* context, int64_t i) { (*static_cast<Function*>(context))(i); }, &function);
  }
};

// Pages of every stream of all groups of one request; scratch is allocated here.
void count_joint_pages(const JointCounts& params, Workers& workers);

// One unit per request and stream: R * S.
void select_unit(const Selection& params, int64_t unit);

// Copies what one stream of one request keeps; R * S units. Requests without a region are left.
void compact_unit(const Compaction& params, int64_t unit);

// Makes MOVES_PER_UNIT moves.
void move_unit(const Moves& params, int64_t unit);

}  // namespace kvcompress
