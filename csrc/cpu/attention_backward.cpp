// Attention, backward, with P recomputed from ℓ:
//
//   dS_ij = P_ij (dO_i·v_j - Δ_i)   Δ_i = dO_i·O_i - dℓ_i   dV = Pᵀ dO   dK = scale dSᵀ Q   dQ = scale dS K
//   dc_i = Σ_j dS_ij - Σ_i' dS_i'i  dsink = -Σ_i e^{sink - ℓ_i} Δ_i
//
// and of a first score f_i and value u_i of row i, with w_i = e^{f_i - ℓ_i}:  du_i = w_i dO_i   df_i = w_i (dO_i·u_i - Δ_i)
//
// An item is one key head of one sequence with the query heads that read it. Its tiles of keys are visited in order, and
// each adds up what the tiles of queries that see it give: no two tasks write the same sum. Where there are fewer items
// than threads, dK and dV are made in parallel over the keys and dQ in parallel over the queries, each score computed
// twice; every sum has the same order in both, hence the same bits.
#include "attention.h"
#include "results.h"

#include <tuple>

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "attention_cpu_backward";
constexpr int kRows = 128;  // of a tile of queries

// Rows kept as left and as right operand of products.
template <class E>
struct RowOperands {
  E *left_rows, *right_rows;
  int ld;

  RowOperands(Arena& arena, int64_t rows, int leading_dim)
      : left_rows(arena.take<E>(rows * leading_dim)),
        right_rows(needs_packing<E> ? arena.take<E>(rows * leading_dim) : left_rows),
        ld(leading_dim) {}

  void pack(const Primitives<E>& isa, int64_t row, const AccumulateOf<E>* x, int rows, int width) {
    isa.pack_left(left_rows + row * ld, ld, x, ld, rows, width);
    if (needs_packing<E>) isa.pack_right(right_rows + row * ld, ld, x, ld, nullptr, rows, width);
  }
  Left<E> left(int64_t row) const { return {left_rows + row * ld, ld, OperandTraits<E>::group}; }
  Right<E> right(int64_t row) const { return {right_rows + row * ld, ld}; }
};

// All rows of one query head of an item.
template <class E>
struct HeadRows {
  using Acc = AccumulateOf<E>;
  RowOperands<E> q, d_o;
  Acc* dq;                       // [rows, K]
  Acc *lse, *delta, *high, *low;  // [rows]
  Acc *row_sums, *column_sums;   // of dS: [rows], [keys]; with decay only

  HeadRows(Arena& arena, const Attention& a, const AttentionSizes& s, int64_t rows, int64_t keys)
      : q(arena, rows, s.ld_key),
        d_o(arena, rows, s.ld_value),
        dq(arena.take<Acc>(rows * s.ld_key)),
        lse(arena.take<Acc>(rows)),
        delta(arena.take<Acc>(rows)),
        high(arena.take<Acc>(rows)),
        low(arena.take<Acc>(rows)),
        row_sums(arena.take<Acc>(a.decay ? rows : 0)),
        column_sums(arena.take<Acc>(a.decay ? keys : 0)) {}
};

// What a thread needs while it works on one tile of keys.
template <class E>
struct BackwardTemporaries {
  using Acc = AccumulateOf<E>;
  KeyTile<E> keys;
  E *values_transposed, *key_rows;            // [V, kKeys], [kKeys, K] where E is not Acc
  Acc *dk, *dv;                               // [kKeys, K], [kKeys, V]
  Acc *p, *ds;                                // [kRows, kKeys]
  E *p_operand, *ds_operand, *ds_left;        // the same where E is not Acc
  Acc *rows, *out;                            // [kRows, K or V]
  Acc *ones, *scales, *part, *weight;         // [kRows]

