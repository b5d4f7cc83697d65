// causal_conv1d's rows for avx2.
#include "conv_rows.h"

#include <cmath>

#include "../../common/cpu_features.h"

#if defined(MEMATTN_X86)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#pragma GCC optimize("no-trapping-math")  // lets selects between floats become masks
namespace memattn::conv::avx2 {
#include "conv_rows.inl.h"
}  // namespace memattn::conv::avx2
#pragma GCC pop_options

namespace memattn::conv {
const RowTable<float> kRowsAvx2 = avx2::table;
}  // namespace memattn::conv
#endif
