// Sparse attention, forward, of sequences with many queries and large blocks: see sparse_attention_blocks.h. A task is a
// chunk of queries of one key head, whose rows keep the maximum, the sum and the output of an online softmax.
#include "sparse_attention_blocks.h"

#include <cmath>
#include <limits>

namespace memattn::cpu {
namespace {

// All rows of a chunk, and what a tile of them needs.
template <class E>
struct ChunkTemporaries {
  using Acc = AccumulateOf<E>;
  BlockTile<E> tile;
  NamedBlock* named;
  Acc *q, *out, *most, *sum;        // [rows, K or V], [rows]
  E* q_packed;                      // [rows, K] where E is not Acc
  const E* packed = nullptr;        // q as left operand
  E* left;                          // [tile rows, K]: gathered
  Acc *scores, *part;               // [tile rows, kTokens], [tile rows, V]
  E *weights, *values;              // scores and value rows as operands, where E is not Acc
  Acc *top, *total, *shrink, *bias;  // [tile rows]: most, sum, and what is added to a row's scores
  Acc* nothing;                     // [max(tile rows, kTokens)]
  int *row, *seen, *entry;          // [tile rows]

  ChunkTemporaries(Arena& arena, const SparseAttention& a, const BlockSizes& s)
      : tile(arena, s),
        named(arena.take<NamedBlock>(s.queries * a.entries)),
        q(arena.take<Acc>(int64_t{s.rows} * s.ld_key)),
        out(arena.take<Acc>(int64_t{s.rows} * s.ld_value)),
        most(arena.take<Acc>(s.rows)),
        sum(arena.take<Acc>(s.rows)),
        q_packed(arena.take<E>(packed_size<E>(s.rows, s.ld_key))),
        left(arena.take<E>(int64_t{s.tile_rows()} * s.ld_key)),
        scores(arena.take<Acc>(int64_t{s.tile_rows()} * s.ld_scores)),
        part(arena.take<Acc>(int64_t{s.tile_rows()} * s.ld_value)),
        weights(arena.take<E>(packed_size<E>(s.tile_rows(), s.ld_scores))),
        values(arena.take<E>(packed_size<E>(kTokens, s.ld_value))),
        top(arena.take<Acc>(s.tile_rows())),
        total(arena.take<Acc>(s.tile_rows())),
        shrink(arena.take<Acc>(s.tile_rows())),
        bias(arena.take<Acc>(s.tile_rows())),
        nothing(arena.take<Acc>(std::max(s.tile_rows(), kTokens))),
        row(arena.take<int>(s.tile_rows())),
        seen(arena.take<int>(s.tile_rows())),
        entry(arena.take<int>(s.tile_rows())) {}
};

template <class E>
class BlockForward {
  using Acc = AccumulateOf<E>;
  static constexpr Acc kNothing = -std::numeric_limits<Acc>::infinity();

 public:
  BlockForward(const SparseAttention& a, const Primitives<E>& isa, void* o, void* lse)
      : a_(a), isa_(isa), s_(a, isa.unit), o_(o), lse_(static_cast<Acc*>(lse)) {}

  void run(int64_t threads) const {
    const auto make = [&](Arena& arena) { return ChunkTemporaries<E>(arena, a_, s_); };
    const auto prepare = [&](ChunkTemporaries<E>& t) {
      std::fill_n(t.nothing, std::max(s_.tile_rows(), kTokens), Acc(0));
    };
    for_each_chunk(a_, isa_, s_, threads, make, prepare, [&](const QueryChunk& chunk, ChunkTemporaries<E>& t) {
      begin(chunk, t);
      for_each_tile(a_, isa_, s_, chunk, t.named, t.tile, [&](int64_t block, const NamedBlock* x, const NamedBlock* end) {
        const Right<E> values = as_right(isa_, t.values, t.tile.values, s_.ld_value, t.tile.width, s_.value_dim);
        while (x != end) {
          const int rows = gather_rows(a_, s_, chunk, t.tile, block, x, end, t.row, t.seen, t.entry);
          if (rows > 0) add(chunk, rows, values, t);
        }
      });
      finish(chunk, t);
    });
  }

