// Sparse attention where many queries name large blocks: a chunk of queries visits the blocks that any of them names, in
// ascending order, each with the rows that name it gathered for matrix products. A row's sums do not depend on the
// others of its chunk.
#pragma once

#include "sparse_attention.h"

#include <tuple>

namespace memattn::cpu {

inline constexpr int kChunkRows = 256;  // rows of a chunk, over the group
inline constexpr int kTileRows = 128;   // of them in a product

// A query of the chunk, and the entry of its list by which it names a block.
struct NamedBlock {
  int32_t block, query, entry;

  bool operator<(const NamedBlock& other) const {
    return std::tie(block, query, entry) < std::tie(other.block, other.query, other.entry);
  }
};

// Sizes of blocks, padded to whole tiles of the products.
struct BlockSizes {
  int unit, group, queries, rows;  // of a chunk, rows padded
  int key_dim, value_dim, ld_key, ld_value, ld_scores;

  BlockSizes(const SparseAttention& a, int block_unit)
      : unit(block_unit),
        group(static_cast<int>(a.group())),
        queries(std::max(1, kChunkRows / group)),
        rows(round_up(queries * group, unit)),
        key_dim(round_up(a.key_dim, unit)),
        value_dim(round_up(a.value_dim, unit)),
        ld_key(leading(key_dim)),
        ld_value(leading(value_dim)),
        ld_scores(leading(kTokens)) {}

  int tile_rows() const { return round_up(std::max(1, kTileRows / group) * group, unit); }
  int tile_queries() const { return std::max(1, kTileRows / group); }
};

// Queries first..last of a sequence, for one key head.
struct QueryChunk {
  int64_t sequence, key_head, first, last;  // rows of q
};

inline std::vector<QueryChunk> query_chunks(const SparseAttention& a, int queries) {
  std::vector<QueryChunk> chunks;
  for (int64_t n = 0; n < a.queries.count(); ++n) {
    if (!a.by_blocks(n)) continue;
    for (int64_t h = 0; h < a.key_heads; ++h) {
      for (int64_t first = a.queries.start(n); first < a.queries.end(n); first += queries) {
        chunks.push_back({n, h, first, std::min(first + queries, a.queries.end(n))});
      }
    }
  }
  return chunks;
}

// What the queries of a chunk name, sorted by blocks; returns how many.
inline int64_t sort_named(const SparseAttention& a, const QueryChunk& chunk, NamedBlock* named) {
  int64_t count = 0;
  for (int64_t row = chunk.first; row < chunk.last; ++row) {
    const int32_t* list = a.indices + a.list(row, chunk.key_head) * a.entries;
    const int64_t used = a.used(row, chunk.key_head);
    for (int64_t e = 0; e < used; ++e) {
      const TokenRange tokens = a.tokens(row, list[e]);
      if (tokens.begin == tokens.end) continue;
      named[count++] = {list[e], static_cast<int32_t>(row - chunk.first), static_cast<int32_t>(e)};
    }
  }
  std::sort(named, named + count);
  return count;
}

// A tile of tokens of a block: keys as right operand kᵀ, and the rows of keys and values.
template <class E>
struct BlockTile {
  using Acc = AccumulateOf<E>;
  Acc *keys, *values;  // [kTokens, K], [kTokens, V]
  E* transposed;       // [K, kTokens]
  int* place;          // [kTokens]: which of the block's tokens; those without a page are left out
  int count = 0, width = 0;

  BlockTile(Arena& arena, const BlockSizes& s)
      : keys(arena.take<Acc>(int64_t{kTokens} * s.ld_key)),
        values(arena.take<Acc>(int64_t{kTokens} * s.ld_value)),
        transposed(arena.take<E>(int64_t{s.key_dim} * s.ld_scores)),
        place(arena.take<int>(kTokens)) {}

  // The next of the tokens that begin at `block`; false at their end.
  bool load(const SparseAttention& a, const Primitives<E>& isa, const BlockSizes& s, const QueryChunk& chunk,
            int64_t block, TokenRange& tokens) {
    TokenTile tile;
    while (tile.tokens < kTokens && tokens.begin < tokens.end) {
      const int64_t at = tokens.begin;
      const int before = tile.tokens;
      a.memory.take(tile, chunk.sequence, tokens, 0);
      for (int j = before; j < tile.tokens; ++j) place[j] = static_cast<int>(at - block) + j - before;
    }
    count = tile.tokens;
    width = round_up(count, s.unit);
    copy(keys, s.ld_key, s.key_dim, isa, a.k, a, chunk.key_head, a.key_dim, tile);
    copy(values, s.ld_value, s.value_dim, isa, a.v, a, chunk.key_head, a.value_dim, tile);
    isa.pack_right_transposed(transposed, s.ld_scores, keys, s.ld_key, width, s.key_dim);
    return count > 0;
  }

