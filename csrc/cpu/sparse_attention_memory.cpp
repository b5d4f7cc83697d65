// Sparse attention, backward, the memory's part: dK and dV, cell by cell, from the queries that name each.
//
// Cells of many tokens are the right operands of matrix products, with tiles of gathered query rows on the left. In cells
// of few tokens these are the rows of the products, and the query rows the columns.
#include "sparse_attention_backward.h"
#include "sparse_attention_blocks.h"
#include "sparse_attention_cells.h"

#include <cmath>
#include <limits>

namespace memattn::cpu {
namespace {

constexpr int64_t kMany = 16;  // tokens of a cell

// Tokens of a cell that are differentiated together.
struct CellTokens {
  int64_t row, key_head, before;  // first row of memory; how many tokens of the cell come before
  int count, width;
};

template <class E>
struct CellTemporaries {
  using Acc = AccumulateOf<E>;
  int rows, ld_rows;
  Acc *keys, *values, *dk, *dv;                 // [kTokens, K or V]
  E *keys_transposed, *values_transposed;       // [K or V, kTokens]
  Acc *q, *d_o;                                 // [rows, K or V]: gathered
  E *q_left, *q_right, *d_o_left, *d_o_right;   // the same as operands, where E is not Acc
  Acc *p, *ds;                                  // [rows, kTokens] or [few tokens, rows]
  E *p_right, *ds_right;                        // [rows, kTokens], where E is not Acc
  Acc *lse, *delta, *bias, *high, *low;         // [rows]
  int* seen;                                    // [rows]: of the tokens
  Acc *nothing, *scales;                        // [max(rows, kTokens)]

  CellTemporaries(Arena& arena, const BlockSizes& s)
      : rows(s.tile_rows()),
        ld_rows(leading(rows)),
        keys(arena.take<Acc>(int64_t{kTokens} * s.ld_key)),
        values(arena.take<Acc>(int64_t{kTokens} * s.ld_value)),
        dk(arena.take<Acc>(int64_t{kTokens} * s.ld_key)),
        dv(arena.take<Acc>(int64_t{kTokens} * s.ld_value)),
        keys_transposed(arena.take<E>(int64_t{s.key_dim} * s.ld_scores)),
        values_transposed(arena.take<E>(int64_t{s.value_dim} * s.ld_scores)),
        q(arena.take<Acc>(int64_t{rows} * s.ld_key)),
        d_o(arena.take<Acc>(int64_t{rows} * s.ld_value)),
        q_left(arena.take<E>(packed_size<E>(rows, s.ld_key))),
        q_right(arena.take<E>(packed_size<E>(rows, s.ld_key))),
        d_o_left(arena.take<E>(packed_size<E>(rows, s.ld_value))),
        d_o_right(arena.take<E>(packed_size<E>(rows, s.ld_value))),
        p(arena.take<Acc>(std::max(int64_t{rows} * s.ld_scores, kMany * ld_rows))),
        ds(arena.take<Acc>(std::max(int64_t{rows} * s.ld_scores, kMany * ld_rows))),
        p_right(arena.take<E>(packed_size<E>(rows, s.ld_scores))),
        ds_right(arena.take<E>(packed_size<E>(rows, s.ld_scores))),
        lse(arena.take<Acc>(rows)),
        delta(arena.take<Acc>(rows)),
        bias(arena.take<Acc>(rows)),
        high(arena.take<Acc>(rows)),
        low(arena.take<Acc>(rows)),
        seen(arena.take<int>(rows)),
        nothing(arena.take<Acc>(std::max(rows, kTokens))),
        scales(arena.take<Acc>(kTokens)) {}
};

template <class E>
class MemoryBackward {
  using Acc = AccumulateOf<E>;
  static constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
  static constexpr Element kStored = element_of_accumulate<Acc>();

  struct Item {
    const CellGroup* group;
    int64_t key_head;
  };

 public:
  MemoryBackward(const SparseAttention& a, const Primitives<E>& isa, const SparseGradients& g,
                 const RowStatistics<Acc>& rows)
      : a_(a), isa_(isa), g_(g), rows_(rows), s_(a, isa.unit), cells_(a) {}

