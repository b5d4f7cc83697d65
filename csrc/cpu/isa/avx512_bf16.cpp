// bf16 operands without tiles: products of pairs (vdpbf16ps), everything else as in the AVX-512 table.
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
#include "bf16_avx512.inl.h"

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
