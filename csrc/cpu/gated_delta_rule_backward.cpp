// Gated delta rule, backward. Symbols as in gated_delta_rule.cpp; rows of one chunk, given dO and dS1:
//   dVn = Aᵀ dO + e^{G_C-G} (K dS1)       dX = Tᵀ dVn       dV = β dX       dR = -β e^G dX
//   dS0 = e^{G_C} dS1 + [K; Q]ᵀ [dR; scale e^G dO]
//   M1 = tril(scale (dO Vnᵀ) e^{Gi-Gj})   M2 = -stril((dX Vnᵀ) e^{Gi-Gj})   N2 = β_i M2
//   dQ = scale e^G (dO S0ᵀ) + M1 K
//   dK = dR S0ᵀ + e^{G_C-G} (Vn dS1ᵀ) + M1ᵀ Q + N2 K + N2ᵀ K
//   dβ_i = <dX_i, E_i> + Σ_j M2_ij (k_i·k_j)
//   dg_t = Σ_{i≥t} read_i + Σ_{i<t} written_i + e^{G_C} <S0, dS1> + Σ_{j<t≤i} e_ij,
//     read_i = <q_i, scale e^G (dO S0ᵀ)_i> + <k_i, (dR S0ᵀ)_i>,   written_i = <k_i, e^{G_C-G} (Vn dS1ᵀ)_i>,
//     e_ij = M1_ij (q_i·k_j) + N2_ij (k_i·k_j)
// dX = Tᵀ dVn needs no gradient of the inverse. dg_t sums the pairs that its gate lies between, and nothing else: as the
// reverse cumulative sum of dG it would lose digits to terms that cancel.
//
// From the saved T and the states of every checkpoint_every-th chunk: per group of chunks, last group first, a forward
// scan rebuilds S0, E and Vn of its chunks, then a reverse scan runs the lines above. Linear attention has no erase term:
// dV = dVn, and dX, dR, M2, N2, E and dβ do not exist.
#include "gated_delta_rule_blocks.h"
#include "gated_delta_rule_items.h"
#include "results.h"

#include <cstring>

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "gated_delta_rule_cpu_backward";

struct Gradients {
  const void *d_o, *ddenominator, *dfinal_state;  // like o; accumulate type or null, or null
  const void *o, *denominator;                    // null where o was not divided
  const void *solve, *states;                     // solve is null where nothing is erased
  void *dq, *dk, *dv, *dg, *dbeta, *dinitial_state;  // the last three may be null
};

template <class E>
class Backward {
  using Acc = AccumulateOf<E>;
  static constexpr Element kAcc = element_of_accumulate<Acc>();

 public:
  Backward(const DeltaRule& rule, const Primitives<E>& isa, const Gradients& grads)
      : rule_(rule), isa_(isa), grads_(grads), s_(rule, isa.unit) {}

  struct Workspace {
    bool shared;
    int64_t chunks;
    std::vector<Acc*> dstates;  // dS1, one per value head of every item
    std::vector<RebuiltChunk<E>> rebuilt;
    std::vector<ReverseHead<E>> reverse;
    std::vector<BackwardTemporaries<E>> temporaries;

    ReverseHead<E>& reverse_head(int64_t item, int64_t chunk, int64_t head, int64_t group) {
      return reverse[shared ? (item * chunks + chunk) * group + head : 0];
    }
  };

  void run(int64_t threads) { run_items(*this, make_items(rule_, rule_.group()), threads, isa_); }

  Workspace workspace(Arena& arena, int64_t items, int64_t chunks, int64_t workers, bool shared) const {
    Workspace w{shared, chunks, {}, {}, {}, {}};
    for (int64_t i = 0; i < items * rule_.group(); ++i) w.dstates.push_back(arena.take<Acc>(state_size()));
    for (int64_t i = 0; i < items * chunks; ++i) w.rebuilt.emplace_back(arena, s_, rule_.group());
    for (int64_t i = 0; i < (shared ? items * chunks * rule_.group() : 1); ++i)
      w.reverse.emplace_back(arena, s_, shared);
    for (int64_t i = 0; i < workers; ++i) w.temporaries.emplace_back(arena, s_);
    return w;
  }

  int64_t chunks_alone() const {
    int64_t most = 1;
    for (int64_t n = 0; n < rule_.sequences.count(); ++n)
      most = std::max(most, rule_.sequences.chunks(n, rule_.chunk_size));
    return std::min(most, rule_.checkpoint_every);
  }
  int64_t chunks_shared(int64_t, int64_t most, int64_t) const {
    return std::clamp<int64_t>(most, 1, rule_.checkpoint_every);
  }

