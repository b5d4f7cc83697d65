// Device code of the gated scan's backward, cut into segments as the forward: see gated_scan.cuh.
//
// With c_t what reaches token t from behind: r_t = dy_t + c_t, c_{t-1} = e^{g_t} r_t. A segment that is a whole chunk needs
// one pass: a thread goes up keeping the state of every kPiece tokens in shared memory, its own column of it, then comes
// down recomputing each piece from there; the second and third read of g and x find them in the cache. Chains first get
// the states before every segment and, by the same links run backwards, what reaches every segment from behind.
#pragma once

#include "gated_scan.cuh"

namespace memattn::scan {

template <typename T>
struct Backward {
  Scan<T> scan;
  const T* dy[kPayloads];          // [tokens, D] or null
  const T* dends[kPayloads];       // [slots, D] or null
  const float* dfinal[kPayloads];  // [N, D] or null
  float* reaching[kPayloads];      // [segments, D]: from within the segment, then from behind it; null without chains
  float* dg;                       // [tokens, D]
  T* dx[kPayloads];                // [tokens, D], or null where the payload is narrower than the gate and has
  float* wide[kPayloads];          // [tokens, D]: under every channel of the gate
  float* dinitial[kPayloads];      // [N, D] or null
};

// Beside what the forward's pass finds: what the segment's own dy give to the token before it.
template <typename T, int kCount, int kVector>
__global__ void __launch_bounds__(kThreads) summarise_backward_kernel(const Backward<T> a) {
  const Lane<kVector, T> at(a.scan);
  const Segment s = segment_at(a.scan.layout, at.id);
  if (!at.inside || s.count == 0) return;
  const int64_t channels = a.scan.channels, mine = at.id * channels + at.channel;
  float sum[kVector], state[kCount][kVector], reaching[kCount][kVector];
  fill(sum, 0.f);
#pragma unroll
  for (int p = 0; p < kCount; ++p) {
    fill(state[p], 0.f);
    fill(reaching[p], 0.f);
  }
  for (int t = 0; t < s.count; t += kPiece) {
    Piece<kCount, kVector> piece;
    load_piece(piece, a.scan, s.first + t, s.count - t, at.channel);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) {
      if (t + i >= s.count) continue;
      float decay[kVector];
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        sum[v] += piece.g[i][v];
        decay[v] = factor(sum[v], false).high;
      }
      advance_token(state, piece, i, a.scan.ema);
#pragma unroll
      for (int p = 0; p < kCount; ++p) {
        if (!a.dy[p]) continue;
        float dy[kVector];
        load(dy, a.dy[p] + (s.first + t + i) * channels + at.channel);
#pragma unroll
        for (int v = 0; v < kVector; ++v) reaching[p][v] += decay[v] * dy[v];
      }
    }
  }
  store(a.scan.sums + mine, sum);
#pragma unroll
  for (int p = 0; p < kCount; ++p) {
    store(a.scan.payloads[p].carry + mine, state[p]);
    store(a.reaching[p] + mine, reaching[p]);
  }
}

// What reaches the segment's last token from behind.
template <typename T, int kCount, int kVector>
__device__ __forceinline__ void begin_backward(float (&reaching)[kCount][kVector], const Backward<T>& a, const Segment& s,
                                               int64_t id, int64_t channel) {
#pragma unroll
  for (int p = 0; p < kCount; ++p) {
    fill(reaching[p], 0.f);
    if (s.count > 0 && !s.closes) {
      load(reaching[p], a.reaching[p] + id * a.scan.channels + channel);
      continue;
    }
    if (a.dfinal[p] && (s.closes_sequence || s.empty_sequence)) {
      load(reaching[p], a.dfinal[p] + s.sequence * a.scan.channels + channel);
    }
    if (a.dends[p] && s.closes) {
      float end[kVector];
      load(end, a.dends[p] + s.slot * a.scan.channels + channel);
#pragma unroll
      for (int v = 0; v < kVector; ++v) reaching[p][v] += end[v];
    }
  }
}

