// gated_delta_rule_step on CUDA: checks, dispatch and launch. The mathematics and the block's work: .cuh beside this.
//
// Bound by the state: every step reads and writes K * V floats per value head, and all else is small beside it, so the
// kernel's one duty is to move that state once, in whole lines, with enough loads in flight.
// No host synchronisation, the current stream, no allocation but the output: the call can be captured in a CUDA graph.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cuda_runtime.h>

#include <limits>
#include <optional>

#include "gated_delta_rule_step.cuh"

namespace memattn::step {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "gated_delta_rule_step_cuda";
constexpr int kMaxKeyDim = 256;

struct Sizes {
  int64_t batch, tokens, heads, value_heads, key_dim, value_dim, pool;
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

  const int64_t blocks = n.batch * n.value_heads * a.column_blocks;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), kOp, ": B * HV * ceil(V / 32) must be at most 2^31 - 1, got ",
                  blocks);
  if (n.key_dim <= 4 * kRowGroups) {
    launch<T, 4>(a, blocks, stream);
  } else if (n.key_dim <= 8 * kRowGroups) {
    launch<T, 8>(a, blocks, stream);
  } else {
    launch<T, kMaxKeyDim / kRowGroups>(a, blocks, stream);
  }
}

// What memory safety needs of one tensor: the device, contiguity and the exact sizes. Meaning is checked in Python.
void check(const char* name, const Tensor& x, const Tensor& q, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index(), kOp, ": ", name, " is not on q's CUDA device");
  STD_TORCH_CHECK(x.is_contiguous(), kOp, ": ", name, " is not contiguous");
  bool same = x.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (const int64_t size : sizes) same = same && x.size(d++) == size;
  STD_TORCH_CHECK(same, kOp, ": ", name, " has sizes that do not fit q, v and state");
}

void check_dtype(const char* name, const Tensor& x, ScalarType a, ScalarType b) {
  STD_TORCH_CHECK(x.scalar_type() == a || x.scalar_type() == b, kOp, ": ", name, " has a dtype that is not supported");
}

Sizes check_all(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& g,
                const std::optional<Tensor>& beta, const Tensor& state, const std::optional<Tensor>& indices) {
  STD_TORCH_CHECK(q.is_cuda() && q.dim() == 4 && v.dim() == 4 && state.dim() == 4, kOp,
                  ": q, v and state must be 4-dimensional CUDA tensors");
  const Sizes n{q.size(0), q.size(1), q.size(2), v.size(2), q.size(3), v.size(3), state.size(0)};
  STD_TORCH_CHECK(n.heads > 0 && n.value_heads > 0 && n.value_heads % n.heads == 0, kOp,
                  ": v's heads must be a positive multiple of q's, got ", n.value_heads, " and ", n.heads);
  STD_TORCH_CHECK(n.key_dim > 0 && n.key_dim <= kMaxKeyDim && n.value_dim > 0, kOp, ": K must be in 1..", kMaxKeyDim, ", got ",
                  n.key_dim);
  STD_TORCH_CHECK(n.tokens <= std::numeric_limits<int32_t>::max() && n.value_dim <= std::numeric_limits<int32_t>::max() - kBlockColumns,
                  kOp, ": t and V must fit in 31 bits");
  const ScalarType dtype = q.scalar_type();
  check("q", q, q, {n.batch, n.tokens, n.heads, n.key_dim});
  check("k", k, q, {n.batch, n.tokens, n.heads, n.key_dim});
  check("v", v, q, {n.batch, n.tokens, n.value_heads, n.value_dim});
  check("state", state, q, {n.pool, n.value_heads, n.key_dim, n.value_dim});
  check_dtype("k", k, dtype, dtype);
  check_dtype("v", v, dtype, dtype);
  check_dtype("state", state, ScalarType::Float, ScalarType::Float);
  if (g) {
    check("g", *g, q, {n.batch, n.tokens, n.value_heads});
    check_dtype("g", *g, ScalarType::Float, ScalarType::Float);
  }
  if (beta) {
    check("beta", *beta, q, {n.batch, n.tokens, n.value_heads});
    check_dtype("beta", *beta, dtype, ScalarType::Float);
  }
  if (indices) {
    check("state_indices", *indices, q, {n.batch});
    check_dtype("state_indices", *indices, ScalarType::Int, ScalarType::Long);
  }
  return n;
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
    default: STD_TORCH_CHECK(false, kOp, ": q must be float32, bfloat16 or float16");
  }
  return o;
}

}  // namespace
}  // namespace memattn::step

STABLE_TORCH_LIBRARY_IMPL(memattn, CUDA, m) {
  m.impl("gated_delta_rule_step_cuda", TORCH_BOX(&memattn::step::gated_delta_rule_step_cuda));
}
