// Sparse attention, backward, with P recomputed from ℓ:
//
//   dS_ij = P_ij (dO_i·v_j - Δ_i)   Δ_i = dO_i·O_i - dℓ_i   dV = Pᵀ dO   dK = scale dSᵀ Q   dQ = scale dS K
//   dbias_ie = Σ_{j∈e} dS_ij        dsink = -Σ_i e^{sink - ℓ_i} Δ_i
//
// Two passes. The first has a task per list, or per chunk of queries, and makes dQ and dbias from the tokens that they
// name. The second has a task per cell of memory (a block, or the part of one that lies on a page) and makes dK and dV from
// the queries that name it, which the lists, inverted by a counting sort, tell in ascending order. Each sum is made by one
// task in a fixed order.
#include "sparse_attention_backward.h"

#include <cmath>
#include <numeric>
#include <tuple>

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "sparse_attention_cpu_backward";

// What a thread needs for one list.
template <class E>
struct ListTemporaries {
  using Acc = AccumulateOf<E>;
  Acc *q, *d_o, *dq, *out;             // [group, K or V]
  Acc *keys, *values;                  // [kTokens, K or V]
  Acc *p, *ds;                         // [group, kTokens]
  Acc *lse, *delta, *nothing, *scales;  // [group]
  Acc* taken;                          // [kTokens]

  ListTemporaries(Arena& arena, const SparseSizes& s)
      : q(arena.take<Acc>(int64_t{s.group} * s.ld_key)),
        d_o(arena.take<Acc>(int64_t{s.group} * s.ld_value)),
        dq(arena.take<Acc>(int64_t{s.group} * s.ld_key)),
        out(arena.take<Acc>(int64_t{s.group} * s.ld_value)),
        keys(arena.take<Acc>(int64_t{kTokens} * s.ld_key)),
        values(arena.take<Acc>(int64_t{kTokens} * s.ld_value)),
        p(arena.take<Acc>(int64_t{s.group} * s.ld_scores)),
        ds(arena.take<Acc>(int64_t{s.group} * s.ld_scores)),
        lse(arena.take<Acc>(s.group)),
        delta(arena.take<Acc>(s.group)),
        nothing(arena.take<Acc>(std::max(s.group, kTokens))),
        scales(arena.take<Acc>(s.group)),
        taken(arena.take<Acc>(kTokens)) {}
};

template <class E>
class Backward {
  using Acc = AccumulateOf<E>;
  static constexpr Element kStored = element_of_accumulate<Acc>();

 public:
  Backward(const SparseAttention& a, const Primitives<E>& isa, const SparseGradients& g)
      : a_(a), isa_(isa), g_(g), s_(a, isa.unit), statistics_(a, g), rows_(a.rows_by_lists()) {}

  void run(int64_t threads) {
    differentiate_lists(threads);
    differentiate_chunks(a_, isa_, g_, statistics_, threads);
    if (g_.dsink) differentiate_sinks(threads);
    if (g_.dk) differentiate_memory(a_, isa_, g_, statistics_, threads);
  }

 private:
  void differentiate_lists(int64_t threads) {
    const int64_t rows = static_cast<int64_t>(rows_.size()), lists = rows * a_.key_heads;
    threads = std::clamp<int64_t>(lists, 1, threads);
    const auto make = [&](Arena& arena) { return ListTemporaries<E>(arena, s_); };
    const size_t bytes = bytes_of(make);
    Scratch scratch(bytes * threads);
    std::vector<ListTemporaries<E>> temporaries;
    for (int64_t i = 0; i < threads; ++i) {
      Arena arena(scratch.data() + i * bytes);
      temporaries.push_back(make(arena));
      std::fill_n(temporaries[i].nothing, std::max(s_.group, kTokens), Acc(0));
      std::fill_n(temporaries[i].scales, s_.group, Acc(a_.scale));
    }
    parallel_tasks(lists, threads, isa_, [&](int64_t i, int64_t worker) {
      differentiate_list(rows_[i % rows], i / rows, temporaries[worker]);
    });
  }

