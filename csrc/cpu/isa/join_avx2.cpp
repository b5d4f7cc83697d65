// Rows of merge_states and gated_combine for avx2.
#include "join_rows.h"

#include <cmath>

#include "../../common/cpu_features.h"

#if defined(MEMATTN_X86)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#pragma GCC optimize("no-trapping-math")  // lets selects between floats become masks
namespace memattn::join::avx2 {
#include "join_rows.inl.h"
}  // namespace memattn::join::avx2
#pragma GCC pop_options

namespace memattn::join {
const RowTable<float> kRowsAvx2 = avx2::table;
}  // namespace memattn::join
#endif