  BackwardTemporaries(Arena& arena, const Attention& a, const AttentionSizes& s)
      : keys(arena, a, s),
        values_transposed(arena.take<E>(int64_t{s.value_dim} * s.ld_scores)),
        key_rows(arena.take<E>(packed_size<E>(kKeys, s.ld_key))),
        dk(arena.take<Acc>(int64_t{kKeys} * s.ld_key)),
        dv(arena.take<Acc>(int64_t{kKeys} * s.ld_value)),
        p(arena.take<Acc>(int64_t{kRows} * s.ld_scores)),
        ds(arena.take<Acc>(int64_t{kRows} * s.ld_scores)),
        p_operand(arena.take<E>(packed_size<E>(kRows, s.ld_scores))),
        ds_operand(arena.take<E>(packed_size<E>(kRows, s.ld_scores))),
        ds_left(arena.take<E>(packed_size<E>(kRows, s.ld_scores))),
        rows(arena.take<Acc>(int64_t{kRows} * std::max(s.ld_key, s.ld_value))),
        out(arena.take<Acc>(int64_t{kRows} * s.ld_value)),
        ones(arena.take<Acc>(kRows)),
        scales(arena.take<Acc>(kRows)),
        part(arena.take<Acc>(kRows)),
        weight(arena.take<Acc>(kRows)) {}
};

template <class E>
class Backward {
  using Acc = AccumulateOf<E>;

  struct Item {
    int64_t sequence, key_head;
  };
  struct Want {
    bool keys, queries;
  };
  using Heads = std::vector<HeadRows<E>>;

 public:
  Backward(const Attention& a, const Primitives<E>& isa, const AttentionGradients& g)
      : a_(a), isa_(isa), g_(g), s_(a, isa.unit, kRows), sinks_(a.queries.count() * a.heads) {
    for (int64_t n = 0; n < a.queries.count(); ++n) {
      longest_ = std::max(longest_, tiles(a.queries.length(n), kRows) * kRows);
      most_keys_ = std::max(most_keys_, tiles(a.keys.length(n), kKeys) * kKeys);
    }
  }

  void run(int64_t threads) {
    std::vector<Item> items;
    std::vector<int64_t> cost;
    for (int64_t n = 0; n < a_.queries.count(); ++n) {
      for (int64_t h = 0; h < a_.key_heads; ++h) {
        items.push_back({n, h});
        cost.push_back((a_.queries.length(n) + 1) * (a_.keys.length(n) + 1));
      }
    }
    const WorkPlan plan = plan_work(cost, threads);
    const int64_t alone = plan.shared.empty() ? std::min<int64_t>(threads, plan.whole.size()) : threads;
    const auto make_heads = [&](Arena& arena) {
      Heads heads;
      for (int64_t m = 0; m < a_.group(); ++m) heads.emplace_back(arena, a_, s_, longest_, most_keys_);
      return heads;
    };
    const auto make = [&](Arena& arena) { return BackwardTemporaries<E>(arena, a_, s_); };
    const size_t heads_bytes = bytes_of(make_heads), bytes = bytes_of(make);
    const int64_t sets = plan.whole.empty() ? 1 : alone;
    Scratch scratch(heads_bytes * sets + bytes * alone);
    std::vector<Heads> heads;
    std::vector<BackwardTemporaries<E>> temporaries;
    for (int64_t i = 0; i < sets; ++i) {
      Arena arena(scratch.data() + i * heads_bytes);
      heads.push_back(make_heads(arena));
    }
    for (int64_t i = 0; i < alone; ++i) {
      Arena arena(scratch.data() + sets * heads_bytes + i * bytes);
      temporaries.push_back(make(arena));
      std::fill(temporaries[i].ones, temporaries[i].ones + kRows, Acc(1));
      std::fill(temporaries[i].scales, temporaries[i].scales + kRows, Acc(a_.scale));
    }
    parallel_tasks(plan.whole.size(), threads, isa_, [&](int64_t i, int64_t worker) {
      const auto serially = [&](int64_t count, auto&& task) {
        for (int64_t j = 0; j < count; ++j) task(j, temporaries[worker]);
      };
      process(items[plan.whole[i]], heads[worker], serially, {{true, true}});
    });
    for (int64_t i : plan.shared) {
      const auto shared = [&](int64_t count, auto&& task) {
        parallel_tasks(count, threads, isa_, [&](int64_t j, int64_t worker) { task(j, temporaries[worker]); });
      };
      process(items[i], heads[0], shared, {{true, false}, {false, true}});
    }
  }

