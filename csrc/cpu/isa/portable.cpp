// The table that is right on any processor: 128-bit vectors of the compiler, no intrinsics. The only one with float64.
#include "primitives.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace memattn::cpu {
namespace {

template <class S>
struct PortableVec {
  using Scalar = S;
  static constexpr int lanes = 16 / sizeof(S);
  typedef S Reg __attribute__((vector_size(16)));

  static Reg load(const S* p) {
    Reg x;
    memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(S* p, Reg x) { memcpy(p, &x, sizeof x); }
  static Reg zero() { return Reg{}; }
  static Reg broadcast(S x) { return x - Reg{}; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg fnma(Reg a, Reg b, Reg c) { return c - a * b; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }
  static S largest(Reg x) {
    S top = x[0];
    for (int i = 1; i < lanes; ++i) top = x[i] > top ? x[i] : top;
    return top;
  }
  static S sum(Reg x) {
    S total = 0;
    for (int i = 0; i < lanes; ++i) total += x[i];
    return total;
  }
  static S square_root(S x) { return sqrt(x); }
  static Reg exp(Reg x) {
    for (int i = 0; i < lanes; ++i) x[i] = sizeof(S) == 8 ? ::exp(x[i]) : ::expf(x[i]);
    return x;
  }
  static Reg first(Reg x, int count) {
    for (int i = 0; i < lanes; ++i) x[i] = i < count ? x[i] : S(0);
    return x;
  }
  static void transpose(Reg* rows) {
    for (int i = 0; i < lanes; ++i) {
      for (int j = 0; j < i; ++j) {
        const S upper = rows[j][i];
        rows[j][i] = rows[i][j];
        rows[i][j] = upper;
      }
    }
  }

  static Reg load_bf16(const uint16_t* p);
  static Reg load_f16(const uint16_t* p);
  static void store_bf16(uint16_t* p, Reg x);
  static void store_f16(uint16_t* p, Reg x);
};

#include "kernels.inl.h"

template <class S>
typename PortableVec<S>::Reg PortableVec<S>::load_bf16(const uint16_t* p) {
  Reg x;
  for (int i = 0; i < lanes; ++i) x[i] = bf16_to_float(p[i]);
  return x;
}

template <class S>
typename PortableVec<S>::Reg PortableVec<S>::load_f16(const uint16_t* p) {
  Reg x;
  for (int i = 0; i < lanes; ++i) x[i] = half_to_float(p[i]);
  return x;
}

template <class S>
void PortableVec<S>::store_bf16(uint16_t* p, Reg x) {
  for (int i = 0; i < lanes; ++i) p[i] = float_to_bf16(x[i]);
}

template <class S>
void PortableVec<S>::store_f16(uint16_t* p, Reg x) {
  for (int i = 0; i < lanes; ++i) p[i] = float_to_half(x[i]);
}

template <class S>
constexpr Primitives<S> portable_table() {
  return make_table<SameDot<PortableVec<S>>, SamePack<PortableVec<S>>, 4, 2, 4>("portable");
}

}  // namespace

constinit const Primitives<float> portable_f32 = portable_table<float>();
constinit const Primitives<double> portable_f64 = portable_table<double>();

}  // namespace memattn::cpu
