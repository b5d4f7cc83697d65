// The chunk engine of the gated delta rule and of linear attention: the arguments, block sizes, and the preparation of one
// chunk, shared by forward and backward. Symbols as in gated_delta_rule.cpp.
#pragma once

#include "../common/checks.h"
#include "../common/sequences.h"
#include "blocks.h"
#include "parallel.h"

#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>

namespace memattn::cpu {

// What a token does to the state.
enum class Memory {
  delta,           // erases, then writes: S_t = (I - beta k kᵀ) e^g S_{t-1} + beta k vᵀ
  sum,             // only writes: S_t = e^g S_{t-1} + k vᵀ, hence T = I, Vn = V, and keys read nothing
  sum_and_weight,  // the same with a column of ones after V: z in the state, and beside o its denominator q·z
  normalised_sum,  // the same, o divided by the denominator
};

// The op's arguments and sizes, checked.
struct DeltaRule {
  Memory memory;
  SequenceLayout sequences;
  int64_t heads, value_heads;
  int key_dim, value_dim;
  const void *q, *k, *v;  // [tokens, heads or value_heads, key_dim or value_dim] of `element`
  const void* g;          // [tokens, value_heads] in the accumulate type, or null
  const void* beta;       // [tokens, value_heads] of `beta_element`, or null
  Element element, beta_element;
  const void* initial_state;  // [N, value_heads, key_dim, columns()] in the accumulate type, or null
  Element output_element;     // of o: the accumulate type for sum_and_weight, else `element`
  double scale;
  bool qk_l2norm;
  int chunk_size;
  int64_t checkpoint_every;

  int64_t group() const { return value_heads / heads; }
  bool erases() const { return memory == Memory::delta; }
  bool weighs() const { return memory == Memory::sum_and_weight || memory == Memory::normalised_sum; }
  bool divides() const { return memory == Memory::normalised_sum; }
  int columns() const { return value_dim + (weighs() ? 1 : 0); }  // of the state
};

inline constexpr double kL2NormEps = 1e-6;

DeltaRule read_arguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                         const std::optional<Tensor>& g, const std::optional<Tensor>& beta,
                         const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens,
                         double scale, bool qk_l2norm, int64_t chunk_size, int64_t checkpoint_every,
                         Memory memory = Memory::delta);

// o and its denominator [tokens, value_heads], not filled; the latter is empty where nothing is weighed.
std::pair<Tensor, Tensor> empty_outputs(const DeltaRule& rule, const Tensor& v);

// o and its denominator; `state` is updated in place.
std::pair<Tensor, Tensor> run_step(const char* op, const DeltaRule& rule, const Tensor& q, const Tensor& v,
                                   const Tensor& state, const std::optional<Tensor>& state_indices);

// A tensor is empty where it is not wanted.
struct ForwardResults {
  Tensor o, denominator, final_state, solve, states;
};
ForwardResults run_forward(const DeltaRule& rule, const Tensor& q, const Tensor& v, bool output_final_state, bool save);

// What backward is given beside the op's inputs. solve: where something is erased; o and denominator: where divided.
struct BackwardInputs {
  const Tensor& d_o;
  const std::optional<Tensor>&ddenominator, &dfinal_state, &o, &denominator, &solve;
  const Tensor& states;
};

// dq, dk, dv, dg, dbeta, dinitial_state; the last three are empty where there is no such input.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run_backward(
    const char* op, const DeltaRule& rule, const BackwardInputs& given, const Tensor& q, const Tensor& k, const Tensor& v,
    const std::optional<Tensor>& g, const std::optional<Tensor>& beta, const std::optional<Tensor>& initial_state);

// --- blocks ---

struct BlockSizes {
  int unit, chunk, key_dim, value_dim;  // padded to `unit`
  int ld_key, ld_value, ld_chunk;
  bool erases;

  BlockSizes(const DeltaRule& rule, int block_unit)
      : unit(block_unit),
        chunk(round_up(rule.chunk_size, unit)),
        key_dim(round_up(rule.key_dim, unit)),
        value_dim(round_up(rule.columns(), unit)),
        ld_key(leading(key_dim)),
        ld_value(leading(value_dim)),
        ld_chunk(leading(chunk)),
        erases(rule.erases()) {}

  // Size of a block that only the erase term needs.
  int64_t if_erasing(int64_t size) const { return erases ? size : 0; }
};

