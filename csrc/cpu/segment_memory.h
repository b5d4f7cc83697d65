// What the forward and the backward of segment_memory share: arguments, block sizes, rows as operands. Mathematics:
// python/memattn/ops/segment_memory.py.
//
// A slot of the table `states` is the memory [K, columns] of one head that a segment starts with; a sequence has one
// more, its final memory. Segments are walked in order: the affine form of the frozen delta rule costs more products
// (ops/segment_memory.py), and heads and columns of V give tasks enough. Reads need only the table, so they are all
// parallel.
#pragma once

#include "../common/sequences.h"
#include "blocks.h"
#include "parallel.h"

#include <cmath>
#include <limits>
#include <tuple>

namespace memattn::cpu {

inline constexpr int kSegmentRows = 64;          // of a tile of tokens
inline constexpr int64_t kReadTokens = 512;      // of a task that reads
inline constexpr double kFlopsWorthAThread = 4e6;

// The settings of the schema, in its order.
struct SegmentSettings {
  int64_t query_segment, key_segment;
  bool delta, normalise, correction, causal;
  double eps;
};

// Rows begin..end of the queries of a sequence, which read its slot `segment`.
struct SegmentRead {
  int64_t sequence, segment, begin, end;
};

// The op's arguments and sizes, checked.
struct SegmentMemory : SegmentSettings {
  SequenceLayout queries, keys;  // the same number of sequences
  int64_t heads, key_heads;
  int key_dim, value_dim;
  const void *q, *k, *v;  // [tokens, heads or key_heads, key_dim or value_dim] of `element`
  const void* beta;       // [tokens, key_heads] of `beta_element`, or null
  Element element, beta_element;
  const void* initial_state;  // [N, key_heads, key_dim, columns()] in the accumulate type, or null

  int64_t group() const { return heads / key_heads; }
  int columns() const { return value_dim + (normalise ? 1 : 0); }
  int64_t state_size() const { return int64_t{key_dim} * columns(); }
  int64_t segments(int64_t n) const { return keys.chunks(n, key_segment); }
  int64_t slots() const { return keys.slots(key_segment) + keys.count(); }
  // First element of a slot's memory of one head.
  int64_t slot(int64_t n, int64_t segment, int64_t head) const {
    return ((keys.slot(n, segment, key_segment) + n) * key_heads + head) * state_size();
  }
  int64_t state_row(int64_t n, int64_t head) const { return (n * key_heads + head) * state_size(); }
  bool is_empty(int64_t segment) const { return segment == 0 && initial_state == nullptr; }

  std::vector<SegmentRead> reads() const {
    std::vector<SegmentRead> all;
    for (int64_t n = 0; n < queries.count(); ++n) {
      for (int64_t begin = 0; begin < queries.length(n);) {
        const int64_t segment = causal ? std::min(begin / query_segment, segments(n)) : segments(n);
        int64_t end = std::min(begin + kReadTokens, queries.length(n));
        if (segment < segments(n)) end = std::min(end, (segment + 1) * query_segment);
        all.push_back({n, segment, begin, end});
        begin = end;
      }
    }
    return all;
  }

  int64_t workers(double flops) const {
    return std::clamp<int64_t>(static_cast<int64_t>(flops / kFlopsWorthAThread), 1, torch::stable::get_num_threads());
  }
  double write_flops() const {
    return 2.0 * double(keys.end(keys.count() - 1)) * double(key_heads) * key_dim * value_dim * (delta ? 2 : 1);
  }
  double read_flops() const {
    return 2.0 * double(queries.end(queries.count() - 1)) * double(heads) * key_dim * value_dim;
  }
};

SegmentMemory read_arguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                             const std::optional<Tensor>& beta, const std::optional<Tensor>& initial_state,
                             const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& cu_seqlens_k,
                             const SegmentSettings& settings);

struct SegmentSizes {
  int key_dim, value_dim;  // padded to the unit
  int ld_key, ld_value;

  SegmentSizes(const SegmentMemory& m, int unit)
      : key_dim(round_up(m.key_dim, unit)),
        value_dim(round_up(m.value_dim, unit)),
        ld_key(leading(key_dim)),
        ld_value(leading(value_dim)) {}
};

// Up to kSegmentRows rows of one head, and operands made of them.
template <class E>
struct SegmentRows {
  using Acc = AccumulateOf<E>;
  Acc* rows;
  int ld, count = 0, padded = 0;

  SegmentRows(Arena& arena, int leading_dim)
      : rows(arena.take<Acc>(int64_t{kSegmentRows} * leading_dim)),
        ld(leading_dim),
        left_(arena.take<E>(packed_size<E>(kSegmentRows, leading_dim))),
        right_(arena.take<E>(packed_size<E>(kSegmentRows, leading_dim))) {}

  // Columns first.. of a tensor [tokens, heads, dim].
  void load(const Primitives<E>& isa, const void* base, Element element, int64_t token, int64_t heads, int64_t head,
            int dim, int tokens, int first, int cols, int width) {
    count = tokens;
    padded = round_up(tokens, isa.unit);
    isa.load_rows(rows, ld, padded, width, offset(base, element, (token * heads + head) * dim + first), element,
                  heads * dim, tokens, cols);
  }
  void store(const Primitives<E>& isa, void* base, Element element, int64_t token, int64_t heads, int64_t head,
             int dim, const Acc* row_scale = nullptr) const {
    isa.store_rows(offset(base, element, (token * heads + head) * dim), element, heads * dim, rows, ld, row_scale,
                   count, dim);
  }
  Left<E> left(const Primitives<E>& isa, int width) const { return as_left(isa, left_, rows, ld, padded, width); }
  Right<E> right(const Primitives<E>& isa, int width) const { return as_right(isa, right_, rows, ld, padded, width); }

