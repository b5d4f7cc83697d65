// gated_delta_rule_step on CUDA: checks, dispatch and launch. The mathematics and the block's work: .cuh beside this.
//
// Bound by the state: every step reads and writes K * V floats per value head, and all else is small beside it, so the
// kernel's one duty is to move that state once, in whole lines, with enough loads in flight.
// No host synchronisation, the current stream, no allocation but the output: the call can be captured in a CUDA graph.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cuda_runtime.h>

#include <limits>
#include <optional>

#include "../common/checks.h"
#include "gated_delta_rule_step.cuh"

namespace memattn::step {
namespace {

constexpr const char* kOp = "gated_delta_rule_step_cuda";
constexpr int64_t kMaxKeyDim = 256, kMaxValueDim = 65536, kMaxInt = std::numeric_limits<int32_t>::max();

struct Sizes {
  int64_t batch, tokens, heads, value_heads, key_dim, value_dim, pool, blocks;
};

template <typename T>
const T* pointer(const std::optional<Tensor>& x, ScalarType dtype) {
  return x && x->scalar_type() == dtype ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

template <typename T, int kRows>
void launch(const Arguments<T>& a, int64_t blocks, cudaStream_t stream) {
  const bool aligned = a.value_dim % kVector == 0 && reinterpret_cast<uintptr_t>(a.state) % 16 == 0;
  const auto grid = dim3(static_cast<unsigned>(blocks));
  if (aligned) {
    gated_delta_rule_step_kernel<T, kRows, true><<<grid, kThreads, 0, stream>>>(a);
  } else {
    gated_delta_rule_step_kernel<T, kRows, false><<<grid, kThreads, 0, stream>>>(a);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void run(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& g,
         const std::optional<Tensor>& beta, const Tensor& state, const std::optional<Tensor>& indices, const Tensor& o,
         const Sizes& n, float scale, bool l2norm, cudaStream_t stream) {
  Arguments<T> a{};
  a.q = static_cast<const T*>(q.const_data_ptr());
  a.k = static_cast<const T*>(k.const_data_ptr());
  a.v = static_cast<const T*>(v.const_data_ptr());
  a.g = pointer<float>(g, ScalarType::Float);
  a.beta_float = pointer<float>(beta, ScalarType::Float);
  a.beta = a.beta_float ? nullptr : pointer<T>(beta, q.scalar_type());
  a.indices32 = pointer<int32_t>(indices, ScalarType::Int);
  a.indices64 = pointer<int64_t>(indices, ScalarType::Long);
  a.state = static_cast<float*>(state.mutable_data_ptr());
  a.o = static_cast<T*>(o.mutable_data_ptr());
  a.pool = n.pool;
  a.tokens = static_cast<int>(n.tokens);
  a.heads = static_cast<int>(n.heads);
  a.value_heads = static_cast<int>(n.value_heads);
  a.key_dim = static_cast<int>(n.key_dim);
  a.value_dim = static_cast<int>(n.value_dim);
  a.column_blocks = (a.value_dim + kBlockColumns - 1) / kBlockColumns;
  a.scale = scale;
  a.l2norm = l2norm;

  if (n.key_dim <= 4 * kRowGroups) {
    launch<T, 4>(a, n.blocks, stream);
  } else if (n.key_dim <= 8 * kRowGroups) {
    launch<T, 8>(a, n.blocks, stream);
  } else {
    launch<T, kMaxKeyDim / kRowGroups>(a, n.blocks, stream);
  }
}

// What memory safety needs; what a value means is checked in Python.
Sizes check_all(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& g,
                const std::optional<Tensor>& beta, const Tensor& state, const std::optional<Tensor>& indices) {
  constexpr auto kFloat = ScalarType::Float;
  constexpr auto kCuda = Place::cuda;
  constexpr auto kAny = kAnySize;
  const ScalarType dtype = q.scalar_type();
  check_tensor(kOp, "q", q, {kFloat, ScalarType::BFloat16, ScalarType::Half}, {kAny, kAny, kAny, kAny}, kCuda);
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), key_dim = q.size(3);
  check_tensor(kOp, "k", k, {dtype}, {batch, tokens, heads, key_dim}, kCuda);
  check_tensor(kOp, "v", v, {dtype}, {batch, tokens, kAny, kAny}, kCuda);
  const int64_t value_heads = v.size(2), value_dim = v.size(3);
  check_tensor(kOp, "g", g, {kFloat}, {batch, tokens, value_heads}, kCuda);
  check_tensor(kOp, "beta", beta, {dtype, kFloat}, {batch, tokens, value_heads}, kCuda);
  check_tensor(kOp, "state", state, {kFloat}, {kAny, value_heads, key_dim, value_dim}, kCuda);
  check_tensor(kOp, "state_indices", indices, {ScalarType::Int, ScalarType::Long}, {batch}, kCuda);
  for (const std::optional<Tensor>& x : {std::optional(k), std::optional(v), std::optional(state), g, beta, indices}) {
    if (x && x->get_device_index() != q.get_device_index()) fail(kOp, "all tensors must be on one CUDA device");
  }
  if (heads < 1 || value_heads < 1 || value_heads % heads != 0) {
    fail(kOp, "the heads of v must be a positive multiple of those of q; got ", value_heads, " and ", heads);
  }
  if (key_dim < 1 || key_dim > kMaxKeyDim || value_dim < 1 || value_dim > kMaxValueDim) {
    fail(kOp, "K must be in 1..", kMaxKeyDim, " and V in 1..", kMaxValueDim, "; got ", key_dim, " and ", value_dim);
  }
  const int64_t blocks = batch * value_heads * ((value_dim + kBlockColumns - 1) / kBlockColumns);
  if (tokens > kMaxInt || blocks > kMaxInt) {
    fail(kOp, "t and B * HV * ceil(V / ", kBlockColumns, ") must be below 2^31; got ", tokens, " and ", blocks);
  }
  return {batch, tokens, heads, value_heads, key_dim, value_dim, state.size(0), blocks};
}

Tensor gated_delta_rule_step_cuda(Tensor q, Tensor k, Tensor v, std::optional<Tensor> g, std::optional<Tensor> beta,
                                  Tensor state, std::optional<Tensor> state_indices, double scale, bool qk_l2norm) {
  const Sizes n = check_all(q, k, v, g, beta, state, state_indices);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor o = torch::stable::empty_like(v);
  if (o.numel() == 0) return o;
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
  const auto go = [&](auto element) {
    run<decltype(element)>(q, k, v, g, beta, state, state_indices, o, n, static_cast<float>(scale), qk_l2norm,
                           static_cast<cudaStream_t>(stream));
  };
  switch (q.scalar_type()) {
    case ScalarType::Float: go(float{}); break;
    case ScalarType::BFloat16: go(c10::BFloat16{}); break;
    case ScalarType::Half: go(c10::Half{}); break;
    default: fail(kOp, "q has dtype ", dtype_name(q.scalar_type()));
  }
  return o;
}

}  // namespace
}  // namespace memattn::step

STABLE_TORCH_LIBRARY_IMPL(memattn, CUDA, m) {
  m.impl("gated_delta_rule_step_cuda", TORCH_BOX(&memattn::step::gated_delta_rule_step_cuda));
}
