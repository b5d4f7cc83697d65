// Every primitive, written once over a vector type V and a product type D. Included inside the anonymous namespace and
// the target region of each table's file, after that file has included <cmath>, <cstdint> and <cstring>; it includes
// nothing but its own other parts (steps, softmax, decode), and calls no function template of std: the linker could pick a copy
// compiled for AVX for everyone.
//
// V: Scalar, Reg, lanes; load, store, zero, broadcast, add, sub, mul, fma(a, b, c) = ab + c, fnma(a, b, c) = c - ab,
//    max, largest (lane), sum, exp, first(x, n) = the first n lanes of x and zero, transpose(rows); for float also
//    load/store bf16 and f16.
// D: E, Vec = V, Wide (a register of right-operand elements), broadcast(pointer to a group), load, mac(c, a, b).

template <class V>
using ScalarOf = typename V::Scalar;

inline constexpr int round_up_to(int n, int unit) { return (n + unit - 1) / unit * unit; }

// --- conversions of single elements, for the columns that do not fill a vector ---

static inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = uint32_t{h} << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

static inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // quiet NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16, magnitude = h & 0x7fffu;
  float x;
  if (magnitude < 0x0400u) {  // zero and denormals: multiples of 2^-24
    x = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
  } else {
    const uint32_t bits = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
    memcpy(&x, &bits, 4);
  }
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits |= sign;
  memcpy(&x, &bits, 4);
  return x;
}

static inline uint16_t float_to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to infinity
  if (bits < 0x38800000u) {  // denormal: adding 0.5 aligns its last bit with that of the float, and rounds
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((bits - 0x38000000u + 0x0fffu + ((bits >> 13) & 1u)) >> 13);
}

// --- one row of storage: convert to and from the accumulate type ---

template <class V>
struct StoredSame {
  using Item = ScalarOf<V>;
  static typename V::Reg load(const Item* p) { return V::load(p); }
  static void store(Item* p, typename V::Reg x) { V::store(p, x); }
  static ScalarOf<V> load_one(const Item* p) { return *p; }
  static void store_one(Item* p, ScalarOf<V> x) { *p = x; }
};

template <class V>
struct StoredBf16 {
  using Item = uint16_t;
  static typename V::Reg load(const Item* p) { return V::load_bf16(p); }
  static void store(Item* p, typename V::Reg x) { V::store_bf16(p, x); }
  static float load_one(const Item* p) { return bf16_to_float(*p); }
  static void store_one(Item* p, float x) { *p = float_to_bf16(x); }
};

template <class V>
struct StoredF16 {
  using Item = uint16_t;
  static typename V::Reg load(const Item* p) { return V::load_f16(p); }
  static void store(Item* p, typename V::Reg x) { V::store_f16(p, x); }
  static float load_one(const Item* p) { return half_to_float(*p); }
  static void store_one(Item* p, float x) { *p = float_to_half(x); }
};

template <class V, class Stored>
static void load_rows_as(ScalarOf<V>* x, int ldx, int padded_rows, int width, const void* src, int64_t stride, int rows,
                         int cols) {
  using Item = typename Stored::Item;
  const int whole = cols / V::lanes * V::lanes;
  for (int i = 0; i < rows; ++i) {
    const Item* from = static_cast<const Item*>(src) + i * stride;
    ScalarOf<V>* to = x + int64_t{i} * ldx;
    for (int j = 0; j < whole; j += V::lanes) V::store(to + j, Stored::load(from + j));
    for (int j = whole; j < cols; ++j) to[j] = Stored::load_one(from + j);
    for (int j = cols; j < width; ++j) to[j] = 0;
  }
  for (int i = rows; i < padded_rows; ++i) {
    for (int j = 0; j < width; j += V::lanes) V::store(x + int64_t{i} * ldx + j, V::zero());
  }
}