// Rows that the next chunk will read. Heads are interleaved in memory, so every row lies in another page and no
// hardware prefetcher follows; the chunk at hand asks for them a few at a time, between its products.
class RowsAhead {
 public:
  void add(const void* base, Element element, int64_t first, int64_t stride, int64_t rows, int cols) {
    if (rows <= 0) return;
    streams_[count_++] = {static_cast<const char*>(offset(base, element, first)), stride * bytes_of(element),
                          cols * bytes_of(element), rows};
    most_ = std::max(most_, rows);
  }

  // The next third of the rows of every stream.
  void fetch() {
    const int64_t end = std::min(done_ + (most_ + 2) / 3, most_);
    for (int s = 0; s < count_; ++s) {
      const Stream& stream = streams_[s];
      for (int64_t row = done_; row < std::min(end, stream.rows); ++row) {
        const char* p = stream.base + row * stream.stride;
        for (int64_t byte = 0; byte < stream.bytes; byte += 64) __builtin_prefetch(p + byte, 0, 2);
      }
    }
    done_ = end;
  }

 private:
  struct Stream {
    const char* base;
    int64_t stride, bytes, rows;
  };
  Stream streams_[4] = {};
  int count_ = 0;
  int64_t most_ = 0, done_ = 0;
};

// --- one chunk of one key head ---

// Rows of K, then of Q, normalised if asked (Q without scale: it enters where sums are scaled anyway), and K Kᵀ, Q Kᵀ.
template <class E>
struct KeyBlock {
  using Acc = AccumulateOf<E>;

  int64_t first_token = 0;
  int rows = 0, padded = 0;  // tokens in the chunk; rounded up to the unit
  Acc *kq, *reciprocal_norm, *kk, *qk;
  Left<E> kq_left{};
  Right<E> kq_right{};

  KeyBlock(Arena& arena, const BlockSizes& s)
      : kq(arena.take<Acc>(int64_t{2} * s.chunk * s.ld_key)),
        reciprocal_norm(arena.take<Acc>(2 * s.chunk)),
        kk(arena.take<Acc>(s.if_erasing(int64_t{s.chunk} * s.ld_chunk))),
        qk(arena.take<Acc>(int64_t{s.chunk} * s.ld_chunk)),
        left_buffer_(arena.take<E>(packed_size<E>(2 * s.chunk, s.ld_key))),
        right_buffer_(arena.take<E>(packed_size<E>(2 * s.chunk, s.ld_key))) {}

  Acc* keys() const { return kq; }
  Acc* queries(const BlockSizes& s) const { return kq + int64_t{padded} * s.ld_key; }
  // First of the rows [K; Q] that read the state: keys read it in order to erase.
  int first_reader(const BlockSizes& s) const { return s.erases ? 0 : padded; }

  // transposed_keys is temporary: [key_dim, ld_chunk].
  void prepare(const DeltaRule& rule, const Primitives<E>& isa, const BlockSizes& s, int64_t sequence, int64_t chunk,
               int64_t head, E* transposed_keys) {
    const int64_t before = chunk * rule.chunk_size;
    first_token = rule.sequences.start(sequence) + before;
    rows = static_cast<int>(std::min<int64_t>(rule.chunk_size, rule.sequences.length(sequence) - before));
    padded = round_up(rows, s.unit);
    const int64_t stride = rule.heads * rule.key_dim, at = (first_token * rule.heads + head) * rule.key_dim;
    isa.load_rows(keys(), s.ld_key, padded, s.key_dim, offset(rule.k, rule.element, at), rule.element, stride, rows,
                  rule.key_dim);
    isa.load_rows(queries(s), s.ld_key, padded, s.key_dim, offset(rule.q, rule.element, at), rule.element, stride, rows,
                  rule.key_dim);
    if (rule.qk_l2norm) isa.l2norm_rows(kq, s.ld_key, reciprocal_norm, Acc(kL2NormEps), 2 * padded, s.key_dim);
    kq_left = as_left(isa, left_buffer_, kq, s.ld_key, 2 * padded, s.key_dim);
    kq_right = as_right(isa, right_buffer_, kq, s.ld_key, 2 * padded, s.key_dim);
    isa.pack_right_transposed(transposed_keys, s.ld_chunk, keys(), s.ld_key, padded, s.key_dim);
    const Right<E> kt{transposed_keys, s.ld_chunk};
    if (s.erases) isa.gemm(kk, s.ld_chunk, kq_left, kt, padded, padded, s.key_dim, 0, Part::lower_c);
    isa.gemm(qk, s.ld_chunk, rows_from(kq_left, padded), kt, padded, padded, s.key_dim, 0, Part::lower_c);
  }

