// Sparse attention, backward, the queries' part where sequences go by blocks: dQ, dbias and Δ of a chunk of queries, as
// in the forward (sparse_attention_prefill.cpp).
#include "sparse_attention_backward.h"
#include "sparse_attention_blocks.h"

namespace memattn::cpu {
namespace {

template <class E>
struct ChunkTemporaries {
  using Acc = AccumulateOf<E>;
  BlockTile<E> tile;
  NamedBlock* named;
  Acc *q, *d_o, *out, *dq;             // [rows, K or V]
  Acc *lse, *delta, *scales;           // [rows]
  E *q_packed, *d_o_packed;            // [rows, K or V] where E is not Acc
  const E *q_rows = nullptr, *d_o_rows = nullptr;  // as left operands
  E *q_left, *d_o_left;                // [tile rows, K or V]: gathered
  E *values_transposed, *key_rows;     // [V, kTokens], [kTokens, K] where E is not Acc
  Acc *p, *ds;                         // [tile rows, kTokens]
  E* ds_left;                          // the same where E is not Acc
  Acc *part, *sums;                    // [tile rows, K], [tile rows]
  Acc *tile_lse, *tile_delta, *bias;   // [tile rows]
  Acc *nothing, *ones;                 // [max(tile rows, kTokens)]
  int *row, *seen, *entry;             // [tile rows]

  ChunkTemporaries(Arena& arena, const SparseAttention& a, const BlockSizes& s)
      : tile(arena, s),
        named(arena.take<NamedBlock>(s.queries * a.entries)),
        q(arena.take<Acc>(int64_t{s.rows} * s.ld_key)),
        d_o(arena.take<Acc>(int64_t{s.rows} * s.ld_value)),
        out(arena.take<Acc>(int64_t{s.group} * s.ld_value)),
        dq(arena.take<Acc>(int64_t{s.rows} * s.ld_key)),
        lse(arena.take<Acc>(s.rows)),
        delta(arena.take<Acc>(s.rows)),
        scales(arena.take<Acc>(s.rows)),
        q_packed(arena.take<E>(packed_size<E>(s.rows, s.ld_key))),
        d_o_packed(arena.take<E>(packed_size<E>(s.rows, s.ld_value))),
        q_left(arena.take<E>(int64_t{s.tile_rows()} * s.ld_key)),
        d_o_left(arena.take<E>(int64_t{s.tile_rows()} * s.ld_value)),
        values_transposed(arena.take<E>(int64_t{s.value_dim} * s.ld_scores)),
        key_rows(arena.take<E>(packed_size<E>(kTokens, s.ld_key))),
        p(arena.take<Acc>(int64_t{s.tile_rows()} * s.ld_scores)),
        ds(arena.take<Acc>(int64_t{s.tile_rows()} * s.ld_scores)),
        ds_left(arena.take<E>(packed_size<E>(s.tile_rows(), s.ld_scores))),
        part(arena.take<Acc>(int64_t{s.tile_rows()} * s.ld_key)),
        sums(arena.take<Acc>(s.tile_rows())),
        tile_lse(arena.take<Acc>(s.tile_rows())),
        tile_delta(arena.take<Acc>(s.tile_rows())),
        bias(arena.take<Acc>(s.tile_rows())),
        nothing(arena.take<Acc>(std::max(s.tile_rows(), kTokens))),
        ones(arena.take<Acc>(std::max(s.tile_rows(), kTokens))),
        row(arena.take<int>(s.tile_rows())),
        seen(arena.take<int>(s.tile_rows())),
        entry(arena.take<int>(s.tile_rows())) {}
};

template <class E>
class ChunkBackward {
  using Acc = AccumulateOf<E>;

 public:
  ChunkBackward(const SparseAttention& a, const Primitives<E>& isa, const SparseGradients& g,
                RowStatistics<Acc>& statistics)
      : a_(a), isa_(isa), g_(g), statistics_(statistics), s_(a, isa.unit) {}