  void differentiate_list(int64_t row, int64_t key_head, ListTemporaries<E>& t) {
    prepare(row, key_head, t);
    const Acc* bias = a_.bias_of<Acc>(row, key_head);
    Acc* dbias = bias ? static_cast<Acc*>(g_.dbias) + (bias - static_cast<const Acc*>(a_.bias)) : nullptr;
    if (bias) std::fill_n(dbias, a_.entries, Acc(0));
    std::fill_n(t.dq, int64_t{s_.group} * s_.ld_key, Acc(0));
    const HeadRows<E> keys(isa_, a_, a_.k, key_head, a_.key_dim, s_.key_dim, s_.ld_key);
    const HeadRows<E> values(isa_, a_, a_.v, key_head, a_.value_dim, s_.value_dim, s_.ld_value);
    TokenCursor cursor(a_, row, key_head, 0, a_.used(row, key_head));
    TokenTile tiles[2];
    cursor.fill(tiles[0]);
    for (int at = 0; tiles[at].tokens > 0; at ^= 1) {
      cursor.fill(tiles[at ^ 1]);
      keys.load(t.keys, tiles[at], tiles[at ^ 1]);
      values.load(t.values, tiles[at], tiles[at ^ 1]);
      add_tile(tiles[at], bias, t);
      if (bias) add_bias(dbias, tiles[at], t);
    }
    isa_.store_rows(offset(g_.dq, a_.element, (row * a_.heads + key_head * s_.group) * a_.key_dim), a_.element,
                    a_.key_dim, t.dq, s_.ld_key, t.scales, s_.group, a_.key_dim);
  }

  // Operands, ℓ and Δ of the rows of a group.
  void prepare(int64_t row, int64_t key_head, ListTemporaries<E>& t) {
    load_group(isa_, t.q, s_.ld_key, s_.key_dim, a_.q, a_, row, key_head, a_.key_dim);
    load_group(isa_, t.d_o, s_.ld_value, s_.value_dim, g_.d_o, a_, row, key_head, a_.value_dim);
    load_group(isa_, t.out, s_.ld_value, s_.value_dim, g_.o, a_, row, key_head, a_.value_dim);
    isa_.dot_rows(t.delta, t.d_o, s_.ld_value, t.out, s_.ld_value, s_.group, s_.value_dim);
    for (int m = 0; m < s_.group; ++m) {
      const int64_t at = row * a_.heads + key_head * s_.group + m;
      t.lse[m] = statistics_.lse(at);
      t.delta[m] = statistics_.keep(at, t.delta[m]);
    }
  }

  void add_tile(const TokenTile& tile, const Acc* bias, ListTemporaries<E>& t) const {
    const int width = round_up(tile.tokens, s_.unit), ld = s_.ld_scores;
    isa_.score_keys(t.p, ld, t.q, s_.ld_key, t.keys, kStored, s_.ld_key, tile.tokens, 1, s_.group, s_.key_dim);
    isa_.score_keys(t.ds, ld, t.d_o, s_.ld_value, t.values, kStored, s_.ld_value, tile.tokens, 1, s_.group,
                    s_.value_dim);
    for (int m = 0; m < s_.group; ++m) {
      std::fill(t.p + m * ld + tile.tokens, t.p + m * ld + width, -std::numeric_limits<Acc>::infinity());
      std::fill(t.ds + m * ld + tile.tokens, t.ds + m * ld + width, Acc(0));
    }
    PairBias<Acc> pairs{};
    if (bias) {
      load_bias(t.taken, tile, bias);
      std::fill(t.taken + tile.tokens, t.taken + width, Acc(0));
      pairs = {t.nothing, t.nothing, t.taken, t.nothing};
    }
    isa_.softmax_rows_backward(t.p, t.ds, ld, Acc(a_.scale), pairs, t.lse, t.delta, s_.group, width);
    isa_.weigh_values(t.dq, s_.ld_key, t.ds, ld, t.keys, kStored, s_.ld_key, tile.tokens, 1, s_.group, s_.key_dim);
  }

