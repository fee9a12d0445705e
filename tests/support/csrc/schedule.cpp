// Blocks and threads of a grid take turns, in an order drawn from a seed.
//
// Several blocks are there at once. A thread runs until it waits for others, or until it is
// pre-empted: at any access to memory in an instrumented build, at atomics else. Half of a block's
// warps sleep until the others are stuck, which so get as far ahead as they can; so do blocks.
#include "schedule.h"

#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace on_host {

Indices indices;
int num_processors = 4;
Settings settings;

namespace {

constexpr int NUM_THREADS = 512;
constexpr int WARP_SIZE = 32;
constexpr int NUM_WARPS = NUM_THREADS / WARP_SIZE;
constexpr size_t STACK_BYTES = 64 * 1024;
// What shared memory holds before a block has written to it.
constexpr unsigned char POISON = 0xA5;
constexpr int MAX_BLOCKS_AT_ONCE = 4;
// Turns of threads that a block has before another one goes on, and accesses between two that a
// thread is pre-empted at: at most.
constexpr unsigned MAX_TURNS = 1000;
constexpr unsigned MAX_ACCESSES = 100;
// Of so many atomics a thread is pre-empted at one. Where blocks can meet, which is not in shared
// memory, all its block then sleeps until no other is awake.
constexpr unsigned ATOMICS = 16;
// Of a grid; none here needs nearly as many.
constexpr uint64_t ENDLESS = 5'000'000;

struct Barrier {
  int num_expected = 0;
  int num_waiting = 0;
  unsigned generation = 0;
  // Where the first thread waits.
  Place place = {nullptr, 0};
};

struct Fiber {
  // It waits until this barrier is past this generation.
  const Barrier* barrier = nullptr;
  unsigned generation = 0;
  bool is_new = true;
  bool is_done = false;
  jmp_buf place;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
};

struct Block {
  std::vector<Fiber> fibers{NUM_THREADS};
  int number = 0;
  dim3 index;
  Barrier barrier;
  Barrier warp_barriers[NUM_WARPS];
  // What lanes tell each other, by turns: whoever tells the next has heard the last.
  uint32_t exchanged[2][NUM_THREADS];
  std::vector<uint32_t> dynamic_shared;
  // The shared variables' contents while other blocks have their turn.
  std::vector<char> static_shared;
  // The turns of the block's threads.
  std::vector<int> order;
  int next = 0;
  int num_done = 0;
  bool has_progressed = false;
  // Its warps, by bits, that sleep until the others are stuck; and whether the block does.
  uint64_t asleep = 0;
  bool is_asleep = false;
};

struct Range {
  uintptr_t begin;
  uintptr_t end;
};

// Where this library's thread-local variables are: the kernels' shared ones.
struct StaticShared {
  char* begin = nullptr;
  size_t num_bytes = 0;
};

StaticShared find_static_shared() {
  // Touched, so that there is memory for them.
  __shared__ volatile char any;
  any = 0;
  StaticShared found;
  const auto look = [](dl_phdr_info* info, size_t, void* result) {
    StaticShared* found = static_cast<StaticShared*>(result);
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const char* begin = static_cast<const char*>(info->dlpi_tls_data);
      const char* variable = const_cast<const char*>(&any);
      if (info->dlpi_phdr[i].p_type != PT_TLS || begin == nullptr) continue;
      if (variable < begin || variable >= begin + info->dlpi_phdr[i].p_memsz) continue;
      *found = {static_cast<char*>(info->dlpi_tls_data), info->dlpi_phdr[i].p_memsz};
    }
    return found->begin != nullptr ? 1 : 0;
  };
  dl_iterate_phdr(look, &found);
  return found;
}

struct Grid {
  dim3 size;
  size_t shared_bytes = 0;
  StaticShared static_shared;
  void (*call)(const void*) = nullptr;
  const void* context = nullptr;
  std::mt19937_64 random;
  std::unique_ptr<HappensBefore> order;
  Block* block = nullptr;
  int thread = 0;
  unsigned accesses_left = 0;
  unsigned turns_left = 0;
  uint64_t num_accesses = 0;
  jmp_buf scheduler;
};

// Null while none runs.
Grid* grid = nullptr;
char fault[512] = "";
std::vector<Range> allowed;

unsigned draw(unsigned limit) {
  return static_cast<unsigned>(grid->random() % limit);
}