  template <class Each>
  void process(const Item* items, int64_t count, Workspace& w, int64_t, int64_t threads, const Each& each) {
    const int64_t group = rule_.group(), every = rule_.checkpoint_every, most = most_chunks(items, count);
    const ColumnBlocks blocks(rule_, s_, count * group, threads);
    each(count * group, [&](int64_t i, int64_t) { start_dstate(items[i / group], i % group, w.dstates[i]); });
    for (int64_t back = 1; back <= (most + every - 1) / every; ++back) {
      // Each item counts its own groups from its end.
      const auto first_chunk = [&](int64_t item) { return ((items[item].chunks + every - 1) / every - back) * every; };
      const auto chunk_count = [&](int64_t item) {
        return first_chunk(item) < 0 ? 0 : std::min(every, items[item].chunks - first_chunk(item));
      };
      if (w.shared) {
        rebuild_shared(items, count, w, blocks, first_chunk, chunk_count, each);
        reverse_shared(items, count, w, blocks, chunk_count, each);
      } else {
        rebuild_alone(items[0], w, first_chunk(0), chunk_count(0));
        reverse_alone(items[0], w, chunk_count(0));
      }
    }
    each(count * group, [&](int64_t i, int64_t) { finish_dstate(items[i / group], i % group, w.dstates[i]); });
  }

 private:
  int64_t state_size() const { return int64_t{s_.key_dim} * s_.ld_value; }

  // One thread: a chunk is scanned as soon as it is prepared.
  void rebuild_alone(const Item& item, Workspace& w, int64_t first, int64_t chunks) {
    for (int64_t c = 0; c < chunks; ++c) {
      prepare(item, first + c, w.rebuilt[c], c == 0, w.temporaries[0]);
      for (int64_t head = 0; head < rule_.group(); ++head) {
        Acc* next = c + 1 < chunks ? w.rebuilt[c + 1].heads[head].state : nullptr;
        rebuild(item, head, w.rebuilt[c], next, w.temporaries[0], 0, s_.value_dim);
      }
    }
  }

  // All threads: the chunks, then the scan over column blocks.
  template <class First, class Count, class Each>
  void rebuild_shared(const Item* items, int64_t count, Workspace& w, const ColumnBlocks& blocks,
                      const First& first_chunk, const Count& chunk_count, const Each& each) {
    const int64_t group = rule_.group();
    each(count * w.chunks, [&](int64_t i, int64_t worker) {
      const int64_t item = i / w.chunks, c = i % w.chunks;
      if (c < chunk_count(item))
        prepare(items[item], first_chunk(item) + c, w.rebuilt[i], c == 0, w.temporaries[worker]);
    });
    each(count * group * blocks.count, [&](int64_t i, int64_t worker) {
      const int64_t item = i / blocks.count / group, head = i / blocks.count % group, block = i % blocks.count;
      RebuiltChunk<E>* chunks = &w.rebuilt[item * w.chunks];
      for (int64_t c = 0; c < chunk_count(item); ++c) {
        Acc* next = c + 1 < chunk_count(item) ? chunks[c + 1].heads[head].state : nullptr;
        rebuild(items[item], head, chunks[c], next, w.temporaries[worker], blocks.begin(block), blocks.end(block));
      }
    });
  }

  // One thread: each chunk's gradients while its data is in cache.
  void reverse_alone(const Item& item, Workspace& w, int64_t chunks) {
    BackwardTemporaries<E>& t = w.temporaries[0];
    ReverseHead<E>& reverse = w.reverse[0];
    for (int64_t c = chunks - 1; c >= 0; --c) {
      RebuiltChunk<E>& chunk = w.rebuilt[c];
      start_key_gradients(chunk.keys, t);
      for (int64_t head = 0; head < rule_.group(); ++head) {
        prepare_reverse(chunk, head, reverse, t);
        reverse_values(item, head, chunk, reverse, w.dstates[head], t, 0, s_.value_dim);
        chunk_gradients(item, head, chunk, reverse, w.dstates[head], t);
        reverse_state(head, chunk, reverse, w.dstates[head], t, 0, s_.value_dim);
      }
      finish_key_gradients(item, chunk.keys, t);
    }
  }

