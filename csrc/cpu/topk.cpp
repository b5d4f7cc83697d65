// Top-k of rows of scores. Mathematics: python/memattn/ops/topk.py; how a stream of scores is selected from: topk.h.
//
// The first scores of a row are read twice, the second time from the cache: the k-th largest of the maxima of groups of
// them is a cut that k scores reach, so that hardly more than k pass it. Everything else is read once. Few long rows are
// divided among threads, whose selections are then selected from.
#include "topk.h"

#include <optional>
#include <tuple>

#include "dispatch.h"

namespace memattn::topk {
namespace {

using cpu::Arena;
using cpu::Scratch;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kChunk = 2048;               // scores converted at a time
constexpr int64_t kFirstScores = int64_t{1} << 17;  // of a row that are read twice
constexpr int64_t kTaskScores = int64_t{1} << 15;   // that make a task worth its while

template <class A, class S>
struct Scores {
  const Table<A>& table;
  const S* data;  // [rows, width]
  int64_t rows, width, k;
  std::vector<int64_t> lengths;  // of the rows; empty: all of `width`
  Cut<A> cut;                    // what every selected score passes
  bool sorted;

  int64_t length(int64_t row) const { return lengths.empty() ? width : lengths[row]; }
  int64_t groups() const { return std::max<int64_t>(256, (2 * k + kBlock - 1) / kBlock * kBlock); }
};

template <class S>
struct Results {
  S* values;                  // [rows, k]
  int32_t *indices, *counts;  // [rows, k], [rows]
};

template <class A>
struct Worker {
  Candidates<A> candidates;
  Spare<A> spare;                 // for the candidates, and for the maxima of the groups
  A* converted;                   // [kChunk or a row of groups]
  std::pair<A, int32_t>* sorted;  // [k]

  Worker(Arena& arena, int64_t k, int64_t groups)
      : candidates(make_candidates<A>(arena, k)),
        spare(arena, std::max(candidates.capacity, groups)),
        converted(arena.take<A>(std::max(kChunk, groups))),
        sorted(arena.take<std::pair<A, int32_t>>(k)) {}
};

// The k-th largest of the maxima of groups of the first scores, where that says more than the cut of the call.
template <class A, class S>
Cut<A> first_cut(const Scores<A, S>& scores, const S* x, int64_t n, Worker<A>& worker) {
  const int64_t groups = scores.groups(), steps = std::min(n, kFirstScores) / groups;
  if (steps < 4) return scores.cut;
  std::fill_n(worker.spare.x, groups, -std::numeric_limits<A>::infinity());
  for (int64_t i = 0; i < steps; ++i) {
    scores.table.keep_larger(worker.spare.x, rows::view(scores.table, worker.converted, x + i * groups, groups), groups);
  }
  const A reached = kth_largest(scores.table, worker.spare.x, worker.spare.y, groups, scores.k);
  return reached > scores.cut.value ? Cut<A>{reached, true} : scores.cut;
}

// The k best of the scores at begin .. end of a row, by position.
template <class A, class S>
Candidates<A> select(const Scores<A, S>& scores, int64_t row, int64_t begin, int64_t end, Worker<A>& worker) {
  const S* x = scores.data + row * scores.width;
  worker.candidates.count = 0;
  Cut<A> cut = first_cut(scores, x + begin, end - begin, worker);
  for (int64_t i = begin; i < end; i += kChunk) {
    const int64_t n = std::min(kChunk, end - i);
    add_scores(scores.table, worker.candidates, cut, scores.k, worker.spare,
               rows::view(scores.table, worker.converted, x + i, n), n, i);
  }
  if (worker.candidates.count > scores.k) keep_best(scores.table, worker.candidates, cut, scores.k, worker.spare);
  return worker.candidates;
}

template <class A>
void set_lowest(A* out, int64_t n) {
  std::fill_n(out, n, -std::numeric_limits<A>::infinity());
}
void set_lowest(rows::BFloat16* out, int64_t n) { std::fill_n(out, n, rows::BFloat16{0xff80}); }
void set_lowest(rows::Half* out, int64_t n) { std::fill_n(out, n, rows::Half{0xfc00}); }

template <class A, class S>
void store(const Scores<A, S>& scores, Candidates<A> best, Worker<A>& worker, int64_t row, const Results<S>& results) {
  if (scores.sorted) sort_candidates(best, worker.sorted);
  const S* x = scores.data + row * scores.width;
  S* values = results.values + row * scores.k;
  int32_t* indices = results.indices + row * scores.k;
  for (int64_t i = 0; i < best.count; ++i) values[i] = x[best.positions[i]];
  set_lowest(values + best.count, scores.k - best.count);
  std::copy_n(best.positions, best.count, indices);
  std::fill_n(indices + best.count, scores.k - best.count, -1);
  results.counts[row] = static_cast<int32_t>(best.count);
}

// Nothing is set up around the tasks of a thread.
struct Plain {
  void enter() const {}
  void leave() const {}
};

template <class A, class S>
void select_rows(const Scores<A, S>& scores, const Results<S>& results) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t longest_part = std::max(kTaskScores, 8 * scores.k);
  const int64_t parts =
      scores.rows < 2 * threads ? std::max<int64_t>(1, std::min(threads, scores.width / longest_part)) : 1;
  const int64_t task_rows = std::max<int64_t>(1, kTaskScores / std::max<int64_t>(1, scores.width));
  const int64_t tasks = parts > 1 ? scores.rows * parts : (scores.rows + task_rows - 1) / task_rows;
  const int64_t workers = std::min(threads, tasks);

