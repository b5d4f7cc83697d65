// What the passes of rat_attention share: a call's arguments, tiles of tokens, and the scan of a tile. Mathematics:
// python/memattn/ops/rat_attention.py.
//
// A tile of tokens never crosses a place where the running state restarts, and its ends depend on positions alone, so that
// bits do not depend on how a call was split among threads.
#pragma once

#include <algorithm>
#include <vector>

#include "attention_forward.h"
#include "isa/scan_rows.h"
#include "rotary.h"

namespace memattn::cpu {

inline constexpr int kTokens = 128;  // of a tile, at most

// The op's arguments and sizes, checked.
struct Rat {
  SequenceLayout tokens, entries;  // entries: rows of what the state held and of what the tokens leave
  SequenceLayout local;            // the same of the rows that a window and a prefix keep of every token
  std::vector<int64_t> start;      // position of each sequence's first token
  int64_t heads, key_heads;
  int64_t held, entry_rows;        // entries of a sequence in the initial state; rows of all of them per batch row
  int64_t held_local, local_rows;  // local rows: the same
  int dim;
  Element element;
  const void *q, *k, *v, *g;              // [tokens, key_heads or heads, dim] of `element`; g in the accumulate type
  const void *keys, *values;              // [sequences, held, heads, dim] or null
  const void *running_key, *running_value;  // [sequences, heads, dim] in the accumulate type, or null
  const void *local_keys, *local_values;    // [sequences, held_local, heads, dim] in order of position, or null
  int64_t restart, stride, unit, window, prefix;
  double rope_base, scale;
  bool tile_heads;

  int64_t group() const { return heads / key_heads; }
  int64_t head(int64_t key_head, int64_t member) const {
    return tile_heads ? member * key_heads + key_head : key_head * group() + member;
  }
  int64_t key_head(int64_t h) const { return tile_heads ? h % key_heads : h / group(); }
  int64_t row(int64_t head) const { return head * dim; }
  int64_t width() const { return heads * dim; }
  bool starts_fresh(int64_t n) const { return restart > 0 && start[n] % restart == 0; }
  int64_t entries_before(int64_t n) const { return std::min(start[n] / stride, held); }
  bool has_local() const { return window > 1 || prefix > 0; }
  int64_t local_before(int64_t n) const { return std::min(start[n], held_local); }
  // Local row of position 0, of those that are not the prefix.
  int64_t local_origin(int64_t n) const { return local_before(n) - start[n]; }
  int64_t local_row(int64_t n, int64_t p) const { return local.start(n) + p + local_origin(n); }
};

struct RatSettings {
  int64_t restart, stride, unit, window, prefix;
  double rope_base;
  bool tile_heads;
  double scale;
};

using MaybeTensor = std::optional<Tensor>;

Rat read_rat(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const MaybeTensor& keys,
             const MaybeTensor& values, const MaybeTensor& running_key, const MaybeTensor& running_value,
             const MaybeTensor& local_keys, const MaybeTensor& local_values, const MaybeTensor& length,
             const MaybeTensor& cu_seqlens, const RatSettings& settings);

// The entries as the keys that `queries` [tokens, heads, dim] see.
Attention entry_attention(const Rat& rat, const void* queries, const void* keys, const void* values);

// The local rows as the keys that they see: those before the query's own. The grid's entries leave these out.
Attention local_attention(const Rat& rat, const void* queries, const void* keys, const void* values);

// Rows first..last of a sequence; `fresh`: the running state does not come from the tile before.
struct TokenTile {
  int64_t sequence, first, last;
  bool fresh;
};

// Tiles of sequence n in order.
inline std::vector<TokenTile> token_tiles(const Rat& rat, int64_t n) {
  std::vector<TokenTile> tiles;
  const int64_t length = rat.tokens.length(n), restart = rat.restart;
  const bool whole = restart > 0 && restart <= kTokens;  // whole chunks in a tile
  const int64_t span = whole ? kTokens / restart * restart : kTokens;
  for (int64_t at = 0; at < length;) {
    const int64_t p = rat.start[n] + at, within = restart > 0 && !whole ? p % restart : p;
    int64_t to = at + span - within % span;
    if (restart > 0 && !whole) to = std::min(to, at + restart - within);
    to = std::min(to, length);
    tiles.push_back({n, at, to, at == 0 || whole || (restart > 0 && within == 0)});
    at = to;
  }
  return tiles;
}

template <class Acc>
Rotary<Acc> rotary_of(const Rat& rat) {
  std::vector<typename Rotary<Acc>::Span> spans;
  for (int64_t n = 0; n < rat.tokens.count(); ++n) {
    if (rat.tokens.length(n) == 0) continue;
    spans.push_back({rat.start[n] / rat.unit, (rat.start[n] + rat.tokens.length(n) - 1) / rat.unit});
  }
  return {rat.rope_base, rat.dim, std::move(spans)};
}

// Running key and value of one head.
template <class Acc>
struct Running {
  Acc *key, *value;  // [dim]
};

// One head's tokens of a tile and the running state before and after each of them.
template <class E>
struct ScanRows {
  using Acc = AccumulateOf<E>;
  int ld, dim, padded;
  Acc *k, *v;              // [kTokens, dim] what is written
  Acc *keys, *values;      // [kTokens + 1, dim] row i: after token i - 1
  Acc* gates;              // [kTokens, 3, dim]