  // All threads: the scan over column blocks, which keeps every dS1, then the chunks.
  template <class Count, class Each>
  void reverse_shared(const Item* items, int64_t count, Workspace& w, const ColumnBlocks& blocks,
                      const Count& chunk_count, const Each& each) {
    const int64_t group = rule_.group();
    each(count * w.chunks * group, [&](int64_t i, int64_t worker) {
      const int64_t slot = i / group, item = slot / w.chunks, head = i % group;
      if (slot % w.chunks < chunk_count(item))
        prepare_reverse(w.rebuilt[slot], head, w.reverse[i], w.temporaries[worker]);
    });
    each(count * group * blocks.count, [&](int64_t i, int64_t worker) {
      const int64_t item = i / blocks.count / group, head = i / blocks.count % group, block = i % blocks.count;
      const int begin = blocks.begin(block), end = blocks.end(block);
      BackwardTemporaries<E>& t = w.temporaries[worker];
      Acc* dstate = w.dstates[item * group + head];
      for (int64_t c = chunk_count(item) - 1; c >= 0; --c) {
        RebuiltChunk<E>& chunk = w.rebuilt[item * w.chunks + c];
        ReverseHead<E>& reverse = w.reverse_head(item, c, head, group);
        reverse_values(items[item], head, chunk, reverse, dstate, t, begin, end);
        copy_columns(reverse.dstate, dstate, begin, end);
        reverse_state(head, chunk, reverse, dstate, t, begin, end);
      }
    });
    each(count * w.chunks, [&](int64_t i, int64_t worker) {
      const int64_t item = i / w.chunks, c = i % w.chunks;
      if (c >= chunk_count(item)) return;
      BackwardTemporaries<E>& t = w.temporaries[worker];
      start_key_gradients(w.rebuilt[i].keys, t);
      for (int64_t head = 0; head < group; ++head) {
        ReverseHead<E>& reverse = w.reverse_head(item, c, head, group);
        chunk_gradients(items[item], head, w.rebuilt[i], reverse, reverse.dstate, t);
      }
      finish_key_gradients(items[item], w.rebuilt[i].keys, t);
    });
  }

  void copy_columns(Acc* to, const Acc* from, int begin, int end) const {
    for (int i = 0; i < s_.key_dim; ++i) {
      std::memcpy(to + int64_t{i} * s_.ld_value + begin, from + int64_t{i} * s_.ld_value + begin,
                  sizeof(Acc) * (end - begin));
    }
  }

  int64_t value_head(const Item& item, int64_t head) const { return item.first_value_head + head; }
  int64_t state_row(const Item& item, int64_t head) const {
    return (item.sequence * rule_.value_heads + value_head(item, head)) * rule_.key_dim * rule_.columns();
  }
  // First element of row `token` of v, do or dv.
  int64_t value_row(const Item& item, int64_t head, int64_t token) const {
    return (token * rule_.value_heads + value_head(item, head)) * rule_.value_dim;
  }
  int64_t value_stride() const { return rule_.value_heads * rule_.value_dim; }

  // For the rebuilding scan: value rows and T, and with the first head the keys and queries.
  RowsAhead rows_of_next_chunk(const Item& item, int64_t head, const RebuiltChunk<E>& r, int begin, int cols) const {
    RowsAhead ahead;
    const int64_t token = r.keys.first_token + rule_.chunk_size, end = rule_.sequences.end(item.sequence);
    const int64_t rows = std::min<int64_t>(end - token, rule_.chunk_size);
    ahead.add(rule_.v, rule_.element, value_row(item, head, token) + begin, value_stride(), rows, cols);
    if (begin > 0) return ahead;
    if (s_.erases) {
      const int64_t c = rule_.chunk_size, slot = r.solve_slot + 1;
      ahead.add(grads_.solve, kAcc, (slot * rule_.value_heads + value_head(item, head)) * c * c, c, rows,
                rule_.chunk_size);
    }
    if (head > 0) return ahead;
    for (const void* x : {rule_.k, rule_.q}) {
      ahead.add(x, rule_.element, (token * rule_.heads + item.head) * rule_.key_dim, rule_.heads * rule_.key_dim, rows,
                rule_.key_dim);
    }
    return ahead;
  }

  // For the reverse scan: rows of dO.
  RowsAhead rows_of_previous_chunk(const Item& item, int64_t head, const RebuiltChunk<E>& r, int begin,
                                   int cols) const {
    RowsAhead ahead;
    const int64_t token = r.keys.first_token - rule_.chunk_size;
    if (token < rule_.sequences.start(item.sequence)) return ahead;
    ahead.add(grads_.d_o, rule_.output_element, value_row(item, head, token) + begin, value_stride(), rule_.chunk_size,
              cols);
    return ahead;
  }

