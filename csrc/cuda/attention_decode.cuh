// Device code of attention_decode: the last tokens of every row over its cache, keys split over blocks (split-KV).
//
//     s_ij = scale q_i.k_j + c_i - c_j - slope (i - j)        o_i = sum_j e^{s_ij - l_i} v_j        l_i = log sum_j e^{s_ij}
//
// Bound by the cache, which is read once per kRows query rows of a key head: heads of a group, and tokens, share a read.
// Grid:   one block per (batch row, key head, kRows query rows, split of kSpan positions). Splits that hold no key that is
//         seen end at once; how many there can be follows from the capacity, so no length is needed on the host.
// Block:  kWarps warps. A key's row lies across the kLanes lanes of a key group in 16-byte accesses; a warp has
//         32 / kLanes key groups and loads kUnroll keys and values of each ahead. Every group keeps its own maximum, sum
//         and output; the block adds them in order.
// Shared: where the keys of the split lie, who sees them, their biases; then the groups' outputs.
// A second kernel merges the splits of a query row in ascending order. Splits are cut by position, so bits depend neither on
// the batch nor on how the cache is laid out. Scores are kept in units of log2.
//
// No torch API and no warp primitive beyond __shfl_xor_sync: tests compile this file with g++ and run it on the host.
#pragma once

#include "device.cuh"

namespace memattn::decode {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kSpan = 256;  // positions of a split
constexpr int kUnroll = 4;  // keys of a key group that are loaded together
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

__device__ __forceinline__ float nothing() { return -__uint_as_float(0x7f800000u); }  // -inf

__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ __forceinline__ int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// --- which keys a query sees, and where they lie ---------------------------------------------------------------------

// The mask of attention: reference/attention_mask.py. A size of 0 stands for "no such term".
struct Mask {
  int64_t causal;  // 0 no, 1 per token, 2 per block
  int64_t window, prefix_len, block_size, dilation, dilated_window, dilated_prefix;

  // First position beyond the prefix that position i may see.
  __device__ __forceinline__ int64_t begin(int64_t i) const {
    const int64_t block = block_size > 0 && causal != 2 ? i / block_size * block_size : 0;
    return window > 0 ? larger(block, i - window + 1) : block;
  }
  __device__ __forceinline__ bool sees(int64_t i, int64_t j) const {
    if (j < prefix_len) return true;
    if (j < begin(i) || (causal == 1 && j > i)) return false;
    if (block_size > 0 && j / block_size > i / block_size) return false;
    return dilation <= 1 || (j + 1) % dilation == 0 || i - j < dilated_window || j < dilated_prefix;
  }
};

// Position -> slot (ring) -> row of the flattened cache (pages).
struct Cache {
  int64_t capacity, ring_start;            // no ring: ring_start < 0
  const int32_t* page_table;               // [B, max_pages] or null: rows of a batch row follow one another
  int64_t max_pages, page_size, pages;

  __device__ __forceinline__ int64_t ring_size() const { return capacity - ring_start; }
  // Tokens of a row whose keys were ever written: a cache without a ring cannot hold more than its capacity.
  __device__ __forceinline__ int64_t tokens(int64_t length) const {
    return ring_start >= 0 ? length : smaller(length, capacity);
  }
  // The first position from ring_start on that is still there.
  __device__ __forceinline__ int64_t oldest(int64_t tokens) const {
    return ring_start >= 0 ? larger(ring_start, tokens - ring_size()) : 0;
  }
  // Row of the key at a position that is still there; -1: its page is missing.
  __device__ __forceinline__ int64_t row(int64_t b, int64_t position) const {
    const bool turns = ring_start >= 0 && position >= ring_start;
    const int64_t slot = turns ? ring_start + (position - ring_start) % ring_size() : position;
    if (!page_table) return b * capacity + slot;
    const int64_t page = page_table[b * max_pages + slot / page_size];
    return page < 0 || page >= pages ? -1 : page * page_size + slot % page_size;
  }
};

template <typename T>
struct Arguments {
  const T* q;             // [B, t, HQ, K]
  const T* k;             // [rows of the cache, HKV, K]
  const T* v;             // [rows of the cache, HKV, V]
  Indices lengths;        // [B]
  const float* sink;      // [HQ] or null
  const double* decay;    // [rows of the cache, HQ] or null
  const float* slopes;    // [HQ] or null
  float2* statistics;     // [B, t, HQ, splits]: maximum in log2 and sum
  float* parts;           // [B, t, HQ, splits, V], unnormalised; written where the sum is not 0
  T* o;                   // [B, t, HQ, V]
  float* lse;             // [B, t, HQ]
  Cache cache;
  Mask mask;
  int64_t tokens, heads, key_heads, row_blocks, splits;
  int64_t prefix_splits;  // of them cover the positions before ring_start
  int key_dim, value_dim;
  float scale;            // in log2
  bool tile_heads, aligned;

