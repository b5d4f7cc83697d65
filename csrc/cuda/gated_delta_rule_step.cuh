// Device code of the gated delta rule step: t tokens of a decode call against a state pool that is updated in place.
//
// One value head, one token; all vectors are rows, the state S is K x V:
//     S' = e^g S        d = beta (v - k S')        S <- S' + k^T d        o = scale q S
// Because q S = q S' + (q.k) d, every inner product a token needs (k S, q S and, for the l2 norms, k.k, q.q, q.k) is
// taken over the old state in one pass and one block-wide reduction. Linear attention is the same with d = v, so it has
// no k S and no norms; its normaliser z is one more column of the state, written as if v ended in a 1.
//
// Grid:   one block per (batch row, value head, block of kBlockColumns state columns); each is independent.
// Block:  kThreads threads = kRowGroups x kColumnLanes. A thread keeps rows {group + i * kRowGroups} of four adjacent
//         columns in registers for all tokens, so the state moves through device memory once in and once out, in
//         16-byte accesses that cover whole 128-byte lines.
// Shared: partial sums of the warps, double-buffered by token parity so that one barrier per token is enough.
//
// No torch API and no warp primitive beyond __shfl_xor_sync: tests compile this file with g++ and run it on the host.
#pragma once

#include "device.cuh"

namespace memattn::step {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kVector = 4;                                // columns per thread, one 16-byte access of float
constexpr int kColumnLanes = 8;
constexpr int kBlockColumns = kColumnLanes * kVector;     // 32 columns: a 128-byte line of the state per row
constexpr int kRowGroups = kThreads / kColumnLanes;       // 16
constexpr int kLanesPerWarpColumn = 32 / kColumnLanes;    // row groups inside one warp
constexpr float kNormEps = 1e-6f;
constexpr float kSmallestNormal = 1.17549435e-38f;
static_assert(kBlockColumns * sizeof(float) == 128, "a block reads whole 128-byte lines of the state");
static_assert(kLanesPerWarpColumn == 4, "the warp reduction below is written for four row groups per warp");

enum class Memory {
  delta,           // erases, then writes
  sum,             // only writes: d = v
  sum_and_weight,  // the same with the column z; o and q.z leave in float, to be handed out or divided
};

template <Memory kMemory>
inline constexpr bool kErases = kMemory == Memory::delta;
template <Memory kMemory>
inline constexpr bool kWeighs = kMemory == Memory::sum_and_weight;

// Block-wide sums of a token: q S [4], q.k, and where keys erase also k S [4], k.k, q.q.
template <Memory kMemory>
inline constexpr int kSumsOf = kErases<kMemory> ? 2 * kVector + 3 : kVector + 1;

template <typename T>
struct Arguments {
  const T* q;               // [B, t, H, K]
  const T* k;               // [B, t, H, K]
  const T* v;               // [B, t, HV, V]
  const float* g;           // [B, t, HV], natural log, or null: no decay
  const T* beta;            // [B, t, HV] in q's dtype, or null
  const float* beta_float;  // [B, t, HV] in float, or null; both null: beta = 1
  Indices indices;          // [B] rows of the pool, or absent: row b uses state b
  float* state;             // [P, HV, K, columns]
  T* o;                     // [B, t, HV, V], or for Memory::sum_and_weight
  float* numerator;         // [B, t, HV, V] and
  float* denominator;       // [B, t, HV]
  int64_t pool;
  int tokens, heads, value_heads, key_dim, value_dim;
  int columns, column_blocks;  // of the state: V, or V + 1 with z
  float scale;
  bool l2norm;
};

// Where this block works. slot < 0: a padding row, its output is zero and the pool is left alone.
struct Position {
  int64_t row, slot;
  int value_head, column;  // column: this thread's first column
};

template <typename T>
__device__ __forceinline__ Position position(const Arguments<T>& a, int64_t block, int column_lane) {
  const int64_t head = block / a.column_blocks;
  Position p;
  p.row = head / a.value_heads;
  p.value_head = static_cast<int>(head % a.value_heads);
  p.column = static_cast<int>(block % a.column_blocks) * kBlockColumns + column_lane * kVector;
  p.slot = a.indices.pool_row(p.row, a.pool);
  return p;
}

// Four adjacent floats from column `column` of a row with `columns` columns; what lies outside reads as zero.
template <bool kAligned>
__device__ __forceinline__ float4 load4(const float* row, int column, int columns) {
  if constexpr (kAligned) {  // columns % 4 == 0 and a 16-byte aligned base: all four inside, or none
    return column < columns ? *reinterpret_cast<const float4*>(row + column) : float4{0.f, 0.f, 0.f, 0.f};
  } else {
    float4 x{0.f, 0.f, 0.f, 0.f};
    if (column + 0 < columns) x.x = row[column + 0];
    if (column + 1 < columns) x.y = row[column + 1];
    if (column + 2 < columns) x.z = row[column + 2];
    if (column + 3 < columns) x.w = row[column + 3];
    return x;
  }
}

template <bool kAligned>
__device__ __forceinline__ void store4(float* row, int column, int columns, float4 x) {
  if constexpr (kAligned) {
    if (column < columns) *reinterpret_cast<float4*>(row + column) = x;
  } else {
    if (column + 0 < columns) row[column + 0] = x.x;
    if (column + 1 < columns) row[column + 1] = x.y;
    if (column + 2 < columns) row[column + 2] = x.z;
    if (column + 3 < columns) row[column + 3] = x.w;
  }
}

__device__ __forceinline__ void multiply_add(float4& y, float a, float4 x) {
  y.x += a * x.x;
  y.y += a * x.y;
  y.z += a * x.z;
  y.w += a * x.w;
}

// Sums over the block's rows, in a fixed order: within the warp by butterfly, then warp 0..3 in turn.
template <int kSums>
__device__ __forceinline__ void reduce_rows(float (&sums)[kSums], float (*partial)[kColumnLanes][kSums], int thread) {
  const int warp = thread / 32, column_lane = thread % kColumnLanes;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    sums[s] += __shfl_xor_sync(0xffffffffu, sums[s], kColumnLanes);
    sums[s] += __shfl_xor_sync(0xffffffffu, sums[s], 2 * kColumnLanes);
  }
  if (thread % 32 < kColumnLanes) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) partial[warp][column_lane][s] = sums[s];
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    sums[s] = partial[0][column_lane][s];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sums[s] += partial[w][column_lane][s];
  }
}