 private:
  E *left_, *right_;
};

// One number per row of a tile.
template <class Acc>
struct SegmentScalars {
  Acc *beta, *reciprocal, *count, *along;

  explicit SegmentScalars(Arena& arena)
      : beta(arena.take<Acc>(kSegmentRows)),
        reciprocal(arena.take<Acc>(kSegmentRows)),
        count(arena.take<Acc>(kSegmentRows)),
        along(arena.take<Acc>(kSegmentRows)) {}
};

// What both passes do with rows, vectors and slots.
template <class E>
class SegmentKernel {
 protected:
  using Acc = AccumulateOf<E>;
  static constexpr Element kAcc = element_of_accumulate<Acc>();

  SegmentKernel(const SegmentMemory& memory, const Primitives<E>& isa) : m_(memory), isa_(isa), s_(memory, isa.unit) {}

  // work(first token of the tile in its sequence, rows)
  template <class Work>
  static void tiles(int64_t begin, int64_t end, const Work& work) {
    for (int64_t at = begin; at < end; at += kSegmentRows)
      work(at, static_cast<int>(std::min<int64_t>(kSegmentRows, end - at)));
  }
  template <class Work>
  void tiles_of_segment(int64_t n, int64_t segment, const Work& work) const {
    const int64_t begin = segment * m_.key_segment;
    tiles(begin, std::min(begin + m_.key_segment, m_.keys.length(n)), [&](int64_t at, int rows) {
      work(m_.keys.start(n) + at, rows);
    });
  }

  void load_keys(SegmentRows<E>& keys, int64_t token, int64_t head, int rows) const {
    keys.load(isa_, m_.k, m_.element, token, m_.key_heads, head, m_.key_dim, rows, 0, m_.key_dim, s_.key_dim);
  }

  // reciprocal = 1 / (rows · z + eps); 1 where nothing is normalised.
  void reciprocals(Acc* reciprocal, const SegmentRows<E>& x, const Acc* z) const {
    if (!m_.normalise) {
      std::fill(reciprocal, reciprocal + x.padded, Acc(1));
      return;
    }
    isa_.dot_rows(reciprocal, x.rows, x.ld, z, 0, x.padded, s_.key_dim);
    for (int i = 0; i < x.padded; ++i) reciprocal[i] = reciprocal_or_zero(reciprocal[i] + Acc(m_.eps));
  }

  // How much of each key the normaliser gains.
  void counts(Acc* count, Acc* scratch, const SegmentRows<E>& keys, const Acc* z) const {
    std::fill(count, count + keys.padded, Acc(1));
    if (!m_.correction) return;
    isa_.dot_rows(count, keys.rows, keys.ld, z, 0, keys.padded, s_.key_dim);
    isa_.dot_rows(scratch, keys.rows, keys.ld, keys.rows, keys.ld, keys.padded, s_.key_dim);
    for (int i = 0; i < keys.padded; ++i) {
      const Acc gain = 1 - count[i] * reciprocal_or_zero(scratch[i] + Acc(m_.eps));
      count[i] = gain < 0 ? 0 : gain > 1 ? 1 : gain;  // a NaN stays
    }
  }

  void load_beta(Acc* beta, int64_t token, int64_t head, int rows, int padded) const {
    std::fill(beta, beta + padded, Acc(0));
    if (m_.beta == nullptr) {
      std::fill(beta, beta + rows, Acc(1));
    } else {
      isa_.load_rows(beta, 1, rows, 1, offset(m_.beta, m_.beta_element, token * m_.key_heads + head), m_.beta_element,
                     m_.key_heads, rows, 1);
    }
  }

  // Columns of a memory from a table or a state; zero from null.
  void load_memory(Acc* memory, const Acc* from, int begin, int cols, int width) const {
    isa_.load_rows(memory, s_.ld_value, s_.key_dim, width, from ? from + begin : nullptr, kAcc, m_.columns(),
                   from ? m_.key_dim : 0, cols);
  }
  void store_memory(Acc* to, const Acc* memory, int begin, int cols) const {
    isa_.store_rows(to + begin, kAcc, m_.columns(), memory, s_.ld_value, nullptr, m_.key_dim, cols);
  }
  void load_normaliser(Acc* z, const Acc* from) const {
    std::fill(z, z + s_.key_dim, Acc(0));
    for (int i = 0; m_.normalise && from && i < m_.key_dim; ++i) z[i] = from[int64_t{i} * m_.columns() + m_.value_dim];
  }
  void store_normaliser(Acc* to, const Acc* z) const {
    for (int i = 0; m_.normalise && i < m_.key_dim; ++i) to[int64_t{i} * m_.columns() + m_.value_dim] = z[i];
  }

  const SegmentMemory& m_;
  const Primitives<E>& isa_;
  const SegmentSizes s_;
};

}  // namespace memattn::cpu