  // Σ over sequences, in their order.
  void store_dsink(Acc* dsink) const {
    for (int64_t h = 0; h < a_.heads; ++h) {
      double total = 0;
      for (int64_t n = 0; n < a_.queries.count(); ++n) total += sinks_[n * a_.heads + h];
      dsink[h] = static_cast<Acc>(total);
    }
  }

 private:
  static int64_t tiles(int64_t length, int64_t span) { return (length + span - 1) / span; }

  template <class Each>
  void process(const Item& item, Heads& heads, const Each& each, const std::vector<Want>& passes) {
    const SeenKeys seen = a_.seen(item.sequence);
    const int64_t row_tiles = tiles(seen.queries(), kRows), key_tiles = tiles(seen.keys(), kKeys);
    each(row_tiles, [&](int64_t i, auto& t) { prepare(item, heads, i * kRows, t); });
    for (HeadRows<E>& head : heads) {
      if (a_.decay) std::fill(head.column_sums, head.column_sums + key_tiles * kKeys, Acc(0));
    }
    for (const Want& want : passes) {
      if (want.keys) {
        each(key_tiles, [&](int64_t j, auto& t) { visit(item, heads, seen, j, 0, seen.queries(), want, t); });
      } else {
        each(row_tiles, [&](int64_t i, auto& t) {
          const int64_t first = i * kRows, last = std::min(first + kRows, seen.queries());
          const int64_t begin = seen.prefix() > 0 ? 0 : seen.range(first).begin / kKeys;
          const int64_t end = tiles(std::max(seen.range(last - 1).end, seen.prefix()), kKeys);
          for (int64_t j = begin; j < end; ++j) visit(item, heads, seen, j, first, last, want, t);
        });
      }
    }
    each(row_tiles, [&](int64_t i, auto& t) { store_dq(item, heads, i * kRows, t); });
    for (int64_t m = 0; m < a_.group(); ++m) finish(item, heads[m], a_.head(item.key_head, m));
  }

  // Rows first..first + kRows of every head: operands, ℓ and Δ. Padding and rows that see nothing get ℓ = inf: P = 0.
  void prepare(const Item& item, Heads& heads, int64_t first, BackwardTemporaries<E>& t) const {
    const int rows = static_cast<int>(std::min<int64_t>(a_.queries.length(item.sequence) - first, kRows));
    const int64_t token = a_.queries.start(item.sequence) + first;
    constexpr Acc infinity = std::numeric_limits<Acc>::infinity();
    for (int64_t m = 0; m < a_.group(); ++m) {
      HeadRows<E>& head = heads[m];
      const int64_t h = a_.head(item.key_head, m);
      load_head(isa_, t.rows, s_.ld_key, kRows, s_.key_dim, a_.q, a_.element, token, a_.heads, h, rows, a_.key_dim);
      head.q.pack(isa_, first, t.rows, kRows, s_.key_dim);
      load_head(isa_, t.rows, s_.ld_value, kRows, s_.value_dim, g_.d_o, a_.element, token, a_.heads, h, rows,
                a_.value_dim);
      head.d_o.pack(isa_, first, t.rows, kRows, s_.value_dim);
      load_head(isa_, t.out, s_.ld_value, kRows, s_.value_dim, g_.o, a_.element, token, a_.heads, h, rows,
                a_.value_dim);
      isa_.dot_rows(head.delta + first, t.rows, s_.ld_value, t.out, s_.ld_value, kRows, s_.value_dim);
      for (int i = 0; i < kRows; ++i) {
        const int64_t at = (token + i) * a_.heads + h;
        Acc& lse = head.lse[first + i];
        lse = i < rows ? static_cast<const Acc*>(g_.lse)[at] : -infinity;
        if (lse == -infinity) {
          lse = infinity;
          head.delta[first + i] = 0;
        } else if (g_.d_lse) {
          head.delta[first + i] -= static_cast<const Acc*>(g_.d_lse)[at];
        }
      }
      if (a_.first_scores) differentiate_first(head, first, token, h, rows, t);
      std::fill(head.dq + first * s_.ld_key, head.dq + (first + kRows) * s_.ld_key, Acc(0));
      if (!a_.decay) continue;
      std::fill(head.row_sums + first, head.row_sums + first + kRows, Acc(0));
      const int64_t at = a_.keys.start(item.sequence) + first + a_.offset(item.sequence);
      load_decay(head.high + first, head.low + first, a_, at, h, rows, kRows);
    }
  }