template <class V, class Stored>
static void store_rows_as(void* dst, int64_t stride, const ScalarOf<V>* x, int ldx, const ScalarOf<V>* row_scale,
                          int rows, int cols) {
  using Item = typename Stored::Item;
  const int whole = cols / V::lanes * V::lanes;
  for (int i = 0; i < rows; ++i) {
    const ScalarOf<V> scale = row_scale ? row_scale[i] : ScalarOf<V>(1);
    const auto wide_scale = V::broadcast(scale);
    const ScalarOf<V>* from = x + int64_t{i} * ldx;
    Item* to = static_cast<Item*>(dst) + i * stride;
    for (int j = 0; j < whole; j += V::lanes) Stored::store(to + j, V::mul(wide_scale, V::load(from + j)));
    for (int j = whole; j < cols; ++j) Stored::store_one(to + j, scale * from[j]);
  }
}

template <class V>
static void load_rows(ScalarOf<V>* x, int ldx, int padded_rows, int width, const void* src, Element type,
                      int64_t stride, int rows, int cols) {
  if constexpr (sizeof(ScalarOf<V>) == 8) {
    load_rows_as<V, StoredSame<V>>(x, ldx, padded_rows, width, src, stride, rows, cols);
  } else if (type == Element::bf16) {
    load_rows_as<V, StoredBf16<V>>(x, ldx, padded_rows, width, src, stride, rows, cols);
  } else if (type == Element::f16) {
    load_rows_as<V, StoredF16<V>>(x, ldx, padded_rows, width, src, stride, rows, cols);
  } else {
    load_rows_as<V, StoredSame<V>>(x, ldx, padded_rows, width, src, stride, rows, cols);
  }
}

template <class V>
static void store_rows(void* dst, Element type, int64_t stride, const ScalarOf<V>* x, int ldx,
                       const ScalarOf<V>* row_scale, int rows, int cols) {
  if constexpr (sizeof(ScalarOf<V>) == 8) {
    store_rows_as<V, StoredSame<V>>(dst, stride, x, ldx, row_scale, rows, cols);
  } else if (type == Element::bf16) {
    store_rows_as<V, StoredBf16<V>>(dst, stride, x, ldx, row_scale, rows, cols);
  } else if (type == Element::f16) {
    store_rows_as<V, StoredF16<V>>(dst, stride, x, ldx, row_scale, rows, cols);
  } else {
    store_rows_as<V, StoredSame<V>>(dst, stride, x, ldx, row_scale, rows, cols);
  }
}

// --- products ---

// A V times the same type: every accumulate-type product.
template <class V>
struct SameDot {
  using E = ScalarOf<V>;
  using Vec = V;
  using Wide = typename V::Reg;
  static typename V::Reg broadcast(const E* p) { return V::broadcast(*p); }
  static typename V::Reg load(const E* p) { return V::load(p); }
  static typename V::Reg mac(typename V::Reg c, typename V::Reg a, typename V::Reg b) { return V::fma(a, b, c); }
};

// ROWS x (COLS vectors) of C held in registers over the whole k range.
template <class D, int ROWS, int COLS>
static inline void gemm_tile(ScalarOf<typename D::Vec>* c, const ScalarOf<typename D::Vec>* c0, int ldc,
                             const typename D::E* a, int64_t row, int64_t step, const typename D::E* b, int64_t b_step,
                             int groups, ScalarOf<typename D::Vec> keep) {
  using V = typename D::Vec;
  constexpr int wide = V::lanes * OperandTraits<typename D::E>::group;
  typename V::Reg sum[ROWS][COLS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) {
      sum[i][j] = keep == 0 ? V::zero() : V::mul(V::broadcast(keep), V::load(c0 + int64_t{i} * ldc + j * V::lanes));
    }
  }
  for (int g = 0; g < groups; ++g, a += step, b += b_step) {
    typename D::Wide right[COLS];
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) right[j] = D::load(b + j * wide);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const typename D::Wide left = D::broadcast(a + i * row);
#pragma GCC unroll 4
      for (int j = 0; j < COLS; ++j) sum[i][j] = D::mac(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) V::store(c + int64_t{i} * ldc + j * V::lanes, sum[i][j]);
  }
}