  void run(int64_t threads) const {
    const auto make = [&](Arena& arena) { return ChunkTemporaries<E>(arena, a_, s_); };
    const auto prepare = [&](ChunkTemporaries<E>& t) {
      std::fill_n(t.nothing, std::max(s_.tile_rows(), kTokens), Acc(0));
      std::fill_n(t.ones, std::max(s_.tile_rows(), kTokens), Acc(1));
      std::fill_n(t.scales, s_.rows, Acc(a_.scale));
    };
    for_each_chunk(a_, isa_, s_, threads, make, prepare, [&](const QueryChunk& chunk, ChunkTemporaries<E>& t) {
      begin(chunk, t);
      for_each_tile(a_, isa_, s_, chunk, t.named, t.tile, [&](int64_t block, const NamedBlock* x, const NamedBlock* end) {
        isa_.pack_right_transposed(t.values_transposed, s_.ld_scores, t.tile.values, s_.ld_value, t.tile.width,
                                   s_.value_dim);
        const Right<E> keys = as_right(isa_, t.key_rows, t.tile.keys, s_.ld_key, t.tile.width, s_.key_dim);
        while (x != end) {
          const int rows = gather_rows(a_, s_, chunk, t.tile, block, x, end, t.row, t.seen, t.entry);
          if (rows > 0) add(chunk, rows, keys, t);
        }
      });
      finish(chunk, t);
    });
  }

 private:
  void begin(const QueryChunk& chunk, ChunkTemporaries<E>& t) const {
    for (int64_t query = chunk.first; query < chunk.last; ++query) {
      const int64_t from = (query - chunk.first) * s_.group, at = query * a_.heads + chunk.key_head * s_.group;
      Acc* d_o = t.d_o + from * s_.ld_value;
      load_group(isa_, t.q + from * s_.ld_key, s_.ld_key, s_.key_dim, a_.q, a_, query, chunk.key_head, a_.key_dim);
      load_group(isa_, d_o, s_.ld_value, s_.value_dim, g_.d_o, a_, query, chunk.key_head, a_.value_dim);
      load_group(isa_, t.out, s_.ld_value, s_.value_dim, g_.o, a_, query, chunk.key_head, a_.value_dim);
      isa_.dot_rows(t.delta + from, d_o, s_.ld_value, t.out, s_.ld_value, s_.group, s_.value_dim);
      for (int m = 0; m < s_.group; ++m) {
        t.lse[from + m] = statistics_.lse(at + m);
        t.delta[from + m] = statistics_.keep(at + m, t.delta[from + m]);
      }
      if (a_.bias) std::fill_n(dbias(query, chunk.key_head), a_.entries, Acc(0));
    }
    const int used = static_cast<int>(chunk.last - chunk.first) * s_.group, rows = round_up(used, s_.unit);
    for (int i = used; i < rows; ++i) {
      std::fill_n(t.q + int64_t{i} * s_.ld_key, s_.key_dim, Acc(0));
      std::fill_n(t.d_o + int64_t{i} * s_.ld_value, s_.value_dim, Acc(0));
    }
    t.q_rows = as_left(isa_, t.q_packed, t.q, s_.ld_key, rows, s_.key_dim).data;
    t.d_o_rows = as_left(isa_, t.d_o_packed, t.d_o, s_.ld_value, rows, s_.value_dim).data;
    std::fill_n(t.dq, int64_t{rows} * s_.ld_key, Acc(0));
  }

