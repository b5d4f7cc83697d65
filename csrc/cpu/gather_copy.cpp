// Gather copy: target[targets[i]] = source[sources[i]] for rows of any size, over all threads.
// Python side: python/memattn/ops/gather_copy.py.
#include "../common/checks.h"
#include "parallel.h"

#include <cstring>

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "gather_copy_cpu";
constexpr int64_t kBytesPerTask = int64_t{1} << 16;

struct Rows {
  char* data;
  int64_t count, stride, bytes;  // stride and bytes of one row
};

// Rows along the first dimension; each must be one run of memory, the first stride is free.
Rows rows_of(const char* name, const Tensor& x) {
  if (!x.is_cpu()) fail(kOp, name, " must be on cpu; got ", describe(x));
  if (x.dim() < 1) fail(kOp, name, " must have at least one dimension; got ", describe(x));
  int64_t run = 1;
  for (int64_t d = x.dim() - 1; d > 0; --d) {
    if (x.size(d) != 1 && x.stride(d) != run) fail(kOp, name, " must have contiguous rows; got ", describe(x));
    run *= x.size(d);
  }
  const int64_t element = x.element_size();
  return {static_cast<char*>(const_cast<void*>(x.const_data_ptr())), x.size(0), x.stride(0) * element, run * element};
}

const int64_t* indices_of(const char* name, const Tensor& x, int64_t count, int64_t limit) {
  check_tensor(kOp, name, x, {ScalarType::Long}, {count});
  const int64_t* index = static_cast<const int64_t*>(x.const_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] < 0 || index[i] >= limit) fail(kOp, name, " must be in 0..", limit - 1, "; got ", index[i]);
  }
  return index;
}

bool rows_match(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.dim() != b.dim()) return false;
  for (int64_t d = 1; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

void gather_copy(Tensor source, Tensor sources, Tensor target, Tensor targets) {
  const Rows from = rows_of("source", source), to = rows_of("target", target);
  if (!rows_match(source, target))
    fail(kOp, "target must have rows like source; got ", describe(target), " and ", describe(source));
  const int64_t count = sources.numel();
  const int64_t* take = indices_of("sources", sources, count, from.count);
  const int64_t* put = indices_of("targets", targets, count, to.count);
  const int64_t rows = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(from.bytes, 1));
  const int64_t tasks = (count + rows - 1) / rows;
  const auto copy = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * rows; i < std::min(count, end * rows); ++i) {
      std::memcpy(to.data + put[i] * to.stride, from.data + take[i] * from.stride, from.bytes);
    }
  };
  if (tasks <= 1) return copy(0, tasks);
  torch::stable::parallel_for(0, tasks, 1, copy);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("gather_copy_cpu", TORCH_BOX(&gather_copy)); }

}  // namespace memattn::cpu