  // The gradients of first scores and values; t.rows holds dO.
  void differentiate_first(const HeadRows<E>& head, int64_t first, int64_t token, int64_t h, int rows,
                           BackwardTemporaries<E>& t) const {
    load_head(isa_, t.out, s_.ld_value, kRows, s_.value_dim, a_.first_values, a_.element, token, a_.heads, h, rows,
              a_.value_dim);
    isa_.dot_rows(t.part, t.rows, s_.ld_value, t.out, s_.ld_value, kRows, s_.value_dim);
    for (int i = 0; i < rows; ++i) {
      const int64_t at = (token + i) * a_.heads + h;
      t.weight[i] = std::exp(static_cast<const Acc*>(a_.first_scores)[at] - head.lse[first + i]);
      static_cast<Acc*>(g_.d_first_scores)[at] = t.weight[i] * (t.part[i] - head.delta[first + i]);
    }
    isa_.store_rows(offset(g_.d_first_values, a_.element, (token * a_.heads + h) * a_.value_dim), a_.element,
                    a_.heads * a_.value_dim, t.rows, s_.ld_value, t.weight, rows, a_.value_dim);
  }

  // One tile of keys with the rows first..last that see it.
  void visit(const Item& item, Heads& heads, const SeenKeys& seen, int64_t tile, int64_t first, int64_t last,
             const Want& want, BackwardTemporaries<E>& t) const {
    const int64_t begin = tile * kKeys, end = std::min(begin + kKeys, seen.keys());
    const AttentionMask::Range rows = seen.rows(first, last, begin, end);
    if (rows.begin == rows.end && !want.keys) return;
    t.keys.load(a_, isa_, s_, item.sequence, item.key_head, begin, end);
    const int width = t.keys.width;
    isa_.pack_right_transposed(t.values_transposed, s_.ld_scores, t.keys.values, s_.ld_value, width, s_.value_dim);
    const Right<E> key_rows = as_right(isa_, t.key_rows, t.keys.rows, s_.ld_key, width, s_.key_dim);
    if (want.keys) {
      std::fill(t.dk, t.dk + int64_t{kKeys} * s_.ld_key, Acc(0));
      std::fill(t.dv, t.dv + int64_t{kKeys} * s_.ld_value, Acc(0));
    }
    for (int64_t row = rows.begin / s_.unit * s_.unit; row < rows.end;) {
      const int64_t next = std::min((row / kRows + 1) * kRows, (rows.end + s_.unit - 1) / s_.unit * s_.unit);
      const int n = static_cast<int>(next - row);
      const bool whole = seen.all(row, std::min(next, seen.queries()), begin, begin + width);
      for (size_t m = 0; m < heads.size(); ++m) {
        scores(seen, heads[m], m, row, n, whole, t);
        add(heads[m], row, n, key_rows, want, t);
      }
      row = next;
    }
    if (want.keys) {
      const int64_t at = (a_.keys.start(item.sequence) + begin) * a_.key_heads + item.key_head;
      isa_.store_rows(offset(g_.dk, a_.element, at * a_.key_dim), a_.element, a_.key_heads * a_.key_dim, t.dk,
                      s_.ld_key, t.scales, t.keys.count, a_.key_dim);
      isa_.store_rows(offset(g_.dv, a_.element, at * a_.value_dim), a_.element, a_.key_heads * a_.value_dim, t.dv,
                      s_.ld_value, nullptr, t.keys.count, a_.value_dim);
    }
  }

