// Sparse attention, backward, with P recomputed from ℓ:
//
//   dS_ij = P_ij (dO_i·v_j - Δ_i)   Δ_i = dO_i·O_i - dℓ_i   dV = Pᵀ dO   dK = scale dSᵀ Q   dQ = scale dS K
//   dbias_ie = Σ_{j∈e} dS_ij        dsink = -Σ_i e^{sink - ℓ_i} Δ_i
//
// Two passes. The first has a task per list and makes dQ and dbias from the tokens that it names. The second has a task
// per cell of memory (a block, or the part of one that lies on a page) and makes dK and dV from the queries that name it,
// which the lists, inverted by a counting sort, tell in ascending order. Each sum is made by one task in a fixed order.
#include "sparse_attention.h"

#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "sparse_attention_cpu_backward";
constexpr int kRows = 64;  // of a tile of query rows, if a group has no more

struct SparseGradients {
  const void *o, *d_o;        // [rows, heads, value_dim] of the arguments' element
  const void *lse, *d_lse;    // [rows, heads] in the accumulate type; d_lse may be null
  void *dq, *dk, *dv;         // like q, k, v; dk and dv null: not wanted
  void *dbias, *dsink;        // like bias and sink, or null
};

// A query row that names a cell: by which entry, and how many of its tokens it sees.
struct Named {
  int32_t row, entry, tokens;
};

// Cells of memory that are inverted together: those of one sequence, or all pages.
struct CellGroup {
  int64_t first_row, last_row;  // queries
  int64_t row, tokens, count;   // of memory: first row, how many, in so many cells
};

// The lists of one key head, inverted: cell c is named by named[begin[c] .. begin[c + 1]].
struct Inverted {
  int64_t* begin;
  Named* named;

  Inverted(Arena& arena, int64_t cells, int64_t entries)
      : begin(arena.take<int64_t>(cells + 2)), named(arena.take<Named>(entries)) {}
};

class Cells {
 public:
  explicit Cells(const SparseAttention& a) : a_(a), size_(a.unit) {
    const TokenMemory& memory = a.memory;
    if (memory.paged) {
      size_ = std::gcd(a.unit, memory.page_size);
      const int64_t tokens = memory.pages * memory.page_size;
      groups_ = {{0, a.rows(), 0, tokens, tokens / size_}};
      return;
    }
    for (int64_t n = 0; n < a.queries.count(); ++n) {
      const int64_t tokens = memory.length(n);
      groups_.push_back({a.queries.start(n), a.queries.end(n), memory.rows.start(n), tokens,
                         (tokens + size_ - 1) / size_});
    }
  }

  int64_t size() const { return size_; }  // tokens of a cell
  const std::vector<CellGroup>& groups() const { return groups_; }
  // The most that the lists of a group name.
  int64_t entries(const CellGroup& group) const {
    const int64_t parts = a_.memory.paged ? a_.unit / size_ : 1;
    return (group.last_row - group.first_row) * a_.entries * parts;
  }

  void invert(const CellGroup& group, int64_t key_head, Inverted& lists) const {
    std::fill_n(lists.begin, group.count + 2, int64_t{0});
    visit(group, key_head, [&](int64_t cell, Named) { ++lists.begin[cell + 2]; });
    std::partial_sum(lists.begin, lists.begin + group.count + 2, lists.begin);
    visit(group, key_head, [&](int64_t cell, Named named) { lists.named[lists.begin[cell + 1]++] = named; });
  }

 private:
  template <class Visit>
  void visit(const CellGroup& group, int64_t key_head, const Visit& each) const {
    for (int64_t row = group.first_row; row < group.last_row; ++row) {
      const int32_t* list = a_.indices + a_.list(row, key_head) * a_.entries;
      const int64_t used = a_.used(row, key_head);
      for (int64_t e = 0; e < used; ++e) {
        const SparseAttention::Range tokens = a_.tokens(row, list[e]);
        for (int64_t at = tokens.begin; at < tokens.end; at += size_) {
          const int64_t seen = std::min(size_, tokens.end - at);
          const TokenRun run = a_.memory.run(a_.sequence[row], at, at + 1);
          if (run.row < 0) continue;
          each((run.row - group.row) / size_,
               Named{static_cast<int32_t>(row), static_cast<int32_t>(e), static_cast<int32_t>(seen)});
        }
      }
    }
  }

