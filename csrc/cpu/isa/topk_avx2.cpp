// Top-k's rows for avx2.
#include "topk_rows.h"

#include "../../common/cpu_features.h"

#if defined(MEMATTN_X86)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#pragma GCC optimize("no-trapping-math")  // lets selects between floats become masks
namespace memattn::topk::avx2 {
#include "topk_rows.inl.h"
}  // namespace memattn::topk::avx2
#pragma GCC pop_options

namespace memattn::topk {
const Table<float> kTopkAvx2 = {{avx2::from_bfloat16, avx2::from_half, avx2::to_bfloat16, avx2::to_half},
                                avx2::keep_larger<float>,
                                avx2::append<float>,
                                avx2::above<float>,
                                avx2::below<float>,
                                avx2::extend<float>,
                                avx2::exceeding<float>};
}  // namespace memattn::topk
#endif