  ScanRows(Arena& arena, int dim, int padded_dim, int leading_dim)
      : ld(leading_dim),
        dim(dim),
        padded(padded_dim),
        k(arena.take<Acc>(int64_t{kTokens} * ld)),
        v(arena.take<Acc>(int64_t{kTokens} * ld)),
        keys(arena.take<Acc>(int64_t{kTokens + 1} * ld)),
        values(arena.take<Acc>(int64_t{kTokens + 1} * ld)),
        gates(arena.take<Acc>(int64_t{kTokens} * 3 * ld)) {}

  scan::Gate<Acc> gate(int64_t i) const {
    Acc* row = gates + i * 3 * ld;
    return {row, row + ld, row + 2 * ld};
  }
  Acc* key(int64_t i) const { return keys + i * ld; }
  Acc* value(int64_t i) const { return values + i * ld; }

  void clear_padding() const {
    for (int64_t i = 0; i <= kTokens; ++i) {
      std::fill(key(i) + dim, key(i) + padded, Acc(0));
      std::fill(value(i) + dim, value(i) + padded, Acc(0));
    }
  }

  // The state, of `states` = keys or values, that token i at position p + i starts from: zero where the average restarts.
  const Acc* before(const Rat& rat, const Acc* states, int64_t p, int64_t i) const {
    static constexpr Acc zeros[256] = {};
    return rat.restart > 0 && (p + i) % rat.restart == 0 ? zeros : states + i * ld;
  }

  // Runs the tile from `running`, which becomes the state after it.
  void run(const Rat& rat, const Primitives<E>& isa, const TokenTile& tile, int64_t h, Running<Acc> running) const {
    const auto& table = scan::row_table<Acc>();
    const int rows = static_cast<int>(tile.last - tile.first);
    const int64_t token = rat.tokens.start(tile.sequence) + tile.first, p = rat.start[tile.sequence] + tile.first;
    load_head(isa, k, ld, rows, padded, rat.k, rat.element, token, rat.key_heads, rat.key_head(h), rows, dim);
    load_head(isa, v, ld, rows, padded, rat.v, rat.element, token, rat.heads, h, rows, dim);
    std::copy_n(running.key, dim, key(0));
    std::copy_n(running.value, dim, value(0));
    const Acc* g = static_cast<const Acc*>(rat.g) + token * rat.width() + rat.row(h);
    for (int64_t i = 0; i < rows; ++i) {
      const scan::Gate<Acc> now = gate(i);
      table.gate(now, g + i * rat.width(), true, dim);
      table.advance(key(i + 1), before(rat, keys, p, i), now, k + i * ld, dim);
      table.advance(value(i + 1), before(rat, values, p, i), now, v + i * ld, dim);
    }
    std::copy_n(key(rows), dim, running.key);
    std::copy_n(value(rows), dim, running.value);
  }
};

// The state that a tile without predecessor starts from.
template <class Acc>
void start_running(const Rat& rat, const TokenTile& tile, int64_t h, Running<Acc> running) {
  if (tile.first == 0 && rat.running_key && !rat.starts_fresh(tile.sequence)) {
    const int64_t at = tile.sequence * rat.width() + rat.row(h);
    std::copy_n(static_cast<const Acc*>(rat.running_key) + at, rat.dim, running.key);
    std::copy_n(static_cast<const Acc*>(rat.running_value) + at, rat.dim, running.value);
  } else {
    std::fill_n(running.key, rat.dim, Acc(0));
    std::fill_n(running.value, rat.dim, Acc(0));
  }
}

}  // namespace memattn::cpu
