// The AMX tile instructions in software, so that the AMX table can be checked on a processor without them. Included by
// csrc/cpu/isa/amx.cpp in test builds, after <immintrin.h>; it replaces the intrinsics by name. Misuse ends the
// process.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {

struct Tile {
  uint8_t bytes[16][64];
};
struct State {
  bool configured = false;
  uint16_t bytes_per_row[8];
  uint8_t rows[8];
  Tile tiles[8];
};
inline thread_local State state;

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "AMX emulation: %s\n", what);
  std::abort();
}

inline void load_config(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  require(bytes[0] == 1, "palette must be 1");
  std::memcpy(state.bytes_per_row, bytes + 16, 16);
  std::memcpy(state.rows, bytes + 48, 8);
  for (int t = 0; t < 8; ++t) {
    require(state.rows[t] <= 16 && state.bytes_per_row[t] <= 64, "a tile is at most 16 rows of 64 bytes");
    std::memset(&state.tiles[t], 0, sizeof(Tile));
  }
  state.configured = true;
}

inline void release() { state.configured = false; }

inline void zero(int t) {
  require(state.configured, "a tile is used outside enter and leave");
  std::memset(&state.tiles[t], 0, sizeof(Tile));
}

inline void load(int t, const void* base, int64_t stride) {
  zero(t);
  for (int r = 0; r < state.rows[t]; ++r) {
    std::memcpy(state.tiles[t].bytes[r], static_cast<const uint8_t*>(base) + r * stride, state.bytes_per_row[t]);
  }
}

inline void store(int t, void* base, int64_t stride) {
  require(state.configured, "a tile is used outside enter and leave");
  for (int r = 0; r < state.rows[t]; ++r) {
    std::memcpy(static_cast<uint8_t*>(base) + r * stride, state.tiles[t].bytes[r], state.bytes_per_row[t]);
  }
}

inline float pair_element(const Tile& tile, int row, int dword, int half) {
  uint16_t high;
  std::memcpy(&high, &tile.bytes[row][4 * dword + 2 * half], 2);
  const uint32_t bits = uint32_t{high} << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// C [m, n] += A [m, k] B [k, n] over pairs, as in the instruction set reference.
inline void dot_bf16(int c, int a, int b) {
  require(state.configured, "a tile is used outside enter and leave");
  require(state.bytes_per_row[a] / 4 == state.rows[b], "the pairs of A must be the rows of B");
  for (int m = 0; m < state.rows[c]; ++m) {
    for (int k = 0; k < state.bytes_per_row[a] / 4; ++k) {
      for (int n = 0; n < state.bytes_per_row[c] / 4; ++n) {
        float sum;
        std::memcpy(&sum, &state.tiles[c].bytes[m][4 * n], 4);
        for (int half = 0; half < 2; ++half) {
          sum += pair_element(state.tiles[a], m, k, half) * pair_element(state.tiles[b], k, n, half);
        }
        std::memcpy(&state.tiles[c].bytes[m][4 * n], &sum, 4);
      }
    }
  }
}

}  // namespace amx_emulation

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) amx_emulation::load_config(config)
#define _tile_release() amx_emulation::release()
#define _tile_zero(t) amx_emulation::zero(t)
#define _tile_loadd(t, base, stride) amx_emulation::load(t, base, stride)
#define _tile_stored(t, base, stride) amx_emulation::store(t, base, stride)
#define _tile_dpbf16ps(c, a, b) amx_emulation::dot_bf16(c, a, b)
