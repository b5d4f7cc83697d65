// Slot write: attention of slots over tokens, the softmax of each slot beginning with a score and a value of its own.
// Mathematics: python/memattn/ops/slot_write.py. With w_i = e^{s_i - l_i} the weight of slot i's own value u_i,
//
//   du_i = w_i dO_i    ds_i = w_i (dO_i.u_i - D_i)    D_i = dO_i.O_i - dl_i
//
// and the rest is attention's backward with the l of the whole softmax.
#include "attention.h"
#include "results.h"

#include <tuple>

namespace memattn::cpu {
namespace {

using MaybeTensor = std::optional<Tensor>;
constexpr int kRows = 64;  // of a block: rows are slots times heads

Attention read(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& scores,
               const MaybeTensor& values, const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k,
               double scale) {
  Attention a = read_arguments(op, q, k, v, std::nullopt, std::nullopt, cu_seqlens_q, cu_seqlens_k,
                               {0, 0, 0, 0, 0, 0, 0, 0, 0, false, scale});
  const int64_t batch = q.size(0), slots = q.size(1), heads = q.size(2);
  if (scores.has_value() != values.has_value()) fail(op, "scores and values must both be given or both be left out");
  check_tensor(op, "scores", scores, {state_dtype(q.scalar_type())}, {batch, slots, heads});
  check_tensor(op, "values", values, {q.scalar_type()}, {batch, slots, heads, v.size(3)});
  a.first_scores = scores ? scores->const_data_ptr() : nullptr;
  a.first_values = values ? values->const_data_ptr() : nullptr;
  return a;
}

template <class E>
struct RowBlock {
  using Acc = AccumulateOf<E>;
  Acc *d_o, *o, *value;            // [kRows, V]
  Acc *delta, *d_weight, *weight;  // [kRows]

  RowBlock(Arena& arena, int ld)
      : d_o(arena.take<Acc>(int64_t{kRows} * ld)),
        o(arena.take<Acc>(int64_t{kRows} * ld)),
        value(arena.take<Acc>(int64_t{kRows} * ld)),
        delta(arena.take<Acc>(kRows)),
        d_weight(arena.take<Acc>(kRows)),
        weight(arena.take<Acc>(kRows)) {}
};

// The gradients of the first scores and values of all `total` rows.
template <class E>
void differentiate_first(const Attention& a, const Primitives<E>& isa, const AttentionGradients& g, int64_t total,
                         void* d_scores, void* d_values) {
  using Acc = AccumulateOf<E>;
  const int width = round_up(a.value_dim, isa.unit), ld = leading(width);
  const int64_t blocks = (total + kRows - 1) / kRows;
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), blocks));
  const auto make = [&](Arena& arena) { return RowBlock<E>(arena, ld); };
  const size_t bytes = bytes_of(make);
  Scratch scratch(bytes * threads);
  std::vector<RowBlock<E>> rows_of;
  for (int64_t i = 0; i < threads; ++i) {
    Arena arena(scratch.data() + i * bytes);
    rows_of.push_back(make(arena));
  }
  parallel_tasks(blocks, threads, isa, [&](int64_t block, int64_t worker) {
    RowBlock<E>& t = rows_of[worker];
    const int64_t first = block * kRows;
    const int rows = static_cast<int>(std::min<int64_t>(kRows, total - first));
    const auto load = [&](Acc* to, const void* from) {
      isa.load_rows(to, ld, kRows, width, offset(from, a.element, first * a.value_dim), a.element, a.value_dim, rows,
                    a.value_dim);
    };
    load(t.d_o, g.d_o);
    load(t.o, g.o);
    load(t.value, a.first_values);
    isa.dot_rows(t.delta, t.d_o, ld, t.o, ld, kRows, width);
    isa.dot_rows(t.d_weight, t.d_o, ld, t.value, ld, kRows, width);
    for (int i = 0; i < rows; ++i) {
      const Acc lse = static_cast<const Acc*>(g.lse)[first + i];
      const bool empty = lse == -std::numeric_limits<Acc>::infinity();
      t.weight[i] = empty ? Acc(0) : std::exp(static_cast<const Acc*>(a.first_scores)[first + i] - lse);
      const Acc delta = t.delta[i] - (g.d_lse ? static_cast<const Acc*>(g.d_lse)[first + i] : Acc(0));
      static_cast<Acc*>(d_scores)[first + i] = t.weight[i] * (t.d_weight[i] - delta);
    }
    isa.store_rows(offset(d_values, a.element, first * a.value_dim), a.element, a.value_dim, t.d_o, ld, t.weight, rows,
                   a.value_dim);
  });
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
                             nullptr};
  differentiate(a, type, g, nullptr);
  if (scores) {
    with_primitives(type, [&]<class E>(const Primitives<E>& isa) {
      differentiate_first<E>(a, isa, g, batch * slots * heads, d_scores.mutable_data_ptr(),
                             d_values.mutable_data_ptr());
    });
  }
  return {dq, dk, dv, d_scores, d_values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) {
  m.impl("slot_write_cpu", TORCH_BOX(&slot_write));
  m.impl("slot_write_cpu_backward", TORCH_BOX(&slot_write_backward));
}

}  // namespace memattn::cpu