  void run(int64_t threads) const {
    std::vector<Item> items;
    std::vector<int64_t> cost;
    int64_t most_cells = 0, most_entries = 0;
    for (const CellGroup& group : cells_.groups()) {
      most_cells = std::max(most_cells, group.count);
      most_entries = std::max(most_entries, cells_.entries(group));
      for (int64_t h = 0; h < a_.key_heads; ++h) {
        items.push_back({&group, h});
        cost.push_back(group.count + cells_.entries(group));
      }
    }
    const WorkPlan plan = plan_work(cost, threads);
    const int64_t alone = plan.shared.empty() ? std::min<int64_t>(threads, plan.whole.size()) : threads;
    const int64_t sets = plan.whole.empty() ? 1 : alone;
    const auto make_lists = [&](Arena& arena) { return Inverted(arena, most_cells, most_entries); };
    const auto make = [&](Arena& arena) { return CellTemporaries<E>(arena, s_); };
    const size_t list_bytes = bytes_of(make_lists), bytes = bytes_of(make);
    Scratch scratch(list_bytes * sets + bytes * alone);
    std::vector<Inverted> lists;
    std::vector<CellTemporaries<E>> temporaries;
    for (int64_t i = 0; i < sets; ++i) {
      Arena arena(scratch.data() + i * list_bytes);
      lists.push_back(make_lists(arena));
    }
    for (int64_t i = 0; i < alone; ++i) {
      Arena arena(scratch.data() + sets * list_bytes + i * bytes);
      temporaries.push_back(make(arena));
      std::fill_n(temporaries[i].nothing, std::max(temporaries[i].rows, kTokens), Acc(0));
      std::fill_n(temporaries[i].scales, kTokens, Acc(a_.scale));
    }
    parallel_tasks(plan.whole.size(), threads, isa_, [&](int64_t i, int64_t worker) {
      const Item& item = items[plan.whole[i]];
      cells_.invert(*item.group, item.key_head, lists[worker]);
      differentiate_cells(item, 0, item.group->count, lists[worker], temporaries[worker]);
    });
    for (int64_t i : plan.shared) {
      const Item& item = items[i];
      cells_.invert(*item.group, item.key_head, lists[0]);
      const int64_t step = std::max<int64_t>(1, kTokens / cells_.size());
      parallel_tasks((item.group->count + step - 1) / step, threads, isa_, [&](int64_t j, int64_t worker) {
        differentiate_cells(item, j * step, std::min((j + 1) * step, item.group->count), lists[0],
                            temporaries[worker]);
      });
    }
  }

 private:
  void differentiate_cells(const Item& item, int64_t first, int64_t last, const Inverted& lists,
                           CellTemporaries<E>& t) const {
    for (int64_t cell = first; cell < last; ++cell) {
      const Named *begin = lists.named + lists.begin[cell], *end = lists.named + lists.begin[cell + 1];
      const int64_t from = cell * cells_.size(), to = std::min(from + cells_.size(), item.group->tokens);
      for (int64_t at = from; at < to; at += kTokens) {
        const int count = static_cast<int>(std::min<int64_t>(to - at, kTokens));
        differentiate({item.group->row + at, item.key_head, at - from, count, round_up(count, s_.unit)}, begin, end, t);
      }
    }
  }

  void differentiate(const CellTokens& tokens, const Named* named, const Named* end, CellTemporaries<E>& t) const {
    std::fill_n(t.dk, int64_t{tokens.width} * s_.ld_key, Acc(0));
    std::fill_n(t.dv, int64_t{tokens.width} * s_.ld_value, Acc(0));
    if (named != end) load(tokens, t);
    while (named != end) {
      const int rows = gather(tokens, named, end, t);
      if (rows == 0) continue;
      if (cells_.size() >= kMany) {
        add_products(tokens, rows, t);
      } else {
        add_columns(tokens.count, rows, t);
      }
    }
    const int64_t at = tokens.row * a_.key_heads + tokens.key_head;
    isa_.store_rows(offset(g_.dk, a_.element, at * a_.key_dim), a_.element, a_.key_heads * a_.key_dim, t.dk, s_.ld_key,
                    t.scales, tokens.count, a_.key_dim);
    isa_.store_rows(offset(g_.dv, a_.element, at * a_.value_dim), a_.element, a_.key_heads * a_.value_dim, t.dv,
                    s_.ld_value, nullptr, tokens.count, a_.value_dim);
  }

