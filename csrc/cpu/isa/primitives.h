// The table of primitives that the CPU ops are written against, and the layouts its operands have.
//
// E is the operand type of matrix products: float, double or bf16. Everything else (sums, gates, states, row
// operations) has the accumulate type Acc = AccumulateOf<E>: float, or double for double.
//
// Every block is zero-padded: its row and column counts are multiples of `unit`, so no primitive has a ragged edge.
// Only load_rows, store_rows and step_columns see the true sizes.
#pragma once

#include <cstdint>

namespace memattn::cpu {

struct bf16 {
  uint16_t bits;
};

// How a row of an op's input or output is stored.
enum class Element { f32, bf16, f16, f64 };

template <class E>
struct OperandTraits {
  using Acc = E;
  static constexpr int group = 1;
};

// Hardware products of bf16 consume pairs of consecutive k.
template <>
struct OperandTraits<bf16> {
  using Acc = float;
  static constexpr int group = 2;
};

template <class E>
using AccumulateOf = typename OperandTraits<E>::Acc;

// Left operand A [m, k]: element (i, j) is data[i * row + j / group * step + j % group].
template <class E>
struct Left {
  const E* data;
  int64_t row;
  int64_t step;
};

// Right operand B [k, n]: element (j, c) is data[(j / group * ld + c) * group + j % group].
template <class E>
struct Right {
  const E* data;
  int ld;
};

// The transpose of a right operand B [k, n] is a left operand [n, k] without moving anything.
template <class E>
Left<E> transposed(Right<E> b) {
  constexpr int group = OperandTraits<E>::group;
  return {b.data, group, int64_t{group} * b.ld};
}

// Which part of a product is known to be zero or is not wanted.
enum class Part {
  full,
  lower_a,  // A(i, j) = 0 for j > i
  upper_a,  // A(i, j) = 0 for j < i
  lower_c,  // C(i, c) is read by nobody for c > i (what is left there is unspecified)
};

// What a score gains besides its product: (row_i - key_j), each as high + low so that a difference of large sums keeps
// its small part. All null: nothing.
template <class Acc>
struct PairBias {
  const Acc *row_high, *row_low, *key_high, *key_low;
};

template <class E>
struct Primitives {
  using Acc = AccumulateOf<E>;

  const char* isa;
  int unit;  // rows and columns of every block are multiples of this

  // Around every task on a thread: AMX loads and releases its tile configuration here.
  void (*enter)();
  void (*leave)();

  // C [m, n] = keep * C + A B; C is not read if keep is 0. The sum over k runs in ascending order, from keep * C.
  void (*gemm)(Acc* c, int ldc, Left<E> a, Right<E> b, int m, int n, int k, Acc keep, Part part);
  // C = keep * C0 + A B, C0 with C's leading dimension.
  void (*gemm_from)(Acc* c, const Acc* c0, int ldc, Left<E> a, Right<E> b, int m, int n, int k, Acc keep, Part part);

  // Operands from rows x [rows, cols]. row_scale may be null.
  void (*pack_left)(E* dst, int ld, const Acc* x, int ldx, int rows, int cols);
  void (*pack_right)(E* dst, int ld, const Acc* x, int ldx, const Acc* row_scale, int rows, int cols);
  void (*pack_right_transposed)(E* dst, int ld, const Acc* x, int ldx, int rows, int cols);  // B = xᵀ [cols, rows]

  // x [rows, cols] from memory, stride in elements; rows to padded_rows and columns to width become zero.
  void (*load_rows)(Acc* x, int ldx, int padded_rows, int width, const void* src, Element type, int64_t stride,
                    int rows, int cols);
  void (*store_rows)(void* dst, Element type, int64_t stride, const Acc* x, int ldx, const Acc* row_scale, int rows,
                     int cols);

  // Row operations on [rows, width]; a, b, c are one number per row.
  void (*l2norm_rows)(Acc* x, int ldx, Acc* reciprocal_norm, Acc eps, int rows, int width);
  void (*l2norm_rows_backward)(Acc* dx, int lddx, const Acc* normalised, int ldn, const Acc* reciprocal_norm, int rows,
                               int width);
  void (*scale_rows)(Acc* x, int ldx, const Acc* a, int rows, int width);                            // x = a x
  void (*add_rows)(Acc* y, int ldy, const Acc* a, const Acc* x, int ldx, int rows, int width);       // y += a x
  void (*residual_rows)(Acc* y, int ldy, const Acc* a, const Acc* x, int ldx, int rows, int width);  // y = x - a y
  void (*dot_rows)(Acc* out, const Acc* x, int ldx, const Acc* y, int ldy, int rows, int width);     // out = <x, y>