 private:
  E *left_buffer_, *right_buffer_;
};

// Where the column after V lies in a block of columns begin..begin+width, or -1.
inline int weight_column(const DeltaRule& rule, int begin, int width) {
  const int at = rule.value_dim - begin;
  return rule.weighs() && at >= 0 && at < width ? at : -1;
}

// How many of the columns begin..begin+width are columns of V.
inline int value_columns(const DeltaRule& rule, int begin, int width) {
  return std::clamp(rule.value_dim - begin, 0, width);
}

// Columns begin.. of a chunk's rows of V [rows, width], with the column of ones.
template <class E>
void load_values(const DeltaRule& rule, const Primitives<E>& isa, const KeyBlock<E>& keys, int64_t value_head,
                 AccumulateOf<E>* values, int ld, int begin, int width) {
  const int64_t at = (keys.first_token * rule.value_heads + value_head) * rule.value_dim + begin;
  isa.load_rows(values, ld, keys.padded, width, offset(rule.v, rule.element, at), rule.element,
                rule.value_heads * rule.value_dim, keys.rows, value_columns(rule, begin, width));
  const int ones = weight_column(rule, begin, width);
  for (int i = 0; ones >= 0 && i < keys.rows; ++i) values[int64_t{i} * ld + ones] = 1;
}

// --- the gates of one chunk of one value head ---

// G is kept as high + low, so that its differences are exact to the last bit of the accumulate type however long the
// chunk has decayed. Rows past the end of the sequence have g = 0 and beta = 0.
template <class Acc>
struct GateBlock {
  Acc *high, *low;         // G = cumulative sum of g in the chunk
  Acc *from_start, *beta;  // e^G
  Acc* to_end;             // e^(G_C - G)
  Acc whole = 1;           // e^(G_C)

  GateBlock(Arena& arena, const BlockSizes& s)
      : high(arena.take<Acc>(s.chunk)),
        low(arena.take<Acc>(s.chunk)),
        from_start(arena.take<Acc>(s.chunk)),
        beta(arena.take<Acc>(s.chunk)),
        to_end(arena.take<Acc>(s.chunk)) {}

  template <class E>
  void prepare(const DeltaRule& rule, const Primitives<E>& isa, int64_t first_token, int rows, int padded,
               int64_t value_head) {
    constexpr double kForgetsAll = -1e4;  // e^-10000 is 0 in either type; keeps -inf - -inf out of the differences
    const Acc* gate = static_cast<const Acc*>(rule.g);
    double total = 0;
    for (int i = 0; i < padded; ++i) {
      const int64_t at = (first_token + i) * rule.value_heads + value_head;
      if (gate != nullptr && i < rows) total += gate[at] < kForgetsAll ? kForgetsAll : double(gate[at]);
      high[i] = static_cast<Acc>(total);
      low[i] = static_cast<Acc>(total - double(high[i]));
      from_start[i] = high[i] + low[i];
    }
    const Acc end_high = high[padded - 1], end_low = low[padded - 1];
    for (int i = 0; i < padded; ++i) to_end[i] = (end_high - high[i]) + (end_low - low[i]);
    isa.exp_row(from_start, from_start, padded);
    isa.exp_row(to_end, to_end, padded);
    whole = from_start[padded - 1];
    load_beta(rule, isa, first_token, rows, padded, value_head);
  }

 private:
  template <class E>
  void load_beta(const DeltaRule& rule, const Primitives<E>& isa, int64_t first_token, int rows, int padded,
                 int64_t value_head) {
    if (rule.beta == nullptr) {
      for (int i = 0; i < padded; ++i) beta[i] = i < rows ? 1 : 0;
      return;
    }
    const void* from = offset(rule.beta, rule.beta_element, first_token * rule.value_heads + value_head);
    isa.load_rows(beta, 1, rows, 1, from, rule.beta_element, rule.value_heads, rows, 1);
    for (int i = rows; i < padded; ++i) beta[i] = 0;
  }
};

}  // namespace memattn::cpu
