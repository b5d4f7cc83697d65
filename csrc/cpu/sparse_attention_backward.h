// What the parts of sparse attention's backward share: where gradients go, ℓ and Δ of the rows.
#pragma once

#include "sparse_attention.h"

#include <limits>

namespace memattn::cpu {

struct SparseGradients {
  const void *o, *d_o;        // [rows, heads, value_dim] of the arguments' element
  const void *lse, *d_lse;    // [rows, heads] in the accumulate type; d_lse may be null
  void *dq, *dk, *dv;         // like q, k, v; dk and dv null: not wanted
  void *dbias, *dsink;        // like bias and sink, or null
};

// ℓ and Δ of every query row.
template <class Acc>
class RowStatistics {
 public:
  static constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();

  RowStatistics(const SparseAttention& a, const SparseGradients& g) : g_(g), delta_(a.rows() * a.heads) {}

  // inf where a row sees nothing: P = 0.
  Acc lse(int64_t at) const {
    const Acc value = static_cast<const Acc*>(g_.lse)[at];
    return value == -kInfinity ? kInfinity : value;
  }
  Acc delta(int64_t at) const { return delta_[at]; }

  // Keeps Δ = dO·O - dℓ of a row whose dO·O is given.
  Acc keep(int64_t at, Acc product) {
    if (g_.d_lse) product -= static_cast<const Acc*>(g_.d_lse)[at];
    return delta_[at] = lse(at) == kInfinity ? Acc(0) : product;
  }

 private:
  const SparseGradients& g_;
  std::vector<Acc> delta_;
};

// dQ, dbias and Δ of the sequences that go by blocks, of the operand types float, double and bf16.
template <class E>
void differentiate_chunks(const SparseAttention& a, const Primitives<E>& isa, const SparseGradients& g,
                          RowStatistics<AccumulateOf<E>>& rows, int64_t threads);

// dK and dV, of the operand types float, double and bf16.
template <class E>
void differentiate_memory(const SparseAttention& a, const Primitives<E>& isa, const SparseGradients& g,
                          const RowStatistics<AccumulateOf<E>>& rows, int64_t threads);

}  // namespace memattn::cpu
