// The launch functions of csrc/cuda for ctypes, run on the CPU.
#include "compact.cu"
#include "joint_counts.cu"
#include "schedule.h"
#include "select.cu"

using namespace kvcompress;

extern "C" {

// How many processors the machine says it has, and the other settings.
void set_machine(uint64_t seed, int num_processors, bool is_checked, const char* without_file,
                 int without_line) {
  on_host::num_processors = num_processors;
  on_host::settings.seed = seed;
  on_host::settings.is_checked = is_checked;
  std::strncpy(on_host::settings.without_file, without_file,
               sizeof(on_host::settings.without_file) - 1);
  on_host::settings.without_line = without_line;
}

void allow_memory(const void* start, size_t num_bytes) {
  on_host::allow_memory(start, num_bytes);
}

void forget_memory() {
  on_host::forget_memory();
}

const char* last_fault() {
  return on_host::last_fault();
}

uint32_t key_of(uint32_t bits) {
  return order_key(bits);
}

size_t workspace_bytes(int num_requests, int num_streams, int num_groups) {
  return joint_workspace_bytes(num_requests, num_streams, num_groups);
}

int run_joint_page_counts(const JointCounts* params) {
  return launch_joint_page_counts(*params, nullptr);
}

int run_select_entries(const Selection* params) {
  return launch_select_entries(*params, nullptr);
}

int run_compact(const Compaction* params) {
  return launch_compact(*params, nullptr);
}

int run_select_and_compact(const SelectionWithCompaction* params) {
  return launch_select_and_compact(*params, nullptr);
}

}  // extern "C"
