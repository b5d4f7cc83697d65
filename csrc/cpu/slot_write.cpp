// Slot write: attention of slots over tokens, the softmax of each slot beginning with a score and a value of its own.
// Mathematics: python/memattn/ops/slot_write.py.
#include "attention.h"
#include "results.h"

#include <tuple>

namespace memattn::cpu {
namespace {

using MaybeTensor = std::optional<Tensor>;

Attention read(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& scores,
               const MaybeTensor& values, const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k,
               double scale) {
  Attention a = read_arguments(op, q, k, v, std::nullopt, std::nullopt, cu_seqlens_q, cu_seqlens_k,
                               {0, 0, 0, 0, 0, 0, 0, 0, 0, false, scale});
  begin_with(op, a, q, v, scores, values);
  return a;
}

std::tuple<Tensor, Tensor> slot_write(Tensor q, Tensor k, Tensor v, MaybeTensor scores, MaybeTensor values,
                                      MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, double scale) {
  const Attention a = read("slot_write_cpu", q, k, v, scores, values, cu_seqlens_q, cu_seqlens_k, scale);
  const std::vector<int64_t> rows{q.size(0), q.size(1), q.size(2)};
  Tensor o = empty_result(q, {q.size(0), q.size(1), q.size(2), v.size(3)});
  Tensor lse = empty_result(q, rows, state_dtype(q.scalar_type()));
  attend(a, q.scalar_type(), o.mutable_data_ptr(), lse.mutable_data_ptr());
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> slot_write_backward(
    Tensor d_o, MaybeTensor d_lse, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, MaybeTensor scores,
    MaybeTensor values, MaybeTensor cu_seqlens_q, MaybeTensor cu_seqlens_k, double scale) {
  const char* op = "slot_write_cpu_backward";
  const Attention a = read(op, q, k, v, scores, values, cu_seqlens_q, cu_seqlens_k, scale);
  const ScalarType type = q.scalar_type(), sums = state_dtype(type);
  const int64_t batch = q.size(0), slots = q.size(1), heads = q.size(2), value_dim = v.size(3);
  check_tensor(op, "do", d_o, {type}, {batch, slots, heads, value_dim});
  check_tensor(op, "o", o, {type}, {batch, slots, heads, value_dim});
  check_tensor(op, "lse", lse, {sums}, {batch, slots, heads});
  check_tensor(op, "dlse", d_lse, {sums}, {batch, slots, heads});
  const auto like = [&](const MaybeTensor& x) {
    return x ? result_like(*x) : empty_result(q, {0}, sums);
  };
  Tensor dq = result_like(q), dk = result_like(k), dv = result_like(v);
  Tensor d_scores = like(scores), d_values = like(values);
  const AttentionGradients g{o.const_data_ptr(),
                             d_o.const_data_ptr(),
                             lse.const_data_ptr(),
                             d_lse ? d_lse->const_data_ptr() : nullptr,
                             dq.mutable_data_ptr(),
                             dk.mutable_data_ptr(),
                             dv.mutable_data_ptr(),
                             nullptr,
                             d_scores.mutable_data_ptr(),
                             d_values.mutable_data_ptr()};
  differentiate(a, type, g, nullptr);
  return {dq, dk, dv, d_scores, d_values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) {
  m.impl("slot_write_cpu", TORCH_BOX(&slot_write));
  m.impl("slot_write_cpu_backward", TORCH_BOX(&slot_write_backward));
}

}  // namespace memattn::cpu