// Ends the grid. Called by threads, whose stacks are then left as they are.
[[noreturn]] void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(fault, sizeof(fault), format, arguments);
  va_end(arguments);
  _longjmp(grid->scheduler, 1);
}

void give_up_turn() {
  if (!_setjmp(grid->block->fibers[grid->thread].place)) _longjmp(grid->scheduler, 1);
}

Fiber& running() {
  return grid->block->fibers[grid->thread];
}

bool lies_in(const void* start, size_t size, uintptr_t begin, size_t num_bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(start);
  return begin >= first && begin + num_bytes <= first + size;
}

bool is_dynamic_shared(uintptr_t begin, size_t num_bytes) {
  return lies_in(grid->block->dynamic_shared.data(), grid->shared_bytes, begin, num_bytes);
}

bool is_static_shared(uintptr_t begin, size_t num_bytes) {
  return lies_in(grid->static_shared.begin, grid->static_shared.num_bytes, begin, num_bytes);
}

void may_be_preempted(uintptr_t begin, size_t num_bytes, Kind kind) {
  if (++grid->num_accesses > ENDLESS) fail("the grid does not come to an end");
  if (kind == Kind::ATOMIC) {
    if (draw(ATOMICS) > 0) return;
    if (!is_dynamic_shared(begin, num_bytes) && !is_static_shared(begin, num_bytes)) {
      grid->block->is_asleep = true;
      grid->turns_left = 0;
    }
  } else {
    if (grid->accesses_left-- > 0) return;
    grid->accesses_left = draw(MAX_ACCESSES);
  }
  give_up_turn();
}

// True in the thread that completes the barrier.
bool wait_at(Barrier& barrier, Place place) {
  if (barrier.num_waiting == 0) {
    barrier.place = place;
  } else if (barrier.place.line != place.line || std::strcmp(barrier.place.file, place.file) != 0) {
    fail("threads of a block are at different barriers, at lines %d and %d", barrier.place.line,
         place.line);
  }
  if (++barrier.num_waiting == barrier.num_expected) {
    barrier.num_waiting = 0;
    ++barrier.generation;
    return true;
  }
  Fiber& fiber = running();
  fiber.barrier = &barrier;
  fiber.generation = barrier.generation;
  give_up_turn();
  fiber.barrier = nullptr;
  return false;
}

// What the lanes of this thread's warp have given, in their order.
const uint32_t* tell_warp(uint32_t value) {
  Barrier& barrier = grid->block->warp_barriers[grid->thread / WARP_SIZE];
  uint32_t* exchanged = grid->block->exchanged[barrier.generation % 2];
  exchanged[grid->thread] = value;
  wait_at(barrier, {"", 0});
  return exchanged + grid->thread / WARP_SIZE * WARP_SIZE;
}

// A fiber is started once for all blocks: that is two calls of the operating system.
[[noreturn]] void run_fiber() {
  while (true) {
    grid->call(grid->context);
    running().is_done = true;
    ++grid->block->num_done;
    give_up_turn();
  }
}

void start_block(Block* block, int number) {
  block->number = number;
  block->index = dim3(number % grid->size.x, number / grid->size.x % grid->size.y,
                      number / grid->size.x / grid->size.y);
  block->barrier = {NUM_THREADS};
  for (Barrier& barrier : block->warp_barriers) barrier = {WARP_SIZE};
  block->dynamic_shared.resize((grid->shared_bytes + 3) / 4);
  std::memset(block->dynamic_shared.data(), POISON, block->dynamic_shared.size() * 4);
  block->static_shared.assign(grid->static_shared.num_bytes, static_cast<char>(POISON));
  block->order.resize(NUM_THREADS);
  std::iota(block->order.begin(), block->order.end(), 0);
  std::shuffle(block->order.begin(), block->order.end(), grid->random);
  for (Fiber& fiber : block->fibers) {
    fiber.is_done = false;
    fiber.barrier = nullptr;
  }
  block->next = block->num_done = 0;
  block->asleep = 0;
  block->is_asleep = false;
  block->has_progressed = false;
}

void run_thread(Fiber& fiber) {
  if (_setjmp(grid->scheduler)) return;
  if (!fiber.is_new) _longjmp(fiber.place, 1);
  fiber.is_new = false;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack.get();
  start.uc_stack.ss_size = STACK_BYTES;
  makecontext(&start, run_fiber, 0);
  setcontext(&start);
}