template <typename T>
__device__ __forceinline__ float gate(const Arguments<T>& a, int64_t at) {
  return a.g ? expf(a.g[at]) : 1.f;
}

template <typename T>
__device__ __forceinline__ float write_strength(const Arguments<T>& a, int64_t at) {
  return a.beta_float ? a.beta_float[at] : a.beta ? static_cast<float>(a.beta[at]) : 1.f;
}

template <typename O>
__device__ __forceinline__ void store_columns(O* o, int column, int columns, float4 x) {
  if (column + 0 < columns) o[column + 0] = static_cast<O>(x.x);
  if (column + 1 < columns) o[column + 1] = static_cast<O>(x.y);
  if (column + 2 < columns) o[column + 2] = static_cast<O>(x.z);
  if (column + 3 < columns) o[column + 3] = static_cast<O>(x.w);
}

// Outputs of value head `at` from the thread's columns; column V is the denominator.
template <Memory kMemory, typename T>
__device__ __forceinline__ void store_output(const Arguments<T>& a, int64_t at, int column, float4 x) {
  if constexpr (kWeighs<kMemory>) {
    store_columns(a.numerator + at * a.value_dim, column, a.value_dim, x);
    const int weight = a.value_dim - column;
    if (0 <= weight && weight < kVector) a.denominator[at] = weight == 0 ? x.x : weight == 1 ? x.y : weight == 2 ? x.z : x.w;
  } else {
    store_columns(a.o + at * a.value_dim, column, a.value_dim, x);
  }
}

// What the token writes into the thread's columns, before an erasure.
template <Memory kMemory, typename T>
__device__ __forceinline__ float4 load_values(const Arguments<T>& a, int64_t at, int column) {
  const T* v = a.v + at * a.value_dim;
  const auto value = [&](int c) {
    return c < a.value_dim ? static_cast<float>(v[c]) : kWeighs<kMemory> && c == a.value_dim ? 1.f : 0.f;
  };
  return {value(column), value(column + 1), value(column + 2), value(column + 3)};
}