  void add_bias(Acc* dbias, const TokenTile& tile, const ListTemporaries<E>& t) const {
    for (int i = 0, at = 0; i < tile.runs; at += tile.run[i++].count) {
      for (int m = 0; m < s_.group; ++m) {
        const Acc* ds = t.ds + m * s_.ld_scores + at;
        dbias[tile.run[i].entry] += std::accumulate(ds, ds + tile.run[i].count, Acc(0));
      }
    }
  }

  void differentiate_sinks(int64_t threads) const {
    parallel_tasks(a_.heads, threads, isa_, [&](int64_t h, int64_t) {
      const double sink = static_cast<const Acc*>(a_.sink)[h];
      double total = 0;
      for (int64_t at = h; at < a_.rows() * a_.heads; at += a_.heads) {
        const double weight = std::exp(sink - static_cast<double>(statistics_.lse(at)));
        total -= weight * static_cast<double>(statistics_.delta(at));
      }
      static_cast<Acc*>(g_.dsink)[h] = static_cast<Acc>(total);
    });
  }

  const SparseAttention& a_;
  const Primitives<E>& isa_;
  const SparseGradients& g_;
  const SparseSizes s_;
  RowStatistics<Acc> statistics_;
  const std::vector<int64_t> rows_;  // that go list by list
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sparse_attention_backward(
    Tensor d_o, std::optional<Tensor> d_lse, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor indices,
    std::optional<Tensor> counts, std::optional<Tensor> q_positions, std::optional<Tensor> bias,
    std::optional<Tensor> sink, std::optional<Tensor> page_table, std::optional<Tensor> cu_seqlens_q,
    std::optional<Tensor> cu_seqlens_k, int64_t unit, double scale, bool memory) {
  const SparseAttention a = read_sparse_arguments(kOp, q, k, v, indices, counts, q_positions, bias, sink, page_table,
                                                  cu_seqlens_q, cu_seqlens_k, unit, scale);
  const ScalarType type = q.scalar_type(), sums = state_dtype(type);
  check_tensor(kOp, "do", d_o, {type}, {q.size(0), q.size(1), q.size(2), v.size(3)});
  check_tensor(kOp, "o", o, {type}, {q.size(0), q.size(1), q.size(2), v.size(3)});
  check_tensor(kOp, "lse", lse, {sums}, {q.size(0), q.size(1), q.size(2)});
  check_tensor(kOp, "dlse", d_lse, {sums}, {q.size(0), q.size(1), q.size(2)});
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (a.rows() > kMost || a.entries > kMost) fail(kOp, "indices must have less than 2^31 rows and entries");

  const auto like = [&](const std::optional<Tensor>& x) {
    return x ? result_like(*x) : empty_result(q, {0}, sums);
  };
  Tensor dq = result_like(q), dbias = like(bias), dsink = like(sink);
  Tensor dk = memory ? result_like(k) : empty_result(k, {0});
  Tensor dv = memory ? result_like(v) : empty_result(v, {0});
  const SparseGradients g{o.const_data_ptr(),
                          d_o.const_data_ptr(),
                          lse.const_data_ptr(),
                          d_lse ? d_lse->const_data_ptr() : nullptr,
                          dq.mutable_data_ptr(),
                          memory ? dk.mutable_data_ptr() : nullptr,
                          memory ? dv.mutable_data_ptr() : nullptr,
                          bias ? dbias.mutable_data_ptr() : nullptr,
                          sink ? dsink.mutable_data_ptr() : nullptr};
  with_primitives(type, [&]<class E>(const Primitives<E>& isa) {
    Backward<E>(a, isa, g).run(torch::stable::get_num_threads());
  });
  return {dq, dk, dv, dbias, dsink};
}

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) {
  m.impl("sparse_attention_cpu_backward", TORCH_BOX(&sparse_attention_backward));
}

}  // namespace
}  // namespace memattn::cpu
