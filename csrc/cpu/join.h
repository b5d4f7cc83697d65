// What merge_states and gated_combine share: rows of adjacent numbers, taken in blocks by tasks.
//
// A task is a fixed number of rows whatever the thread count, so that sums over rows, one partial sum per task and head
// added in the order of the tasks, have the same bits on any number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "isa/join_rows.h"
#include "results.h"

namespace memattn::join {

using cpu::empty_result;
using cpu::result_like;
using rows::accumulate_type;
using rows::dispatch;

inline constexpr int64_t kBlock = 4096;          // numbers of a block: what is at hand of one fits the second-level cache
inline constexpr int64_t kBlocksOfTask = 16;
inline constexpr int64_t kParallelWork = 32768;  // numbers below which a second thread costs more than it saves

// [count, width], row r of head r % heads.
struct Rows {
  int64_t count, heads, width;

  // Of [B, T, H, V].
  static Rows of(const char* op, const Tensor& x) {
    const int64_t width = x.size(3);
    if (width < 1 || width > kBlock) fail(op, "V must be 1 to ", kBlock, "; got ", width);
    return {x.size(0) * x.size(1) * x.size(2), x.size(2), width};
  }
  int64_t of_block() const { return kBlock / width; }
  int64_t of_task() const { return of_block() * kBlocksOfTask; }
  int64_t tasks() const { return (count + of_task() - 1) / of_task(); }
};

// block(task, first, rows) for every block of rows; those of one task in order, on one thread.
template <class Block>
void for_blocks(const Rows& rows, const Block& block) {
  const int64_t grain = std::max<int64_t>(1, kParallelWork / (rows.of_task() * rows.width));
  torch::stable::parallel_for(0, rows.tasks(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t last = std::min((task + 1) * rows.of_task(), rows.count);
      for (int64_t first = task * rows.of_task(); first < last; first += rows.of_block()) {
        block(task, first, std::min(rows.of_block(), last - first));
      }
    }
  });
}

// Sums over the rows of each head.
class HeadSums {
 public:
  explicit HeadSums(const Rows& rows) : heads_(rows.heads), partial_(static_cast<size_t>(rows.tasks() * rows.heads)) {}

  template <class A>
  void add(int64_t task, int64_t first, int64_t rows, const A* x) {
    double* sums = partial_.data() + task * heads_;
    for (int64_t i = 0; i < rows; ++i) sums[(first + i) % heads_] += x[i];
  }
  template <class A>
  void store(A* out) const {
    for (int64_t h = 0; h < heads_; ++h) {
      double total = 0;
      for (size_t at = h; at < partial_.size(); at += heads_) total += partial_[at];
      out[h] = static_cast<A>(total);
    }
  }

 private:
  int64_t heads_;
  std::vector<double> partial_;  // [tasks, heads]
};

}  // namespace memattn::join
