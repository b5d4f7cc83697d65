// What the forward and the backward of sparse attention share: the arguments, and the tokens of a list by tiles.
#pragma once

#include "../common/sequences.h"
#include "blocks.h"
#include "parallel.h"
#include "results.h"

namespace memattn::cpu {

inline constexpr int kTokens = 64;  // of a tile

// Consecutive tokens of one entry of a list, in consecutive rows of memory.
struct TokenRun {
  int64_t row;
  int count, entry;
};

struct TokenRange {
  int64_t begin, end;
};

// Up to kTokens tokens.
struct TokenTile {
  int runs = 0, tokens = 0;
  TokenRun run[kTokens];

  void add(TokenRun more) {
    run[runs++] = more;
    tokens += more.count;
  }
};

// Where token j of sequence n lies: in the rows of the sequence, or on page j / page_size of its line of the table.
struct TokenMemory {
  SequenceLayout rows;
  bool paged;
  const int32_t* page_table;  // [sequences, max_pages]
  int64_t page_size, max_pages, pages;

  int64_t length(int64_t n) const { return paged ? page_size * max_pages : rows.length(n); }

  // From token `begin` on, at most up to `end`; row -1: nothing is there.
  TokenRun run(int64_t n, int64_t begin, int64_t end) const {
    if (!paged) return {rows.start(n) + begin, static_cast<int>(end - begin), 0};
    const int64_t page = page_table[n * max_pages + begin / page_size], within = begin % page_size;
    const int count = static_cast<int>(std::min(end - begin, page_size - within));
    return {page < 0 || page >= pages ? -1 : page * page_size + within, count, 0};
  }

  // Moves the first tokens of a range, those of one run, into the tile.
  void take(TokenTile& tile, int64_t n, TokenRange& tokens, int entry) const {
    TokenRun next = run(n, tokens.begin, std::min(tokens.end, tokens.begin + (kTokens - tile.tokens)));
    tokens.begin += next.count;
    next.entry = entry;
    if (next.row >= 0) tile.add(next);
  }
};

// The op's arguments and sizes, checked.
struct SparseAttention {
  SequenceLayout queries;
  TokenMemory memory;
  int64_t heads, key_heads, list_heads, entries, unit;
  int key_dim, value_dim;
  const void *q, *k, *v;  // [rows, heads or key_heads, key_dim or value_dim] of `element`
  Element element;
  const int32_t* indices;       // [query rows, list_heads, entries]
  const int32_t* counts;        // [query rows, list_heads], or null
  std::vector<int64_t> last;    // last position that each query row sees, or empty
  const void* bias;             // [query rows, key_heads, entries] in the accumulate type, or null
  const void* sink;             // [heads] in the accumulate type, or null
  double scale;
  std::vector<int64_t> sequence;  // of each query row

  int64_t group() const { return heads / key_heads; }
  int64_t rows() const { return static_cast<int64_t>(sequence.size()); }

  int64_t list(int64_t row, int64_t key_head) const { return row * list_heads + (list_heads == 1 ? 0 : key_head); }
  int64_t used(int64_t row, int64_t key_head) const {
    return counts ? std::clamp<int64_t>(counts[list(row, key_head)], 0, entries) : entries;
  }
  // Tokens of what an entry of the list of this query row names, as far as it sees them.
  TokenRange tokens(int64_t row, int64_t index) const {
    const int64_t length = memory.length(sequence[row]);
    const int64_t seen = last.empty() ? length : std::clamp<int64_t>(last[row], -1, length - 1) + 1;
    if (index < 0 || index >= (seen + unit - 1) / unit) return {0, 0};
    return {index * unit, std::min(index * unit + unit, seen)};
  }

  // Whether the queries of a sequence are so many, and blocks so large, that products pay: blocks are then visited in
  // turn, each with all the queries that name it. Else lists are, token by token.
  bool by_blocks(int64_t n) const { return unit >= 16 && queries.length(n) >= 16; }
  std::vector<int64_t> rows_by_lists() const {
    std::vector<int64_t> chosen;
    for (int64_t row = 0; row < rows(); ++row) {
      if (!by_blocks(sequence[row])) chosen.push_back(row);
    }
    return chosen;
  }