  // P and dS of n rows.
  void scores(const SeenKeys& seen, const HeadRows<E>& head, int64_t member, int64_t row, int n, bool whole,
              BackwardTemporaries<E>& t) const {
    const int width = t.keys.width, ld = s_.ld_scores;
    isa_.gemm(t.p, ld, head.q.left(row), {t.keys.transposed, ld}, n, width, s_.key_dim, 0, Part::full);
    isa_.gemm(t.ds, ld, head.d_o.left(row), {t.values_transposed, ld}, n, width, s_.value_dim, 0, Part::full);
    if (!whole) seen.hide(t.p, ld, row, row + n, t.keys.begin, width);
    isa_.softmax_rows_backward(t.p, t.ds, ld, Acc(a_.scale), t.keys.bias(member, head.high + row, head.low + row),
                               head.lse + row, head.delta + row, n, width);
  }

  // What n rows give to dV, dK and dQ.
  void add(HeadRows<E>& head, int64_t row, int n, Right<E> key_rows, const Want& want,
           BackwardTemporaries<E>& t) const {
    const int width = t.keys.width, ld = s_.ld_scores;
    if (want.keys) {
      const Right<E> p = as_right(isa_, t.p_operand, t.p, ld, n, width);
      const Right<E> ds = as_right(isa_, t.ds_operand, t.ds, ld, n, width);
      isa_.gemm(t.dv, s_.ld_value, transposed(p), head.d_o.right(row), width, s_.value_dim, n, 1, Part::full);
      isa_.gemm(t.dk, s_.ld_key, transposed(ds), head.q.right(row), width, s_.key_dim, n, 1, Part::full);
      if (a_.decay) isa_.add_rows(head.column_sums + t.keys.begin, 0, t.ones, t.ds, ld, n, width);
    }
    if (want.queries) {
      const Left<E> ds = as_left(isa_, t.ds_left, t.ds, ld, n, width);
      isa_.gemm(head.dq + row * s_.ld_key, s_.ld_key, ds, key_rows, n, s_.key_dim, width, 1, Part::full);
      if (!a_.decay) return;
      isa_.dot_rows(t.part, t.ds, ld, t.ones, 0, n, width);
      for (int i = 0; i < n; ++i) head.row_sums[row + i] += t.part[i];
    }
  }

  void store_dq(const Item& item, const Heads& heads, int64_t first, BackwardTemporaries<E>& t) const {
    const int rows = static_cast<int>(std::min<int64_t>(a_.queries.length(item.sequence) - first, kRows));
    for (int64_t m = 0; m < a_.group(); ++m) {
      const int64_t at = (a_.queries.start(item.sequence) + first) * a_.heads + a_.head(item.key_head, m);
      isa_.store_rows(offset(g_.dq, a_.element, at * a_.key_dim), a_.element, a_.heads * a_.key_dim,
                      heads[m].dq + first * s_.ld_key, s_.ld_key, t.scales, rows, a_.key_dim);
    }
  }

