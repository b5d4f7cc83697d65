// Memory-safety checks of the C++ ops: one line per tensor, one error naming argument, received and allowed.
// Called before any parallel region, because an error raised inside one loses its message.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace memattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Place { cpu, cuda };

// A size that any value satisfies.
inline constexpr int64_t kAnySize = -1;

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return torch::headeronly::toString(type);
  }
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  text << '[';
  const char* separator = "";
  for (int64_t size : sizes) {
    text << separator;
    if (size == kAnySize)
      text << "any";
    else
      text << size;
    separator = ", ";
  }
  text << ']';
  return text.str();
}

inline std::string describe(const Tensor& tensor) {
  std::string text = std::string(dtype_name(tensor.scalar_type())) + " " + shape_text(tensor.sizes());
  text += tensor.is_cpu() ? " on cpu" : tensor.is_cuda() ? " on cuda" : " on another device";
  if (!tensor.is_contiguous()) text += ", not contiguous";
  return text;
}

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline bool sizes_match(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t d = 0;
  for (int64_t size : shape) {
    if (size != kAnySize && tensor.size(d) != size) return false;
    ++d;
  }
  return true;
}

// `tensor` must be contiguous, on `place`, of one of `dtypes` and of `shape` (kAnySize matches anything).
inline void check_tensor(const char* op, const char* name, const Tensor& tensor,
                         std::initializer_list<ScalarType> dtypes, std::initializer_list<int64_t> shape,
                         Place place = Place::cpu) {
  bool dtype_ok = false;
  for (ScalarType dtype : dtypes) dtype_ok = dtype_ok || tensor.scalar_type() == dtype;
  const bool place_ok = place == Place::cpu ? tensor.is_cpu() : tensor.is_cuda();
  if (dtype_ok && place_ok && sizes_match(tensor, shape) && tensor.is_contiguous()) return;
  std::string allowed;
  for (ScalarType dtype : dtypes) allowed += (allowed.empty() ? "" : " or ") + std::string(dtype_name(dtype));
  fail(op, name, " must be ", allowed, " ", shape_text(shape), ", contiguous on ", place == Place::cpu ? "cpu" : "cuda",
       "; got ", describe(tensor));
}

inline void check_tensor(const char* op, const char* name, const std::optional<Tensor>& tensor,
                         std::initializer_list<ScalarType> dtypes, std::initializer_list<int64_t> shape,
                         Place place = Place::cpu) {
  if (tensor.has_value()) check_tensor(op, name, *tensor, dtypes, shape, place);
}

// Reads a 1-d int32 or int64 index tensor on the CPU (already checked) into int64.
inline std::vector<int64_t> read_indices(const Tensor& tensor) {
  const int64_t count = tensor.numel();
  std::vector<int64_t> values(static_cast<size_t>(count));
  if (tensor.scalar_type() == ScalarType::Int) {
    const int32_t* data = tensor.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < count; ++i) values[i] = data[i];
  } else {
    const int64_t* data = tensor.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < count; ++i) values[i] = data[i];
  }
  return values;
}

// Sequence boundaries [N+1] of a packed batch: monotone from 0 to `tokens`, or an error. Wrong values would reach
// outside the token arrays, so this is checked on every call.
inline std::vector<int64_t> read_cu_seqlens(const char* op, const Tensor& cu_seqlens, int64_t batch, int64_t tokens) {
  check_tensor(op, "cu_seqlens", cu_seqlens, {ScalarType::Int, ScalarType::Long}, {kAnySize});
  if (batch != 1) fail(op, "cu_seqlens needs a batch of 1 (packed tokens); got B = ", batch);
  if (cu_seqlens.numel() < 1) fail(op, "cu_seqlens must have at least one entry; got none");
  std::vector<int64_t> bounds = read_indices(cu_seqlens);
  for (size_t i = 1; i < bounds.size(); ++i) {
    if (bounds[i] < bounds[i - 1]) {
      fail(op, "cu_seqlens must not decrease; got ", bounds[i - 1], " then ", bounds[i], " at entry ", i);
    }
  }
  if (bounds.front() != 0 || bounds.back() != tokens) {
    fail(op, "cu_seqlens must run from 0 to T = ", tokens, "; got ", bounds.front(), " to ", bounds.back());
  }
  return bounds;
}

}  // namespace memattn