  __device__ __forceinline__ int64_t group() const { return heads / key_heads; }
  __device__ __forceinline__ int64_t head(int64_t key_head, int64_t member) const {
    return tile_heads ? member * key_heads + key_head : key_head * group() + member;
  }
  // First position of a split of a row with so many tokens: a ring's later splits begin at what is still there.
  __device__ __forceinline__ int64_t first_position(int64_t split, int64_t count) const {
    if (split < prefix_splits || cache.ring_start < 0) return split * kSpan;
    return (larger(cache.oldest(count) / kSpan, prefix_splits) + split - prefix_splits) * kSpan;
  }
};

// One of the query rows that share a key head: tokens by members of the group.
struct Query {
  int64_t position, row;  // row of q and o; -1: there are no more
  int head;
};

template <typename T>
__device__ __forceinline__ Query query_at(const Arguments<T>& a, int64_t b, int64_t key_head, int64_t index, int64_t count) {
  const int64_t token = index / a.group();
  if (token >= a.tokens) return {-1, -1, 0};
  const int64_t head = a.head(key_head, index % a.group());
  return {count - a.tokens + token, (b * a.tokens + token) * a.heads + head, static_cast<int>(head)};
}

// --- a split ---------------------------------------------------------------------------------------------------------

// How a row of up to kDim numbers lies across lanes: kPacks times kWidth adjacent numbers for each of kLanes lanes.
template <typename T, int kDim>
struct Across {
  static constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
  static constexpr int kLanes = kDim / kWidth < 32 ? kDim / kWidth : 32;
  static constexpr int kPacks = kDim / (kWidth * kLanes);
  static constexpr int kNumbers = kPacks * kWidth;  // of a lane
  static constexpr int kKeyGroups = 32 / kLanes;    // of a warp
  static constexpr int kSlots = kWarps * kKeyGroups;

