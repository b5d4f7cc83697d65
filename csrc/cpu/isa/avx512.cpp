// The AVX-512 table: 16 floats per vector, 8 x 3 vectors of C in registers.
#include "primitives.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns inside its own AVX-512 headers
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

namespace memattn::cpu {
namespace {

#include "vec_avx512.inl.h"
#include "kernels.inl.h"

}  // namespace

constinit const Primitives<float> avx512_f32 = make_table<SameDot<Avx512Vec>, SamePack<Avx512Vec>, 8, 3, 8>("avx512");

}  // namespace memattn::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace memattn::cpu {
constinit const Primitives<float> avx512_f32{};
}

#endif
