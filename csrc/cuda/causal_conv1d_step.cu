// causal_conv1d_step on CUDA: checks, dispatch and launch. The mathematics and the block's work: .cuh beside this.
//
// Bound by the state: a step reads and writes W-1 floats per channel of every batch row, against one input and output.
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
#include "causal_conv1d_step.cuh"

namespace memattn::conv_step {
namespace {

constexpr const char* kOp = "causal_conv1d_step_cuda";
constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

template <typename T>
const T* pointer(const std::optional<Tensor>& x, ScalarType dtype) {
  return x && x->scalar_type() == dtype ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

template <typename T>
Parameter<T> parameter(const std::optional<Tensor>& x, ScalarType dtype) {
  return {pointer<T>(x, dtype), pointer<float>(x, ScalarType::Float)};
}

void check_all(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& state,
               const std::optional<Tensor>& indices) {
  constexpr auto kFloat = ScalarType::Float;
  constexpr auto kCuda = Place::cuda;
  const ScalarType dtype = x.scalar_type();
  check_tensor(kOp, "x", x, {kFloat, ScalarType::BFloat16, ScalarType::Half}, {kAnySize, kAnySize, kAnySize}, kCuda);
  check_tensor(kOp, "weight", weight, {dtype, kFloat}, {x.size(2), kAnySize}, kCuda);
  if (weight.size(1) < 2 || weight.size(1) > 4) fail(kOp, "weight must have 2 to 4 taps; got ", weight.size(1));
  check_tensor(kOp, "bias", bias, {dtype, kFloat}, {x.size(2)}, kCuda);
  const int64_t pool = indices ? kAnySize : x.size(0);
  check_tensor(kOp, "state", state, {kFloat}, {pool, x.size(2), weight.size(1) - 1}, kCuda);
  check_tensor(kOp, "state_indices", indices, {ScalarType::Int, ScalarType::Long}, {x.size(0)}, kCuda);
  for (const std::optional<Tensor>& other : {std::optional(weight), std::optional(state), bias, indices}) {
    if (other && other->get_device_index() != x.get_device_index()) fail(kOp, "all tensors must be on one CUDA device");
  }
}

template <typename T>
void launch(const Arguments<T>& a, int64_t width, unsigned blocks, cudaStream_t stream) {
  switch (width) {
    case 2: causal_conv1d_step_kernel<T, 2><<<blocks, kThreads, 0, stream>>>(a); break;
    case 3: causal_conv1d_step_kernel<T, 3><<<blocks, kThreads, 0, stream>>>(a); break;
    default: causal_conv1d_step_kernel<T, 4><<<blocks, kThreads, 0, stream>>>(a);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void run(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& state,
         const std::optional<Tensor>& indices, bool silu, const Tensor& y, cudaStream_t stream) {
  Arguments<T> a{};
  a.x = static_cast<const T*>(x.const_data_ptr());
  a.weight = parameter<T>(weight, x.scalar_type());
  a.bias = parameter<T>(bias, x.scalar_type());
  a.state = static_cast<float*>(state.mutable_data_ptr());
  a.indices32 = pointer<int32_t>(indices, ScalarType::Int);
  a.indices64 = pointer<int64_t>(indices, ScalarType::Long);
  a.y = static_cast<T*>(y.mutable_data_ptr());
  a.pool = state.size(0);
  a.channels = x.size(2);
  a.silu = silu;
  const int64_t column_blocks = (a.channels + kThreads - 1) / kThreads, blocks = x.size(0) * column_blocks;
  if (x.size(1) > kMaxInt || blocks > kMaxInt) {
    fail(kOp, "t and B * ceil(D / ", kThreads, ") must be below 2^31; got ", x.size(1), " and ", blocks);
  }
  a.tokens = static_cast<int>(x.size(1));
  a.column_blocks = static_cast<int>(column_blocks);
  launch(a, weight.size(1), static_cast<unsigned>(blocks), stream);
}

Tensor causal_conv1d_step_cuda(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                               const Tensor& state, const std::optional<Tensor>& state_indices, bool silu) {
  check_all(x, weight, bias, state, state_indices);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  if (y.numel() == 0) return y;
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const auto go = [&](auto element) {
    run<decltype(element)>(x, weight, bias, state, state_indices, silu, y, static_cast<cudaStream_t>(stream));
  };
  switch (x.scalar_type()) {
    case ScalarType::Float: go(float{}); break;
    case ScalarType::BFloat16: go(c10::BFloat16{}); break;
    default: go(c10::Half{});
  }
  return y;
}

}  // namespace
}  // namespace memattn::conv_step

STABLE_TORCH_LIBRARY_IMPL(memattn, CUDA, m) {
  m.impl("causal_conv1d_step_cuda", TORCH_BOX(&memattn::conv_step::causal_conv1d_step_cuda));
}