  void load(const CellTokens& tokens, CellTemporaries<E>& t) const {
    const int64_t at = tokens.row * a_.key_heads + tokens.key_head;
    isa_.load_rows(t.keys, s_.ld_key, tokens.width, s_.key_dim, offset(a_.k, a_.element, at * a_.key_dim), a_.element,
                   a_.key_heads * a_.key_dim, tokens.count, a_.key_dim);
    isa_.load_rows(t.values, s_.ld_value, tokens.width, s_.value_dim, offset(a_.v, a_.element, at * a_.value_dim),
                   a_.element, a_.key_heads * a_.value_dim, tokens.count, a_.value_dim);
    if (cells_.size() < kMany) return;
    isa_.pack_right_transposed(t.keys_transposed, s_.ld_scores, t.keys, s_.ld_key, tokens.width, s_.key_dim);
    isa_.pack_right_transposed(t.values_transposed, s_.ld_scores, t.values, s_.ld_value, tokens.width, s_.value_dim);
  }

  // The rows of the next queries that see any of the tokens, padded; returns how many.
  int gather(const CellTokens& tokens, const Named*& named, const Named* end, CellTemporaries<E>& t) const {
    int rows = 0;
    for (; named != end && rows + s_.group <= t.rows; ++named) {
      const int seen = static_cast<int>(std::min<int64_t>(named->tokens - tokens.before, tokens.count));
      if (seen <= 0) continue;
      load_group(isa_, t.q + int64_t{rows} * s_.ld_key, s_.ld_key, s_.key_dim, a_.q, a_, named->row, tokens.key_head,
                 a_.key_dim);
      load_group(isa_, t.d_o + int64_t{rows} * s_.ld_value, s_.ld_value, s_.value_dim, g_.d_o, a_, named->row,
                 tokens.key_head, a_.value_dim);
      const Acc* bias = a_.bias_of<Acc>(named->row, tokens.key_head);
      for (int m = 0; m < s_.group; ++m, ++rows) {
        const int64_t at = named->row * a_.heads + tokens.key_head * s_.group + m;
        t.lse[rows] = rows_.lse(at);
        t.delta[rows] = rows_.delta(at);
        t.bias[rows] = bias ? bias[named->entry] : Acc(0);
        t.seen[rows] = seen;
      }
    }
    for (int i = rows; i < round_up(rows, s_.unit); ++i) {
      std::fill_n(t.q + int64_t{i} * s_.ld_key, s_.key_dim, Acc(0));
      std::fill_n(t.d_o + int64_t{i} * s_.ld_value, s_.value_dim, Acc(0));
      t.lse[i] = kInfinity;
      t.delta[i] = t.bias[i] = 0;
      t.seen[i] = 0;
    }
    return rows;
  }

  // --- many tokens: [rows, tokens] ---