// One thread's turn, if it can go on.
void take_turn(Block* block) {
  const int thread = block->order[block->next];
  Fiber& fiber = block->fibers[thread];
  const bool is_waiting = fiber.barrier && fiber.barrier->generation == fiber.generation;
  if (!fiber.is_done && !is_waiting && !(block->asleep >> thread / WARP_SIZE & 1)) {
    grid->thread = thread;
    indices.thread.x = thread;
    block->has_progressed = true;
    run_thread(fiber);
  }
  if (++block->next < NUM_THREADS || block->num_done == NUM_THREADS) return;
  block->next = 0;
  if (!block->has_progressed && block->asleep == 0) {
    std::snprintf(fault, sizeof(fault), "threads wait for others that never come, one at line %d",
                  block->barrier.place.line);
  }
  if (!block->has_progressed) {
    block->asleep = 0;
  } else if (block->asleep == 0) {
    block->asleep = grid->random();
  }
  block->has_progressed = false;
}

// Some turns of one block's threads.
void run_block(Block* block) {
  std::copy(block->static_shared.begin(), block->static_shared.end(), grid->static_shared.begin);
  grid->block = block;
  indices.block = block->index;
  for (grid->turns_left = 1 + draw(MAX_TURNS); grid->turns_left > 0;) {
    --grid->turns_left;
    take_turn(block);
    if (fault[0] || block->num_done == NUM_THREADS) break;
  }
  std::copy_n(grid->static_shared.begin, block->static_shared.size(), block->static_shared.begin());
}

void run_blocks(int num_blocks) {
  // Stacks are large, so slots are kept for all grids.
  static std::vector<std::unique_ptr<Block>> slots;
  std::vector<int> waiting(num_blocks);
  std::iota(waiting.begin(), waiting.end(), 0);
  std::shuffle(waiting.begin(), waiting.end(), grid->random);
  std::vector<Block*> there;
  const size_t most = 1 + draw(MAX_BLOCKS_AT_ONCE);
  while (slots.size() < most) slots.push_back(std::make_unique<Block>());
  for (size_t slot = 0; slot < most && !waiting.empty(); ++slot) {
    there.push_back(slots[slot].get());
    start_block(there.back(), waiting.back());
    waiting.pop_back();
  }
  while (!there.empty() && !fault[0]) {
    if (std::all_of(there.begin(), there.end(), [](Block* block) { return block->is_asleep; })) {
      for (Block* block : there) block->is_asleep = false;
    }
    const unsigned turn = draw(there.size());
    if (there[turn]->is_asleep) continue;
    run_block(there[turn]);
    if (there[turn]->num_done < NUM_THREADS) continue;
    if (waiting.empty()) {
      there.erase(there.begin() + turn);
    } else {
      start_block(there[turn], waiting.back());
      waiting.pop_back();
    }
  }
  // After a fault threads are in the middle of something.
  if (fault[0]) slots.clear();
}

bool is_left_out(Place place) {
  if (place.line != settings.without_line) return false;
  const char* slash = std::strrchr(place.file, '/');
  return std::strcmp(slash ? slash + 1 : place.file, settings.without_file) == 0;
}

Thread this_thread() {
  return {grid->block->number, grid->thread};
}

// An address of the code, as debuggers know it.
size_t in_library(uintptr_t code) {
  Dl_info library = {};
  dladdr(reinterpret_cast<void*>(code), &library);
  return code - reinterpret_cast<uintptr_t>(library.dli_fbase);
}

// Where the order of accesses is noted: shared memory lies at an address of its own per block.
// 0 for what is the thread's alone. Fails where a kernel has no business.
uint64_t noted_address(uintptr_t begin, size_t num_bytes, uintptr_t code) {
  if (lies_in(running().stack.get(), STACK_BYTES, begin, num_bytes) ||
      lies_in(&indices, sizeof(indices), begin, num_bytes)) {
    return 0;
  }
  const uint64_t shared_of_block = uint64_t{1} << 62 | static_cast<uint64_t>(grid->block->number)
                                                           << 24;
  if (is_static_shared(begin, num_bytes)) {
    return shared_of_block + (begin - reinterpret_cast<uintptr_t>(grid->static_shared.begin));
  }
  if (is_dynamic_shared(begin, num_bytes)) {
    const void* start = grid->block->dynamic_shared.data();
    return shared_of_block + (uint64_t{1} << 23) + (begin - reinterpret_cast<uintptr_t>(start));
  }
  for (const Range& range : allowed) {
    if (begin >= range.begin && begin + num_bytes <= range.end) return begin;
  }
  fail("%zu bytes of memory that is not the kernel's are touched at code+0x%zx", num_bytes,
       in_library(code));
}