  template <class Acc>
  const Acc* bias_of(int64_t row, int64_t key_head) const {
    return bias ? static_cast<const Acc*>(bias) + (row * key_heads + key_head) * entries : nullptr;
  }
};

SparseAttention read_sparse_arguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                      const Tensor& indices, const std::optional<Tensor>& counts,
                                      const std::optional<Tensor>& q_positions, const std::optional<Tensor>& bias,
                                      const std::optional<Tensor>& sink, const std::optional<Tensor>& page_table,
                                      const std::optional<Tensor>& cu_seqlens_q,
                                      const std::optional<Tensor>& cu_seqlens_k, int64_t unit, double scale);

// Forward of the sequences that go by blocks.
void attend_blocks(const SparseAttention& a, ScalarType type, void* o, void* lse);

struct SparseSizes {
  int unit, group, key_dim, value_dim;  // dims padded to whole vectors
  int ld_key, ld_value, ld_scores;

  SparseSizes(const SparseAttention& a, int block_unit)
      : unit(block_unit),
        group(static_cast<int>(a.group())),
        key_dim(round_up(a.key_dim, 16)),
        value_dim(round_up(a.value_dim, 16)),
        ld_key(leading(key_dim)),
        ld_value(leading(value_dim)),
        ld_scores(leading(kTokens)) {}
};

// Passes over the tokens that entries begin..end of a list name, in their order.
class TokenCursor {
 public:
  TokenCursor(const SparseAttention& a, int64_t row, int64_t key_head, int64_t begin, int64_t end)
      : a_(a), row_(row), list_(a.indices + a.list(row, key_head) * a.entries), entry_(begin - 1), end_(end) {}

  // The next tile; without tokens at the end.
  void fill(TokenTile& tile) {
    tile.runs = tile.tokens = 0;
    while (tile.tokens < kTokens && (tokens_.begin < tokens_.end || advance())) {
      a_.memory.take(tile, a_.sequence[row_], tokens_, static_cast<int>(entry_));
    }
  }

 private:
  bool advance() {
    while (++entry_ < end_) {
      tokens_ = a_.tokens(row_, list_[entry_]);
      if (tokens_.begin < tokens_.end) return true;
    }
    entry_ = end_;
    return false;
  }

  const SparseAttention& a_;
  const int64_t row_;
  const int32_t* list_;
  int64_t entry_, end_;
  TokenRange tokens_{0, 0};
};

// One head's rows of k or v: copied by tiles into x [kTokens, ld], while the same rows of the next tile are asked for.
template <class E>
struct HeadRows {
  const Primitives<E>& isa;
  const void* base;
  Element element;
  int64_t stride, first;  // between rows; of the head
  int dim, width, ld;

  HeadRows(const Primitives<E>& table, const SparseAttention& a, const void* from, int64_t key_head, int columns,
           int padded, int leading_dim)
      : isa(table),
        base(from),
        element(a.element),
        stride(a.key_heads * columns),
        first(key_head * columns),
        dim(columns),
        width(padded),
        ld(leading_dim) {}

  void load(AccumulateOf<E>* x, const TokenTile& tile, const TokenTile& next) const {
    int at = 0, ahead = 0, row = 0;
    for (int i = 0; i < tile.runs; ++i) {
      const TokenRun& run = tile.run[i];
      for (int j = 0; j < run.count && ahead < next.runs; ++j) {
        prefetch(next.run[ahead].row + row);
        if (++row == next.run[ahead].count) row = 0, ++ahead;
      }
      isa.load_rows(x + int64_t{at} * ld, ld, 0, width, offset(base, element, run.row * stride + first), element,
                    stride, run.count, dim);
      at += run.count;
    }
  }

 private:
  void prefetch(int64_t row) const {
    const char* from = static_cast<const char*>(offset(base, element, row * stride + first));
    for (int64_t at = 0; at < dim * bytes_of(element); at += 64) __builtin_prefetch(from + at, 0, 2);
  }
};

// Rows of the heads of a group at a query row, from a tensor [rows, heads, dim].
template <class E>
void load_group(const Primitives<E>& isa, AccumulateOf<E>* x, int ld, int width, const void* base,
                const SparseAttention& a, int64_t row, int64_t key_head, int dim) {
  const int group = static_cast<int>(a.group());
  const void* from = offset(base, a.element, (row * a.heads + key_head * group) * dim);
  isa.load_rows(x, ld, group, width, from, a.element, dim, group, dim);
}

// The bias of the tokens of a tile, as what a key takes away from its scores.
template <class Acc>
void load_bias(Acc* taken, const TokenTile& tile, const Acc* bias) {
  for (int i = 0; i < tile.runs; ++i) taken = std::fill_n(taken, tile.run[i].count, -bias[tile.run[i].entry]);
}

}  // namespace memattn::cpu
