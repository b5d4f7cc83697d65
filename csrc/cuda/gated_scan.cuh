// Device code of the gated scan: where its parts lie, the forward passes and the step. Mathematics: ops/gated_scan.py.
//
// A thread walks kVector adjacent channels through a segment of at most kSegment tokens, kPiece tokens loaded ahead. Chunks
// of up to kSegment tokens are segments: one pass, each byte moved once. Longer runs are chains of segments in three
// passes: what each segment ends with from zero, and the sum of its log gates; along each chain the state before every
// segment; the walk itself from there. Lengths alone decide how tokens are cut, so bits do not depend on the batch.
//
// No torch API and no barrier: tests compile this with g++ and run it on the host.
#pragma once

#include "device.cuh"

namespace memattn::scan {

constexpr int kThreads = 128;
constexpr int kSegment = 128;  // tokens
constexpr int kPiece = 8;      // tokens whose loads are in flight together
constexpr int kPayloads = 2;   // that one call carries
static_assert(kSegment % kPiece == 0, "checkpoints of the backward are whole pieces apart");

// --- where chunks and segments lie -----------------------------------------------------------------------------------

// Slots of `span` tokens: chunk c of row b in b * ceil(T / span) + c, of packed sequence n from token a in
// a / span + n + c. The grid needs no length from the device; slots that nobody owns have no tokens.
struct Layout {
  Indices cu_seqlens;           // [N+1] or absent
  int64_t tokens;               // of a batch row
  int64_t sequences, slots;     // of all rows
  int64_t slots_per_row, span;
  int segments;                 // of a slot
  bool chunked;                 // a chain is a slot; else it is a sequence, each of whose slots is one segment
};

struct Segment {
  int64_t sequence, slot;
  int64_t first;                 // token of all rows
  int64_t chain_end, sequence_end;
  int count;                     // tokens, 0 where nobody owns the slot
  bool opens, closes;            // the chain
  bool opens_sequence, closes_sequence;
  bool empty_sequence;           // stands for a sequence without tokens
};

__device__ __forceinline__ int64_t clamped(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Bound n of the packed sequences, inside the tokens whatever cu_seqlens holds.
__device__ __forceinline__ int64_t bound(const Layout& l, int64_t n) {
  return clamped(l.cu_seqlens.at(n), 0, l.tokens);
}

__device__ __forceinline__ bool packed(const Layout& l) { return l.cu_seqlens.narrow || l.cu_seqlens.wide; }

// The last packed sequence whose first slot is at or before `slot`.
__device__ __forceinline__ int64_t sequence_of(const Layout& l, int64_t slot) {
  int64_t low = 0, high = l.sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (bound(l, middle) / l.span + middle <= slot ? low : high) = middle;
  }
  return low;
}

__device__ __forceinline__ Segment segment_at(const Layout& l, int64_t id) {
  Segment s;
  s.slot = id / l.segments;
  const int64_t part = id % l.segments;
  int64_t begin, chunk;
  if (packed(l)) {
    s.sequence = sequence_of(l, s.slot);
    begin = bound(l, s.sequence);
    s.sequence_end = bound(l, s.sequence + 1);
    chunk = s.slot - begin / l.span - s.sequence;
  } else {
    s.sequence = s.slot / l.slots_per_row;
    begin = s.sequence * l.tokens;
    s.sequence_end = begin + l.tokens;
    chunk = s.slot % l.slots_per_row;
  }
  s.first = begin + chunk * l.span + part * kSegment;
  const int64_t chunk_end = begin + (chunk + 1) * l.span;
  s.chain_end = l.chunked && chunk_end < s.sequence_end ? chunk_end : s.sequence_end;
  s.count = chunk < 0 ? 0 : static_cast<int>(clamped(s.chain_end - s.first, 0, kSegment));
  const bool some = s.count > 0;
  s.opens = part == 0 && (l.chunked || chunk == 0);
  s.closes = some && s.first + s.count == s.chain_end;
  s.opens_sequence = part == 0 && chunk == 0;
  s.closes_sequence = some && s.first + s.count == s.sequence_end;
  s.empty_sequence = s.opens_sequence && s.sequence_end <= begin;
  return s;
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

struct Factor {
  float high, low, weight;  // e^g = high + low; w = 1 - e^g, or 1
};

// As in csrc/cpu/isa/scan_rows.inl.h: near e^g = 1 the rounding of e^g would be raised to the number of tokens.
__device__ __forceinline__ Factor factor(float g, bool ema) {
  const float x = g < -87.3f ? -87.3f : g;
  const float shifted = x * 1.44269504f + 12582912.f;  // its low mantissa bits hold the rounded n of g = n ln 2 + r
  const float whole = shifted - 12582912.f;
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float q = p * (r * r) + r;
  const float s = __uint_as_float((__float_as_uint(shifted) - 0x4b400000u + 127u) << 23), scaled = s * q;
  const float high = s + scaled, low = (s - high) + scaled;
  const bool forgets = g < -87.3f;  // -inf included
  return {forgets ? 0.f : high, forgets ? 0.f : low, ema ? (1.f - s) - scaled : 1.f};
}

__device__ __forceinline__ float advance(const Factor& f, float y, float x) {
  return f.high * y + (f.low * y + f.weight * x);
}

// --- the arguments of all passes -------------------------------------------------------------------------------------

template <typename T>
struct Payload {
  const T* x;            // [tokens, width]
  const float* initial;  // [N, D] or null: zero
  int64_t width;         // channel c of the gate reads channel c % width
  float* carry;          // [segments, D]: ends of the segments, then states before them; null without chains
};

template <typename T>
struct Scan {
  Layout layout;
  const float* g;  // [tokens, D]
  Payload<T> payloads[kPayloads];
  float* sums;  // [segments, D] of the log gates
  int64_t channels, column_blocks;
  bool ema;
};

// This thread's segment and first channel.
template <int kVector, typename T>
struct Lane {
  __device__ explicit Lane(const Scan<T>& a)
      : id(blockIdx.x / a.column_blocks),
        channel((blockIdx.x % a.column_blocks * kThreads + threadIdx.x) * kVector),
        inside(channel < a.channels) {}

  int64_t id, channel;
  bool inside;
};

template <int kCount, int kVector>
struct Piece {
  float g[kPiece][kVector], x[kCount][kPiece][kVector];
};

// Tokens first..first + left of the gate and the payloads; what lies behind is not read.
template <int kCount, int kVector, typename T>
__device__ __forceinline__ void load_piece(Piece<kCount, kVector>& piece, const Scan<T>& a, int64_t first, int left,
                                           int64_t channel) {
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    if (i >= left) continue;
    load(piece.g[i], a.g + (first + i) * a.channels + channel);
#pragma unroll
    for (int p = 0; p < kCount; ++p) {
      const Payload<T>& payload = a.payloads[p];
      load(piece.x[p][i], payload.x + (first + i) * payload.width + channel % payload.width);
    }
  }
}

// The states before the segment.
template <int kCount, int kVector, typename T>
__device__ __forceinline__ void begin(float (&state)[kCount][kVector], const Scan<T>& a, const Segment& s, int64_t id,
                                      int64_t channel) {
#pragma unroll
  for (int p = 0; p < kCount; ++p) {
    const Payload<T>& payload = a.payloads[p];
    fill(state[p], 0.f);
    if (s.opens_sequence && payload.initial) load(state[p], payload.initial + s.sequence * a.channels + channel);
    if (!s.opens && s.count > 0) load(state[p], payload.carry + id * a.channels + channel);
  }
}

template <int kCount, int kVector>
__device__ __forceinline__ void advance_token(float (&state)[kCount][kVector], const Piece<kCount, kVector>& piece, int i,
                                              bool ema) {
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    const Factor f = factor(piece.g[i][v], ema);
#pragma unroll
    for (int p = 0; p < kCount; ++p) state[p][v] = advance(f, state[p][v], piece.x[p][i][v]);
  }
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename T>
struct Forward {
  Scan<T> scan;
  T* y[kPayloads];          // [tokens, D] or null
  T* ends[kPayloads];       // [slots, D] or null
  float* final[kPayloads];  // [N, D] or null
};

// What every segment ends with from zero, and the sum of its log gates.
template <typename T, int kCount, int kVector>
__global__ void __launch_bounds__(kThreads) summarise_kernel(const Scan<T> a) {
  const Lane<kVector, T> at(a);
  const Segment s = segment_at(a.layout, at.id);
  if (!at.inside || s.count == 0) return;
  float sum[kVector], state[kCount][kVector];
  fill(sum, 0.f);
#pragma unroll
  for (int p = 0; p < kCount; ++p) fill(state[p], 0.f);
  for (int t = 0; t < s.count; t += kPiece) {
    Piece<kCount, kVector> piece;
    load_piece(piece, a, s.first + t, s.count - t, at.channel);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      if (t + i >= s.count) continue;
#pragma unroll
      for (int v = 0; v < kVector; ++v) sum[v] += piece.g[i][v];
      advance_token(state, piece, i, a.ema);
    }
  }
  store(a.sums + at.id * a.channels + at.channel, sum);
#pragma unroll
  for (int p = 0; p < kCount; ++p) store(a.payloads[p].carry + at.id * a.channels + at.channel, state[p]);
}

