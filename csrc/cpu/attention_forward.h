// What the forwards of attention and of rat_attention share: a tile of queries passes over the tiles of keys it sees with the
// running maximum and sum of an online softmax per row.
#pragma once

#include "attention.h"

namespace memattn::cpu {

// One head's rows of a tile of queries.
template <class E>
struct QueryRows {
  using Acc = AccumulateOf<E>;
  Acc *rows, *out;         // [queries, K], [queries, V]
  E* buffer;               // rows as an operand, where E is not Acc
  Acc *most, *sum, *high, *low;  // [queries]
  Left<E> left{};

  QueryRows(Arena& arena, const AttentionSizes& s)
      : rows(arena.take<Acc>(int64_t{s.queries} * s.ld_key)),
        out(arena.take<Acc>(int64_t{s.queries} * s.ld_value)),
        buffer(arena.take<E>(packed_size<E>(s.queries, s.ld_key))),
        most(arena.take<Acc>(s.queries)),
        sum(arena.take<Acc>(s.queries)),
        high(arena.take<Acc>(s.queries)),
        low(arena.take<Acc>(s.queries)) {}
};

template <class E>
struct ForwardTemporaries {
  using Acc = AccumulateOf<E>;
  std::vector<QueryRows<E>> heads;
  KeyTile<E> keys;
  Acc *scores, *shrink;  // [queries, kKeys], [queries]
  E *weights, *values;   // scores and value rows as operands, where E is not Acc

  ForwardTemporaries(Arena& arena, const Attention& a, const AttentionSizes& s)
      : keys(arena, a, s),
        scores(arena.take<Acc>(int64_t{s.queries} * s.ld_scores)),
        shrink(arena.take<Acc>(s.queries)),
        weights(arena.take<E>(packed_size<E>(s.queries, s.ld_scores))),
        values(arena.take<E>(packed_size<E>(kKeys, s.ld_value))) {
    for (int64_t m = 0; m < a.group(); ++m) heads.emplace_back(arena, s);
  }
};

template <class E>
class QueryTile {
  using Acc = AccumulateOf<E>;

 public:
  QueryTile(const Attention& a, const Primitives<E>& isa, const AttentionSizes& s, void* o, Acc* lse)
      : a_(a), isa_(isa), s_(s), o_(o), lse_(lse) {}

  // Rows first..last of every head, whose softmax has been started, take in all the keys they see.
  void attend(int64_t sequence, int64_t key_head, int64_t first, int64_t last, ForwardTemporaries<E>& t) const {
    const SeenKeys seen = a_.seen(sequence);
    const int64_t begin = seen.range(first).begin, end = std::max(seen.range(last - 1).end, seen.prefix());
    for (int64_t from = 0; from < end; from += kKeys) {
      if (from >= seen.prefix() && from + kKeys <= begin) {
        from = begin / kKeys * kKeys;
      }
      const int64_t to = std::min(from + kKeys, end);
      const int64_t cut = from < seen.prefix() ? from : std::max(from, begin / s_.unit * s_.unit);
      const AttentionMask::Range rows = seen.rows(first, last, cut, to);
      if (rows.begin == rows.end) continue;
      t.keys.load(a_, isa_, s_, sequence, key_head, cut, to);
      add_tile(seen, first, rows, t);
    }
  }

  void finish(QueryRows<E>& head, int64_t sequence, int64_t h, int64_t first, int64_t last) const {
    const int rows = static_cast<int>(last - first);
    const int64_t token = a_.queries.start(sequence) + first;
    for (int i = 0; i < rows; ++i) {
      const Acc sum = head.sum[i];
      const bool empty = sum == 0;
      lse_[(token + i) * a_.heads + h] = empty ? -std::numeric_limits<Acc>::infinity() : head.most[i] + std::log(sum);
      head.sum[i] = empty ? Acc(0) : 1 / sum;
    }
    isa_.store_rows(offset(o_, a_.element, (token * a_.heads + h) * a_.value_dim), a_.element, a_.heads * a_.value_dim,
                    head.out, s_.ld_value, head.sum, rows, a_.value_dim);
  }

 private:
  // Rows `seen_rows` of every head take in the loaded tile of keys.
  void add_tile(const SeenKeys& seen, int64_t first, AttentionMask::Range seen_rows, ForwardTemporaries<E>& t) const {
    const int from = static_cast<int>(seen_rows.begin - first) / s_.unit * s_.unit;
    const int to = round_up(static_cast<int>(seen_rows.end - first), s_.unit), n = to - from, width = t.keys.width;
    const int64_t last = std::min(first + to, seen.queries());
    const bool whole = seen.all(first + from, last, t.keys.begin, t.keys.begin + width);
    const Right<E> values = as_right(isa_, t.values, t.keys.values, s_.ld_value, width, s_.value_dim);
    for (size_t m = 0; m < t.heads.size(); ++m) {
      QueryRows<E>& head = t.heads[m];
      Acc* out = head.out + int64_t{from} * s_.ld_value;
      isa_.gemm(t.scores, s_.ld_scores, rows_from(head.left, from), {t.keys.transposed, s_.ld_scores}, n, width,
                s_.key_dim, 0, Part::full);
      if (!whole) seen.hide(t.scores, s_.ld_scores, first + from, first + to, t.keys.begin, width);
      isa_.softmax_rows(t.scores, s_.ld_scores, Acc(a_.scale), t.keys.bias(m, head.high + from, head.low + from),
                        head.most + from, head.sum + from, t.shrink, n, width);
      if (std::any_of(t.shrink, t.shrink + n, [](Acc x) { return x != 1; })) {
        isa_.scale_rows(out, s_.ld_value, t.shrink, n, s_.value_dim);
      }
      isa_.gemm(out, s_.ld_value, as_left(isa_, t.weights, t.scores, s_.ld_scores, n, width), values, n, s_.value_dim,
                width, 1, Part::full);
    }
  }

  const Attention& a_;
  const Primitives<E>& isa_;
  const AttentionSizes& s_;
  void* o_;
  Acc* lse_;
};

}  // namespace memattn::cpu
