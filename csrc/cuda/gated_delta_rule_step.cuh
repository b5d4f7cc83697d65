// Device code of the gated delta rule step: t tokens of a decode call against a state pool that is updated in place.
//
// One value head, one token; all vectors are rows, the state S is K x V:
//     S' = e^g S        d = beta (v - k S')        S <- S' + k^T d        o = scale q S
// Because q S = q S' + (q.k) d, every inner product a token needs (k S, q S and, for the l2 norms, k.k, q.q, q.k) is
// taken over the old state in one pass and one block-wide reduction.
//
// Grid:   one block per (batch row, value head, block of kBlockColumns state columns); each is independent.
// Block:  kThreads threads = kRowGroups x kColumnLanes. A thread keeps rows {group + i * kRowGroups} of four adjacent
//         columns in registers for all tokens, so the state moves through device memory once in and once out, in
//         16-byte accesses that cover whole 128-byte lines.
// Shared: partial sums of the warps, double-buffered by token parity so that one barrier per token is enough.
//
// No torch API and no warp primitive beyond __shfl_xor_sync: tests compile this file with g++ and run it on the host.
#pragma once

#include <cstdint>

namespace memattn::step {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kVector = 4;                                // columns per thread, one 16-byte access of float
constexpr int kColumnLanes = 8;
constexpr int kBlockColumns = kColumnLanes * kVector;     // 32 columns: a 128-byte line of the state per row
constexpr int kRowGroups = kThreads / kColumnLanes;       // 16
constexpr int kLanesPerWarpColumn = 32 / kColumnLanes;    // row groups inside one warp
constexpr int kSums = 2 * kVector + 3;                    // k S [4], q S [4], k.k, q.q, q.k
constexpr float kNormEps = 1e-6f;
static_assert(kBlockColumns * sizeof(float) == 128, "a block reads whole 128-byte lines of the state");
static_assert(kLanesPerWarpColumn == 4, "the warp reduction below is written for four row groups per warp");

template <typename T>
struct Arguments {
  const T* q;               // [B, t, H, K]
  const T* k;               // [B, t, H, K]
  const T* v;               // [B, t, HV, V]
  const float* g;           // [B, t, HV], natural log, or null: no decay
  const T* beta;            // [B, t, HV] in q's dtype, or null
  const float* beta_float;  // [B, t, HV] in float, or null; both null: beta = 1
  const int32_t* indices32; // [B] rows of the pool, or null
  const int64_t* indices64; // [B] or null; both null: row b uses state b
  float* state;             // [P, HV, K, V]
  T* o;                     // [B, t, HV, V]
  int64_t pool;
  int tokens, heads, value_heads, key_dim, value_dim, column_blocks;
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
  p.slot = a.indices32 ? a.indices32[p.row] : a.indices64 ? a.indices64[p.row] : p.row;
  if (p.slot >= a.pool) p.slot = -1;  // an out-of-range index is treated as padding, never followed
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

template <typename T>
__device__ void store_output(T* o, int column, int columns, float4 x) {
  if (column + 0 < columns) o[column + 0] = static_cast<T>(x.x);
  if (column + 1 < columns) o[column + 1] = static_cast<T>(x.y);
  if (column + 2 < columns) o[column + 2] = static_cast<T>(x.z);
  if (column + 3 < columns) o[column + 3] = static_cast<T>(x.w);
}

template <typename T>
__device__ __forceinline__ float4 load_values(const T* v, int column, int columns) {
  float4 x{0.f, 0.f, 0.f, 0.f};
  if (column + 0 < columns) x.x = static_cast<float>(v[column + 0]);
  if (column + 1 < columns) x.y = static_cast<float>(v[column + 1]);
  if (column + 2 < columns) x.z = static_cast<float>(v[column + 2]);
  if (column + 3 < columns) x.w = static_cast<float>(v[column + 3]);
  return x;
}

// kRows: state rows per thread, kRows * kRowGroups >= K. kAligned: 16-byte accesses to the state are legal.
template <typename T, int kRows, bool kAligned>
__global__ void __launch_bounds__(kThreads) gated_delta_rule_step_kernel(const Arguments<T> a) {
  __shared__ float partial[2][kWarps][kColumnLanes][kSums];
  const int thread = static_cast<int>(threadIdx.x);
  const int group = thread / kColumnLanes;
  const Position p = position(a, blockIdx.x, thread % kColumnLanes);
  const int key_head = p.value_head / (a.value_heads / a.heads);
  const int64_t first = p.row * a.tokens;  // the row's first token in the [B * t, ...] view

  if (p.slot < 0) {  // uniform over the block, so no barrier is left waiting
    if (group == 0) {
      for (int i = 0; i < a.tokens; ++i) {
        T* o = a.o + ((first + i) * a.value_heads + p.value_head) * a.value_dim;
        store_output(o, p.column, a.value_dim, float4{0.f, 0.f, 0.f, 0.f});
      }
    }
    return;
  }

  float* tile = a.state + (p.slot * a.value_heads + p.value_head) * a.key_dim * static_cast<int64_t>(a.value_dim);
  float4 S[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = group + i * kRowGroups;
    S[i] = row < a.key_dim ? load4<kAligned>(tile + static_cast<int64_t>(row) * a.value_dim, p.column, a.value_dim)
                           : float4{0.f, 0.f, 0.f, 0.f};
  }

  for (int token = 0; token < a.tokens; ++token) {
    const int64_t at_key = ((first + token) * a.heads + key_head) * a.key_dim;
    const int64_t at_head = (first + token) * a.value_heads + p.value_head;
    const float decay = gate(a, at_head), beta = write_strength(a, at_head);
    const float4 v = load_values(a.v + at_head * a.value_dim, p.column, a.value_dim);

    float k[kRows];
    float4 kS{0.f, 0.f, 0.f, 0.f}, qS{0.f, 0.f, 0.f, 0.f};
    float kk = 0.f, qq = 0.f, qk = 0.f;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = group + i * kRowGroups;
      const bool inside = row < a.key_dim;
      const float q = inside ? static_cast<float>(a.q[at_key + row]) : 0.f;
      k[i] = inside ? static_cast<float>(a.k[at_key + row]) : 0.f;
      multiply_add(kS, k[i], S[i]);
      multiply_add(qS, q, S[i]);
      kk += k[i] * k[i];
      qq += q * q;
      qk += q * k[i];
    }
    float sums[kSums] = {kS.x, kS.y, kS.z, kS.w, qS.x, qS.y, qS.z, qS.w, kk, qq, qk};
    reduce_rows(sums, partial[token & 1], thread);

    const float k_norm = a.l2norm ? rsqrtf(sums[8] + kNormEps) : 1.f;
    const float q_norm = a.scale * (a.l2norm ? rsqrtf(sums[9] + kNormEps) : 1.f);
    const float erase = decay * k_norm, read = decay * q_norm, overlap = q_norm * k_norm * sums[10];
    const float4 d{beta * (v.x - erase * sums[0]), beta * (v.y - erase * sums[1]),
                   beta * (v.z - erase * sums[2]), beta * (v.w - erase * sums[3])};
    if (group == 0) {
      const float4 o{read * sums[4] + overlap * d.x, read * sums[5] + overlap * d.y,
                     read * sums[6] + overlap * d.z, read * sums[7] + overlap * d.w};
      store_output(a.o + at_head * a.value_dim, p.column, a.value_dim, o);
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
      store4<kAligned>(tile + static_cast<int64_t>(row) * a.value_dim, p.column, a.value_dim, S[i]);
    }
  }
}

}  // namespace memattn::step