 private:
  void begin(const QueryChunk& chunk, ChunkTemporaries<E>& t) const {
    const int queries = static_cast<int>(chunk.last - chunk.first);
    for (int i = 0; i < queries; ++i) {
      load_group(isa_, t.q + int64_t{i} * s_.group * s_.ld_key, s_.ld_key, s_.key_dim, a_.q, a_, chunk.first + i,
                 chunk.key_head, a_.key_dim);
    }
    const int rows = round_up(queries * s_.group, s_.unit);
    for (int i = queries * s_.group; i < rows; ++i) std::fill_n(t.q + int64_t{i} * s_.ld_key, s_.ld_key, Acc(0));
    t.packed = as_left(isa_, t.q_packed, t.q, s_.ld_key, rows, s_.key_dim).data;
    std::fill_n(t.out, int64_t{rows} * s_.ld_value, Acc(0));
    for (int i = 0; i < rows; ++i) {
      t.most[i] = a_.sink ? static_cast<const Acc*>(a_.sink)[chunk.key_head * s_.group + i % s_.group] : kNothing;
      t.sum[i] = Acc(t.most[i] != kNothing);
    }
  }

  // The gathered rows take in the tile.
  void add(const QueryChunk& chunk, int rows, Right<E> values, ChunkTemporaries<E>& t) const {
    const int padded = round_up(rows, s_.unit), width = t.tile.width, ld = s_.ld_scores;
    copy_rows(t.left, t.packed, s_.ld_key, s_.key_dim, t.row, rows, padded);
    for (int i = 0; i < rows; ++i) {
      t.top[i] = t.most[t.row[i]];
      t.total[i] = t.sum[t.row[i]];
      if (a_.bias) t.bias[i] = a_.bias_of<Acc>(chunk.first + t.row[i] / s_.group, chunk.key_head)[t.entry[i]];
    }
    isa_.gemm(t.scores, ld, {t.left, s_.ld_key, OperandTraits<E>::group}, {t.tile.transposed, ld}, padded, width,
              s_.key_dim, 0, Part::full);
    hide_beyond(t.scores, ld, t.seen, rows, width, kNothing);
    const PairBias<Acc> pairs = a_.bias ? PairBias<Acc>{t.bias, t.nothing, t.nothing, t.nothing} : PairBias<Acc>{};
    isa_.softmax_rows(t.scores, ld, Acc(a_.scale), pairs, t.top, t.total, t.shrink, rows, width);
    isa_.gemm(t.part, s_.ld_value, as_left(isa_, t.weights, t.scores, ld, padded, width), values, padded,
              s_.value_dim, width, 0, Part::full);
    constexpr Acc one = 1;
    for (int i = 0; i < rows; ++i) {
      Acc* out = t.out + int64_t{t.row[i]} * s_.ld_value;
      if (t.shrink[i] != 1) isa_.scale_rows(out, s_.ld_value, t.shrink + i, 1, s_.value_dim);
      isa_.add_rows(out, s_.ld_value, &one, t.part + int64_t{i} * s_.ld_value, s_.ld_value, 1, s_.value_dim);
      t.most[t.row[i]] = t.top[i];
      t.sum[t.row[i]] = t.total[i];
    }
  }

  void finish(const QueryChunk& chunk, ChunkTemporaries<E>& t) const {
    for (int64_t query = chunk.first; query < chunk.last; ++query) {
      const int64_t from = (query - chunk.first) * s_.group, at = query * a_.heads + chunk.key_head * s_.group;
      for (int m = 0; m < s_.group; ++m) {
        Acc& sum = t.sum[from + m];
        lse_[at + m] = sum == 0 ? kNothing : t.most[from + m] + std::log(sum);
        sum = sum == 0 ? Acc(0) : 1 / sum;
      }
      isa_.store_rows(offset(o_, a_.element, at * a_.value_dim), a_.element, a_.value_dim, t.out + from * s_.ld_value,
                      s_.ld_value, t.sum + from, s_.group, a_.value_dim);
    }
  }

  const SparseAttention& a_;
  const Primitives<E>& isa_;
  const BlockSizes s_;
  void* o_;
  Acc* lse_;
};

}  // namespace

void attend_blocks(const SparseAttention& a, ScalarType type, void* o, void* lse) {
  with_primitives(type, [&](const auto& isa) { BlockForward(a, isa, o, lse).run(torch::stable::get_num_threads()); });
}

}  // namespace memattn::cpu