  void (*exp_row)(Acc* dst, const Acc* x, int count);

  // With x = scale s + bias [rows, width] and most' = max(most, x): shrink = exp(most - most'), s = exp(x - most'),
  // sum = shrink sum + the new row's sum. Scores of -inf weigh nothing, also in a row that has no others.
  void (*softmax_rows)(Acc* s, int ld, Acc scale, PairBias<Acc> bias, Acc* most, Acc* sum, Acc* shrink, int rows,
                       int width);
  // s becomes p = exp(scale s + bias - lse), and dp becomes p (dp - delta).
  void (*softmax_rows_backward)(Acc* s, Acc* dp, int ld, Acc scale, PairBias<Acc> bias, const Acc* lse,
                                const Acc* delta, int rows, int width);

  // decay [n, n] = exp(G_i - G_j) for j <= i, else 0, with G = high + low. Masked before exp.
  void (*decay_matrix)(Acc* decay, int ld, const Acc* high, const Acc* low, int n);
  // lower = beta_i kk decay below the diagonal, attention = scale qk decay up to it; zero elsewhere.
  void (*chunk_scores)(Acc* lower, Acc* attention, int ld, const Acc* kk, const Acc* qk, const Acc* decay,
                       const Acc* beta, Acc scale, int n);
  // Given dA = dO Vnᵀ and dxv = dX Vnᵀ: m1 = scale dA decay (j <= i), m2 = -dxv decay (j < i), n2 = beta_i m2 and
  // with e = m1 qk + n2 kk: dg_t = sum of e_ij over j < t <= i, dbeta_i += sum_j m2_ij kk_ij. below [n] is scratch.
  void (*chunk_scores_backward)(Acc* m1, Acc* n2, int ld, const Acc* da, const Acc* dxv, const Acc* qk, const Acc* kk,
                                const Acc* decay, const Acc* beta, Acc scale, Acc* below, Acc* dg, Acc* dbeta, int n);
  // The two of a rule that erases nothing: attention, and m1 with dg, alone.
  void (*causal_scores)(Acc* attention, int ld, const Acc* qk, const Acc* decay, Acc scale, int n);
  void (*causal_scores_backward)(Acc* m1, int ld, const Acc* da, const Acc* qk, const Acc* decay, Acc scale, Acc* below,
                                 Acc* dg, int n);
  // inverse = (I + lower)^-1 for a strictly lower triangular matrix.
  void (*unit_lower_inverse)(Acc* inverse, int ldi, const Acc* lower, int ldl, int n);

  // One token on `cols` columns of a state [k_dim, ld], read and written once:
  // r = kᵀ S, p = qᵀ S;  u = beta (v - decay r);  S = decay S + k uᵀ;  o = decay p + (q.k) u.
  void (*step_columns)(Acc* state, int64_t ld, const Acc* k, const Acc* q, const Acc* v, Acc decay, Acc beta, Acc* o,
                       int k_dim, int cols);
  // The same where nothing is erased: S = decay S + k vᵀ;  o = qᵀ S.
  void (*write_columns)(Acc* state, int64_t ld, const Acc* k, const Acc* q, const Acc* v, Acc decay, Acc* o, int k_dim,
                        int cols);

  // Few query rows against rows of a cache as they are stored, [count, heads, dim] with `stride` between rows, each
  // read once. Query row h * queries + m belongs to head h. s [heads * queries, count] = q kᵀ;  o += p v.
  void (*score_keys)(Acc* s, int lds, const Acc* q, int ldq, const void* keys, Element type, int64_t stride, int count,
                     int heads, int queries, int dim);
  void (*weigh_values)(Acc* o, int ldo, const Acc* p, int ldp, const void* values, Element type, int64_t stride,
                       int count, int heads, int queries, int dim);
};

// A table has a null `isa` where the compiler could not build it.
extern const Primitives<float> portable_f32, avx2_f32, avx512_f32;
extern const Primitives<double> portable_f64;
extern const Primitives<bf16> avx512_bf16, amx_bf16;

// The table in use for operands of type E; null if this processor has no products of that type (bf16).
template <class E>
const Primitives<E>* primitives();

}  // namespace memattn::cpu
