// gated_combine on the CPU: one pass over both branches, forward and backward. Mathematics:
// python/memattn/ops/merge_states.py. A gate of one number per row or per head is spread over the row of a block, and the
// gradient of the spread one summed up.
#include <tuple>

#include "join.h"

namespace memattn::join {
namespace {

enum class Layout { heads, rows, numbers };  // [H], [B, T, H], [B, T, H, V]

struct Arguments {
  Rows rows;
  Layout layout;
  Mode mode;
};

Arguments read_arguments(const char* op, const Tensor& a, const Tensor& b, const Tensor& gate, int64_t mode) {
  check_tensor(op, "a", a, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double},
               {kAnySize, kAnySize, kAnySize, kAnySize});
  const ScalarType type = a.scalar_type(), sums = accumulate_type(type);
  check_tensor(op, "b", b, {type}, {a.size(0), a.size(1), a.size(2), a.size(3)});
  if (mode < 0 || mode > 2) fail(op, "mode must be 0, 1 or 2; got ", mode);
  const Rows rows = Rows::of(op, a);
  if (gate.dim() == 4) {
    check_tensor(op, "gate", gate, {type}, {a.size(0), a.size(1), a.size(2), a.size(3)});
    return {rows, Layout::numbers, static_cast<Mode>(mode)};
  }
  if (gate.dim() == 3) {
    check_tensor(op, "gate", gate, {sums}, {a.size(0), a.size(1), a.size(2)});
    return {rows, Layout::rows, static_cast<Mode>(mode)};
  }
  check_tensor(op, "gate", gate, {sums}, {a.size(2)});
  return {rows, Layout::heads, static_cast<Mode>(mode)};
}

template <class A, class S>
class Combine {
 public:
  Combine(const Arguments& arguments, const Tensor& a, const Tensor& b, const Tensor& gate)
      : rows_(arguments.rows),
        layout_(arguments.layout),
        mode_(arguments.mode),
        a_(static_cast<const S*>(a.const_data_ptr())),
        b_(static_cast<const S*>(b.const_data_ptr())),
        gate_(gate.const_data_ptr()) {}

  void forward(S* y) const {
    for_blocks(rows_, [&](int64_t, int64_t first, int64_t rows) {
      alignas(64) A a[kBlock], b[kBlock], g[kBlock], result[kBlock];
      S* to = y + first * rows_.width;
      A* out = rows::target(result, to);
      table_.combine(out, block(a, a_, first, rows), block(b, b_, first, rows), gate(g, first, rows), mode_,
                     rows * rows_.width);
      rows::store(table_, to, out, rows * rows_.width);
    });
  }

  void backward(const S* dy, S* da, S* db, void* dgate) const {
    HeadSums sums(rows_);
    for_blocks(rows_, [&](int64_t task, int64_t first, int64_t rows) {
      alignas(64) A a[kBlock], b[kBlock], g[kBlock], gradient[kBlock], of_a[kBlock], of_b[kBlock], of_g[kBlock];
      const int64_t at = first * rows_.width, n = rows * rows_.width;
      A *out_a = rows::target(of_a, da + at), *out_b = rows::target(of_b, db + at);
      table_.differentiate(out_a, out_b, of_g, block(gradient, dy, first, rows), block(a, a_, first, rows),
                           block(b, b_, first, rows), gate(g, first, rows), mode_, n);
      rows::store(table_, da + at, out_a, n);
      rows::store(table_, db + at, out_b, n);
      if (layout_ == Layout::numbers) {
        rows::store(table_, static_cast<S*>(dgate) + at, of_g, n);
      } else if (layout_ == Layout::rows) {
        table_.sum(static_cast<A*>(dgate) + first, of_g, rows, rows_.width);
      } else {
        table_.sum(g, of_g, rows, rows_.width);
        sums.add(task, first, rows, g);
      }
    });
    if (layout_ == Layout::heads) sums.store(static_cast<A*>(dgate));
  }

 private:
  const A* block(A* scratch, const S* x, int64_t first, int64_t rows) const {
    return rows::view(table_, scratch, x + first * rows_.width, rows * rows_.width);
  }

  const A* gate(A* scratch, int64_t first, int64_t rows) const {
    if (layout_ == Layout::numbers) return block(scratch, static_cast<const S*>(gate_), first, rows);
    const A* gates = static_cast<const A*>(gate_);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = first + i;
      std::fill_n(scratch + i * rows_.width, rows_.width, gates[layout_ == Layout::rows ? row : row % rows_.heads]);
    }
    return scratch;
  }

  const Rows rows_;
  const Layout layout_;
  const Mode mode_;
  const S *a_, *b_;
  const void* gate_;
  const RowTable<A>& table_ = row_table<A>();
};

Tensor gated_combine(Tensor a, Tensor b, Tensor gate, int64_t mode) {
  const Arguments arguments = read_arguments("gated_combine_cpu", a, b, gate, mode);
  Tensor y = result_like(a);
  dispatch(a.scalar_type(), [&]<class A, class S>(A, S) {
    Combine<A, S>(arguments, a, b, gate).forward(static_cast<S*>(y.mutable_data_ptr()));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gated_combine_backward(Tensor dy, Tensor a, Tensor b, Tensor gate, int64_t mode) {
  constexpr const char* op = "gated_combine_cpu_backward";
  const Arguments arguments = read_arguments(op, a, b, gate, mode);
  check_tensor(op, "dy", dy, {a.scalar_type()}, {a.size(0), a.size(1), a.size(2), a.size(3)});
  Tensor da = result_like(a), db = result_like(b), dgate = result_like(gate);
  dispatch(a.scalar_type(), [&]<class A, class S>(A, S) {
    Combine<A, S>(arguments, a, b, gate)
        .backward(static_cast<const S*>(dy.const_data_ptr()), static_cast<S*>(da.mutable_data_ptr()),
                  static_cast<S*>(db.mutable_data_ptr()), dgate.mutable_data_ptr());
  });
  return {da, db, dgate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) {
  m.impl("gated_combine_cpu", TORCH_BOX(&gated_combine));
  m.impl("gated_combine_cpu_backward", TORCH_BOX(&gated_combine_backward));
}

}  // namespace memattn::join