  __device__ static int column(int lane, int i) { return (i / kWidth * kLanes + lane) * kWidth + i % kWidth; }
};

// A lane's numbers of a row with `columns` columns; what lies outside is 0.
template <typename T, int kDim>
__device__ __forceinline__ void load_row(float (&to)[Across<T, kDim>::kNumbers], const T* row, int lane, int columns,
                                         bool aligned) {
  using A = Across<T, kDim>;
#pragma unroll
  for (int pack = 0; pack < A::kPacks; ++pack) {
    const int column = A::column(lane, pack * A::kWidth);
    if (aligned && column < columns) {  // whole packs are inside
      float numbers[A::kWidth];
      load(numbers, row + column);
#pragma unroll
      for (int i = 0; i < A::kWidth; ++i) to[pack * A::kWidth + i] = numbers[i];
    } else {
#pragma unroll
      for (int i = 0; i < A::kWidth; ++i) {
        to[pack * A::kWidth + i] = !aligned && column + i < columns ? static_cast<float>(row[column + i]) : 0.f;
      }
    }
  }
}

// What all threads of a block look up about the keys of its split.
template <int kRows>
struct Keys {
  int64_t rows[kSpan];            // of the cache
  unsigned char seen[kSpan];      // bit r: query row r sees the key
  float bias[kSpan][kRows];       // in log2
};

template <typename T, int kRows>
__device__ void look_up(Keys<kRows>& keys, const Query (&queries)[kRows], const Arguments<T>& a, int64_t b, int64_t first,
                        int64_t count) {
  for (int k = static_cast<int>(threadIdx.x); k < kSpan; k += kThreads) {
    const int64_t j = first + k;
    const bool held = j < count && (a.cache.ring_start < 0 || j < a.cache.ring_start || j >= a.cache.oldest(count));
    const int64_t row = held ? a.cache.row(b, j) : -1;
    unsigned seen = 0;
    for (int r = 0; row >= 0 && r < kRows; ++r) {
      const Query query = queries[r];
      if (query.position < 0 || !a.mask.sees(query.position, j)) continue;
      seen |= 1u << r;
      double bias = 0.;
      if (a.decay) {
        const int64_t own = a.cache.row(b, query.position);
        bias = (own >= 0 ? a.decay[own * a.heads + query.head] : 0.) - a.decay[row * a.heads + query.head];
      }
      if (a.slopes) bias -= static_cast<double>(a.slopes[query.head]) * static_cast<double>(query.position - j);
      keys.bias[k][r] = kLog2e * static_cast<float>(bias);
    }
    keys.rows[k] = row;
    keys.seen[k] = static_cast<unsigned char>(seen);
  }
}

// Whether any query row of the block can see a key of the split: the whole range, before any key is looked at.
template <typename T>
__device__ bool split_is_seen(const Arguments<T>& a, int64_t first_position, int64_t first_query, int64_t count) {
  const int64_t token = first_query / a.group(), i = count - a.tokens + token;
  if (first_position >= count) return false;
  if (first_position < a.mask.prefix_len) return true;
  return first_position + kSpan > (i < 0 ? 0 : a.mask.begin(i));
}

template <typename T, int kDim, int kRows>
__global__ void __launch_bounds__(kThreads) split_kernel(const Arguments<T> a) {
  using A = Across<T, kDim>;
  __shared__ Keys<kRows> keys;
  __shared__ Query queries[kRows];
  __shared__ float outputs[A::kSlots][kRows][kDim];
  __shared__ float most_of[A::kSlots][kRows], sum_of[A::kSlots][kRows];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % A::kLanes, slot = thread / A::kLanes;
  const int64_t split = blockIdx.x % a.splits, rest = blockIdx.x / a.splits;
  const int64_t first_query = rest % a.row_blocks * kRows, key_head = rest / a.row_blocks % a.key_heads;
  const int64_t b = rest / a.row_blocks / a.key_heads;
  const int64_t count = a.cache.tokens(a.lengths.at(b)), first = a.first_position(split, count);

  const bool useful = split_is_seen(a, first, first_query, count);  // uniform over the block
  if (thread < kRows) {
    const Query query = query_at(a, b, key_head, first_query + thread, count);
    queries[thread] = query;
    if (!useful && query.row >= 0) a.statistics[query.row * a.splits + split] = {nothing(), 0.f};
  }
  if (!useful) return;
  __syncthreads();
  look_up(keys, queries, a, b, first, count);

  float q[kRows][A::kNumbers], out[kRows][A::kNumbers], most[kRows], sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    fill(q[r], 0.f);
    if (queries[r].row >= 0) load_row<T, kDim>(q[r], a.q + queries[r].row * a.key_dim, lane, a.key_dim, a.aligned);
    fill(out[r], 0.f);
    most[r] = nothing();
    sum[r] = 0.f;
  }
  __syncthreads();

