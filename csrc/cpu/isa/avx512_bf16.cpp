// Products of bf16 pairs accumulated in float (vdpbf16ps), everything else as in the AVX-512 table.
#include "primitives.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns inside its own AVX-512 headers
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

namespace memattn::cpu {
namespace {

#include "vec_avx512.inl.h"
#include "kernels.inl.h"
#include "bf16_pack.inl.h"

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

}  // namespace

constinit const Primitives<bf16> avx512_bf16 = make_table<Bf16Dot, Bf16Pack, 8, 3, 8>("avx512_bf16");

}  // namespace memattn::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace memattn::cpu {
constinit const Primitives<bf16> avx512_bf16{};
}

#endif
