// The loops behind topk_rows.h, written for the compiler to vectorise. Each topk_*.cpp includes this once, inside its own
// target region and a namespace of its own, so that no function compiled for one processor is linked into another's path.

#include "float_rows.inl.h"

template <class A>
void keep_larger(A* __restrict most, const A* __restrict x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) most[j] = x[j] > most[j] ? x[j] : most[j];
}

template <bool inclusive, class A>
inline bool passes(A x, A cut) {
  return inclusive ? x >= cut : x > cut;
}

template <bool inclusive, class A>
inline void append_each(Candidates<A>& to, const A* x, int64_t n, A cut, int64_t position) {
  for (int64_t j = 0; j < n; ++j) {
    to.values[to.count] = x[j];
    to.positions[to.count] = static_cast<int32_t>(position + j);
    to.count += passes<inclusive>(x[j], cut);
  }
}

template <bool inclusive, class A>
int64_t append_passing(Candidates<A>& to, const A* x, int64_t n, A cut, int64_t first) {
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t count = n - i < kBlock ? n - i : kBlock;
    int any = count < kBlock;
    if (count == kBlock) {
      for (int64_t j = 0; j < kBlock; ++j) any |= passes<inclusive>(x[i + j], cut);
    }
    if (!any) continue;
    if (to.count + kBlock > to.capacity) return i;
    append_each<inclusive>(to, x + i, count, cut, first + i);
  }
  return n;
}

template <class A>
int64_t append(Candidates<A>& to, const A* x, int64_t n, Cut<A> cut, int64_t first) {
  return cut.inclusive ? append_passing<true>(to, x, n, cut.value, first)
                       : append_passing<false>(to, x, n, cut.value, first);
}

template <class A>
int64_t above(A* out, const A* x, int64_t n, A pivot) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) {
    const A score = x[j];
    out[count] = score;
    count += score > pivot;
  }
  return count;
}

template <class A>
int64_t below(A* out, const A* x, int64_t n, A pivot) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) {
    const A score = x[j];
    out[count] = score;
    count += score < pivot;
  }
  return count;
}

template <class A>
void extend(A* __restrict least, A* __restrict most, const A* __restrict x, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    const A value = x[j];
    least[j] = !(value >= least[j]) && least[j] == least[j] ? value : least[j];
    most[j] = !(value <= most[j]) && most[j] == most[j] ? value : most[j];
  }
}

template <class A>
int64_t exceeding(int32_t* __restrict offsets, const A* __restrict x, int ld, int rows, int cols,
                  const A* __restrict cuts) {
  constexpr int block = 16;
  int64_t count = 0;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; j += block) {
      const int32_t at = i * ld + j;
      int any = 0;
      for (int c = 0; c < block; ++c) any |= x[at + c] > cuts[j + c];
      for (int c = 0; any && c < block; ++c) {
        offsets[count] = at + c;
        count += x[at + c] > cuts[j + c];
      }
    }
  }
  return count;
}
