// Selection of the k largest of a stream of scores, shared by the ops that select.
//
// Scores above a cut go to a buffer of candidates. When that is full, the k best stay and the k-th of them becomes the
// cut: of equal scores the earlier ones are in the buffer already, so that a later one must exceed it. What is left at
// the end depends on the scores alone, not on when the buffer was full.
#pragma once

#include "isa/topk_rows.h"
#include "parallel.h"
#include "results.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace memattn::topk {

using cpu::empty_result;

inline constexpr int64_t kMostSelected = 4096;
inline constexpr int64_t kSlack = 16;  // that a vector may write behind an array

inline int64_t candidate_capacity(int64_t k) { return 2 * k + 4 * kBlock; }

template <class A>
constexpr Cut<A> any_score() {
  return {-std::numeric_limits<A>::infinity(), false};
}

// The k-th largest of x [n], 1 <= k <= n, no NaN among them. Destroys x and `spare`, each with room for kSlack more.
template <class A>
A kth_largest(const Table<A>& table, A* x, A* spare, int64_t n, int64_t k) {
  constexpr int64_t few = 32;
  constexpr int most_rounds = 48;  // of unlucky pivots
  for (int round = 0; n > few && round < most_rounds; ++round) {
    const A a = x[n / 4], b = x[n / 2], c = x[n - n / 4];
    const A pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    const int64_t larger = table.above(spare, x, n, pivot);
    if (k <= larger) {
      std::swap(x, spare);
      n = larger;
      continue;
    }
    const int64_t smaller = table.below(x, x, n, pivot);
    if (k <= n - smaller) return pivot;
    k -= n - smaller;
    n = smaller;
  }
  std::nth_element(x, x + (k - 1), x + n, [](A p, A q) { return p > q; });
  return x[k - 1];
}

// Two arrays to find the k-th of `size` values in.
template <class A>
struct Spare {
  A *x, *y;
  Spare(cpu::Arena& arena, int64_t size) : x(arena.take<A>(size + kSlack)), y(arena.take<A>(size + kSlack)) {}
};

// Leaves the k best of at least k candidates, and the cut for scores that come later.
template <class A>
void keep_best(const Table<A>& table, Candidates<A>& candidates, Cut<A>& cut, int64_t k, const Spare<A>& spare) {
  std::copy_n(candidates.values, candidates.count, spare.x);
  const A last = kth_largest(table, spare.x, spare.y, candidates.count, k);
  int64_t equals = k;
  for (int64_t i = 0; i < candidates.count; ++i) equals -= candidates.values[i] > last;
  int64_t kept = 0;
  for (int64_t i = 0; i < candidates.count; ++i) {
    const A value = candidates.values[i];
    const int64_t equal = (value == last) & (equals > 0);
    candidates.values[kept] = value;
    candidates.positions[kept] = candidates.positions[i];
    kept += (value > last) | equal;
    equals -= equal;
  }
  candidates.count = kept;
  cut = {last, false};
}

template <class A>
Candidates<A> make_candidates(cpu::Arena& arena, int64_t k) {
  const int64_t capacity = candidate_capacity(k);
  return {arena.take<A>(capacity), arena.take<int32_t>(capacity), 0, capacity};
}

// Adds scores x [n] that stand at positions from `first` on, after all that were added before.
template <class A>
void add_scores(const Table<A>& table, Candidates<A>& candidates, Cut<A>& cut, int64_t k, const Spare<A>& spare,
                const A* x, int64_t n, int64_t first) {
  for (int64_t i = 0;;) {
    i += table.append(candidates, x + i, n - i, cut, first + i);
    if (i == n) return;
    keep_best(table, candidates, cut, k, spare);
  }
}

// Puts candidates in descending order of value, equal ones by position; `pairs` has room for all.
template <class A>
void sort_candidates(Candidates<A>& candidates, std::pair<A, int32_t>* pairs) {
  for (int64_t i = 0; i < candidates.count; ++i) pairs[i] = {candidates.values[i], candidates.positions[i]};
  std::sort(pairs, pairs + candidates.count, [](const auto& p, const auto& q) {
    return p.first > q.first || (p.first == q.first && p.second < q.second);
  });
  for (int64_t i = 0; i < candidates.count; ++i) {
    candidates.values[i] = pairs[i].first;
    candidates.positions[i] = pairs[i].second;
  }
}

// What each part of each row has selected.
template <class A>
struct Partial {
  int64_t parts, k;
  A* values;           // [rows, parts, k]
  int32_t* positions;  // likewise
  int64_t* counts;     // [rows, parts]

  Partial(cpu::Arena& arena, int64_t rows, int64_t row_parts, int64_t selected)
      : parts(row_parts),
        k(selected),
        values(arena.take<A>(rows * parts * k)),
        positions(arena.take<int32_t>(rows * parts * k)),
        counts(arena.take<int64_t>(rows * parts)) {}

  void put(int64_t task, const Candidates<A>& best) const {
    std::copy_n(best.values, best.count, values + task * k);
    std::copy_n(best.positions, best.count, positions + task * k);
    counts[task] = best.count;
  }

  // The selections of a row's parts, moved together.
  Candidates<A> joined(int64_t row) const {
    Candidates<A> all{values + row * parts * k, positions + row * parts * k, 0, parts * k};
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t count = counts[row * parts + part];
      std::copy_n(all.values + part * k, count, all.values + all.count);
      std::copy_n(all.positions + part * k, count, all.positions + all.count);
      all.count += count;
    }
    return all;
  }
};

}  // namespace memattn::topk
