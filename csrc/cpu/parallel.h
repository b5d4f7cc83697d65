// Work sharing of the CPU ops: tasks over the threads of torch, one scratch area per worker, and the choice of what
// runs as one task on one thread and what is shared by all threads.
#pragma once

#include "pages.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

namespace memattn::cpu {

// Scratch that a forward without gradients may use per thread, whatever the length.
inline constexpr int64_t kScratchPerThread = int64_t{2} << 20;

// Cache-aligned memory, allocated before the parallel region so that running out of it is an ordinary error.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(static_cast<std::byte*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
    advise_huge_pages(data_.get(), bytes);
  }
  std::byte* data() { return data_.get(); }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> data_;
};

// Hands out aligned arrays from scratch. Over a null base it only counts what would be handed out.
class Arena {
 public:
  explicit Arena(std::byte* base = nullptr) : base_(base) {}

  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base_ + (base_ ? used_ : 0));
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return base_ ? p : nullptr;
  }
  size_t used() const { return used_; }

 private:
  std::byte* base_;
  size_t used_ = 0;
};

// Bytes that one value made by `make(arena)` takes.
template <class Make>
size_t bytes_of(Make&& make) {
  Arena counter;
  make(counter);
  return counter.used();
}

// task(i, worker) for i < count, in any order. `around` is entered once per worker.
template <class Around, class Task>
void parallel_tasks(int64_t count, int64_t workers, const Around& around, const Task& task) {
  workers = std::min(workers, count);
  if (workers <= 1) {
    around.enter();
    for (int64_t i = 0; i < count; ++i) task(i, 0);
    around.leave();
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    around.enter();
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i, worker);
    }
    around.leave();
  });
}

struct WorkPlan {
  std::vector<int64_t> whole;   // items that are one task each, the longest first
  std::vector<int64_t> shared;  // items whose inside is divided among all threads
};

// Items too long to be balanced as single tasks are shared. The bits of a result do not depend on this choice.
inline WorkPlan plan_work(const std::vector<int64_t>& cost, int64_t threads) {
  std::vector<int64_t> order(cost.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });

  const auto unbalanced = [&](size_t first) {
    int64_t total = 0;
    for (size_t i = first; i < order.size(); ++i) total += cost[order[i]];
    if (cost[order[first]] * threads <= total / 5) return false;
    std::vector<int64_t> load(threads, 0);  // greedily, to the least loaded thread: what parallel_tasks will do
    for (size_t i = first; i < order.size(); ++i) *std::min_element(load.begin(), load.end()) += cost[order[i]];
    return *std::max_element(load.begin(), load.end()) * threads > total + total / 5;
  };
  size_t first = 0;
  while (threads > 1 && first < order.size() && unbalanced(first)) ++first;
  return {{order.begin() + first, order.end()}, {order.begin(), order.begin() + first}};
}

}  // namespace memattn::cpu