// One panel of COLS vectors of C: B's panel stays in L1 while the rows of A pass.
template <class D, int ROWS, int COLS>
static void gemm_panel(ScalarOf<typename D::Vec>* c, const ScalarOf<typename D::Vec>* c0, int ldc,
                       Left<typename D::E> a, Right<typename D::E> b, int column, int m, int k,
                       ScalarOf<typename D::Vec> keep, Part part) {
  constexpr int group = OperandTraits<typename D::E>::group;
  const int64_t b_step = int64_t{b.ld} * group;
  const int first_row = part == Part::lower_c ? column / ROWS * ROWS : 0;
  for (int i = first_row; i < m; i += ROWS) {
    const int begin = part == Part::upper_a ? i / group : 0;
    int end = part == Part::lower_a ? (i + ROWS + group - 1) / group : k / group;
    if (end > k / group) end = k / group;
    const int64_t at = int64_t{i} * ldc + column;
    gemm_tile<D, ROWS, COLS>(c + at, c0 + at, ldc, a.data + i * a.row + begin * a.step, a.row, a.step,
                             b.data + begin * b_step + int64_t{column} * group, b_step, end - begin, keep);
  }
}

// PANEL is 2 or 3 vectors. The k order of every element is the same whatever the panel, hence also whatever part of the
// columns a caller asks for.
template <class D, int ROWS, int PANEL>
static void gemm_from(ScalarOf<typename D::Vec>* c, const ScalarOf<typename D::Vec>* c0, int ldc, Left<typename D::E> a,
                      Right<typename D::E> b, int m, int n, int k, ScalarOf<typename D::Vec> keep, Part part) {
  constexpr int lanes = D::Vec::lanes;
  int column = 0;
  while (column < n) {
    const int vectors = (n - column) / lanes;
    if (PANEL == 3 && vectors >= 3 && vectors != 4) {
      gemm_panel<D, ROWS, PANEL>(c, c0, ldc, a, b, column, m, k, keep, part);
      column += 3 * lanes;
    } else if (vectors >= 2) {
      gemm_panel<D, ROWS, 2>(c, c0, ldc, a, b, column, m, k, keep, part);
      column += 2 * lanes;
    } else {
      gemm_panel<D, ROWS, 1>(c, c0, ldc, a, b, column, m, k, keep, part);
      column += lanes;
    }
  }
}

template <class D, int ROWS, int PANEL>
static void gemm(ScalarOf<typename D::Vec>* c, int ldc, Left<typename D::E> a, Right<typename D::E> b, int m, int n,
                 int k, ScalarOf<typename D::Vec> keep, Part part) {
  gemm_from<D, ROWS, PANEL>(c, c, ldc, a, b, m, n, k, keep, part);
}

// --- operands of accumulate type ---

template <class V>
struct SamePack {
  using Acc = ScalarOf<V>;

  static void right(Acc* dst, int ld, const Acc* x, int ldx, const Acc* row_scale, int rows, int cols) {
    for (int i = 0; i < rows; ++i) {
      const auto scale = V::broadcast(row_scale ? row_scale[i] : Acc(1));
      for (int j = 0; j < cols; j += V::lanes) {
        V::store(dst + int64_t{i} * ld + j, V::mul(scale, V::load(x + int64_t{i} * ldx + j)));
      }
    }
  }

  static void left(Acc* dst, int ld, const Acc* x, int ldx, int rows, int cols) {
    right(dst, ld, x, ldx, nullptr, rows, cols);
  }

  static void right_transposed(Acc* dst, int ld, const Acc* x, int ldx, int rows, int cols) {
    for (int i = 0; i < rows; i += V::lanes) {
      for (int j = 0; j < cols; j += V::lanes) {
        typename V::Reg block[V::lanes];
        for (int r = 0; r < V::lanes; ++r) block[r] = V::load(x + int64_t{i + r} * ldx + j);
        V::transpose(block);
        for (int r = 0; r < V::lanes; ++r) V::store(dst + int64_t{j + r} * ld + i, block[r]);
      }
    }
  }
};

// --- row operations ---

template <class V>
static inline ScalarOf<V> dot(const ScalarOf<V>* x, const ScalarOf<V>* y, int width) {
  auto even = V::zero(), odd = V::zero();
  int j = 0;
  for (; j + 2 * V::lanes <= width; j += 2 * V::lanes) {
    even = V::fma(V::load(x + j), V::load(y + j), even);
    odd = V::fma(V::load(x + j + V::lanes), V::load(y + j + V::lanes), odd);
  }
  for (; j < width; j += V::lanes) even = V::fma(V::load(x + j), V::load(y + j), even);
  return V::sum(V::add(even, odd));
}

