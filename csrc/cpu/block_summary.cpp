// Block summaries: the mean, or the largest and the least, of the keys of each block, channel by channel. Mathematics:
// python/memattn/ops/block_summary.py. A token's heads lie side by side, so that all are summarised as one long row.
// Blocks are given by their first and last tokens, neither ever decreasing; they may overlap and leave gaps.
#include <optional>
#include <tuple>

#include "dispatch.h"
#include "isa/scan_rows.h"
#include "isa/topk_rows.h"
#include "parallel.h"
#include "results.h"

namespace memattn::summary {
namespace {

using cpu::Arena;
using cpu::empty_result;
using cpu::result_like;
using cpu::Scratch;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kTaskNumbers = int64_t{1} << 17;  // of k that make a task

enum class Mode : int64_t { mean, max, minmax };

struct Blocks {
  int64_t batch, tokens, width;  // numbers of a token
  std::vector<int64_t> begins, ends, lengths;  // of the blocks; tokens of each row, empty: all

  int64_t count() const { return static_cast<int64_t>(begins.size()); }
  int64_t end(int64_t b, int64_t block) const {
    return lengths.empty() ? ends[block] : std::min(ends[block], lengths[b]);
  }
  int64_t size(int64_t b, int64_t block) const { return std::max<int64_t>(0, end(b, block) - begins[block]); }
};

struct Plain {
  void enter() const {}
  void leave() const {}
};

// task(i, scratch of the worker) for every i, scratch holding `numbers` of A.
template <class A, class Task>
void for_each(int64_t count, int64_t numbers, const Task& task) {
  const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), count));
  const int64_t own = (numbers + 15) / 16 * 16;
  Scratch scratch(static_cast<size_t>(workers * own) * sizeof(A));
  A* base = reinterpret_cast<A*>(scratch.data());
  cpu::parallel_tasks(count, workers, Plain{}, [&](int64_t i, int64_t worker) { task(i, base + worker * own); });
}

// Summary of n > 0 rows x in rows[0 .. width), for Mode::minmax [least, largest] in rows[0 .. 2 width).
template <class A, class S>
void summarise(const topk::Table<A>& table, const scan::RowTable<A>& sums, Mode mode, const S* x, int64_t n, int64_t width,
               A* rows) {
  A *converted = rows + 2 * width, *largest = rows + width;
  if (mode == Mode::mean) {
    rows::load(table, rows, x, width);
    for (int64_t i = 1; i < n; ++i) sums.add(rows, rows::view(table, converted, x + i * width, width), width);
    for (int64_t c = 0; c < width; ++c) rows[c] /= static_cast<A>(n);
    return;
  }
  rows::load(table, rows, x, width);
  std::copy_n(rows, width, largest);
  for (int64_t i = 1; i < n; ++i) table.extend(rows, largest, rows::view(table, converted, x + i * width, width), width);
}

// [least, largest] of every head side by side.
template <class A, class S>
void store_extremes(const topk::Table<A>& table, S* out, const A* rows, int64_t heads, int64_t dim) {
  for (int64_t h = 0; h < heads; ++h) {
    rows::store(table, out + 2 * h * dim, rows + h * dim, dim);
    rows::store(table, out + (2 * h + 1) * dim, rows + (heads + h) * dim, dim);
  }
}

template <class A, class S>
void forward(const Blocks& blocks, int64_t heads, Mode mode, const S* k, S* values, int32_t* counts) {
  const topk::Table<A>& table = topk::table<A>();
  const scan::RowTable<A>& sums = scan::row_table<A>();
  const int64_t width = blocks.width, out_width = mode == Mode::minmax ? 2 * width : width;
  const int64_t longest = blocks.count() ? std::max<int64_t>(1, blocks.tokens / blocks.count()) : 1;
  const int64_t per_task = std::max<int64_t>(1, kTaskNumbers / std::max<int64_t>(1, longest * width));
  const int64_t total = blocks.batch * blocks.count();
  for_each<A>((total + per_task - 1) / per_task, 3 * width, [&](int64_t task, A* rows) {
    for (int64_t i = task * per_task; i < std::min(total, (task + 1) * per_task); ++i) {
      const int64_t b = i / blocks.count(), block = i % blocks.count(), n = blocks.size(b, block);
      S* out = values + i * out_width;
      counts[i] = static_cast<int32_t>(n);
      if (n == 0) {
        std::fill_n(out, out_width, S{});
        continue;
      }
      summarise(table, sums, mode, k + (b * blocks.tokens + blocks.begins[block]) * width, n, width, rows);
      if (mode == Mode::minmax) {
        store_extremes(table, out, rows, heads, width / heads);
      } else {
        rows::store(table, out, mode == Mode::max ? rows + width : rows, width);
      }
    }
  });
}