  // --- state gradients at the ends ---

  void start_dstate(const Item& item, int64_t head, Acc* dstate) const {
    const bool given = grads_.dfinal_state != nullptr;
    const void* from = given ? offset(grads_.dfinal_state, kAcc, state_row(item, head)) : nullptr;
    isa_.load_rows(dstate, s_.ld_value, s_.key_dim, s_.value_dim, from, kAcc, rule_.columns(),
                   given ? rule_.key_dim : 0, rule_.columns());
  }

  void finish_dstate(const Item& item, int64_t head, const Acc* dstate) const {
    if (grads_.dinitial_state == nullptr) return;
    isa_.store_rows(offset(grads_.dinitial_state, kAcc, state_row(item, head)), kAcc, rule_.columns(), dstate,
                    s_.ld_value, nullptr, rule_.key_dim, rule_.columns());
  }

  // --- rebuilding the forward ---

  // Keys, gates and T of a chunk; the first chunk of a group also fetches its state.
  void prepare(const Item& item, int64_t chunk, RebuiltChunk<E>& r, bool first, BackwardTemporaries<E>& t) const {
    r.keys.prepare(rule_, isa_, s_, item.sequence, chunk, item.head, t.key_value);
    r.solve_slot = rule_.sequences.slot(item.sequence, chunk, rule_.chunk_size);
    for (int64_t i = 0; i < rule_.group(); ++i) {
      RebuiltHead<E>& head = r.heads[i];
      head.gates.prepare(rule_, isa_, r.keys.first_token, r.keys.rows, r.keys.padded, value_head(item, i));
      if (s_.erases) load_solve(item, i, r, head);
      if (first) load_checkpoint(item, chunk, i, head.state);
    }
  }

  void load_solve(const Item& item, int64_t i, const RebuiltChunk<E>& r, RebuiltHead<E>& head) const {
    const int n = r.keys.padded, c = rule_.chunk_size, rows = std::min(n, c);
    const int64_t at = (r.solve_slot * rule_.value_heads + value_head(item, i)) * c * c;
    isa_.load_rows(head.solve, s_.ld_chunk, n, n, offset(grads_.solve, kAcc, at), kAcc, c, rows, rows);
    head.solve_left = as_left(isa_, head.solve_left_buffer, head.solve, s_.ld_chunk, n, n);
    head.solve_right = as_right(isa_, head.solve_right_buffer, head.solve, s_.ld_chunk, n, n);
  }

  void load_checkpoint(const Item& item, int64_t chunk, int64_t head, Acc* state) const {
    const int64_t every = rule_.checkpoint_every;
    const int64_t slot = rule_.sequences.slot(item.sequence, chunk / every, rule_.chunk_size * every);
    const int64_t at = (slot * rule_.value_heads + value_head(item, head)) * rule_.key_dim * rule_.columns();
    isa_.load_rows(state, s_.ld_value, s_.key_dim, s_.value_dim, offset(grads_.states, kAcc, at), kAcc, rule_.columns(),
                   rule_.key_dim, rule_.columns());
  }

  // Columns begin..end of E and Vn of one chunk, and of the next chunk's state; the forward's own operations.
  void rebuild(const Item& item, int64_t head, RebuiltChunk<E>& r, Acc* next, BackwardTemporaries<E>& t, int begin,
               int end) const {
    RebuiltHead<E>& h = r.heads[head];
    const int n = r.keys.padded, width = end - begin, ld = s_.ld_value;
    Acc *error = h.error + begin, *fresh = h.fresh + begin;
    RowsAhead ahead = rows_of_next_chunk(item, head, r, begin, value_columns(rule_, begin, width));
    if (s_.erases) {
      const Right<E> s0 = as_right(isa_, t.key_value, h.state + begin, ld, s_.key_dim, width);
      ahead.fetch();
      isa_.gemm(error, ld, r.keys.kq_left, s0, n, width, s_.key_dim, 0, Part::full);
      load_values(rule_, isa_, r.keys, value_head(item, head), t.values, ld, begin, width);
      isa_.residual_rows(error, ld, h.gates.from_start, t.values, ld, n, width);
      isa_.pack_right(t.chunk_value, ld, error, ld, h.gates.beta, n, width);
      ahead.fetch();
      isa_.gemm(fresh, ld, h.solve_left, {t.chunk_value, ld}, n, width, n, 0, Part::lower_a);
    } else {
      load_values(rule_, isa_, r.keys, value_head(item, head), fresh, ld, begin, width);
      ahead.fetch();
    }
    ahead.fetch();
    if (next == nullptr) return;
    isa_.pack_right(t.chunk_value, ld, fresh, ld, h.gates.to_end, n, width);
    ahead.fetch();
    isa_.gemm_from(next + begin, h.state + begin, ld, transposed(r.keys.kq_right), {t.chunk_value, ld}, s_.key_dim,
                   width, n, h.gates.whole, Part::full);
  }

