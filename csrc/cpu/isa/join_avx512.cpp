// Rows of merge_states and gated_combine for avx512.
#include "join_rows.h"

#include <cmath>

#include "../../common/cpu_features.h"

#if defined(MEMATTN_X86)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#pragma GCC optimize("no-trapping-math")  // lets selects between floats become masks
namespace memattn::join::avx512 {
#include "join_rows.inl.h"
}  // namespace memattn::join::avx512
#pragma GCC pop_options

namespace memattn::join {
const RowTable<float> kRowsAvx512 = avx512::table;
}  // namespace memattn::join
#endif