  const SparseAttention& a_;
  int64_t size_;
  std::vector<CellGroup> groups_;
};

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

// What a thread needs for one cell: its tokens are the rows of the products, the queries that name it the columns.
template <class E>
struct CellTemporaries {
  using Acc = AccumulateOf<E>;
  int columns, ld_columns;
  Acc *keys, *values, *dk, *dv;  // [kTokens, K or V]
  Acc *q, *d_o;                  // [columns, K or V]
  Acc *p, *ds;                   // [kTokens, columns]
  Acc *high, *low, *delta;       // [columns]: ℓ - bias as a sum of two, Δ
  int* tokens;                   // [columns]: seen
  Acc *nothing, *scales;         // [kTokens]

  CellTemporaries(Arena& arena, const SparseSizes& s)
      : columns(round_up(std::max(1, kRows / s.group) * s.group, s.unit)),
        ld_columns(leading(columns)),
        keys(arena.take<Acc>(int64_t{kTokens} * s.ld_key)),
        values(arena.take<Acc>(int64_t{kTokens} * s.ld_value)),
        dk(arena.take<Acc>(int64_t{kTokens} * s.ld_key)),
        dv(arena.take<Acc>(int64_t{kTokens} * s.ld_value)),
        q(arena.take<Acc>(int64_t{columns} * s.ld_key)),
        d_o(arena.take<Acc>(int64_t{columns} * s.ld_value)),
        p(arena.take<Acc>(int64_t{kTokens} * ld_columns)),
        ds(arena.take<Acc>(int64_t{kTokens} * ld_columns)),
        high(arena.take<Acc>(columns)),
        low(arena.take<Acc>(columns)),
        delta(arena.take<Acc>(columns)),
        tokens(arena.take<int>(columns)),
        nothing(arena.take<Acc>(kTokens)),
        scales(arena.take<Acc>(kTokens)) {}
};

template <class E>
class Backward {
  using Acc = AccumulateOf<E>;
  static constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
  static constexpr Element kStored = element_of_accumulate<Acc>();

 public:
  Backward(const SparseAttention& a, const Primitives<E>& isa, const SparseGradients& g)
      : a_(a), isa_(isa), g_(g), s_(a, isa.unit), delta_(a.rows() * a.heads) {}

  void run(int64_t threads) {
    differentiate_lists(threads);
    if (g_.dsink) differentiate_sinks(threads);
    if (g_.dk) differentiate_memory(threads);
  }

 private:
  // --- dQ and dbias, list by list ---