  // --- the reverse scan ---

  void prepare_reverse(const RebuiltChunk<E>& r, int64_t head, ReverseHead<E>& reverse,
                       BackwardTemporaries<E>& t) const {
    const GateBlock<Acc>& gates = r.heads[head].gates;
    const int n = r.keys.padded;
    isa_.decay_matrix(reverse.decay, s_.ld_chunk, gates.high, gates.low, n);
    if (s_.erases) {
      isa_.chunk_scores(t.m1, reverse.attention, s_.ld_chunk, r.keys.kk, r.keys.qk, reverse.decay, gates.beta,
                        Acc(rule_.scale), n);
    } else {
      isa_.causal_scores(reverse.attention, s_.ld_chunk, r.keys.qk, reverse.decay, Acc(rule_.scale), n);
    }
    reverse.attention_right = as_right(isa_, reverse.attention_buffer, reverse.attention, s_.ld_chunk, n, n);
    for (int i = 0; i < n; ++i) {
      reverse.row_factor[i] = -gates.beta[i] * gates.from_start[i];
      reverse.row_factor[n + i] = Acc(rule_.scale) * gates.from_start[i];
    }
  }

  // Columns begin..end of dO, dX and dV.
  void reverse_values(const Item& item, int64_t head, const RebuiltChunk<E>& r, ReverseHead<E>& reverse,
                      const Acc* dstate, BackwardTemporaries<E>& t, int begin, int end) const {
    const RebuiltHead<E>& h = r.heads[head];
    const int n = r.keys.padded, width = end - begin, ld = s_.ld_value, columns = value_columns(rule_, begin, width);
    const int64_t at = value_row(item, head, r.keys.first_token) + begin;
    Acc *dx = reverse.grads + begin, *d_o = dx + int64_t{n} * ld, *dfresh = s_.erases ? t.values : dx;
    isa_.load_rows(d_o, ld, n, width, offset(grads_.d_o, rule_.output_element, at), rule_.output_element,
                   value_stride(), r.keys.rows, columns);
    if (const int weight = weight_column(rule_, begin, width); weight >= 0)
      through_weight(item, head, r.keys, d_o, weight, t);
    RowsAhead ahead = rows_of_previous_chunk(item, head, r, begin, columns);
    const Right<E> ds1 = as_right(isa_, t.key_value, dstate + begin, ld, s_.key_dim, width);
    ahead.fetch();
    isa_.gemm(dfresh, ld, r.keys.kq_left, ds1, n, width, s_.key_dim, 0, Part::full);
    isa_.scale_rows(dfresh, ld, h.gates.to_end, n, width);
    ahead.fetch();
    isa_.gemm(dfresh, ld, transposed(reverse.attention_right), as_right(isa_, t.chunk_value, d_o, ld, n, width), n,
              width, n, 1, Part::upper_a);
    ahead.fetch();
    if (s_.erases) {
      isa_.gemm(dx, ld, transposed(h.solve_right), as_right(isa_, t.chunk_value, dfresh, ld, n, width), n, width, n, 0,
                Part::upper_a);
    }
    ahead.fetch();
    isa_.store_rows(offset(grads_.dv, rule_.element, at), rule_.element, value_stride(), dx, ld,
                    s_.erases ? h.gates.beta : nullptr, r.keys.rows, columns);
  }

