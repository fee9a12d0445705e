// Launch functions of the kernels: plain C++, no torch. None waits for the GPU, allocates memory or
// reads a value back, so a CUDA graph may record them. Results do not depend on any order in time.
//
// R requests, S streams (layer, KV head), layer first; N entries, which are pages or tokens. What
// the values mean, and which are allowed, is written in vllm_kvcompress/ops/{select,move}/.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../row_fields.h"

#ifdef KVC_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace kvcompress {

// Scores of the entries of all streams, read only.
struct Scores {
  // [R, S, N] bits of float32; entries of a stream lie one after another.
  const uint32_t* bits;
  // [R] entries that each of the request's streams can choose from.
  const int32_t* num_entries;
  // In entries.
  int64_t request_stride;
  int64_t stream_stride;
  int num_requests;
  int num_streams;
  // N.
  int max_entries;
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
  // joint_workspace_bytes() bytes, aligned to 16; what it holds before and after means nothing.
  void* workspace;
};

struct Selection {
  Scores scores;
  // [R, S], read only.
  const int32_t* num_pages;
  // [R, S + 1], written.
  int32_t* page_offsets;
  // [R, indices_stride], written: chosen entries of all streams, one stream after another.
  int32_t* indices;
  int64_t indices_stride;
};

// Where the pool's pages lie, and what a row says of a request.
struct Pages {
  // [blocks, S, b] tokens of token_bytes each, written at the regions' pages only. A token is its
  // key and its value, in plain order.
  void* pool;
  // [R, ROW_WIDTH], read only.
  const int32_t* rows;
  // [R, table_stride]: block ids of a request. Read only.
  const int32_t* block_table;
  int64_t table_stride;
  int num_requests;
  int num_streams;
  // b, tokens per page.
  int block_size;
  int token_bytes;
  // 1 where whole pages are kept, b where tokens are.
  int entries_per_page;
  // Greatest number of region blocks of a request.
  int max_region_blocks;
};

struct Compaction {
  Pages pages;
  // [R, S + 1] and [R, indices_stride], of a selection, read only.
  const int32_t* page_offsets;
  const int32_t* indices;
  int64_t indices_stride;
};

struct SelectionWithCompaction {
  Selection selection;
  Pages pages;
};

#ifndef KVC_ON_HOST
// Whether the current device can run these kernels: the driver may be too old for the runtime in
// this library, and the library may have nothing for the device.
cudaError_t check_device();
#endif

size_t joint_workspace_bytes(int num_requests, int num_streams, int num_groups);

cudaError_t launch_joint_page_counts(const JointCounts& params, cudaStream_t stream);
cudaError_t launch_select_entries(const Selection& params, cudaStream_t stream);
cudaError_t launch_compact(const Compaction& params, cudaStream_t stream);
cudaError_t launch_select_and_compact(const SelectionWithCompaction& params, cudaStream_t stream);

}  // namespace kvcompress