  void differentiate_lists(int64_t threads) {
    const int64_t lists = a_.rows() * a_.key_heads;
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
      differentiate_list(i % a_.rows(), i / a_.rows(), temporaries[worker]);
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

  // Operands, ℓ and Δ of the rows of a group. Rows that see nothing get ℓ = inf: P = 0.
  void prepare(int64_t row, int64_t key_head, ListTemporaries<E>& t) {
    load_group(isa_, t.q, s_.ld_key, s_.key_dim, a_.q, a_, row, key_head, a_.key_dim);
    load_group(isa_, t.d_o, s_.ld_value, s_.value_dim, g_.d_o, a_, row, key_head, a_.value_dim);
    load_group(isa_, t.out, s_.ld_value, s_.value_dim, g_.o, a_, row, key_head, a_.value_dim);
    isa_.dot_rows(t.delta, t.d_o, s_.ld_value, t.out, s_.ld_value, s_.group, s_.value_dim);
    for (int m = 0; m < s_.group; ++m) {
      const int64_t at = row * a_.heads + key_head * s_.group + m;
      t.lse[m] = lse(at);
      if (t.lse[m] == kInfinity) {
        t.delta[m] = 0;
      } else if (g_.d_lse) {
        t.delta[m] -= static_cast<const Acc*>(g_.d_lse)[at];
      }
      delta_[at] = t.delta[m];
    }
  }

  void add_tile(const TokenTile& tile, const Acc* bias, ListTemporaries<E>& t) const {
    const int width = round_up(tile.tokens, s_.unit), ld = s_.ld_scores;
    isa_.score_keys(t.p, ld, t.q, s_.ld_key, t.keys, kStored, s_.ld_key, tile.tokens, 1, s_.group, s_.key_dim);
    isa_.score_keys(t.ds, ld, t.d_o, s_.ld_value, t.values, kStored, s_.ld_value, tile.tokens, 1, s_.group,
                    s_.value_dim);
    for (int m = 0; m < s_.group; ++m) {
      std::fill(t.p + m * ld + tile.tokens, t.p + m * ld + width, -kInfinity);
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

  // ℓ of a row, inf where it sees nothing.
  Acc lse(int64_t at) const {
    const Acc value = static_cast<const Acc*>(g_.lse)[at];
    return value == -kInfinity ? kInfinity : value;
  }

  void differentiate_sinks(int64_t threads) const {
    parallel_tasks(a_.heads, threads, isa_, [&](int64_t h, int64_t) {
      const double sink = static_cast<const Acc*>(a_.sink)[h];
      double total = 0;
      for (int64_t at = h; at < a_.rows() * a_.heads; at += a_.heads) {
        total -= std::exp(sink - static_cast<double>(lse(at))) * static_cast<double>(delta_[at]);
      }
      static_cast<Acc*>(g_.dsink)[h] = static_cast<Acc>(total);
    });
  }

  // --- dK and dV, cell by cell ---

  void differentiate_memory(int64_t threads) const {
    struct Item {
      const CellGroup* group;
      int64_t key_head;
    };
    const Cells cells(a_);
    std::vector<Item> items;
    std::vector<int64_t> cost;
    int64_t most_cells = 0, most_entries = 0;
    for (const CellGroup& group : cells.groups()) {
      most_cells = std::max(most_cells, group.count);
      most_entries = std::max(most_entries, cells.entries(group));
      for (int64_t h = 0; h < a_.key_heads; ++h) {
        items.push_back({&group, h});
        cost.push_back(group.count + cells.entries(group));
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
      std::fill_n(temporaries[i].nothing, kTokens, Acc(0));
      std::fill_n(temporaries[i].scales, kTokens, Acc(a_.scale));
    }
    parallel_tasks(plan.whole.size(), threads, isa_, [&](int64_t i, int64_t worker) {
      const Item& item = items[plan.whole[i]];
      cells.invert(*item.group, item.key_head, lists[worker]);
      for (int64_t cell = 0; cell < item.group->count; ++cell) {
        differentiate_cell(*item.group, item.key_head, cell, cells.size(), lists[worker], temporaries[worker]);
      }
    });
    for (int64_t i : plan.shared) {
      const Item& item = items[i];
      cells.invert(*item.group, item.key_head, lists[0]);
      const int64_t step = std::max<int64_t>(1, kTokens / cells.size());
      parallel_tasks((item.group->count + step - 1) / step, threads, isa_, [&](int64_t j, int64_t worker) {
        for (int64_t cell = j * step; cell < std::min((j + 1) * step, item.group->count); ++cell) {
          differentiate_cell(*item.group, item.key_head, cell, cells.size(), lists[0], temporaries[worker]);
        }
      });
    }
  }

  void differentiate_cell(const CellGroup& group, int64_t key_head, int64_t cell, int64_t size, const Inverted& lists,
                          CellTemporaries<E>& t) const {
    const Named *begin = lists.named + lists.begin[cell], *end = lists.named + lists.begin[cell + 1];
    const int64_t last = std::min((cell + 1) * size, group.tokens);
    for (int64_t first = cell * size; first < last; first += kTokens) {
      const int tokens = static_cast<int>(std::min<int64_t>(last - first, kTokens));
      const int hidden = static_cast<int>(first - cell * size);  // tokens of the cell before these
      differentiate_tokens(group.row + first, tokens, hidden, key_head, begin, end, t);
    }
  }

  // The tokens in these rows of memory, with the queries that name their cell.
  void differentiate_tokens(int64_t row, int tokens, int64_t hidden, int64_t key_head, const Named* begin,
                            const Named* end, CellTemporaries<E>& t) const {
    const int64_t at = row * a_.key_heads + key_head;
    if (begin != end) {
      isa_.load_rows(t.keys, s_.ld_key, tokens, s_.key_dim, offset(a_.k, a_.element, at * a_.key_dim), a_.element,
                     a_.key_heads * a_.key_dim, tokens, a_.key_dim);
      isa_.load_rows(t.values, s_.ld_value, tokens, s_.value_dim, offset(a_.v, a_.element, at * a_.value_dim),
                     a_.element, a_.key_heads * a_.value_dim, tokens, a_.value_dim);
    }
    std::fill_n(t.dk, int64_t{tokens} * s_.ld_key, Acc(0));
    std::fill_n(t.dv, int64_t{tokens} * s_.ld_value, Acc(0));
    for (const Named* named = begin; named != end;) {
      const int columns = gather(named, end, tokens, hidden, key_head, t);
      if (columns > 0) add_columns(tokens, columns, t);
    }
    isa_.store_rows(offset(g_.dk, a_.element, at * a_.key_dim), a_.element, a_.key_heads * a_.key_dim, t.dk, s_.ld_key,
                    t.scales, tokens, a_.key_dim);
    isa_.store_rows(offset(g_.dv, a_.element, at * a_.value_dim), a_.element, a_.key_heads * a_.value_dim, t.dv,
                    s_.ld_value, nullptr, tokens, a_.value_dim);
  }

  // The rows of the next queries that see any of the tokens; returns how many.
  int gather(const Named*& named, const Named* end, int tokens, int64_t hidden, int64_t key_head,
             CellTemporaries<E>& t) const {
    int columns = 0;
    for (; named != end && columns + s_.group <= t.columns; ++named) {
      const int seen = static_cast<int>(std::min<int64_t>(named->tokens - hidden, tokens));
      if (seen <= 0) continue;
      load_group(isa_, t.q + int64_t{columns} * s_.ld_key, s_.ld_key, s_.key_dim, a_.q, a_, named->row, key_head,
                 a_.key_dim);
      load_group(isa_, t.d_o + int64_t{columns} * s_.ld_value, s_.ld_value, s_.value_dim, g_.d_o, a_, named->row,
                 key_head, a_.value_dim);
      const Acc* bias = a_.bias_of<Acc>(named->row, key_head);
      for (int m = 0; m < s_.group; ++m, ++columns) {
        const int64_t at = named->row * a_.heads + key_head * s_.group + m;
        const double base = static_cast<double>(lse(at)) - (bias ? static_cast<double>(bias[named->entry]) : 0.0);
        t.high[columns] = static_cast<Acc>(base);
        t.low[columns] = std::isfinite(base) ? static_cast<Acc>(base - static_cast<double>(t.high[columns])) : Acc(0);
        t.delta[columns] = delta_[at];
        t.tokens[columns] = seen;
      }
    }
    return columns;
  }

  void add_columns(int tokens, int columns, CellTemporaries<E>& t) const {
    const int width = round_up(columns, s_.unit), ld = t.ld_columns;
    isa_.score_keys(t.p, ld, t.keys, s_.ld_key, t.q, kStored, s_.ld_key, columns, 1, tokens, s_.key_dim);
    isa_.score_keys(t.ds, ld, t.values, s_.ld_value, t.d_o, kStored, s_.ld_value, columns, 1, tokens, s_.value_dim);
    std::fill(t.high + columns, t.high + width, Acc(0));
    std::fill(t.low + columns, t.low + width, Acc(0));
    for (int j = 0; j < tokens; ++j) {
      Acc *p = t.p + int64_t{j} * ld, *ds = t.ds + int64_t{j} * ld;
      for (int i = 0; i < columns; ++i) ds[i] -= t.delta[i];
      std::fill(p + columns, p + width, -kInfinity);
      std::fill(ds + columns, ds + width, Acc(0));
    }
    for (int i = 0; i < columns; ++i) {
      for (int j = t.tokens[i]; j < tokens; ++j) {
        t.p[int64_t{j} * ld + i] = -kInfinity;
        t.ds[int64_t{j} * ld + i] = 0;
      }
    }
    isa_.softmax_rows_backward(t.p, t.ds, ld, Acc(a_.scale), {t.nothing, t.nothing, t.high, t.low}, t.nothing,
                               t.nothing, tokens, width);
    isa_.weigh_values(t.dv, s_.ld_value, t.p, ld, t.d_o, kStored, s_.ld_value, columns, 1, tokens, s_.value_dim);
    isa_.weigh_values(t.dk, s_.ld_key, t.ds, ld, t.q, kStored, s_.ld_key, columns, 1, tokens, s_.key_dim);
  }

  const SparseAttention& a_;
  const Primitives<E>& isa_;
  const SparseGradients g_;
  const SparseSizes s_;
  std::vector<Acc> delta_;  // [rows, heads]
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
