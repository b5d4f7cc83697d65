// bf16 operands with AMX tiles: products of 32 x 32 blocks of C in four accumulator tiles, everything else as in the
// avx512_bf16 table. All eight tiles are 16 rows of 64 bytes: 16 x 16 floats of C, 16 x 32 bf16 of A, and 16 pairs of
// rows x 16 columns of B, which is exactly the layout of a right operand.
//
// The tile state belongs to a thread: `enter` configures it at the start of a task and `leave` releases it. Permission
// is asked for once per process, where the processor's features are detected.
#include "primitives.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#if defined(MEMATTN_AMX_EMULATION)
#include MEMATTN_AMX_EMULATION  // tests replace the tile instructions by software
#endif

#if defined(__clang__)
#pragma clang attribute push(                                                                                 \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns inside its own AVX-512 headers
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif

namespace memattn::cpu {
namespace {

#include "vec_avx512.inl.h"
#include "kernels.inl.h"
#include "bf16_avx512.inl.h"

constexpr int kTile = 16, kBlock = 2 * kTile;
constexpr int kMaxDepth = 256;  // the longest k of a product: a head dimension, or two chunks

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void configure_tiles() {
  static constexpr TileConfig config;
  _tile_loadconfig(&config);
}

void release_tiles() { _tile_release(); }

// Rows of A with consecutive pairs, as a tile wants them. Only the transpose of a right operand has them apart; its
// pairs are the dwords of a 16 x 16 transpose.
const bf16* contiguous_rows(Left<bf16> a, int first_row, int begin, int end, bf16* buffer, int64_t* row) {
  if (a.step == 2) {
    *row = a.row;
    return a.data + first_row * a.row;
  }
  *row = kMaxDepth;
  for (int i = 0; i < kBlock; i += kTile) {
    for (int j = begin; j < end; j += kBlock) {
      __m512 block[16];
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r)
        block[r] = _mm512_loadu_ps(a.data + (first_row + i) * a.row + (j / 2 + r) * a.step);
      Avx512Vec::transpose(block);
#pragma GCC unroll 16
      for (int r = 0; r < kTile; ++r) _mm512_storeu_ps(buffer + int64_t{i + r} * kMaxDepth + j, block[r]);
    }
  }
  return buffer;
}

void scale_block(float* c, const float* c0, int ldc, float keep) {
  for (int i = 0; i < kBlock; ++i) {
    for (int j = 0; j < kBlock; j += Avx512Vec::lanes) {
      const int64_t at = int64_t{i} * ldc + j;
      Avx512Vec::store(c + at, Avx512Vec::mul(Avx512Vec::broadcast(keep), Avx512Vec::load(c0 + at)));
    }
  }
}

// Tiles 0 to 3 are C, 4 and 5 the two row halves of A, 6 and 7 the two column halves of B.
void tile_block(float* c, const float* c0, int ldc, const bf16* a, int64_t row, const bf16* b, int64_t b_row, int begin,
                int end, float keep) {
  const int64_t c_bytes = int64_t{ldc} * 4, a_bytes = row * 2, b_bytes = b_row * 2;
  if (keep == 0) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    if (keep != 1 || c0 != c) scale_block(c, c0, ldc, keep);
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + kTile, c_bytes);
    _tile_loadd(2, c + int64_t{kTile} * ldc, c_bytes);
    _tile_loadd(3, c + int64_t{kTile} * ldc + kTile, c_bytes);
  }
  for (int k = begin; k < end; k += kBlock) {
    const bf16* pairs = b + int64_t{k} / 2 * b_row;
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, pairs, b_bytes);
    _tile_loadd(5, a + kTile * row + k, a_bytes);
    _tile_loadd(7, pairs + 2 * kTile, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + kTile, c_bytes);
  _tile_stored(2, c + int64_t{kTile} * ldc, c_bytes);
  _tile_stored(3, c + int64_t{kTile} * ldc + kTile, c_bytes);
}

// m, n and k are multiples of 32.
void tile_gemm_from(float* c, const float* c0, int ldc, Left<bf16> a, Right<bf16> b, int m, int n, int k, float keep,
                    Part part) {
  alignas(64) bf16 buffer[kBlock * kMaxDepth];
  const int64_t b_row = int64_t{2} * b.ld;
  for (int i = 0; i < m; i += kBlock) {
    const int begin = part == Part::upper_a ? i : 0;
    const int end = part == Part::lower_a && i + kBlock < k ? i + kBlock : k;
    int64_t row;
    const bf16* rows = contiguous_rows(a, i, begin, end, buffer, &row);
    const int columns = part == Part::lower_c && i + kBlock < n ? i + kBlock : n;
    for (int j = 0; j < columns; j += kBlock) {
      const int64_t at = int64_t{i} * ldc + j;
      tile_block(c + at, c0 + at, ldc, rows, row, b.data + int64_t{2} * j, b_row, begin, end, keep);
    }
  }
}

void tile_gemm(float* c, int ldc, Left<bf16> a, Right<bf16> b, int m, int n, int k, float keep, Part part) {
  tile_gemm_from(c, c, ldc, a, b, m, n, k, keep, part);
}

constexpr Primitives<bf16> amx_table() {
  Primitives<bf16> table = make_table<Bf16Dot, Bf16Pack, 8, 3, 8>("amx");
  table.unit = kBlock;
  table.enter = configure_tiles;
  table.leave = release_tiles;
  table.gemm = tile_gemm;
  table.gemm_from = tile_gemm_from;
  return table;
}

}  // namespace

constinit const Primitives<bf16> amx_bf16 = amx_table();

}  // namespace memattn::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace memattn::cpu {
constinit const Primitives<bf16> amx_bf16{};
}

#endif