  const int64_t key_stride = a.key_heads * a.key_dim, value_stride = a.key_heads * a.value_dim;
  for (int at = slot; at < kSpan; at += A::kSlots * kUnroll) {
    float k[kUnroll][A::kNumbers], v[kUnroll][A::kNumbers], p[kUnroll][kRows];
    unsigned seen[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int key = at + u * A::kSlots;
      seen[u] = keys.seen[key];
      fill(k[u], 0.f);
      fill(v[u], 0.f);
      if (!seen[u]) continue;
      load_row<T, kDim>(k[u], a.k + keys.rows[key] * key_stride + key_head * a.key_dim, lane, a.key_dim, a.aligned);
      load_row<T, kDim>(v[u], a.v + keys.rows[key] * value_stride + key_head * a.value_dim, lane, a.value_dim, a.aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float dot = 0.f;
#pragma unroll
        for (int i = 0; i < A::kNumbers; ++i) dot += q[r][i] * k[u][i];
#pragma unroll
        for (int mask = 1; mask < A::kLanes; mask *= 2) dot += __shfl_xor_sync(0xffffffffu, dot, mask);
        p[u][r] = seen[u] >> r & 1u ? a.scale * dot + keys.bias[at + u * A::kSlots][r] : nothing();
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float top = most[r];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) top = fmaxf(top, p[u][r]);
      const float base = top == nothing() ? 0.f : top, keep = exp2f(most[r] - base);
      most[r] = top;
      sum[r] *= keep;
#pragma unroll
      for (int i = 0; i < A::kNumbers; ++i) out[r][i] *= keep;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const float weight = exp2f(p[u][r] - base);
        sum[r] += weight;
#pragma unroll
        for (int i = 0; i < A::kNumbers; ++i) out[r][i] += weight * v[u][i];
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < A::kNumbers; ++i) outputs[slot][r][A::column(lane, i)] = out[r][i];
    if (lane == 0) {
      most_of[slot][r] = most[r];
      sum_of[slot][r] = sum[r];
    }
  }
  __syncthreads();
  for (int r = 0; r < kRows; ++r) {
    if (queries[r].row < 0) break;
    float top = nothing(), total = 0.f;
    for (int s = 0; s < A::kSlots; ++s) top = fmaxf(top, most_of[s][r]);
    const float base = top == nothing() ? 0.f : top;
    for (int s = 0; s < A::kSlots; ++s) total += exp2f(most_of[s][r] - base) * sum_of[s][r];
    const int64_t part = queries[r].row * a.splits + split;
    if (thread == 0) a.statistics[part] = {top, total};
    for (int column = thread; total != 0.f && column < a.value_dim; column += kThreads) {
      float x = 0.f;
      for (int s = 0; s < A::kSlots; ++s) x += exp2f(most_of[s][r] - base) * outputs[s][r][column];
      a.parts[part * a.value_dim + column] = x;
    }
  }
}

// --- the splits of a query row become its output ---------------------------------------------------------------------

// The greatest value of the block's threads, for all of them.
__device__ __forceinline__ float block_max(float x, float (&of_warps)[kWarps]) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = of_warps[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) x = fmaxf(x, of_warps[w]);
  return x;
}

// One block per query row. A thread weighs one split of kThreads, then adds up columns over all of them.
template <typename T>
__global__ void __launch_bounds__(kThreads) merge_kernel(const Arguments<T> a) {
  constexpr int kColumns = 2;  // of a thread, V <= kColumns * kThreads
  __shared__ float of_warps[kWarps], weights[kThreads], sums[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x, head = row % a.heads, b = row / a.heads / a.tokens;
  const int64_t count = a.cache.tokens(a.lengths.at(b));
  const bool there = count - a.tokens + row / a.heads % a.tokens >= 0;
  const int64_t splits = there ? a.splits : 0;
  const float2* statistics = a.statistics + row * a.splits;
  const float sink = there && a.sink ? kLog2e * a.sink[head] : nothing();
  float top = sink;
  for (int64_t s = thread; s < splits; s += kThreads) top = fmaxf(top, statistics[s].x);
  top = block_max(top, of_warps);

  const float base = top == nothing() ? 0.f : top;
  float sum = exp2f(sink - base), x[kColumns] = {};
  for (int64_t first = 0; first < splits; first += kThreads) {
    const bool mine = first + thread < splits;
    const float2 s = mine ? statistics[first + thread] : float2{nothing(), 0.f};
    __syncthreads();  // the tile before this one has been read
    weights[thread] = exp2f(s.x - base);
    sums[thread] = s.y;
    __syncthreads();
    const int tile = static_cast<int>(smaller(splits - first, kThreads));
    for (int i = 0; i < tile; ++i) {
      if (sums[i] == 0.f) continue;  // nothing was written
      sum += weights[i] * sums[i];
      const float* part = a.parts + (row * a.splits + first + i) * a.value_dim;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = thread + c * kThreads;
        if (column < a.value_dim) x[c] += weights[i] * part[column];
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int column = thread + c * kThreads;
    if (column < a.value_dim) a.o[row * a.value_dim + column] = static_cast<T>(sum == 0.f ? 0.f : x[c] / sum);
  }
  if (thread == 0) a.lse[row] = sum == 0.f ? nothing() : kLn2 * (base + log2f(sum));
}

}  // namespace memattn::decode
