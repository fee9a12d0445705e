// Numbers of a row descriptor. What they mean, and their order, is written at
// vllm_kvcompress/row_descriptor.py; a test compares.
#pragma once

#include <cstdint>

namespace kvcompress {

enum RowField {
  ROW_SEQ_LEN,
  ROW_NUM_REGION_BLOCKS,
  ROW_REGION_COLUMN,
  ROW_BOUNDARY_BLOCK,
  ROW_FIRST_KEPT_BLOCK,
  // How many there are.
  ROW_WIDTH
};

}  // namespace kvcompress
