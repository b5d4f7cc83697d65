// The tensors an op returns, on huge pages where they are large.
#pragma once

#include "../common/checks.h"
#include "pages.h"

#include <optional>

namespace memattn::cpu {

inline Tensor on_huge_pages(Tensor x) {
  advise_huge_pages(x.data_ptr(), static_cast<size_t>(x.numel()) * x.element_size());
  return x;
}

inline Tensor empty_result(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                           std::optional<ScalarType> type = std::nullopt) {
  return on_huge_pages(torch::stable::new_empty(like, shape, type));
}

inline Tensor zero_result(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                          std::optional<ScalarType> type = std::nullopt) {
  Tensor x = empty_result(like, shape, type);
  return torch::stable::zero_(x);
}

inline Tensor result_like(const Tensor& x) { return on_huge_pages(torch::stable::empty_like(x)); }

}  // namespace memattn::cpu