  const auto make_worker = [&](Arena& arena) { return Worker<A>(arena, scores.k, scores.groups()); };
  const auto make_partial = [&](Arena& arena) { return Partial<A>(arena, parts > 1 ? scores.rows : 0, parts, scores.k); };
  const auto make_joining = [&](Arena& arena) { return Spare<A>(arena, parts > 1 ? parts * scores.k : 0); };
  const size_t worker_bytes = cpu::bytes_of(make_worker), partial_bytes = cpu::bytes_of(make_partial);
  Scratch scratch(workers * worker_bytes + partial_bytes + cpu::bytes_of(make_joining));
  std::vector<Worker<A>> of;
  for (int64_t i = 0; i < workers; ++i) {
    Arena arena(scratch.data() + i * worker_bytes);
    of.push_back(make_worker(arena));
  }
  Arena rest(scratch.data() + workers * worker_bytes);
  const Partial<A> partial = make_partial(rest);
  const Spare<A> joining = make_joining(rest);

  cpu::parallel_tasks(tasks, workers, Plain{}, [&](int64_t task, int64_t worker) {
    if (parts > 1) {
      const int64_t row = task / parts, part = task % parts, length = scores.length(row);
      partial.put(task, select(scores, row, length * part / parts, length * (part + 1) / parts, of[worker]));
      return;
    }
    const int64_t end = std::min(scores.rows, (task + 1) * task_rows);
    for (int64_t row = task * task_rows; row < end; ++row) {
      store(scores, select(scores, row, 0, scores.length(row), of[worker]), of[worker], row, results);
    }
  });
  if (parts == 1) return;
  for (int64_t row = 0; row < scores.rows; ++row) {
    Candidates<A> all = partial.joined(row);
    Cut<A> cut = scores.cut;
    if (all.count > scores.k) keep_best(scores.table, all, cut, scores.k, joining);
    store(scores, all, of[0], row, results);
  }
}

std::vector<int64_t> read_lengths(const char* op, const MaybeTensor& lengths, int64_t rows, int64_t width) {
  if (!lengths) return {};
  check_tensor(op, "lengths", lengths, {ScalarType::Int, ScalarType::Long}, {rows});
  std::vector<int64_t> values = read_indices(*lengths);
  for (int64_t& length : values) length = std::clamp<int64_t>(length, 0, width);
  return values;
}

std::tuple<Tensor, Tensor, Tensor> topk(Tensor scores, int64_t k, MaybeTensor lengths, double threshold, bool sorted) {
  const char* op = "topk_cpu";
  check_tensor(op, "scores", scores,
               {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double}, {kAnySize, kAnySize});
  const int64_t rows = scores.size(0), width = scores.size(1);
  if (k < 1 || k > kMostSelected) fail(op, "k must be 1 to ", kMostSelected, "; got ", k);
  if (width > std::numeric_limits<int32_t>::max()) fail(op, "scores has rows of ", width, "; indices are int32");
  Tensor values = empty_result(scores, {rows, k});
  Tensor indices = empty_result(scores, {rows, k}, ScalarType::Int);
  Tensor counts = empty_result(scores, {rows}, ScalarType::Int);
  rows::dispatch(scores.scalar_type(), [&]<class A, class S>(A, S) {
    const A least = static_cast<A>(threshold);
    const Cut<A> cut{least, least > -std::numeric_limits<A>::infinity()};
    select_rows<A, S>({table<A>(), static_cast<const S*>(scores.const_data_ptr()), rows, width, k,
                       read_lengths(op, lengths, rows, width), cut, sorted},
                      {static_cast<S*>(values.mutable_data_ptr()), indices.mutable_data_ptr<int32_t>(),
                       counts.mutable_data_ptr<int32_t>()});
  });
  return {values, indices, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("topk_cpu", TORCH_BOX(&topk)); }

}  // namespace memattn::topk
