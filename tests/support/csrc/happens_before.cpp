#include "happens_before.h"

#include <algorithm>

namespace on_host {

namespace {

void join(ClockPtr* into, const ClockPtr& other) {
  if (!other) return;
  if (!*into) {
    *into = other;
    return;
  }
  auto both = std::make_shared<Clock>(**into);
  for (const auto& [block, epoch] : other->epochs) {
    both->epochs[block] = std::max(both->epochs[block], epoch);
  }
  for (const auto& [thread, time] : other->times) {
    both->times[thread] = std::max(both->times[thread], time);
  }
  *into = both;
}

bool knows(const ClockPtr& clock, const Access& access) {
  if (!clock) return false;
  const auto epoch = clock->epochs.find(access.thread.block);
  if (epoch != clock->epochs.end() && access.epoch < epoch->second) return true;
  const auto time = clock->times.find({access.thread.block, access.thread.number});
  return time != clock->times.end() && access.time < time->second;
}

}  // namespace

HappensBefore::HappensBefore(int num_blocks, int threads_per_block) : blocks_(num_blocks) {
  for (BlockClocks& block : blocks_) block.threads.resize(threads_per_block);
}

bool HappensBefore::is_ordered(const Access& before, Thread thread) const {
  const BlockClocks& block = blocks_[thread.block];
  if (before.thread.block == thread.block) {
    if (before.thread.number == thread.number || before.epoch < block.epoch) return true;
  }
  return knows(block.acquired, before) || knows(block.threads[thread.number].acquired, before);
}

const Access* HappensBefore::find_unordered(const Accesses& accesses, Thread thread) const {
  if (accesses.first.thread.block == NOBODY) return nullptr;
  if (!is_ordered(accesses.first, thread)) return &accesses.first;
  if (!accesses.more) return nullptr;
  for (const Access& access : *accesses.more) {
    if (!is_ordered(access, thread)) return &access;
  }
  return nullptr;
}

void HappensBefore::add(Accesses* accesses, const Access& access) {
  Access* place = nullptr;
  if (accesses->first.thread.block == NOBODY ||
      accesses->first.thread.block == access.thread.block) {
    place = &accesses->first;
  } else {
    if (!accesses->more) accesses->more = std::make_unique<std::vector<Access>>();
    for (Access& other : *accesses->more) {
      if (other.thread.block == access.thread.block) place = &other;
    }
    if (place == nullptr) place = &accesses->more->emplace_back();
  }
  const bool is_other = place->thread.block == access.thread.block &&
                        place->epoch == access.epoch &&
                        place->thread.number != access.thread.number;
  *place = access;
  if (is_other) place->thread.number = SEVERAL;
}

Byte* HappensBefore::byte_at(uint64_t address) {
  const uint64_t number = address / PAGE_BYTES;
  if (number != last_page_number_) {
    std::unique_ptr<Byte[]>& page = pages_[number];
    if (!page) page = std::make_unique<Byte[]>(PAGE_BYTES);
    last_page_number_ = number;
    last_page_ = page.get();
  }
  return last_page_ + address % PAGE_BYTES;
}

const Access* HappensBefore::access(uint64_t address, Kind kind, Thread thread, uintptr_t code) {
  Byte& byte = *byte_at(address);
  if (byte.write.thread.block != NOBODY && !is_ordered(byte.write, thread)) return &byte.write;
  if (kind != Kind::READ) {
    if (const Access* read = find_unordered(byte.reads, thread)) return read;
  }
  if (kind != Kind::ATOMIC) {
    if (const Access* atomic = find_unordered(byte.atomics, thread)) return atomic;
  }
  const Access now = {thread, blocks_[thread.block].epoch, clocks_of(thread).time, kind, code};
  switch (kind) {
    case Kind::READ:
      add(&byte.reads, now);
      break;
    case Kind::ATOMIC:
      add(&byte.atomics, now);
      break;
    case Kind::WRITE:
      // All others are ordered before it.
      byte.write = now;
      byte.reads = {};
      byte.atomics = {};
      break;
  }
  return nullptr;
}

void HappensBefore::pass_barrier(int block) {
  BlockClocks& clocks = blocks_[block];
  ++clocks.epoch;
  for (ThreadClocks& thread : clocks.threads) {
    join(&clocks.acquired, thread.acquired);
    thread.acquired = nullptr;
  }
}

void HappensBefore::fence(Thread thread) {
  const BlockClocks& block = blocks_[thread.block];
  ThreadClocks& clocks = clocks_of(thread);
  join(&clocks.acquired, clocks.pending);
  clocks.pending = nullptr;
  ++clocks.time;
  auto own = std::make_shared<Clock>();
  own->epochs[thread.block] = block.epoch;
  own->times[{thread.block, thread.number}] = clocks.time;
  clocks.released = own;
  join(&clocks.released, block.acquired);
  join(&clocks.released, clocks.acquired);
}

void HappensBefore::pass_atomic(uint64_t address, Thread thread) {
  ThreadClocks& clocks = clocks_of(thread);
  const auto known = passed_on_.find(address);
  const ClockPtr released = clocks.released;
  if (known != passed_on_.end()) join(&clocks.pending, known->second);
  if (released) join(&passed_on_[address], released);
}

}  // namespace on_host
