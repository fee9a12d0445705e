// The instruction sets that the library was built for.
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

}  // namespace

const InstructionSet INSTRUCTION_SETS[] = {
#ifdef __x86_64__
    {"avx512_bf16", has_avx512_bf16, KVC_KERNELS(avx512_bf16)},
    {"avx512", has_avx512, KVC_KERNELS(avx512)},
    {"avx2", has_avx2, KVC_KERNELS(avx2)},
#endif
    {"portable", always, KVC_KERNELS(portable)},
};
const int NUM_INSTRUCTION_SETS = sizeof(INSTRUCTION_SETS) / sizeof(INSTRUCTION_SETS[0]);

}  // namespace kvcompress