  // What the tile gives to the gathered rows.
  void add(const QueryChunk& chunk, int rows, Right<E> keys, ChunkTemporaries<E>& t) const {
    const int padded = round_up(rows, s_.unit), width = t.tile.width, ld = s_.ld_scores;
    copy_rows(t.q_left, t.q_rows, s_.ld_key, s_.key_dim, t.row, rows, padded);
    copy_rows(t.d_o_left, t.d_o_rows, s_.ld_value, s_.value_dim, t.row, rows, padded);
    for (int i = 0; i < rows; ++i) {
      t.tile_lse[i] = t.lse[t.row[i]];
      t.tile_delta[i] = t.delta[t.row[i]];
      if (a_.bias) t.bias[i] = a_.bias_of<Acc>(query_of(chunk, t.row[i]), chunk.key_head)[t.entry[i]];
    }
    constexpr int group = OperandTraits<E>::group;
    isa_.gemm(t.p, ld, {t.q_left, s_.ld_key, group}, {t.tile.transposed, ld}, padded, width, s_.key_dim, 0, Part::full);
    isa_.gemm(t.ds, ld, {t.d_o_left, s_.ld_value, group}, {t.values_transposed, ld}, padded, width, s_.value_dim, 0,
              Part::full);
    hide_beyond(t.p, ld, t.seen, rows, width, -std::numeric_limits<Acc>::infinity());
    hide_beyond(t.ds, ld, t.seen, rows, width, Acc(0));
    const PairBias<Acc> pairs = a_.bias ? PairBias<Acc>{t.bias, t.nothing, t.nothing, t.nothing} : PairBias<Acc>{};
    isa_.softmax_rows_backward(t.p, t.ds, ld, Acc(a_.scale), pairs, t.tile_lse, t.tile_delta, rows, width);
    isa_.gemm(t.part, s_.ld_key, as_left(isa_, t.ds_left, t.ds, ld, padded, width), keys, padded, s_.key_dim, width, 0,
              Part::full);
    if (a_.bias) isa_.dot_rows(t.sums, t.ds, ld, t.ones, 0, rows, width);
    for (int i = 0; i < rows; ++i) {
      isa_.add_rows(t.dq + int64_t{t.row[i]} * s_.ld_key, s_.ld_key, t.ones, t.part + int64_t{i} * s_.ld_key, s_.ld_key,
                    1, s_.key_dim);
      if (a_.bias) dbias(query_of(chunk, t.row[i]), chunk.key_head)[t.entry[i]] += t.sums[i];
    }
  }

  void finish(const QueryChunk& chunk, ChunkTemporaries<E>& t) const {
    for (int64_t query = chunk.first; query < chunk.last; ++query) {
      const int64_t from = (query - chunk.first) * s_.group, at = query * a_.heads + chunk.key_head * s_.group;
      isa_.store_rows(offset(g_.dq, a_.element, at * a_.key_dim), a_.element, a_.key_dim, t.dq + from * s_.ld_key,
                      s_.ld_key, t.scales, s_.group, a_.key_dim);
    }
  }

  int64_t query_of(const QueryChunk& chunk, int row) const { return chunk.first + row / s_.group; }
  Acc* dbias(int64_t query, int64_t key_head) const {
    return static_cast<Acc*>(g_.dbias) + (query * a_.key_heads + key_head) * a_.entries;
  }

  const SparseAttention& a_;
  const Primitives<E>& isa_;
  const SparseGradients& g_;
  RowStatistics<Acc>& statistics_;
  const BlockSizes s_;
};

}  // namespace

template <class E>
void differentiate_chunks(const SparseAttention& a, const Primitives<E>& isa, const SparseGradients& g,
                          RowStatistics<AccumulateOf<E>>& rows, int64_t threads) {
  ChunkBackward<E>(a, isa, g, rows).run(threads);
}

template void differentiate_chunks(const SparseAttention&, const Primitives<float>&, const SparseGradients&,
                                   RowStatistics<float>&, int64_t);
template void differentiate_chunks(const SparseAttention&, const Primitives<double>&, const SparseGradients&,
                                   RowStatistics<double>&, int64_t);
template void differentiate_chunks(const SparseAttention&, const Primitives<bf16>&, const SparseGradients&,
                                   RowStatistics<float>&, int64_t);

}  // namespace memattn::cpu