template <class V>
static void dot_rows(ScalarOf<V>* out, const ScalarOf<V>* x, int ldx, const ScalarOf<V>* y, int ldy, int rows,
                     int width) {
  for (int i = 0; i < rows; ++i) out[i] = dot<V>(x + int64_t{i} * ldx, y + int64_t{i} * ldy, width);
}

template <class V>
static void scale_rows(ScalarOf<V>* x, int ldx, const ScalarOf<V>* a, int rows, int width) {
  for (int i = 0; i < rows; ++i) {
    ScalarOf<V>* to = x + int64_t{i} * ldx;
    const auto scale = V::broadcast(a[i]);
    for (int j = 0; j < width; j += V::lanes) V::store(to + j, V::mul(scale, V::load(to + j)));
  }
}

template <class V>
static void add_rows(ScalarOf<V>* y, int ldy, const ScalarOf<V>* a, const ScalarOf<V>* x, int ldx, int rows,
                     int width) {
  for (int i = 0; i < rows; ++i) {
    ScalarOf<V>* to = y + int64_t{i} * ldy;
    const ScalarOf<V>* from = x + int64_t{i} * ldx;
    const auto scale = V::broadcast(a[i]);
    for (int j = 0; j < width; j += V::lanes) V::store(to + j, V::fma(scale, V::load(from + j), V::load(to + j)));
  }
}

template <class V>
static void residual_rows(ScalarOf<V>* y, int ldy, const ScalarOf<V>* a, const ScalarOf<V>* x, int ldx, int rows,
                          int width) {
  for (int i = 0; i < rows; ++i) {
    ScalarOf<V>* to = y + int64_t{i} * ldy;
    const ScalarOf<V>* from = x + int64_t{i} * ldx;
    const auto scale = V::broadcast(a[i]);
    for (int j = 0; j < width; j += V::lanes) V::store(to + j, V::fnma(scale, V::load(to + j), V::load(from + j)));
  }
}

template <class V>
static void l2norm_rows(ScalarOf<V>* x, int ldx, ScalarOf<V>* reciprocal_norm, ScalarOf<V> eps, int rows, int width) {
  for (int i = 0; i < rows; ++i) {
    ScalarOf<V>* row = x + int64_t{i} * ldx;
    reciprocal_norm[i] = ScalarOf<V>(1) / V::square_root(dot<V>(row, row, width) + eps);
  }
  scale_rows<V>(x, ldx, reciprocal_norm, rows, width);
}

// y = r x with r = 1/|x|:  dx = r (dy - y <y, dy>)
template <class V>
static void l2norm_rows_backward(ScalarOf<V>* dx, int lddx, const ScalarOf<V>* normalised, int ldn,
                                 const ScalarOf<V>* reciprocal_norm, int rows, int width) {
  for (int i = 0; i < rows; ++i) {
    ScalarOf<V>* d = dx + int64_t{i} * lddx;
    const ScalarOf<V>* y = normalised + int64_t{i} * ldn;
    const auto along = V::broadcast(dot<V>(d, y, width)), scale = V::broadcast(reciprocal_norm[i]);
    for (int j = 0; j < width; j += V::lanes) {
      V::store(d + j, V::mul(scale, V::fnma(along, V::load(y + j), V::load(d + j))));
    }
  }
}

template <class V>
static void exp_row(ScalarOf<V>* dst, const ScalarOf<V>* x, int count) {
  for (int j = 0; j < count; j += V::lanes) V::store(dst + j, V::exp(V::load(x + j)));
}

#include "softmax.inl.h"

// --- the C x C part of a chunk ---

template <class V>
static void decay_matrix(ScalarOf<V>* decay, int ld, const ScalarOf<V>* high, const ScalarOf<V>* low, int n) {
  for (int i = 0; i < n; ++i) {
    const auto high_i = V::broadcast(high[i]), low_i = V::broadcast(low[i]);
    for (int j = 0; j < n; j += V::lanes) {
      const auto difference = V::add(V::sub(high_i, V::load(high + j)), V::sub(low_i, V::load(low + j)));
      const int causal = i + 1 - j;
      V::store(decay + int64_t{i} * ld + j,
               causal <= 0 ? V::zero() : V::first(V::exp(V::first(difference, causal)), causal));
    }
  }
}