  // Adds the denominator's gradient as the column `weight` of dO. If o = n / d was divided, dO becomes
  // dn = do / d first, and dd = -<do, o> / d.
  void through_weight(const Item& item, int64_t head, const KeyBlock<E>& keys, Acc* d_o, int weight,
                      BackwardTemporaries<E>& t) const {
    const int n = keys.padded, ld = s_.ld_value;
    const int64_t stride = rule_.value_heads, row = keys.first_token * stride + value_head(item, head);
    if (rule_.divides()) {
      Acc *reciprocal = t.dg, *along = t.row;
      for (int i = 0; i < n; ++i)
        reciprocal[i] = i < keys.rows
                            ? reciprocal_or_zero(static_cast<const Acc*>(grads_.denominator)[row + i * stride])
                            : Acc(0);
      isa_.load_rows(t.values, ld, n, s_.value_dim, offset(grads_.o, rule_.element, row * rule_.value_dim),
                     rule_.element, value_stride(), keys.rows, rule_.value_dim);
      isa_.dot_rows(along, d_o, ld, t.values, ld, n, s_.value_dim);
      isa_.scale_rows(d_o, ld, reciprocal, n, s_.value_dim);
      for (int i = 0; i < keys.rows; ++i) d_o[int64_t{i} * ld + weight] = -along[i] * reciprocal[i];
    } else if (grads_.ddenominator) {
      for (int i = 0; i < keys.rows; ++i)
        d_o[int64_t{i} * ld + weight] = static_cast<const Acc*>(grads_.ddenominator)[row + i * stride];
    }
  }

  // Columns begin..end of dS1 become those of dS0.
  void reverse_state(int64_t head, const RebuiltChunk<E>& r, const ReverseHead<E>& reverse, Acc* dstate,
                     BackwardTemporaries<E>& t, int begin, int end) const {
    const int width = end - begin, ld = s_.ld_value, first = r.keys.first_reader(s_), readers = 2 * r.keys.padded - first;
    isa_.pack_right(t.grads_right, ld, reverse.grads + int64_t{first} * ld + begin, ld, reverse.row_factor + first,
                    readers, width);
    isa_.gemm(dstate + begin, ld, transposed(rows_from(r.keys.kq_right, first)), {t.grads_right, ld}, s_.key_dim, width,
              readers, r.heads[head].gates.whole, Part::full);
  }

  // --- gradients of one chunk ---

  void start_key_gradients(const KeyBlock<E>& keys, BackwardTemporaries<E>& t) const {
    std::fill(t.dkq, t.dkq + int64_t{2} * keys.padded * s_.ld_key, Acc(0));
  }

  // Adds this value head's part of dK and dQ, and stores its dg and dbeta.
  void chunk_gradients(const Item& item, int64_t head, const RebuiltChunk<E>& r, const ReverseHead<E>& reverse,
                       const Acc* dstate, BackwardTemporaries<E>& t) const {
    const RebuiltHead<E>& h = r.heads[head];
    const int n = r.keys.padded, ld = s_.ld_chunk, first = r.keys.first_reader(s_);
    const Left<E> grads = as_left(isa_, t.grads_operand, reverse.grads + int64_t{first} * s_.ld_value, s_.ld_value,
                                  2 * n - first, s_.value_dim);  // of the rows that read the state

    isa_.pack_right_transposed(t.key_value, ld, h.fresh, s_.ld_value, n, s_.value_dim);
    isa_.gemm(t.da, ld, rows_from(grads, n - first), {t.key_value, ld}, n, n, s_.value_dim, 0, Part::lower_c);
    if (s_.erases) {
      isa_.dot_rows(t.dbeta, reverse.grads, s_.ld_value, h.error, s_.ld_value, n, s_.value_dim);
      isa_.gemm(t.dxv, ld, grads, {t.key_value, ld}, n, n, s_.value_dim, 0, Part::lower_c);
      isa_.chunk_scores_backward(t.m1, t.n2, ld, t.da, t.dxv, r.keys.qk, r.keys.kk, reverse.decay, h.gates.beta,
                                 Acc(rule_.scale), t.row, t.dg, t.dbeta, n);
    } else {
      isa_.causal_scores_backward(t.m1, ld, t.da, r.keys.qk, reverse.decay, Acc(rule_.scale), t.row, t.dg, n);
    }

    through_state(r, h, reverse, grads, t);
    through_next_state(r, h, dstate, t);
    through_scores(r, t);
    store_gate_gradients(item, head, r.keys, t);
  }

