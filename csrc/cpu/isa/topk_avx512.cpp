// Top-k's rows for avx512, where a mask of scores is compressed into the candidates at once.
#include "topk_rows.h"

#include "../../common/cpu_features.h"

#if defined(MEMATTN_X86)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt,prefer-vector-width=512")
#pragma GCC optimize("no-trapping-math")  // lets selects between floats become masks
namespace memattn::topk::avx512 {
#include "topk_rows.inl.h"

constexpr int kLanes = 16;

template <bool inclusive>
int64_t compress_passing(Candidates<float>& to, const float* x, int64_t n, float cut, int64_t first) {
  constexpr int predicate = inclusive ? _CMP_GE_OQ : _CMP_GT_OQ;
  constexpr int vectors = kBlock / kLanes;
  const __m512 limit = _mm512_set1_ps(cut);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    __m512 scores[vectors];
    __mmask16 passing[vectors];
    unsigned any = 0;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      scores[v] = _mm512_loadu_ps(x + i + v * kLanes);
      passing[v] = _mm512_cmp_ps_mask(scores[v], limit, predicate);
      any |= passing[v];
    }
    if (!any) continue;
    if (to.count + kBlock > to.capacity) return i;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(first + i) + v * kLanes));
      _mm512_storeu_ps(to.values + to.count, _mm512_maskz_compress_ps(passing[v], scores[v]));
      _mm512_storeu_si512(to.positions + to.count, _mm512_maskz_compress_epi32(passing[v], at));
      to.count += __builtin_popcount(passing[v]);
    }
  }
  return i + append_passing<inclusive>(to, x + i, n - i, cut, first + i);
}

int64_t compress(Candidates<float>& to, const float* x, int64_t n, Cut<float> cut, int64_t first) {
  return cut.inclusive ? compress_passing<true>(to, x, n, cut.value, first)
                       : compress_passing<false>(to, x, n, cut.value, first);
}

template <int predicate>
int64_t part(float* out, const float* x, int64_t n, float pivot) {
  const __m512 limit = _mm512_set1_ps(pivot);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const __mmask16 given = n - i < kLanes ? static_cast<__mmask16>((1u << (n - i)) - 1u) : __mmask16{0xffff};
    const __m512 scores = _mm512_maskz_loadu_ps(given, x + i);
    const __mmask16 wanted = _mm512_mask_cmp_ps_mask(given, scores, limit, predicate);
    _mm512_storeu_ps(out + count, _mm512_maskz_compress_ps(wanted, scores));
    count += __builtin_popcount(wanted);
  }
  return count;
}

int64_t compress_offsets(int32_t* offsets, const float* x, int ld, int rows, int cols, const float* cuts) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t count = 0;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; j += kLanes) {
      const int32_t at = i * ld + j;
      const __mmask16 larger = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + at), _mm512_loadu_ps(cuts + j), _CMP_GT_OQ);
      if (!larger) continue;
      const __m512i place = _mm512_add_epi32(lane, _mm512_set1_epi32(at));
      _mm512_storeu_si512(offsets + count, _mm512_maskz_compress_epi32(larger, place));
      count += __builtin_popcount(larger);
    }
  }
  return count;
}

}  // namespace memattn::topk::avx512
#pragma GCC pop_options

namespace memattn::topk {
const Table<float> kTopkAvx512 = {{avx512::from_bfloat16, avx512::from_half, avx512::to_bfloat16, avx512::to_half},
                                  avx512::keep_larger<float>,
                                  avx512::compress,
                                  avx512::part<_CMP_GT_OQ>,
                                  avx512::part<_CMP_LT_OQ>,
                                  avx512::extend<float>,
                                  avx512::compress_offsets};
}  // namespace memattn::topk
#endif
