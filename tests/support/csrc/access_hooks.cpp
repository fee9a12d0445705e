// What gcc calls before every plain access to memory in code compiled with -fsanitize=thread: here
// instead of its own runtime, so that the accesses of the emulated threads are seen.
#include "schedule.h"

namespace {

using on_host::Kind;

inline void see(const void* pointer, size_t num_bytes, Kind kind, void* code) {
  on_host::before_access(pointer, num_bytes, kind, reinterpret_cast<uintptr_t>(code));
}

}  // namespace

#define SEE_BYTES(BYTES)                                           \
  void __tsan_read##BYTES(void* pointer) {                         \
    see(pointer, BYTES, Kind::READ, __builtin_return_address(0));  \
  }                                                                \
  void __tsan_write##BYTES(void* pointer) {                        \
    see(pointer, BYTES, Kind::WRITE, __builtin_return_address(0)); \
  }

extern "C" {

SEE_BYTES(1)
SEE_BYTES(2)
SEE_BYTES(4)
SEE_BYTES(8)
SEE_BYTES(16)

void __tsan_read_range(void* pointer, size_t num_bytes) {
  see(pointer, num_bytes, Kind::READ, __builtin_return_address(0));
}

void __tsan_write_range(void* pointer, size_t num_bytes) {
  see(pointer, num_bytes, Kind::WRITE, __builtin_return_address(0));
}

void __tsan_init() {}

}  // extern "C"
