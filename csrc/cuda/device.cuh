// Device helpers that several kernels share. No torch API: tests compile this with g++ and run it on the host.
#pragma once

#include <cstdint>
#include <cstring>

namespace memattn {

// kCount adjacent values, moved in one access: a pointer to them must be aligned to their size.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

template <int kCount, typename T>
__device__ __forceinline__ void load(float (&to)[kCount], const T* from) {
  const auto pack = *reinterpret_cast<const Pack<T, kCount>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = static_cast<float>(pack.values[i]);
}

// What one store instruction moves. A plain assignment of as much was compiled to a store per number.
template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// To device memory.
template <int kCount, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[kCount]) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.values[i] = static_cast<T>(from[i]);
  typename Word<sizeof(pack)>::Type word;
  memcpy(&word, &pack, sizeof(word));
  __stwb(reinterpret_cast<typename Word<sizeof(pack)>::Type*>(to), word);
}

template <int kCount>
__device__ __forceinline__ void fill(float (&x)[kCount], float value) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = value;
}

// An index or length tensor, int32 or int64, or absent: both null.
struct Indices {
  const int32_t* narrow;
  const int64_t* wide;

  __device__ __forceinline__ int64_t at(int64_t i) const { return narrow ? narrow[i] : wide[i]; }

  // Row of a pool that batch row `row` uses, its own without indices; -1: padding, or an index that must not be followed.
  __device__ __forceinline__ int64_t pool_row(int64_t row, int64_t pool) const {
    const int64_t slot = narrow || wide ? at(row) : row;
    return slot < 0 || slot >= pool ? -1 : slot;
  }
};

}  // namespace memattn
