// merge_states on the CPU: one pass over the parts, forward and backward. Mathematics: python/memattn/ops/merge_states.py.
//
//   do_n = w_n dO    dl_n = w_n (dO.o_n - D)    dsink = -sum_i e^{sink - l_i} D_i    D = sum_n w_n dO.o_n - dl
//
// with w_n = e^{l_n - l}; D needs no stored o. Rows that no part has seen have weights of 0.
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "isa/primitives.h"
#include "join.h"

namespace memattn::join {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

template <class A>
constexpr A kNothing = -std::numeric_limits<A>::infinity();

template <class A, class S>
class Merge {
 public:
  Merge(const Rows& rows, const Tensors& outputs, const Tensors& lses, const MaybeTensor& sink)
      : rows_(rows), sink_(sink ? static_cast<const A*>(sink->const_data_ptr()) : nullptr) {
    for (const Tensor& x : outputs) outputs_.push_back(static_cast<const S*>(x.const_data_ptr()));
    for (const Tensor& x : lses) lses_.push_back(static_cast<const A*>(x.const_data_ptr()));
  }

  void forward(S* o, A* lse) const {
    for_blocks(rows_, [&](int64_t, int64_t first, int64_t rows) {
      alignas(64) A total[kBlock], weight[kBlock], row[kBlock], result[kBlock];
      join_lses(lse + first, first, rows, total, weight);
      A* y = rows::target(result, o + first * rows_.width);
      for (size_t n = 0; n < outputs_.size(); ++n) {
        weights(weight, lses_[n] + first, lse + first, rows);
        table_.weigh(y, weight, part(row, outputs_[n], first, rows), n > 0, rows, rows_.width);
      }
      rows::store(table_, o + first * rows_.width, y, rows * rows_.width);
    });
  }

  // d_outputs and d_lses: those of all parts, one behind the other.
  void backward(const S* d_o, const A* d_lse, const A* lse, S* d_outputs, A* d_lses, A* dsink) const {
    HeadSums sums(rows_);
    for_blocks(rows_, [&](int64_t task, int64_t first, int64_t rows) {
      alignas(64) A delta[kBlock], weight[kBlock], row[kBlock], gradient[kBlock], result[kBlock];
      const A* dy = part(gradient, d_o, first, rows);
      for (int64_t i = 0; i < rows; ++i) {
        delta[i] = d_lse && lse[first + i] != kNothing<A> ? -d_lse[first + i] : A(0);
      }
      for (size_t n = 0; n < outputs_.size(); ++n) {
        S* dx = d_outputs + (n * rows_.count + first) * rows_.width;
        A *y = rows::target(result, dx), *dots = d_lses + n * rows_.count + first;
        weights(weight, lses_[n] + first, lse + first, rows);
        table_.dot(dots, dy, part(row, outputs_[n], first, rows), rows, rows_.width);
        for (int64_t i = 0; i < rows; ++i) delta[i] += weight[i] * dots[i];
        table_.weigh(y, weight, dy, false, rows, rows_.width);
        rows::store(table_, dx, y, rows * rows_.width);
      }
      for (size_t n = 0; n < outputs_.size(); ++n) {
        A* dl = d_lses + n * rows_.count + first;
        weights(weight, lses_[n] + first, lse + first, rows);
        for (int64_t i = 0; i < rows; ++i) dl[i] = weight[i] * (dl[i] - delta[i]);
      }
      if (!dsink) return;
      for (int64_t i = 0; i < rows; ++i) row[i] = sink_[(first + i) % rows_.heads];
      weights(weight, row, lse + first, rows);
      for (int64_t i = 0; i < rows; ++i) weight[i] *= -delta[i];
      sums.add(task, first, rows, weight);
    });
    if (dsink) sums.store(dsink);
  }

 private:
  const A* part(A* scratch, const S* x, int64_t first, int64_t rows) const {
    return rows::view(table_, scratch, x + first * rows_.width, rows * rows_.width);
  }

  // lse = log(sum of e^{l_n} and of e^sink) of a block; `total` and `term` are scratch.
  void join_lses(A* lse, int64_t first, int64_t rows, A* total, A* term) const {
    for (int64_t i = 0; i < rows; ++i) {
      A most = sink_ ? sink_[(first + i) % rows_.heads] : kNothing<A>;
      for (const A* l : lses_) most = std::max(most, l[first + i]);
      lse[i] = most == kNothing<A> ? A(0) : most;
      total[i] = sink_ ? std::exp(sink_[(first + i) % rows_.heads] - lse[i]) : A(0);
    }
    for (const A* l : lses_) {
      weights(term, l + first, lse, rows);
      for (int64_t i = 0; i < rows; ++i) total[i] += term[i];
    }
    for (int64_t i = 0; i < rows; ++i) lse[i] = total[i] == 0 ? kNothing<A> : lse[i] + std::log(total[i]);
  }

