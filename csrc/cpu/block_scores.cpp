// The product of few queries with many block summaries, [batch, queries, heads, blocks]: the summaries are read once, in
// their stored type and in the order they lie in memory, which is what bounds a decode step.
#include "blocks.h"
#include "parallel.h"
#include "results.h"

namespace memattn::cpu {
namespace {

constexpr int64_t kTileBytes = int64_t{1} << 18;  // of summaries that meet all queries while in the cache

Tensor block_product(Tensor q, Tensor r) {
  const char* op = "block_product_cpu";
  const ScalarType type = r.scalar_type();
  check_tensor(op, "r", r, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double},
               {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t batch = r.size(0), blocks = r.size(1), groups = r.size(2), dim = r.size(3);
  check_tensor(op, "q", q, {state_dtype(type)}, {batch, kAnySize, kAnySize, dim});
  const int64_t queries = q.size(1), heads = q.size(2);
  if (groups < 1 || heads % groups != 0) fail(op, "heads of q must be a multiple of r's; got ", heads, " and ", groups);
  if (blocks > std::numeric_limits<int32_t>::max()) fail(op, "blocks must be below 2^31; got ", blocks);
  Tensor scores = empty_result(q, {batch, queries, heads, blocks});

  const Element element = element_of(type);
  const int64_t row_bytes = std::max<int64_t>(1, groups * dim * bytes_of(element));
  const int64_t tile = std::max<int64_t>(64, kTileBytes / row_bytes / 64 * 64), tiles = (blocks + tile - 1) / tile;
  const auto run = [&]<class Acc>(const Primitives<Acc>& isa) {
    parallel_tasks(batch * tiles, torch::stable::get_num_threads(), isa, [&](int64_t task, int64_t) {
      const int64_t b = task / tiles, first = task % tiles * tile, count = std::min(tile, blocks - first);
      const void* rows = offset(r.const_data_ptr(), element, (b * blocks + first) * groups * dim);
      for (int64_t row = b * queries; row < (b + 1) * queries; ++row) {
        isa.score_keys(static_cast<Acc*>(scores.mutable_data_ptr()) + row * heads * blocks + first,
                       static_cast<int>(blocks), static_cast<const Acc*>(q.const_data_ptr()) + row * heads * dim,
                       static_cast<int>(dim), rows, element, groups * dim, static_cast<int>(count),
                       static_cast<int>(groups), static_cast<int>(heads / groups), static_cast<int>(dim));
      }
    });
  };
  if (type == ScalarType::Double) {
    run(*primitives<double>());
  } else {
    run(*primitives<float>());
  }
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("block_product_cpu", TORCH_BOX(&block_product)); }

}  // namespace memattn::cpu
