// What the backward of the chunk engine keeps per chunk and per thread. Symbols as in gated_delta_rule_backward.cpp.
#pragma once

#include "gated_delta_rule.h"

namespace memattn::cpu {

// What the forward scan leaves for one value head of one chunk.
template <class E>
struct RebuiltHead {
  using Acc = AccumulateOf<E>;
  GateBlock<Acc> gates;
  Acc *solve, *error, *fresh, *state;  // T, E, Vn, S0
  E *solve_left_buffer, *solve_right_buffer;
  Left<E> solve_left{};
  Right<E> solve_right{};

  RebuiltHead(Arena& arena, const BlockSizes& s)
      : gates(arena, s),
        solve(arena.take<Acc>(s.if_erasing(int64_t{s.chunk} * s.ld_chunk))),
        error(arena.take<Acc>(s.if_erasing(int64_t{s.chunk} * s.ld_value))),
        fresh(arena.take<Acc>(int64_t{s.chunk} * s.ld_value)),
        state(arena.take<Acc>(int64_t{s.key_dim} * s.ld_value)),
        solve_left_buffer(arena.take<E>(s.if_erasing(packed_size<E>(s.chunk, s.ld_chunk)))),
        solve_right_buffer(arena.take<E>(s.if_erasing(packed_size<E>(s.chunk, s.ld_chunk)))) {}
};

template <class E>
struct RebuiltChunk {
  KeyBlock<E> keys;
  std::vector<RebuiltHead<E>> heads;
  int64_t solve_slot = 0;

  RebuiltChunk(Arena& arena, const BlockSizes& s, int64_t value_heads) : keys(arena, s) {
    for (int64_t i = 0; i < value_heads; ++i) heads.emplace_back(arena, s);
  }
};

// What the reverse scan has in hand for one value head of one chunk. An item that is one task has one for all chunks.
template <class E>
struct ReverseHead {
  using Acc = AccumulateOf<E>;
  Acc *decay, *attention;  // e^{Gi-Gj}, A
  Acc* grads;              // dX over dO [2 C, V]
  Acc* row_factor;         // -beta e^G over scale e^G [2 C]
  Acc* dstate;             // dS1 as it was when the scan passed; only where chunks are shared
  E* attention_buffer;
  Right<E> attention_right{};

  ReverseHead(Arena& arena, const BlockSizes& s, bool shared)
      : decay(arena.take<Acc>(int64_t{s.chunk} * s.ld_chunk)),
        attention(arena.take<Acc>(int64_t{s.chunk} * s.ld_chunk)),
        grads(arena.take<Acc>(int64_t{2} * s.chunk * s.ld_value)),
        row_factor(arena.take<Acc>(2 * s.chunk)),
        dstate(arena.take<Acc>(shared ? int64_t{s.key_dim} * s.ld_value : 0)),
        attention_buffer(arena.take<E>(packed_size<E>(s.chunk, s.ld_chunk))) {}
};

template <class E>
struct BackwardTemporaries {
  using Acc = AccumulateOf<E>;
  E *key_value, *grads_operand, *grads_right, *chunk_value;  // operands [K or V, V or K], [2 C, V] twice, [C, V]
  E *chunk_chunk, *chunk_chunk_too;                          // operands [C, C]
  Acc *values, *inter, *dkq;                                 // [C, V], [2 C, K] twice
  Acc *da, *dxv, *m1, *n2;                                   // [C, C]
  Acc *row, *dg, *dbeta;                                     // [2 C], [C], [C]; row also [K]

  BackwardTemporaries(Arena& arena, const BlockSizes& s) {
    const int64_t wide = std::max(s.ld_key, s.ld_value), tall = std::max(std::max(s.key_dim, s.value_dim), s.chunk);
    key_value = arena.take<E>(tall * std::max<int64_t>(wide, s.ld_chunk));
    grads_operand = arena.take<E>(packed_size<E>(2 * s.chunk, s.ld_value));
    grads_right = arena.take<E>(int64_t{2} * s.chunk * s.ld_value);
    chunk_value = arena.take<E>(int64_t{s.chunk} * s.ld_value);
    chunk_chunk = arena.take<E>(packed_size<E>(s.chunk, s.ld_chunk));
    chunk_chunk_too = arena.take<E>(packed_size<E>(s.chunk, s.ld_chunk));
    values = arena.take<Acc>(int64_t{s.chunk} * s.ld_value);
    inter = arena.take<Acc>(int64_t{2} * s.chunk * s.ld_key);
    dkq = arena.take<Acc>(int64_t{2} * s.chunk * s.ld_key);
    for (Acc** block : {&da, &m1}) *block = arena.take<Acc>(int64_t{s.chunk} * s.ld_chunk);
    for (Acc** block : {&dxv, &n2}) *block = arena.take<Acc>(s.if_erasing(int64_t{s.chunk} * s.ld_chunk));
    row = arena.take<Acc>(std::max(2 * s.chunk, s.key_dim));
    dg = arena.take<Acc>(s.chunk);
    dbeta = arena.take<Acc>(s.chunk);
  }
};

}  // namespace memattn::cpu
