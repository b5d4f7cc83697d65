// Rows of memory to and from rows of the accumulate type A, float or double. The conversions are filled once per
// instruction set, as a part of the ops' own tables.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace memattn::rows {

// 16-bit floats as they lie in memory; arithmetic on them happens after conversion.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class A>
struct Conversions {
  void (*from_bfloat16)(A* out, const BFloat16* in, int64_t n);
  void (*from_half)(A* out, const Half* in, int64_t n);
  void (*to_bfloat16)(BFloat16* out, const A* in, int64_t n);
  void (*to_half)(Half* out, const A* in, int64_t n);
};

template <class A>
void load(const Conversions<A>&, A* out, const A* in, int64_t n) {
  std::copy_n(in, n, out);
}
inline void load(const Conversions<float>& table, float* out, const BFloat16* in, int64_t n) { table.from_bfloat16(out, in, n); }
inline void load(const Conversions<float>& table, float* out, const Half* in, int64_t n) { table.from_half(out, in, n); }

template <class A>
void store(const Conversions<A>&, A* out, const A* in, int64_t n) {
  if (out != in) std::copy_n(in, n, out);
}
inline void store(const Conversions<float>& table, BFloat16* out, const float* in, int64_t n) { table.to_bfloat16(out, in, n); }
inline void store(const Conversions<float>& table, Half* out, const float* in, int64_t n) { table.to_half(out, in, n); }

// `in` itself where it needs no conversion, else its copy in `scratch`.
template <class A, class S>
const A* view(const Conversions<A>& table, A* scratch, const S* in, int64_t n) {
  if constexpr (std::is_same_v<A, S>) return in;
  else return load(table, scratch, in, n), scratch;
}

// Where to compute a row that store() then puts in place.
template <class A, class S>
A* target(A* scratch, S* out) {
  if constexpr (std::is_same_v<A, S>) return out;
  else return scratch;
}

}  // namespace memattn::rows
