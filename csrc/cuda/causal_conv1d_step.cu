// causal_conv1d_step on CUDA: checks, dispatch and launch. The mathematics and the block's work: .cuh beside this.
//
// Bound by the state: a step reads and writes W-1 floats per channel of every batch row, against one input and output.
// No host synchronisation, the current stream, no allocation but the output: the call can be captured in a CUDA graph.
#include "launch.h"

#include "causal_conv1d_step.cuh"

namespace memattn::conv_step {
namespace {

constexpr const char* kOp = "causal_conv1d_step_cuda";

template <typename T>
Parameter<T> parameter(const MaybeTensor& x, ScalarType dtype) {
  return {pointer<T>(x, dtype), pointer<float>(x, ScalarType::Float)};
}

void check_all(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& state,
               const MaybeTensor& indices) {
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
  check_one_device(kOp, x, {weight, state, bias, indices});
}

template <typename T>
auto kernel_of(int64_t width) {
  return width == 2   ? causal_conv1d_step_kernel<T, 2>
         : width == 3 ? causal_conv1d_step_kernel<T, 3>
                      : causal_conv1d_step_kernel<T, 4>;
}

template <typename T>
void run(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& state,
         const MaybeTensor& indices, bool silu, const Tensor& y, cudaStream_t stream) {
  Arguments<T> a{};
  a.x = static_cast<const T*>(x.const_data_ptr());
  a.weight = parameter<T>(weight, x.scalar_type());
  a.bias = parameter<T>(bias, x.scalar_type());
  a.state = static_cast<float*>(state.mutable_data_ptr());
  a.indices = indices_of(indices);
  a.y = static_cast<T*>(y.mutable_data_ptr());
  a.pool = state.size(0);
  a.channels = x.size(2);
  a.silu = silu;
  const int64_t column_blocks = ceil_div(a.channels, kThreads), blocks = x.size(0) * column_blocks;
  if (x.size(1) > kMaxInt || blocks > kMaxInt) {
    fail(kOp, "t and B * ceil(D / ", kThreads, ") must be below 2^31; got ", x.size(1), " and ", blocks);
  }
  a.tokens = static_cast<int>(x.size(1));
  a.column_blocks = static_cast<int>(column_blocks);
  launch(kernel_of<T>(weight.size(1)), blocks, kThreads, stream, a);
}

Tensor causal_conv1d_step_cuda(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                               const Tensor& state, const MaybeTensor& state_indices, bool silu) {
  check_all(x, weight, bias, state, state_indices);
  const OnDeviceOf here(x);
  Tensor y = torch::stable::empty_like(x);
  if (y.numel() == 0) return y;
  with_element(x.scalar_type(), [&]<typename T>(T) {
    run<T>(x, weight, bias, state, state_indices, silu, y, here.stream());
  });
  return y;
}

}  // namespace
}  // namespace memattn::conv_step

STABLE_TORCH_LIBRARY_IMPL(memattn, CUDA, m) {
  m.impl("causal_conv1d_step_cuda", TORCH_BOX(&memattn::conv_step::causal_conv1d_step_cuda));
}