  // What is summed over whole columns of rows: dsink and the decay's gradient.
  void finish(const Item& item, const HeadRows<E>& head, int64_t h) {
    const int64_t queries = a_.queries.length(item.sequence), keys = a_.keys.length(item.sequence);
    if (a_.sink) {
      double total = 0;
      for (int64_t i = 0; i < queries; ++i) total -= std::exp(a_.sink_of<Acc>(h) - head.lse[i]) * head.delta[i];
      sinks_[item.sequence * a_.heads + h] = total;
    }
    if (!a_.decay) return;
    double* ddecay = g_.ddecay + a_.keys.start(item.sequence) * a_.heads + h;
    for (int64_t j = 0; j < keys; ++j) ddecay[j * a_.heads] = -static_cast<double>(head.column_sums[j]);
    const int64_t first = a_.offset(item.sequence);
    for (int64_t i = 0; i < queries; ++i) ddecay[(i + first) * a_.heads] += head.row_sums[i];
  }

  const Attention& a_;
  const Primitives<E>& isa_;
  const AttentionGradients g_;
  const AttentionSizes s_;
  int64_t longest_ = 0, most_keys_ = 0;  // rows and keys of an item, in whole tiles
  std::vector<double> sinks_;            // [sequences, heads]
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor d_o, std::optional<Tensor> d_lse, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v,
    std::optional<Tensor> sink, std::optional<Tensor> decay, std::optional<Tensor> cu_seqlens_q,
    std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> first_scores, std::optional<Tensor> first_values,
    int64_t causal, int64_t window, int64_t prefix_len, int64_t block_size,
    int64_t summary, int64_t dilation, int64_t dilated_window, int64_t dilated_prefix, int64_t q_offset,
    bool tile_heads, double scale) {
  Attention a = read_arguments(kOp, q, k, v, sink, decay, cu_seqlens_q, cu_seqlens_k,
                                     {causal, window, prefix_len, block_size, summary, dilation, dilated_window,
                                      dilated_prefix, q_offset, tile_heads, scale});
  begin_with(kOp, a, q, v, first_scores, first_values);
  const ScalarType type = q.scalar_type(), sums = state_dtype(type);
  const int64_t batch = q.size(0), length = q.size(1), heads = q.size(2), value_dim = v.size(3);
  check_tensor(kOp, "do", d_o, {type}, {batch, length, heads, value_dim});
  check_tensor(kOp, "o", o, {type}, {batch, length, heads, value_dim});
  check_tensor(kOp, "lse", lse, {sums}, {batch, length, heads});
  check_tensor(kOp, "dlse", d_lse, {sums}, {batch, length, heads});

  Tensor dq = result_like(q), dk = result_like(k), dv = result_like(v);
  const auto like = [&](const std::optional<Tensor>& x) {
    return x ? result_like(*x) : empty_result(q, {0}, sums);
  };
  Tensor dsink = like(sink), ddecay = like(decay);
  Tensor d_first_scores = like(first_scores), d_first_values = like(first_values);
  const AttentionGradients g{o.const_data_ptr(),
                    d_o.const_data_ptr(),
                    lse.const_data_ptr(),
                    d_lse ? d_lse->const_data_ptr() : nullptr,
                    dq.mutable_data_ptr(),
                    dk.mutable_data_ptr(),
                    dv.mutable_data_ptr(),
                    decay ? ddecay.mutable_data_ptr<double>() : nullptr,
                    d_first_scores.mutable_data_ptr(),
                    d_first_values.mutable_data_ptr()};
  differentiate(a, type, g, sink ? dsink.mutable_data_ptr() : nullptr);
  return {dq, dk, dv, dsink, ddecay, d_first_scores, d_first_values};
}

}  // namespace

void differentiate(const Attention& a, ScalarType type, const AttentionGradients& g, void* dsink) {
  with_primitives(type, [&]<class E>(const Primitives<E>& isa) {
    Backward<E> backward(a, isa, g);
    backward.run(torch::stable::get_num_threads());
    if (dsink) backward.store_dsink(static_cast<AccumulateOf<E>*>(dsink));
  });
}

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("attention_cpu_backward", TORCH_BOX(&attention_backward)); }

}  // namespace memattn::cpu