// The states before the segments of a chain, in place of their ends: carry <- e^sum carry + end, along the chain or,
// for what flows backwards, against it.
template <typename T>
struct Links {
  Layout layout;
  const float* sums;
  float* carry[kPayloads];          // [segments, D] or null
  const float* outside[kPayloads];  // [N, D] or null: enters the chain at that end of a sequence
  const T* ends[kPayloads];         // [slots, D] or null: enters every chain
  int64_t channels, column_blocks;
  bool backwards;
};

__device__ __forceinline__ int64_t first_segment(const Layout& l, int64_t chain) {
  if (l.chunked) return chain * l.segments;
  return packed(l) ? bound(l, chain) / l.span + chain : chain * l.slots_per_row;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) link_kernel(const Links<T> a) {
  const int64_t channel = blockIdx.x % a.column_blocks * kThreads + threadIdx.x;
  const int64_t first = first_segment(a.layout, blockIdx.x / a.column_blocks);
  const Segment s = segment_at(a.layout, first);
  if (channel >= a.channels || s.count == 0) return;
  const int64_t number = (s.chain_end - s.first + kSegment - 1) / kSegment;
  const bool meets = a.backwards ? s.chain_end == s.sequence_end : s.opens_sequence;
  const int64_t start = (a.backwards ? first + number - 1 : first) * a.channels + channel;
  const int64_t stride = a.backwards ? -a.channels : a.channels;
  for (int p = 0; p < kPayloads; ++p) {
    if (!a.carry[p]) continue;
    float carry = meets && a.outside[p] ? a.outside[p][s.sequence * a.channels + channel] : 0.f;
    if (a.ends[p]) carry += static_cast<float>(a.ends[p][s.slot * a.channels + channel]);
    for (int64_t done = 0; done < number; done += kPiece) {
      float sum[kPiece], end[kPiece];
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        if (done + i >= number) continue;
        sum[i] = a.sums[start + (done + i) * stride];
        end[i] = a.carry[p][start + (done + i) * stride];
      }
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        if (done + i >= number) continue;
        a.carry[p][start + (done + i) * stride] = carry;
        carry = advance(factor(sum[i], false), carry, end[i]);
      }
    }
  }
}