  // dR S0ᵀ and scale e^G (dO S0ᵀ), with their part of dg.
  void through_state(const RebuiltChunk<E>& r, const RebuiltHead<E>& h, const ReverseHead<E>& reverse, Left<E> grads,
                     BackwardTemporaries<E>& t) const {
    const int n = r.keys.padded, ld = s_.ld_key, first = r.keys.first_reader(s_), readers = 2 * n - first;
    const int64_t at = int64_t{first} * ld;
    isa_.pack_right_transposed(t.key_value, ld, h.state, s_.ld_value, s_.key_dim, s_.value_dim);
    isa_.gemm(t.inter, ld, grads, {t.key_value, ld}, readers, s_.key_dim, s_.value_dim, 0, Part::full);
    isa_.add_rows(t.dkq + at, ld, reverse.row_factor + first, t.inter, ld, readers, s_.key_dim);
    std::fill(t.row, t.row + first, Acc(0));
    isa_.dot_rows(t.row + first, r.keys.kq + at, ld, t.inter, ld, readers, s_.key_dim);
    double read = 0;
    for (int i = n - 1; i >= 0; --i) {
      read += reverse.row_factor[i] * t.row[i] + reverse.row_factor[n + i] * t.row[n + i];
      t.dg[i] += static_cast<Acc>(read);
    }
  }

  // e^{G_C-G} (Vn dS1ᵀ), with its part of dg, and e^{G_C} <S0, dS1>.
  void through_next_state(const RebuiltChunk<E>& r, const RebuiltHead<E>& h, const Acc* dstate,
                          BackwardTemporaries<E>& t) const {
    const int n = r.keys.padded, ld = s_.ld_key;
    isa_.pack_right_transposed(t.key_value, ld, dstate, s_.ld_value, s_.key_dim, s_.value_dim);
    const Left<E> fresh = as_left(isa_, t.chunk_value, h.fresh, s_.ld_value, n, s_.value_dim);
    isa_.gemm(t.inter, ld, fresh, {t.key_value, ld}, n, s_.key_dim, s_.value_dim, 0, Part::full);
    isa_.add_rows(t.dkq, ld, h.gates.to_end, t.inter, ld, n, s_.key_dim);
    isa_.dot_rows(t.row, h.state, s_.ld_value, dstate, s_.ld_value, s_.key_dim, s_.value_dim);
    double overlap = 0;
    for (int i = 0; i < s_.key_dim; ++i) overlap += t.row[i];
    isa_.dot_rows(t.row, r.keys.kq, ld, t.inter, ld, n, s_.key_dim);
    double before = h.gates.whole * overlap;
    for (int i = 0; i < n; ++i) {
      t.dg[i] += static_cast<Acc>(before);
      before += h.gates.to_end[i] * t.row[i];
    }
  }

  // dQ += M1 K, dK += M1ᵀ Q + N2 K + N2ᵀ K.
  void through_scores(const RebuiltChunk<E>& r, BackwardTemporaries<E>& t) const {
    const int n = r.keys.padded, ld = s_.ld_key;
    const Right<E> keys = r.keys.kq_right, queries = rows_from(keys, n);
    const auto add = [&](Acc* to, Left<E> a, Right<E> b, Part part) {
      isa_.gemm(to, ld, a, b, n, s_.key_dim, n, 1, part);
    };
    Acc *dk = t.dkq, *dq = t.dkq + int64_t{n} * ld;
    add(dq, as_left(isa_, t.chunk_chunk, t.m1, s_.ld_chunk, n, n), keys, Part::lower_a);
    add(dk, transposed(as_right(isa_, t.chunk_chunk_too, t.m1, s_.ld_chunk, n, n)), queries, Part::upper_a);
    if (!s_.erases) return;
    add(dk, as_left(isa_, t.chunk_chunk, t.n2, s_.ld_chunk, n, n), keys, Part::lower_a);
    add(dk, transposed(as_right(isa_, t.chunk_chunk_too, t.n2, s_.ld_chunk, n, n)), keys, Part::upper_a);
  }

  void store_gate_gradients(const Item& item, int64_t head, const KeyBlock<E>& keys, BackwardTemporaries<E>& t) const {
    const int64_t at = keys.first_token * rule_.value_heads + value_head(item, head);
    if (grads_.dg) {
      Acc* dg = static_cast<Acc*>(grads_.dg) + at;
      for (int i = 0; i < keys.rows; ++i) dg[i * rule_.value_heads] = t.dg[i];
    }
    if (grads_.dbeta) {
      isa_.store_rows(offset(grads_.dbeta, rule_.beta_element, at), rule_.beta_element, rule_.value_heads, t.dbeta, 1,
                      nullptr, keys.rows, 1);
    }
  }