template <class V>
static void chunk_scores(ScalarOf<V>* lower, ScalarOf<V>* attention, int ld, const ScalarOf<V>* kk,
                         const ScalarOf<V>* qk, const ScalarOf<V>* decay, const ScalarOf<V>* beta, ScalarOf<V> scale,
                         int n) {
  const auto wide_scale = V::broadcast(scale);
  for (int i = 0; i < n; ++i) {
    const auto beta_i = V::broadcast(beta[i]);
    for (int j = 0; j < n; j += V::lanes) {
      const int64_t at = int64_t{i} * ld + j;
      if (j > i) {
        V::store(lower + at, V::zero());
        V::store(attention + at, V::zero());
        continue;
      }
      const auto d = V::load(decay + at);
      V::store(lower + at, V::first(V::mul(V::mul(beta_i, V::load(kk + at)), d), i - j));
      V::store(attention + at, V::first(V::mul(V::mul(wide_scale, V::load(qk + at)), d), i + 1 - j));
    }
  }
}

// Adds a block of row i, at column j, to the sum of the rows below it; returns of that sum what lies left of i.
template <class V>
static auto add_below(ScalarOf<V>* below, int i, int j, decltype(V::zero()) e) {
  const auto sum = V::add(V::load(below + j), e);
  V::store(below + j, sum);
  return V::first(sum, i - j);
}

template <class V>
static void chunk_scores_backward(ScalarOf<V>* m1, ScalarOf<V>* n2, int ld, const ScalarOf<V>* da,
                                  const ScalarOf<V>* dxv, const ScalarOf<V>* qk, const ScalarOf<V>* kk,
                                  const ScalarOf<V>* decay, const ScalarOf<V>* beta, ScalarOf<V> scale,
                                  ScalarOf<V>* below, ScalarOf<V>* dg, ScalarOf<V>* dbeta, int n) {
  const auto wide_scale = V::broadcast(scale);
  for (int i = 0; i < n; ++i) below[i] = 0;
  for (int i = n - 1; i >= 0; --i) {
    const auto beta_i = V::broadcast(beta[i]);
    auto left = V::zero(), beta_sum = V::zero();
    for (int j = 0; j < n; j += V::lanes) {
      const int64_t at = int64_t{i} * ld + j;
      if (j > i) {
        V::store(m1 + at, V::zero());
        V::store(n2 + at, V::zero());
        continue;
      }
      const auto d = V::load(decay + at);
      const auto kk_ij = V::first(V::load(kk + at), i - j), qk_ij = V::first(V::load(qk + at), i + 1 - j);
      const auto m1_ij = V::first(V::mul(V::mul(wide_scale, V::load(da + at)), d), i + 1 - j);
      const auto m2_ij = V::first(V::sub(V::zero(), V::mul(V::load(dxv + at), d)), i - j);
      const auto n2_ij = V::mul(beta_i, m2_ij);
      const auto e = V::fma(m1_ij, qk_ij, V::mul(n2_ij, kk_ij));
      beta_sum = V::fma(m2_ij, kk_ij, beta_sum);
      left = V::add(left, add_below<V>(below, i, j, e));
      V::store(m1 + at, m1_ij);
      V::store(n2 + at, n2_ij);
    }
    dg[i] = V::sum(left);
    dbeta[i] += V::sum(beta_sum);
  }
}

template <class V>
static void causal_scores(ScalarOf<V>* attention, int ld, const ScalarOf<V>* qk, const ScalarOf<V>* decay,
                          ScalarOf<V> scale, int n) {
  const auto wide_scale = V::broadcast(scale);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; j += V::lanes) {
      const int64_t at = int64_t{i} * ld + j;
      V::store(attention + at,
               j > i ? V::zero()
                     : V::first(V::mul(V::mul(wide_scale, V::load(qk + at)), V::load(decay + at)), i + 1 - j));
    }
  }
}