// dk_t = the sum over the blocks of t of dr_j / |B_j|. Tokens of the same blocks have the same.
template <class A, class S>
void backward(const Blocks& blocks, const S* d_values, S* dk) {
  const topk::Table<A>& table = topk::table<A>();
  const int64_t width = blocks.width;
  const int64_t per_task = std::max<int64_t>(1, kTaskNumbers / std::max<int64_t>(1, width));
  const int64_t parts = (blocks.tokens + per_task - 1) / per_task;
  for_each<A>(blocks.batch * parts, 2 * width, [&](int64_t task, A* sum) {
    const int64_t b = task / parts, first = task % parts * per_task, last = std::min(blocks.tokens, first + per_task);
    int64_t from = 0, to = 0, sum_from = -1, sum_to = -1;
    for (int64_t t = first; t < last; ++t) {
      while (from < blocks.count() && blocks.end(b, from) <= t) ++from;
      while (to < blocks.count() && blocks.begins[to] <= t) ++to;
      if (from != sum_from || to != sum_to) {
        std::fill_n(sum, width, A(0));
        for (int64_t block = from; block < to; ++block) {
          const A* dr = rows::view(table, sum + width, d_values + (b * blocks.count() + block) * width, width);
          const A weight = A(1) / static_cast<A>(blocks.size(b, block));
          for (int64_t c = 0; c < width; ++c) sum[c] += weight * dr[c];
        }
        sum_from = from;
        sum_to = to;
      }
      rows::store(table, dk + (b * blocks.tokens + t) * width, sum, width);
    }
  });
}

std::vector<int64_t> read_bounds(const char* op, const char* name, const Tensor& bounds, int64_t count, int64_t tokens) {
  check_tensor(op, name, bounds, {ScalarType::Long}, {count});
  std::vector<int64_t> values = read_indices(bounds);
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] < 0 || values[i] > tokens || (i > 0 && values[i] < values[i - 1])) {
      fail(op, name, " must not decrease and lie in 0..", tokens, "; got ", values[i], " at entry ", i);
    }
  }
  return values;
}

Blocks read_blocks(const char* op, int64_t batch, int64_t tokens, int64_t width, const Tensor& begins,
                   const Tensor& ends, const MaybeTensor& lengths) {
  check_tensor(op, "begins", begins, {ScalarType::Long}, {kAnySize});
  const int64_t count = begins.size(0);
  Blocks blocks{batch, tokens, width, read_bounds(op, "begins", begins, count, tokens),
                read_bounds(op, "ends", ends, count, tokens), {}};
  check_tensor(op, "lengths", lengths, {ScalarType::Int, ScalarType::Long}, {batch});
  if (lengths) blocks.lengths = read_indices(*lengths);
  for (int64_t& n : blocks.lengths) n = std::clamp<int64_t>(n, 0, tokens);
  return blocks;
}

std::tuple<Tensor, Tensor> block_summary(Tensor k, Tensor begins, Tensor ends, MaybeTensor lengths, int64_t mode) {
  const char* op = "block_summary_cpu";
  check_tensor(op, "k", k, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double},
               {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t batch = k.size(0), tokens = k.size(1), heads = k.size(2), dim = k.size(3);
  const Blocks blocks = read_blocks(op, batch, tokens, heads * dim, begins, ends, lengths);
  if (mode < 0 || mode > 2) fail(op, "mode must be 0, 1 or 2; got ", mode);
  const int64_t columns = static_cast<Mode>(mode) == Mode::minmax ? 2 * dim : dim;
  Tensor values = empty_result(k, {batch, blocks.count(), heads, columns});
  Tensor counts = empty_result(k, {batch, blocks.count()}, ScalarType::Int);
  if (heads * dim == 0) fail(op, "k must have channels; got ", heads, " heads of ", dim);
  rows::dispatch(k.scalar_type(), [&]<class A, class S>(A, S) {
    forward<A, S>(blocks, heads, static_cast<Mode>(mode), static_cast<const S*>(k.const_data_ptr()),
                  static_cast<S*>(values.mutable_data_ptr()), counts.mutable_data_ptr<int32_t>());
  });
  return {values, counts};
}

Tensor block_mean_backward(Tensor d_values, Tensor k, Tensor begins, Tensor ends, MaybeTensor lengths) {
  const char* op = "block_summary_cpu_backward";
  check_tensor(op, "k", k, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double},
               {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t batch = k.size(0), tokens = k.size(1), heads = k.size(2), dim = k.size(3);
  const Blocks blocks = read_blocks(op, batch, tokens, heads * dim, begins, ends, lengths);
  check_tensor(op, "dvalues", d_values, {k.scalar_type()}, {batch, blocks.count(), heads, dim});
  Tensor dk = result_like(k);
  rows::dispatch(d_values.scalar_type(), [&]<class A, class S>(A, S) {
    backward<A, S>(blocks, static_cast<const S*>(d_values.const_data_ptr()), static_cast<S*>(dk.mutable_data_ptr()));
  });
  return dk;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) {
  m.impl("block_summary_cpu", TORCH_BOX(&block_summary));
  m.impl("block_summary_cpu_backward", TORCH_BOX(&block_mean_backward));
}

}  // namespace memattn::summary