  // e^{part - whole}, 0 where the whole is e^-inf.
  void weights(A* weight, const A* part, const A* whole, int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) weight[i] = whole[i] == kNothing<A> ? kNothing<A> : part[i] - whole[i];
    primitives_.exp_row(weight, weight, static_cast<int>(rows));
  }

  const Rows rows_;
  const A* sink_;
  std::vector<const S*> outputs_;
  std::vector<const A*> lses_;
  const RowTable<A>& table_ = row_table<A>();
  const cpu::Primitives<A>& primitives_ = *cpu::primitives<A>();
};

void check_parts(const char* op, const Tensors& outputs, const Tensors& lses, const MaybeTensor& sink) {
  if (outputs.empty() || outputs.size() != lses.size()) {
    fail(op, "needs as many lses as outputs, at least one; got ", lses.size(), " and ", outputs.size());
  }
  const Tensor& o = outputs[0];
  check_tensor(op, "outputs", o, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double},
               {kAnySize, kAnySize, kAnySize, kAnySize});
  const ScalarType type = o.scalar_type(), sums = accumulate_type(type);
  for (const Tensor& x : outputs) check_tensor(op, "outputs", x, {type}, {o.size(0), o.size(1), o.size(2), o.size(3)});
  for (const Tensor& x : lses) check_tensor(op, "lses", x, {sums}, {o.size(0), o.size(1), o.size(2)});
  check_tensor(op, "sink", sink, {sums}, {o.size(2)});
}

std::tuple<Tensor, Tensor> merge_states(Tensors outputs, Tensors lses, MaybeTensor sink) {
  constexpr const char* op = "merge_states_cpu";
  check_parts(op, outputs, lses, sink);
  Tensor o = result_like(outputs[0]), lse = result_like(lses[0]);
  const Rows rows = Rows::of(op, o);
  dispatch(o.scalar_type(), [&]<class A, class S>(A, S) {
    Merge<A, S>(rows, outputs, lses, sink)
        .forward(static_cast<S*>(o.mutable_data_ptr()), static_cast<A*>(lse.mutable_data_ptr()));
  });
  return {o, lse};
}

// (d_outputs [n, B, T, H, V], d_lses [n, B, T, H], dsink [H] or empty).
std::tuple<Tensor, Tensor, Tensor> merge_states_backward(Tensor d_o, MaybeTensor d_lse, Tensor lse, Tensors outputs,
                                                         Tensors lses, MaybeTensor sink) {
  constexpr const char* op = "merge_states_cpu_backward";
  check_parts(op, outputs, lses, sink);
  const Tensor& o = outputs[0];
  const ScalarType type = o.scalar_type(), sums = accumulate_type(type);
  const int64_t n = static_cast<int64_t>(outputs.size()), b = o.size(0), t = o.size(1), h = o.size(2), v = o.size(3);
  check_tensor(op, "do", d_o, {type}, {b, t, h, v});
  check_tensor(op, "dlse", d_lse, {sums}, {b, t, h});
  check_tensor(op, "lse", lse, {sums}, {b, t, h});
  Tensor d_outputs = empty_result(o, {n, b, t, h, v}), d_lses = empty_result(lse, {n, b, t, h});
  Tensor dsink = empty_result(lse, {sink ? h : 0});
  dispatch(type, [&]<class A, class S>(A, S) {
    const auto values = [](const Tensor& x) { return static_cast<const A*>(x.const_data_ptr()); };
    Merge<A, S>(Rows::of(op, o), outputs, lses, sink)
        .backward(static_cast<const S*>(d_o.const_data_ptr()), d_lse ? values(*d_lse) : nullptr, values(lse),
                  static_cast<S*>(d_outputs.mutable_data_ptr()), static_cast<A*>(d_lses.mutable_data_ptr()),
                  sink ? static_cast<A*>(dsink.mutable_data_ptr()) : nullptr);
  });
  return {d_outputs, d_lses, dsink};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) {
  m.impl("merge_states_cpu", TORCH_BOX(&merge_states));
  m.impl("merge_states_cpu_backward", TORCH_BOX(&merge_states_backward));
}

}  // namespace memattn::join
