// Products of bf16 pairs accumulated in float (vdpbf16ps), and their operands from float rows, for the tables with
// hardware bf16. Included inside the anonymous namespace and target region of those tables, after vec_avx512.inl.h.

struct Bf16Dot {
  using E = bf16;
  using Vec = Avx512Vec;
  using Wide = __m512i;
  static Wide broadcast(const bf16* pair) {
    int dword;
    memcpy(&dword, pair, 4);
    return _mm512_set1_epi32(dword);
  }
  static Wide load(const bf16* p) { return _mm512_loadu_si512(p); }
  static __m512 mac(__m512 c, Wide a, Wide b) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
};

struct Bf16Pack {
  static __m512i as_bf16(__m512 high, __m512 low) {  // 32 bf16: those of `low` first
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }

  // Rows stay rows: 32 consecutive columns per store (the last 16 alone if their number is odd).
  static void left(bf16* dst, int ld, const float* x, int ldx, int rows, int cols) {
    for (int i = 0; i < rows; ++i) {
      const float* from = x + int64_t{i} * ldx;
      bf16* to = dst + int64_t{i} * ld;
      int j = 0;
      for (; j + 32 <= cols; j += 32) {
        _mm512_storeu_si512(to + j, as_bf16(_mm512_loadu_ps(from + j + 16), _mm512_loadu_ps(from + j)));
      }
      if (j < cols) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + j)));
      }
    }
  }

  // Pairs of rows interleaved: element (2 r, c) beside (2 r + 1, c).
  static void right(bf16* dst, int ld, const float* x, int ldx, const float* row_scale, int rows, int cols) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                                23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int i = 0; i < rows; i += 2) {
      const float *even = x + int64_t{i} * ldx, *odd = even + ldx;
      bf16* to = dst + int64_t{i} * ld;
      const __m512 even_scale = _mm512_set1_ps(row_scale ? row_scale[i] : 1.0f);
      const __m512 odd_scale = _mm512_set1_ps(row_scale ? row_scale[i + 1] : 1.0f);
      for (int j = 0; j < cols; j += 16) {
        const __m512 a = _mm512_mul_ps(even_scale, _mm512_loadu_ps(even + j));
        const __m512 b = _mm512_mul_ps(odd_scale, _mm512_loadu_ps(odd + j));
        _mm512_storeu_si512(to + 2 * j, _mm512_permutexvar_epi16(interleave, as_bf16(b, a)));
      }
    }
  }

  // The pairs (2 c, 2 c + 1) of 16 rows are 16 x 16 dwords to transpose.
  static void right_transposed(bf16* dst, int ld, const float* x, int ldx, int rows, int cols) {
    for (int i = 0; i < rows; i += 16) {
      for (int j = 0; j < cols; j += 32) {
        const bool half = cols - j < 32;
        __m512 block[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) {
          const float* from = x + int64_t{i + r} * ldx + j;
          block[r] = _mm512_castsi512_ps(
              as_bf16(half ? _mm512_setzero_ps() : _mm512_loadu_ps(from + 16), _mm512_loadu_ps(from)));
        }
        Avx512Vec::transpose(block);
        const int pairs = half ? 8 : 16;
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) {
          if (r < pairs) _mm512_storeu_ps(dst + (int64_t{j / 2 + r} * ld + i) * 2, block[r]);
        }
      }
    }
  }
};