  // How many of the tokens a query sees that sees the first `seen` of the block.
  int visible(int64_t seen) const {
    if (count == 0 || place[count - 1] < seen) return count;
    return static_cast<int>(std::lower_bound(place, place + count, seen) - place);
  }

 private:
  void copy(Acc* x, int ld, int dim, const Primitives<E>& isa, const void* base, const SparseAttention& a,
            int64_t key_head, int columns, const TokenTile& tile) const {
    int at = 0;
    for (int i = 0; i < tile.runs; at += tile.run[i++].count) {
      const bool last = i + 1 == tile.runs;
      isa.load_rows(x + int64_t{at} * ld, ld, last ? width - at : tile.run[i].count, dim,
                    offset(base, a.element, (tile.run[i].row * a.key_heads + key_head) * columns), a.element,
                    a.key_heads * columns, tile.run[i].count, columns);
    }
  }
};

// What a row has for tokens that it does not see becomes `value`.
template <class Acc>
void hide_beyond(Acc* x, int ld, const int* seen, int rows, int width, Acc value) {
  for (int i = 0; i < rows; ++i) std::fill(x + int64_t{i} * ld + seen[i], x + int64_t{i} * ld + width, value);
}

// task(chunk, temporaries) for all chunks, with temporaries of each thread made by make(arena) and then prepared.
template <class E, class Make, class Prepare, class Task>
void for_each_chunk(const SparseAttention& a, const Primitives<E>& isa, const BlockSizes& s, int64_t threads,
                    const Make& make, const Prepare& prepare, const Task& task) {
  const std::vector<QueryChunk> chunks = query_chunks(a, s.queries);
  const int64_t count = static_cast<int64_t>(chunks.size());
  if (count == 0) return;
  threads = std::min(threads, count);
  const size_t bytes = bytes_of(make);
  Scratch scratch(bytes * threads);
  std::vector<decltype(make(std::declval<Arena&>()))> temporaries;
  for (int64_t i = 0; i < threads; ++i) {
    Arena arena(scratch.data() + i * bytes);
    temporaries.push_back(make(arena));
    prepare(temporaries.back());
  }
  parallel_tasks(count, threads, isa, [&](int64_t i, int64_t worker) {
    task(chunks[count - 1 - i], temporaries[worker]);  // the last see most under a causal mask
  });
}

// visit(first token of the block, named, end) for all tiles of all blocks that a chunk names; `named` to `end` name it.
template <class E, class Visit>
void for_each_tile(const SparseAttention& a, const Primitives<E>& isa, const BlockSizes& s, const QueryChunk& chunk,
                   NamedBlock* named, BlockTile<E>& tile, const Visit& visit) {
  const NamedBlock* const end = named + sort_named(a, chunk, named);
  for (const NamedBlock *first = named, *last; first != end; first = last) {
    last = std::find_if(first, end, [&](const NamedBlock& x) { return x.block != first->block; });
    TokenRange tokens = {int64_t{first->block} * a.unit, 0};
    for (const NamedBlock* x = first; x != last; ++x) {
      tokens.end = std::max(tokens.end, a.tokens(chunk.first + x->query, x->block).end);
    }
    const int64_t block = tokens.begin;
    while (tokens.begin < tokens.end && tile.load(a, isa, s, chunk, block, tokens)) visit(block, first, last);
  }
}

// Rows of the next queries that see any of the tile: which of the chunk, how many of its tokens they see, by which entry.
// Returns how many. A query that names the block twice is in two tiles of rows.
template <class E>
int gather_rows(const SparseAttention& a, const BlockSizes& s, const QueryChunk& chunk, const BlockTile<E>& tile,
                int64_t block, const NamedBlock*& named, const NamedBlock* end, int* row, int* seen, int* entry) {
  int rows = 0;
  for (; named != end && rows / s.group < s.tile_queries(); ++named) {
    if (rows > 0 && row[rows - 1] / s.group == named->query) break;
    const int visible = tile.visible(a.tokens(chunk.first + named->query, named->block).end - block);
    for (int m = 0; m < s.group && visible > 0; ++m, ++rows) {
      row[rows] = named->query * s.group + m;
      seen[rows] = visible;
      entry[rows] = named->entry;
    }
  }
  return rows;
}

// Rows of a left operand one after the other, padded with zeros.
template <class E>
void copy_rows(E* to, const E* from, int ld, int width, const int* row, int rows, int padded) {
  for (int i = 0; i < rows; ++i) std::copy_n(from + int64_t{row[i]} * ld, width, to + int64_t{i} * ld);
  for (int i = rows; i < padded; ++i) std::fill_n(to + int64_t{i} * ld, width, E{});
}

}  // namespace memattn::cpu
