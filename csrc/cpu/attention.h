// What the forward and the backward of attention share: the arguments, block sizes, and the loading of rows.
#pragma once

#include "../common/sequences.h"
#include "attention_mask.h"
#include "blocks.h"
#include "parallel.h"

#include <cmath>
#include <limits>

namespace memattn::cpu {

inline constexpr int64_t kAtTheEnd = -1;  // a q_offset: the last query of each sequence stands at its last key

// The op's arguments and sizes, checked.
struct Attention {
  SequenceLayout queries, keys;  // the same number of sequences
  AttentionMask mask;
  std::vector<int64_t> q_offsets;  // of each sequence, instead of the mask's; empty: none
  int64_t heads, key_heads;
  int key_dim, value_dim;
  const void *q, *k, *v;  // [tokens, heads or key_heads, key_dim or value_dim] of `element`
  Element element;
  const void* sink;     // [heads] in the accumulate type, or null
  const void* first_scores;  // [query tokens, heads] in the accumulate type, or null: every row's softmax begins with
  const void* first_values;  // such a score and a value, [query tokens, heads, value_dim] of `element`
  const double* decay;  // [key tokens, heads], summed up over time, or null
  bool tile_heads;
  double scale;

  int64_t group() const { return heads / key_heads; }
  int64_t head(int64_t key_head, int64_t member) const {
    return tile_heads ? member * key_heads + key_head : key_head * group() + member;
  }
  // Position of a sequence's first query.
  int64_t offset(int64_t sequence) const {
    if (!q_offsets.empty()) return q_offsets[sequence];
    return mask.q_offset == kAtTheEnd ? keys.length(sequence) - queries.length(sequence) : mask.q_offset;
  }
  SeenKeys seen(int64_t sequence) const {
    AttentionMask placed = mask;
    placed.q_offset = offset(sequence);
    return {placed, queries.length(sequence), keys.length(sequence)};
  }

  template <class Acc>
  Acc sink_of(int64_t h) const {
    return sink ? static_cast<const Acc*>(sink)[h] : -std::numeric_limits<Acc>::infinity();
  }
};

// The settings of the schema, in its order.
struct AttentionSettings {
  int64_t causal, window, prefix_len, block_size, summary, dilation, dilated_window, dilated_prefix, q_offset;
  bool tile_heads;
  double scale;
};

Attention read_arguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                         const std::optional<Tensor>& sink, const std::optional<Tensor>& decay,
                         const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                         const AttentionSettings& settings);

// Has every row's softmax begin with a score [B, Tq, HQ] and a value [B, Tq, HQ, V]: both given or both left out.
void begin_with(const char* op, Attention& a, const Tensor& q, const Tensor& v, const std::optional<Tensor>& scores,
                const std::optional<Tensor>& values);

// o [query tokens, heads, value_dim] and lse [query tokens, heads] of a call with tensors of `type`.
void attend(const Attention& a, ScalarType type, void* o, void* lse);

// What backward reads besides the arguments, and where its results go.
struct AttentionGradients {
  const void *o, *d_o;         // like q with V columns
  const void *lse, *d_lse;     // [tokens, heads] in the accumulate type; d_lse may be null
  void *dq, *dk, *dv;          // like q, k, v
  double* ddecay;              // like decay, or null
  void *d_first_scores = nullptr, *d_first_values = nullptr;  // where the softmax begins with such
};

// The gradients of a call with tensors of `type`.
void differentiate(const Attention& a, ScalarType type, const AttentionGradients& g, void* dsink);

inline constexpr int kKeys = 64;  // of a tile; tiles begin at its multiples, so that bits do not depend on the queries

struct AttentionSizes {
  int unit, queries, key_dim, value_dim;  // padded to `unit`
  int ld_key, ld_value, ld_scores;

  AttentionSizes(const Attention& a, int block_unit, int query_rows)
      : unit(block_unit),
        queries(round_up(query_rows, unit)),
        key_dim(round_up(a.key_dim, unit)),
        value_dim(round_up(a.value_dim, unit)),
        ld_key(leading(key_dim)),
        ld_value(leading(value_dim)),
        ld_scores(leading(kKeys)) {}
};

// Rows of one head from a tensor [tokens, heads, dim].
template <class E>
void load_head(const Primitives<E>& isa, AccumulateOf<E>* x, int ld, int padded_rows, int width, const void* base,
               Element element, int64_t token, int64_t heads, int64_t head, int rows, int dim) {
  const void* from = offset(base, element, (token * heads + head) * dim);
  isa.load_rows(x, ld, padded_rows, width, from, element, heads * dim, rows, dim);
}

// The cumulative decay of `rows` rows of one head, as high + low; 0 in the padding.
template <class Acc>
void load_decay(Acc* high, Acc* low, const Attention& a, int64_t token, int64_t head, int rows, int padded_rows) {
  for (int i = 0; i < padded_rows; ++i) {
    const double c = i < rows ? a.decay[(token + i) * a.heads + head] : 0.0;
    high[i] = static_cast<Acc>(c);
    low[i] = static_cast<Acc>(c - static_cast<double>(high[i]));
  }
}

// A tile of keys: kᵀ as right operand, and for each member of the group its decay.
template <class E>
struct KeyTile {
  using Acc = AccumulateOf<E>;
  Acc *rows, *values;   // [kKeys, K], [kKeys, V]
  E* transposed;        // [K, kKeys]
  Acc *high, *low;      // [group, kKeys], or null
  int64_t begin = 0;    // position of the first key
  int count = 0, width = 0;  // keys, padded to the unit

  KeyTile(Arena& arena, const Attention& a, const AttentionSizes& s)
      : rows(arena.take<Acc>(int64_t{kKeys} * s.ld_key)),
        values(arena.take<Acc>(int64_t{kKeys} * s.ld_value)),
        transposed(arena.take<E>(int64_t{s.key_dim} * s.ld_scores)),
        high(a.decay ? arena.take<Acc>(a.group() * kKeys) : nullptr),
        low(a.decay ? arena.take<Acc>(a.group() * kKeys) : nullptr) {}

  void load(const Attention& a, const Primitives<E>& isa, const AttentionSizes& s, int64_t sequence, int64_t key_head,
            int64_t from, int64_t to) {
    const int64_t token = a.keys.start(sequence) + from;
    begin = from;
    count = static_cast<int>(std::min(to, a.keys.length(sequence)) - from);
    width = round_up(count, s.unit);
    load_head(isa, rows, s.ld_key, width, s.key_dim, a.k, a.element, token, a.key_heads, key_head, count, a.key_dim);
    load_head(isa, values, s.ld_value, width, s.value_dim, a.v, a.element, token, a.key_heads, key_head, count,
              a.value_dim);
    isa.pack_right_transposed(transposed, s.ld_scores, rows, s.ld_key, width, s.key_dim);
    for (int64_t m = 0; a.decay && m < a.group(); ++m) {
      load_decay(high + m * kKeys, low + m * kKeys, a, token, a.head(key_head, m), count, width);
    }
  }

  PairBias<Acc> bias(int64_t member, const Acc* row_high, const Acc* row_low) const {
    if (!high) return {};
    return {row_high, row_low, high + member * kKeys, low + member * kKeys};
  }
};

}  // namespace memattn::cpu
