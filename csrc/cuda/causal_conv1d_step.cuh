// Device code of the convolution step: t tokens of a decode call against a pool of tails that is updated in place.
//
//     window <- last W inputs        z = bias + sum_w weight[w] window[w]        y = silu(z) or z
//
// Grid:   one block per (batch row, kThreads channels), each independent. One thread per channel.
// Shared: the block's tails. A channel's W-1 floats are adjacent in memory, so a thread reading its own would leave most
//         of every line to its neighbours; the block moves them together instead, each byte once in and once out.
//         A stride of W-1 words (1, 2 or 3) costs at most a two-way bank conflict.
//
// No torch API: tests compile this file with g++ and run it on the host.
#pragma once

#include "device.cuh"

namespace memattn::conv_step {

constexpr int kThreads = 128;

// weight or bias: in x's dtype or in float; both null: absent.
template <typename T>
struct Parameter {
  const T* own;
  const float* wide;

  __device__ float at(int64_t i) const { return wide ? wide[i] : own ? static_cast<float>(own[i]) : 0.f; }
};

template <typename T>
struct Arguments {
  const T* x;                // [B, t, D]
  Parameter<T> weight;       // [D, W]
  Parameter<T> bias;         // [D]
  float* state;              // [P, D, W-1]
  Indices indices;           // [B] rows of the pool, or absent: row b uses state b
  T* y;                      // [B, t, D]
  int64_t pool, channels;
  int tokens, column_blocks;  // column_blocks = ceil(D / kThreads)
  bool silu;
};

template <typename T, int W>
__global__ void __launch_bounds__(kThreads) causal_conv1d_step_kernel(const Arguments<T> a) {
  __shared__ float tails[kThreads * (W - 1)];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x / a.column_blocks, first = int64_t{kThreads} * (blockIdx.x % a.column_blocks);
  const int64_t channel = first + thread, left = a.channels - first;
  const int floats = static_cast<int>(left < kThreads ? left : kThreads) * (W - 1);
  const bool inside = channel < a.channels;
  const T* x = a.x + row * a.tokens * a.channels + channel;
  T* y = a.y + row * a.tokens * a.channels + channel;

  const int64_t slot = a.indices.pool_row(row, a.pool);
  if (slot < 0) {  // uniform over the block
    for (int t = 0; inside && t < a.tokens; ++t, y += a.channels) *y = static_cast<T>(0.f);
    return;
  }

  float* state = a.state + (slot * a.channels + first) * (W - 1);
  for (int i = thread; i < floats; i += kThreads) tails[i] = state[i];
  __syncthreads();
  if (inside) {
    float weight[W], window[W];
#pragma unroll
    for (int w = 0; w < W; ++w) weight[w] = a.weight.at(channel * W + w);
#pragma unroll
    for (int w = 1; w < W; ++w) window[w] = tails[thread * (W - 1) + w - 1];
    const float bias = a.bias.at(channel);
    for (int t = 0; t < a.tokens; ++t, x += a.channels, y += a.channels) {
#pragma unroll
      for (int w = 0; w + 1 < W; ++w) window[w] = window[w + 1];
      window[W - 1] = static_cast<float>(*x);
      float z = bias;
#pragma unroll
      for (int w = 0; w < W; ++w) z += weight[w] * window[w];
      *y = static_cast<T>(a.silu ? z / (1.f + expf(-z)) : z);
    }
#pragma unroll
    for (int w = 1; w < W; ++w) tails[thread * (W - 1) + w - 1] = window[w];
  }
  __syncthreads();
  for (int i = thread; i < floats; i += kThreads) state[i] = tails[i];
}

}  // namespace memattn::conv_step
