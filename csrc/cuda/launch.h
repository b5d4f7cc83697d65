// What every CUDA op's host side does: element types, pointers, the current device and stream, one launch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>

#include "../common/checks.h"
#include "device.cuh"

namespace memattn {

inline constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

using MaybeTensor = std::optional<Tensor>;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Reads of `x` as T, or null where it is absent or of another dtype.
template <typename T>
const T* pointer(const MaybeTensor& x, ScalarType dtype) {
  return x && x->scalar_type() == dtype ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

inline Indices indices_of(const MaybeTensor& x) {
  return {pointer<int32_t>(x, ScalarType::Int), pointer<int64_t>(x, ScalarType::Long)};
}

inline void check_one_device(const char* op, const Tensor& first, std::initializer_list<MaybeTensor> others) {
  for (const MaybeTensor& other : others) {
    if (other && other->get_device_index() != first.get_device_index()) fail(op, "all tensors must be on one CUDA device");
  }
}

// The device of a tensor while this lives, and its current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

template <typename Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, int threads, cudaStream_t stream, const Arguments& arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments));
}

// Calls `go` with a value of the element type, which checks have found to be one of these.
template <typename Go>
void with_element(ScalarType dtype, const Go& go) {
  switch (dtype) {
    case ScalarType::Float: go(float{}); break;
    case ScalarType::BFloat16: go(c10::BFloat16{}); break;
    default: go(c10::Half{});
  }
}

}  // namespace memattn
