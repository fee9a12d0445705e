// The launch functions of csrc/cuda for ctypes, run on the CPU.
#include "compact.cu"
#include "joint_counts.cu"
#include "select.cu"

using namespace kvcompress;

extern "C" {

// Seed of all orders, and how many processors the machine says it has.
void set_machine(uint64_t seed, int num_processors) {
  on_host::machine.seed = seed;
  on_host::machine.num_processors = num_processors;
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