  void add_products(const CellTokens& tokens, int rows, CellTemporaries<E>& t) const {
    const int padded = round_up(rows, s_.unit), width = tokens.width, ld = s_.ld_scores;
    isa_.gemm(t.p, ld, as_left(isa_, t.q_left, t.q, s_.ld_key, padded, s_.key_dim), {t.keys_transposed, ld}, padded,
              width, s_.key_dim, 0, Part::full);
    isa_.gemm(t.ds, ld, as_left(isa_, t.d_o_left, t.d_o, s_.ld_value, padded, s_.value_dim), {t.values_transposed, ld},
              padded, width, s_.value_dim, 0, Part::full);
    hide_beyond(t.p, ld, t.seen, padded, width, -kInfinity);
    hide_beyond(t.ds, ld, t.seen, padded, width, Acc(0));
    const PairBias<Acc> pairs = a_.bias ? PairBias<Acc>{t.bias, t.nothing, t.nothing, t.nothing} : PairBias<Acc>{};
    isa_.softmax_rows_backward(t.p, t.ds, ld, Acc(a_.scale), pairs, t.lse, t.delta, padded, width);
    isa_.gemm(t.dv, s_.ld_value, transposed(as_right(isa_, t.p_right, t.p, ld, padded, width)),
              as_right(isa_, t.d_o_right, t.d_o, s_.ld_value, padded, s_.value_dim), width, s_.value_dim, padded, 1,
              Part::full);
    isa_.gemm(t.dk, s_.ld_key, transposed(as_right(isa_, t.ds_right, t.ds, ld, padded, width)),
              as_right(isa_, t.q_right, t.q, s_.ld_key, padded, s_.key_dim), width, s_.key_dim, padded, 1, Part::full);
  }

  // --- few tokens: [tokens, rows] ---

  void add_columns(int tokens, int rows, CellTemporaries<E>& t) const {
    const int width = round_up(rows, s_.unit), ld = t.ld_rows;
    isa_.score_keys(t.p, ld, t.keys, s_.ld_key, t.q, kStored, s_.ld_key, rows, 1, tokens, s_.key_dim);
    isa_.score_keys(t.ds, ld, t.values, s_.ld_value, t.d_o, kStored, s_.ld_value, rows, 1, tokens, s_.value_dim);
    for (int i = 0; i < width; ++i) {
      const double base = static_cast<double>(t.lse[i]) - static_cast<double>(t.bias[i]);
      t.high[i] = static_cast<Acc>(base);
      t.low[i] = std::isfinite(base) ? static_cast<Acc>(base - static_cast<double>(t.high[i])) : Acc(0);
    }
    for (int j = 0; j < tokens; ++j) {
      Acc *p = t.p + int64_t{j} * ld, *ds = t.ds + int64_t{j} * ld;
      for (int i = 0; i < rows; ++i) ds[i] -= t.delta[i];
      std::fill(p + rows, p + width, -kInfinity);
      std::fill(ds + rows, ds + width, Acc(0));
    }
    for (int i = 0; i < rows; ++i) {
      for (int j = t.seen[i]; j < tokens; ++j) {
        t.p[int64_t{j} * ld + i] = -kInfinity;
        t.ds[int64_t{j} * ld + i] = 0;
      }
    }
    isa_.softmax_rows_backward(t.p, t.ds, ld, Acc(a_.scale), {t.nothing, t.nothing, t.high, t.low}, t.nothing,
                               t.nothing, tokens, width);
    isa_.weigh_values(t.dv, s_.ld_value, t.p, ld, t.d_o, kStored, s_.ld_value, rows, 1, tokens, s_.value_dim);
    isa_.weigh_values(t.dk, s_.ld_key, t.ds, ld, t.q, kStored, s_.ld_key, rows, 1, tokens, s_.key_dim);
  }

  const SparseAttention& a_;
  const Primitives<E>& isa_;
  const SparseGradients& g_;
  const RowStatistics<Acc>& rows_;
  const BlockSizes s_;
  const Cells cells_;
};

}  // namespace

template <class E>
void differentiate_memory(const SparseAttention& a, const Primitives<E>& isa, const SparseGradients& g,
                          const RowStatistics<AccumulateOf<E>>& rows, int64_t threads) {
  MemoryBackward<E>(a, isa, g, rows).run(threads);
}

template void differentiate_memory(const SparseAttention&, const Primitives<float>&, const SparseGradients&,
                                   const RowStatistics<float>&, int64_t);
template void differentiate_memory(const SparseAttention&, const Primitives<double>&, const SparseGradients&,
                                   const RowStatistics<double>&, int64_t);
template void differentiate_memory(const SparseAttention&, const Primitives<bf16>&, const SparseGradients&,
                                   const RowStatistics<float>&, int64_t);

}  // namespace memattn::cpu