// kRows: state rows per thread, kRows * kRowGroups >= K. kAligned: 16-byte accesses to the state are legal.
template <typename T, Memory kMemory, int kRows, bool kAligned>
__global__ void __launch_bounds__(kThreads) gated_delta_rule_step_kernel(const Arguments<T> a) {
  constexpr int kSums = kSumsOf<kMemory>;
  __shared__ float partial[2][kWarps][kColumnLanes][kSums];
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / kColumnLanes;
  const Position p = position(a, blockIdx.x, thread % kColumnLanes);
  const int key_head = p.value_head / (a.value_heads / a.heads);
  const int64_t first = p.row * a.tokens;  // the row's first token in the [B * t, ...] view

  if (p.slot < 0) {  // uniform over the block, so no barrier is left waiting
    for (int i = 0; group == 0 && i < a.tokens; ++i) {
      store_output<kMemory>(a, (first + i) * a.value_heads + p.value_head, p.column, float4{0.f, 0.f, 0.f, 0.f});
    }
    return;
  }

  float* tile = a.state + (p.slot * a.value_heads + p.value_head) * a.key_dim * static_cast<int64_t>(a.columns);
  float4 S[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = group + i * kRowGroups;
    S[i] = row < a.key_dim ? load4<kAligned>(tile + static_cast<int64_t>(row) * a.columns, p.column, a.columns)
                           : float4{0.f, 0.f, 0.f, 0.f};
  }

  for (int token = 0; token < a.tokens; ++token) {
    const int64_t at_key = ((first + token) * a.heads + key_head) * a.key_dim;
    const int64_t at_head = (first + token) * a.value_heads + p.value_head;
    const float decay = gate(a, at_head);
    float4 d = load_values<kMemory>(a, at_head, p.column);

    float k[kRows];
    float4 kS{0.f, 0.f, 0.f, 0.f}, qS{0.f, 0.f, 0.f, 0.f};
    float kk = 0.f, qq = 0.f, qk = 0.f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = group + i * kRowGroups;
      const bool inside = row < a.key_dim;
      const float q = inside ? static_cast<float>(a.q[at_key + row]) : 0.f;
      k[i] = inside ? static_cast<float>(a.k[at_key + row]) : 0.f;
      multiply_add(qS, q, S[i]);
      qk += q * k[i];
      if constexpr (kErases<kMemory>) {
        multiply_add(kS, k[i], S[i]);
        kk += k[i] * k[i];
        qq += q * q;
      }
    }
    float k_norm = 1.f, q_norm = a.scale;
    if constexpr (kErases<kMemory>) {
      float sums[kSums] = {qS.x, qS.y, qS.z, qS.w, qk, kS.x, kS.y, kS.z, kS.w, kk, qq};
      reduce_rows(sums, partial[token & 1], thread);
      qS = {sums[0], sums[1], sums[2], sums[3]};
      qk = sums[4];
      if (a.l2norm) {
        k_norm = rsqrtf(sums[9] + kNormEps);
        q_norm *= rsqrtf(sums[10] + kNormEps);
      }
      const float beta = write_strength(a, at_head), erase = decay * k_norm;
      d = {beta * (d.x - erase * sums[5]), beta * (d.y - erase * sums[6]), beta * (d.z - erase * sums[7]),
           beta * (d.w - erase * sums[8])};
    } else {
      float sums[kSums] = {qS.x, qS.y, qS.z, qS.w, qk};
      reduce_rows(sums, partial[token & 1], thread);
      qS = {sums[0], sums[1], sums[2], sums[3]};
      qk = sums[4];
    }
    if (group == 0) {
      const float read = decay * q_norm, overlap = q_norm * k_norm * qk;
      store_output<kMemory>(a, at_head, p.column,
                            float4{read * qS.x + overlap * d.x, read * qS.y + overlap * d.y,
                                   read * qS.z + overlap * d.z, read * qS.w + overlap * d.w});
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      S[i].x *= decay;
      S[i].y *= decay;
      S[i].z *= decay;
      S[i].w *= decay;
      multiply_add(S[i], k_norm * k[i], d);
    }
  }

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = group + i * kRowGroups;
    if (row < a.key_dim) {
      store4<kAligned>(tile + static_cast<int64_t>(row) * a.columns, p.column, a.columns, S[i]);
    }
  }
}

// o = numerator / denominator; 0 where the denominator is below the normal numbers: nothing was seen. The denominator
// of a head is known to one block of the step only, so this is a pass of its own over what is K times smaller.
template <typename T>
struct Quotient {
  const float* numerator;    // [B * t * HV, V]
  const float* denominator;  // [B * t * HV]
  T* o;                      // [B * t * HV, V]
  int64_t count;             // of outputs
  int value_dim;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) divide_kernel(const Quotient<T> a) {
  const int64_t i = int64_t{kThreads} * blockIdx.x + threadIdx.x;
  if (i >= a.count) return;
  const float denominator = a.denominator[i / a.value_dim];
  a.o[i] = static_cast<T>(fabsf(denominator) < kSmallestNormal ? 0.f : a.numerator[i] / denominator);
}

}  // namespace memattn::step