template <typename T, int kCount, int kVector>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Forward<T> a) {
  const Lane<kVector, T> at(a.scan);
  const Segment s = segment_at(a.scan.layout, at.id);
  if (!at.inside) return;
  const int64_t channels = a.scan.channels;
  float state[kCount][kVector];
  begin(state, a.scan, s, at.id, at.channel);
  for (int t = 0; t < s.count; t += kPiece) {
    Piece<kCount, kVector> piece;
    load_piece(piece, a.scan, s.first + t, s.count - t, at.channel);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      if (t + i >= s.count) continue;
      advance_token(state, piece, i, a.scan.ema);
#pragma unroll
      for (int p = 0; p < kCount; ++p) {
        if (a.y[p]) store(a.y[p] + (s.first + t + i) * channels + at.channel, state[p]);
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kCount; ++p) {
    const bool unowned = s.opens && s.count == 0;  // its state may be a sequence's initial one
    float end[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) end[v] = unowned ? 0.f : state[p][v];
    if (a.ends[p] && (s.closes || unowned)) store(a.ends[p] + s.slot * channels + at.channel, end);
    if (a.final[p] && (s.closes_sequence || s.empty_sequence)) {
      store(a.final[p] + s.sequence * channels + at.channel, state[p]);
    }
  }
}

// --- step ------------------------------------------------------------------------------------------------------------

template <typename T>
struct Step {
  const float* g;       // [B, t, D]
  const T* x;           // [B, t, width]
  float* state;         // [P, D]
  const bool* restart;  // [B] or null
  Indices indices;      // [B] rows of the pool, or absent: row b uses state b
  T* y;                 // [B, t, D]
  int64_t channels, width, pool, tokens, column_blocks;
  bool ema;
};

// One block per batch row and kThreads * kVector channels.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) step_kernel(const Step<T> a) {
  const int64_t row = blockIdx.x / a.column_blocks;
  const int64_t channel = (blockIdx.x % a.column_blocks * kThreads + threadIdx.x) * kVector;
  if (channel >= a.channels) return;
  const int64_t slot = a.indices.pool_row(row, a.pool);
  float state[kVector];
  fill(state, 0.f);
  if (slot >= 0 && !(a.restart && a.restart[row])) load(state, a.state + slot * a.channels + channel);
  for (int64_t t = row * a.tokens; t < (row + 1) * a.tokens; ++t) {
    if (slot >= 0) {
      float g[kVector], x[kVector];
      load(g, a.g + t * a.channels + channel);
      load(x, a.x + t * a.width + channel % a.width);
#pragma unroll
      for (int v = 0; v < kVector; ++v) state[v] = advance(factor(g[v], a.ema), state[v], x[v]);
    }
    store(a.y + t * a.channels + channel, state);
  }
  if (slot >= 0) store(a.state + slot * a.channels + channel, state);
}

}  // namespace memattn::scan