// Tokens first..first + left, `state` the one before them: their gradients, and what reaches the token before them.
template <typename T, int kCount, int kVector>
__device__ __forceinline__ void piece_backward(float (&reaching)[kCount][kVector], float (&state)[kCount][kVector],
                                               const Backward<T>& a, int64_t first, int left, int64_t channel) {
  Piece<kCount, kVector> piece;
  float dy[kCount][kPiece][kVector], before[kCount][kPiece][kVector];
  Factor factors[kPiece][kVector];
  load_piece(piece, a.scan, first, left, channel);
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    if (i >= left) continue;
#pragma unroll
    for (int p = 0; p < kCount; ++p) {
      fill(dy[p][i], 0.f);
      if (a.dy[p]) load(dy[p][i], a.dy[p] + (first + i) * a.scan.channels + channel);
    }
  }
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    if (i >= left) continue;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      factors[i][v] = factor(piece.g[i][v], a.scan.ema);
#pragma unroll
      for (int p = 0; p < kCount; ++p) {
        before[p][i][v] = state[p][v];
        state[p][v] = advance(factors[i][v], state[p][v], piece.x[p][i][v]);
      }
    }
  }
#pragma unroll
  for (int i = kPiece - 1; i >= 0; --i) {
    if (i >= left) continue;
    const int64_t at = (first + i) * a.scan.channels + channel;
    float dg[kVector];
    fill(dg, 0.f);
#pragma unroll
    for (int p = 0; p < kCount; ++p) {
      float dx[kVector];
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const Factor f = factors[i][v];
        const float r = dy[p][i][v] + reaching[p][v], decayed = f.high * r + f.low * r;
        dx[v] = f.weight * r;
        dg[v] += decayed * (a.scan.ema ? before[p][i][v] - piece.x[p][i][v] : before[p][i][v]);
        reaching[p][v] = decayed;
      }
      if (a.dx[p]) store(a.dx[p] + at, dx);
      if (a.wide[p]) store(a.wide[p] + at, dx);
    }
    store(a.dg + at, dg);
  }
}

template <typename T, int kCount, int kVector>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Backward<T> a) {
  __shared__ float checkpoints[kSegment / kPiece][kCount][kVector][kThreads];  // each thread its own column
  const Lane<kVector, T> at(a.scan);
  const Segment s = segment_at(a.scan.layout, at.id);
  if (!at.inside) return;
  float state[kCount][kVector], reaching[kCount][kVector];
  begin(state, a.scan, s, at.id, at.channel);
  begin_backward(reaching, a, s, at.id, at.channel);
  const int pieces = (s.count + kPiece - 1) / kPiece;
  for (int n = 0; n < pieces; ++n) {
#pragma unroll
    for (int p = 0; p < kCount; ++p) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) checkpoints[n][p][v][threadIdx.x] = state[p][v];
    }
    if (n == pieces - 1) continue;
    Piece<kCount, kVector> piece;
    load_piece(piece, a.scan, s.first + n * kPiece, kPiece, at.channel);
#pragma unroll
    for (int i = 0; i < kPiece; ++i) advance_token(state, piece, i, a.scan.ema);
  }
  for (int n = pieces - 1; n >= 0; --n) {
#pragma unroll
    for (int p = 0; p < kCount; ++p) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) state[p][v] = checkpoints[n][p][v][threadIdx.x];
    }
    piece_backward(reaching, state, a, s.first + n * kPiece, s.count - n * kPiece, at.channel);
  }
#pragma unroll
  for (int p = 0; p < kCount; ++p) {
    if (a.dinitial[p] && s.opens_sequence) store(a.dinitial[p] + s.sequence * a.scan.channels + at.channel, reaching[p]);
  }
}

// dx of a payload from the gradients under every channel of the gate, added tile by tile.
template <typename T>
struct Tiles {
  const float* wide;  // [tokens, D]
  T* dx;              // [tokens, width]
  int64_t count;      // of dx
  int64_t channels, width;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) add_tiles_kernel(const Tiles<T> a) {
  const int64_t i = int64_t{kThreads} * blockIdx.x + threadIdx.x;
  if (i >= a.count) return;
  const float* wide = a.wide + i / a.width * a.channels + i % a.width;
  float sum = 0.f;
  for (int64_t c = 0; c < a.channels; c += a.width) sum += wide[c];
  a.dx[i] = static_cast<T>(sum);
}

}  // namespace memattn::scan
