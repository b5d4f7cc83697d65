// gated_scan's rows for avx2.
#include "scan_rows.h"

#include <cmath>

#include "../../common/cpu_features.h"

#if defined(MEMATTN_X86)
#define MEMATTN_STREAM __builtin_ia32_movntps256
#define MEMATTN_STREAM_BYTES 32
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#pragma GCC optimize("no-trapping-math")  // lets selects between floats become masks
namespace memattn::scan::avx2 {
#include "scan_rows.inl.h"
}  // namespace memattn::scan::avx2
#pragma GCC pop_options

namespace memattn::scan {
const RowTable<float> kRowsAvx2 = avx2::table;
}  // namespace memattn::scan
#endif
