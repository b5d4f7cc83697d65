// The CUDA step kernel's own source, compiled for the host (see cuda_on_host.h) and called through ctypes.
#include "cuda_on_host.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../../csrc/cuda/gated_delta_rule_step.cuh"

using namespace memattn::step;

template <typename T, bool kAligned>
void run(const Arguments<T>& a, int64_t batch) {
  const auto blocks = static_cast<unsigned>(batch * a.value_heads * a.column_blocks);
  if (a.key_dim <= 4 * kRowGroups) {
    cuda_on_host::launch(gated_delta_rule_step_kernel<T, 4, kAligned>, blocks, kThreads, a);
  } else if (a.key_dim <= 8 * kRowGroups) {
    cuda_on_host::launch(gated_delta_rule_step_kernel<T, 8, kAligned>, blocks, kThreads, a);
  } else {
    cuda_on_host::launch(gated_delta_rule_step_kernel<T, 16, kAligned>, blocks, kThreads, a);
  }
}

template <typename T>
void call(const void* q, const void* k, const void* v, const float* g, const void* beta, bool beta_is_float, float* state,
          const int64_t* indices, void* o, const int64_t* sizes, float scale, bool l2norm, bool aligned) {
  Arguments<T> a{};
  a.q = static_cast<const T*>(q);
  a.k = static_cast<const T*>(k);
  a.v = static_cast<const T*>(v);
  a.g = g;
  if (beta_is_float) a.beta_float = static_cast<const float*>(beta);
  if (!beta_is_float) a.beta = static_cast<const T*>(beta);
  a.state = state;
  a.indices64 = indices;
  a.o = static_cast<T*>(o);
  a.tokens = static_cast<int>(sizes[1]);
  a.heads = static_cast<int>(sizes[2]);
  a.value_heads = static_cast<int>(sizes[3]);
  a.key_dim = static_cast<int>(sizes[4]);
  a.value_dim = static_cast<int>(sizes[5]);
  a.pool = sizes[6];
  a.column_blocks = (a.value_dim + kBlockColumns - 1) / kBlockColumns;
  a.scale = scale;
  a.l2norm = l2norm;
  aligned ? run<T, true>(a, sizes[0]) : run<T, false>(a, sizes[0]);
}

// sizes: B, t, H, HV, K, V, P. bfloat16 and float16 as torch stores them.
extern "C" {
#define STEP(NAME, T)                                                                                                 \
  void NAME(const void* q, const void* k, const void* v, const float* g, const void* beta, bool beta_is_float,        \
            float* state, const int64_t* indices, void* o, const int64_t* sizes, float scale, bool l2norm,            \
            bool aligned) {                                                                                           \
    call<T>(q, k, v, g, beta, beta_is_float, state, indices, o, sizes, scale, l2norm, aligned);                       \
  }
STEP(step_float, float)
STEP(step_bfloat16, c10::BFloat16)
STEP(step_float16, c10::Half)
}
