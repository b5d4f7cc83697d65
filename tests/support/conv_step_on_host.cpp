// The CUDA convolution step's own source, compiled for the host (see cuda_on_host.h) and called through ctypes.
#include "cuda_on_host.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../../csrc/cuda/causal_conv1d_step.cuh"

using namespace memattn::conv_step;

template <typename T>
Parameter<T> parameter(const void* data, bool wide) {
  return wide ? Parameter<T>{nullptr, static_cast<const float*>(data)} : Parameter<T>{static_cast<const T*>(data), nullptr};
}

template <typename T>
void call(const void* x, const void* weight, const void* bias, bool wide, float* state, const void* indices,
          bool indices_are_32_bit, void* y, const int64_t* sizes, bool silu) {
  Arguments<T> a{};
  a.x = static_cast<const T*>(x);
  a.weight = parameter<T>(weight, wide);
  a.bias = parameter<T>(bias, wide);
  a.state = state;
  if (indices_are_32_bit) a.indices32 = static_cast<const int32_t*>(indices);
  else a.indices64 = static_cast<const int64_t*>(indices);
  a.y = static_cast<T*>(y);
  a.tokens = static_cast<int>(sizes[1]);
  a.channels = sizes[2];
  a.pool = sizes[4];
  a.column_blocks = static_cast<int>((a.channels + kThreads - 1) / kThreads);
  a.silu = silu;
  const auto blocks = static_cast<unsigned>(sizes[0] * a.column_blocks);
  if (sizes[3] == 2) cuda_on_host::launch(causal_conv1d_step_kernel<T, 2>, blocks, kThreads, a);
  else if (sizes[3] == 3) cuda_on_host::launch(causal_conv1d_step_kernel<T, 3>, blocks, kThreads, a);
  else cuda_on_host::launch(causal_conv1d_step_kernel<T, 4>, blocks, kThreads, a);
}

// sizes: B, t, D, W, P. bfloat16 and float16 as torch stores them.
extern "C" {
#define STEP(NAME, T)                                                                                                   \
  void NAME(const void* x, const void* weight, const void* bias, bool wide, float* state, const void* indices,          \
            bool indices_are_32_bit, void* y, const int64_t* sizes, bool silu) {                                        \
    call<T>(x, weight, bias, wide, state, indices, indices_are_32_bit, y, sizes, silu);                                 \
  }
STEP(step_float, float)
STEP(step_bfloat16, c10::BFloat16)
STEP(step_float16, c10::Half)
}
