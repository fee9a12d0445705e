// The instruction sets that the library was built for, and the one in use.
#include <cstring>

#include "kernels.h"

#define KVC_DECLARE(isa)                                     \
  extern const UnitKernel<WindowScores> window_kernel_##isa; \
  extern const UnitKernel<ValueEffect> effect_kernel_##isa;  \
  extern const UnitKernel<JoinScores> join_kernel_##isa
#define KVC_KERNELS(isa) &window_kernel_##isa, &effect_kernel_##isa, &join_kernel_##isa

namespace kvcompress {

KVC_DECLARE(portable);
#ifdef __x86_64__
KVC_DECLARE(avx512_bf16);
KVC_DECLARE(avx512);
KVC_DECLARE(avx2);
#endif

namespace {

#ifdef __x86_64__
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif

bool always() {
  return true;
}

// Best first; the last one, 'portable', always works.
const InstructionSet INSTRUCTION_SETS[] = {
#ifdef __x86_64__
    {"avx512_bf16", has_avx512_bf16, KVC_KERNELS(avx512_bf16)},
    {"avx512", has_avx512, KVC_KERNELS(avx512)},
    {"avx2", has_avx2, KVC_KERNELS(avx2)},
#endif
    {"portable", always, KVC_KERNELS(portable)},
};

const InstructionSet* best() {
  const InstructionSet* set = INSTRUCTION_SETS;
  while (!set->is_supported()) ++set;
  return set;
}

const InstructionSet* in_use = best();

}  // namespace

const InstructionSet& instruction_set_in_use() {
  return *in_use;
}

// Names of the instruction sets that the library has and this CPU too, best first, by number; null
// past the last. Read by ctypes.
extern "C" __attribute__((visibility("default"))) const char* kvc_instruction_set(int number) {
  for (const InstructionSet& set : INSTRUCTION_SETS) {
    if (set.is_supported() && number-- == 0) return set.name;
  }
  return nullptr;
}

// The name of the one in use.
extern "C" __attribute__((visibility("default"))) const char* kvc_instruction_set_in_use() {
  return in_use->name;
}

// Use one of them from now on; 0 if there is none of this name. Not while an op runs.
extern "C" __attribute__((visibility("default"))) int kvc_use_instruction_set(const char* name) {
  for (const InstructionSet& set : INSTRUCTION_SETS) {
    if (set.is_supported() && std::strcmp(set.name, name) == 0) {
      in_use = &set;
      return 1;
    }
  }
  return 0;
}

}  // namespace kvcompress