template <class V>
static void causal_scores_backward(ScalarOf<V>* m1, int ld, const ScalarOf<V>* da, const ScalarOf<V>* qk,
                                   const ScalarOf<V>* decay, ScalarOf<V> scale, ScalarOf<V>* below, ScalarOf<V>* dg,
                                   int n) {
  const auto wide_scale = V::broadcast(scale);
  for (int i = 0; i < n; ++i) below[i] = 0;
  for (int i = n - 1; i >= 0; --i) {
    auto left = V::zero();
    for (int j = 0; j < n; j += V::lanes) {
      const int64_t at = int64_t{i} * ld + j;
      if (j > i) {
        V::store(m1 + at, V::zero());
        continue;
      }
      const auto m1_ij = V::first(V::mul(V::mul(wide_scale, V::load(da + at)), V::load(decay + at)), i + 1 - j);
      const auto e = V::mul(m1_ij, V::first(V::load(qk + at), i + 1 - j));
      left = V::add(left, add_below<V>(below, i, j, e));
      V::store(m1 + at, m1_ij);
    }
    dg[i] = V::sum(left);
  }
}

// Panels of 8 rows: what the rows above contribute is a product, what the panel's own rows contribute a substitution.
template <class V, int ROWS, int PANEL>
static void unit_lower_inverse(ScalarOf<V>* inverse, int ldi, const ScalarOf<V>* lower, int ldl, int n) {
  constexpr int panel = 8;
  for (int top = 0; top < n; top += panel) {
    ScalarOf<V>* rows = inverse + int64_t{top} * ldi;
    const ScalarOf<V>* factors = lower + int64_t{top} * ldl;
    const int known = round_up_to(top, V::lanes);
    gemm<SameDot<V>, ROWS, PANEL>(rows, ldi, {factors, ldl, 1}, {inverse, ldi}, panel, known, top, 0, Part::full);
    for (int i = 0; i < panel; ++i) {
      for (int j = known; j < n; j += V::lanes) V::store(rows + int64_t{i} * ldi + j, V::zero());
      rows[int64_t{i} * ldi + top + i] = -1;
    }
    for (int j = 0; j < top + panel; j += V::lanes) {
      typename V::Reg solved[panel];
      for (int i = 0; i < panel; ++i) {
        auto row = V::sub(V::zero(), V::load(rows + int64_t{i} * ldi + j));
        for (int r = 0; r < i; ++r) row = V::fnma(V::broadcast(factors[int64_t{i} * ldl + top + r]), solved[r], row);
        solved[i] = row;
        V::store(rows + int64_t{i} * ldi + j, row);
      }
    }
  }
}

#include "steps.inl.h"
#include "decode.inl.h"

// --- the table ---

static void nothing() {}

// ROWS x PANEL vectors is the register tile of products, STEP the vectors per column block of a step.
template <class D, class Pack, int ROWS, int PANEL, int STEP>
static constexpr Primitives<typename D::E> make_table(const char* isa) {
  using V = typename D::Vec;
  Primitives<typename D::E> table{};
  table.isa = isa;
  table.unit = 16;
  table.enter = nothing;
  table.leave = nothing;
  table.gemm = gemm<D, ROWS, PANEL>;
  table.gemm_from = gemm_from<D, ROWS, PANEL>;
  table.pack_left = Pack::left;
  table.pack_right = Pack::right;
  table.pack_right_transposed = Pack::right_transposed;
  table.load_rows = load_rows<V>;
  table.store_rows = store_rows<V>;
  table.l2norm_rows = l2norm_rows<V>;
  table.l2norm_rows_backward = l2norm_rows_backward<V>;
  table.scale_rows = scale_rows<V>;
  table.add_rows = add_rows<V>;
  table.residual_rows = residual_rows<V>;
  table.dot_rows = dot_rows<V>;
  table.exp_row = exp_row<V>;
  table.softmax_rows = softmax_rows<V>;
  table.softmax_rows_backward = softmax_rows_backward<V>;
  table.decay_matrix = decay_matrix<V>;
  table.chunk_scores = chunk_scores<V>;
  table.chunk_scores_backward = chunk_scores_backward<V>;
  table.causal_scores = causal_scores<V>;
  table.causal_scores_backward = causal_scores_backward<V>;
  table.unit_lower_inverse = unit_lower_inverse<V, ROWS, PANEL>;
  table.step_columns = step_columns<V, STEP>;
  table.write_columns = write_columns<V, STEP>;
  table.score_keys = score_keys<V>;
  table.weigh_values = weigh_values<V>;
  return table;
}