  void finish_key_gradients(const Item& item, const KeyBlock<E>& keys, BackwardTemporaries<E>& t) const {
    const int n = keys.padded, ld = s_.ld_key;
    if (rule_.qk_l2norm) isa_.l2norm_rows_backward(t.dkq, ld, keys.kq, ld, keys.reciprocal_norm, 2 * n, s_.key_dim);
    const int64_t at = (keys.first_token * rule_.heads + item.head) * rule_.key_dim,
                  stride = rule_.heads * rule_.key_dim;
    isa_.store_rows(offset(grads_.dk, rule_.element, at), rule_.element, stride, t.dkq, ld, nullptr, keys.rows,
                    rule_.key_dim);
    isa_.store_rows(offset(grads_.dq, rule_.element, at), rule_.element, stride, t.dkq + int64_t{n} * ld, ld, nullptr,
                    keys.rows, rule_.key_dim);
  }

  const DeltaRule& rule_;
  const Primitives<E>& isa_;
  const Gradients grads_;
  const BlockSizes s_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_delta_rule_backward(
    Tensor d_o, std::optional<Tensor> dfinal_state, Tensor q, Tensor k, Tensor v, std::optional<Tensor> g,
    std::optional<Tensor> beta, std::optional<Tensor> initial_state, std::optional<Tensor> cu_seqlens, Tensor solve,
    Tensor states, double scale, bool qk_l2norm, int64_t chunk_size, int64_t checkpoint_every) {
  const DeltaRule rule =
      read_arguments(kOp, q, k, v, g, beta, initial_state, cu_seqlens, scale, qk_l2norm, chunk_size, checkpoint_every);
  const std::optional<Tensor> none, needed = solve;
  return run_backward(kOp, rule, {d_o, none, dfinal_state, none, none, needed, states}, q, k, v, g, beta,
                      initial_state);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run_backward(
    const char* op, const DeltaRule& rule, const BackwardInputs& given, const Tensor& q, const Tensor& k, const Tensor& v,
    const std::optional<Tensor>& g, const std::optional<Tensor>& beta, const std::optional<Tensor>& initial_state) {
  const SequenceLayout& sequences = rule.sequences;
  const ScalarType type = q.scalar_type(), state = state_dtype(type);
  const ScalarType output = rule.memory == Memory::sum_and_weight ? state : type;
  const int64_t b = v.size(0), length = v.size(1), hv = rule.value_heads, c = rule.chunk_size;
  const int64_t key_dim = rule.key_dim, columns = rule.columns();
  check_tensor(op, "do", given.d_o, {output}, {b, length, hv, rule.value_dim});
  check_tensor(op, "ddenominator", given.ddenominator, {state}, {b, length, hv});
  check_tensor(op, "dfinal_state", given.dfinal_state, {state}, {sequences.count(), hv, key_dim, columns});
  if (rule.divides()) {
    if (!given.o || !given.denominator) fail(op, "o and denominator must be given where o was divided");
    check_tensor(op, "o", given.o, {type}, {b, length, hv, rule.value_dim});
    check_tensor(op, "denominator", given.denominator, {state}, {b, length, hv});
  }
  if (rule.erases()) check_tensor(op, "solve", given.solve, {state}, {sequences.slots(c), hv, c, c});
  check_tensor(op, "states", given.states, {state}, {sequences.slots(c * rule.checkpoint_every), hv, key_dim, columns});

  const auto gradient_of = [&](const std::optional<Tensor>& x) {
    return x ? result_like(*x) : empty_result(q, {0}, state);
  };
  Tensor dq = result_like(q), dk = result_like(k), dv = result_like(v);
  Tensor dg = gradient_of(g), dbeta = gradient_of(beta), dinitial = gradient_of(initial_state);
  const auto data = [](const Tensor& tensor, bool wanted) { return wanted ? tensor.mutable_data_ptr() : nullptr; };
  const auto read = [](const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; };
  const Gradients gradients{given.d_o.const_data_ptr(),    read(given.ddenominator),
                            read(given.dfinal_state),      read(given.o),
                            read(given.denominator),       read(given.solve),
                            given.states.const_data_ptr(), dq.mutable_data_ptr(),
                            dk.mutable_data_ptr(),         dv.mutable_data_ptr(),
                            data(dg, g.has_value()),       data(dbeta, beta.has_value()),
                            data(dinitial, initial_state.has_value())};
  with_primitives(type, [&](const auto& isa) { Backward(rule, isa, gradients).run(torch::stable::get_num_threads()); });
  return {dq, dk, dv, dg, dbeta, dinitial};
}

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) {
  m.impl("gated_delta_rule_cpu_backward", TORCH_BOX(&gated_delta_rule_backward));
}

}  // namespace memattn::cpu