const char* name_of(Kind kind) {
  return kind == Kind::READ ? "read" : kind == Kind::WRITE ? "write" : "atomic";
}

// Notes an access, once it is certain that it comes next.
void note(uintptr_t begin, size_t num_bytes, Kind kind, uintptr_t code) {
  if (!settings.is_checked) return;
  const uint64_t address = noted_address(begin, num_bytes, code);
  if (address == 0) return;
  for (size_t i = 0; i < num_bytes; ++i) {
    const Access* other = grid->order->access(address + i, kind, this_thread(), code);
    if (other == nullptr) continue;
    char threads[32] = "several threads";
    if (other->thread.number != SEVERAL) {
      std::snprintf(threads, sizeof(threads), "thread %d", other->thread.number);
    }
    fail(
        "no order between this %s at code+0x%zx of thread %d, block %d, and the %s at code+0x%zx "
        "of %s, block %d",
        name_of(kind), in_library(code), grid->thread, grid->block->number, name_of(other->kind),
        in_library(other->code), threads, other->thread.block);
  }
}

uintptr_t caller(void* return_address) {
  return reinterpret_cast<uintptr_t>(return_address) - 1;
}

}  // namespace

void allow_memory(const void* start, size_t num_bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(start);
  allowed.push_back({begin, begin + num_bytes});
}

void forget_memory() {
  allowed.clear();
}

const char* last_fault() {
  return fault;
}

void before_access(const void* pointer, size_t num_bytes, Kind kind, uintptr_t code) {
  // Instrumented code of the host runs too.
  if (grid == nullptr) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
  may_be_preempted(begin, num_bytes, kind);
  note(begin, num_bytes, kind, code - 1);
}

uint32_t* dynamic_shared() {
  return grid->block->dynamic_shared.data();
}

void sync_threads(Place place) {
  if (is_left_out(place)) return;
  if (wait_at(grid->block->barrier, place) && settings.is_checked) {
    grid->order->pass_barrier(grid->block->number);
  }
}

void thread_fence(Place place) {
  if (settings.is_checked && !is_left_out(place)) grid->order->fence(this_thread());
}

uint32_t atomic_add(uint32_t* pointer, uint32_t value, Place place) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
  const uintptr_t code = caller(__builtin_return_address(0));
  may_be_preempted(begin, sizeof(value), Kind::ATOMIC);
  if (is_left_out(place)) {
    note(begin, sizeof(value), Kind::READ, code);
    const uint32_t before = *pointer;
    may_be_preempted(begin, sizeof(value), Kind::ATOMIC);
    note(begin, sizeof(value), Kind::WRITE, code);
    *pointer = before + value;
    return before;
  }
  note(begin, sizeof(value), Kind::ATOMIC, code);
  if (settings.is_checked) grid->order->pass_atomic(begin, this_thread());
  const uint32_t before = *pointer;
  *pointer = before + value;
  return before;
}

uint32_t load(const void* pointer) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
  may_be_preempted(begin, sizeof(uint32_t), Kind::READ);
  note(begin, sizeof(uint32_t), Kind::READ, caller(__builtin_return_address(0)));
  uint32_t value;
  std::memcpy(&value, pointer, sizeof(value));
  return value;
}

int lane() {
  return grid->thread % WARP_SIZE;
}

uint32_t exchange(uint32_t value, int source_lane) {
  return tell_warp(value)[source_lane];
}

int reduce_add(int value) {
  const uint32_t* values = tell_warp(static_cast<uint32_t>(value));
  return static_cast<int>(std::accumulate(values, values + WARP_SIZE, 0u));
}

cudaError_t run_grid(void (*call)(const void*), const void* context, dim3 size,
                     size_t shared_bytes) {
  fault[0] = 0;
  Grid now;
  now.static_shared = find_static_shared();
  now.size = indices.grid = size;
  now.shared_bytes = shared_bytes;
  now.call = call;
  now.context = context;
  now.random.seed(settings.seed);
  const int num_blocks = static_cast<int>(size.x * size.y * size.z);
  if (settings.is_checked) now.order = std::make_unique<HappensBefore>(num_blocks, NUM_THREADS);
  grid = &now;
  run_blocks(num_blocks);
  grid = nullptr;
  return fault[0] ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace on_host
