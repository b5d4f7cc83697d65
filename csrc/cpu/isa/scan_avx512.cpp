// gated_scan's rows for avx512.
#include "scan_rows.h"

#include <cmath>

#include "../../common/cpu_features.h"

#if defined(MEMATTN_X86)
#define MEMATTN_STREAM __builtin_ia32_movntps512
#define MEMATTN_STREAM_BYTES 64
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#pragma GCC optimize("no-trapping-math")  // lets selects between floats become masks
namespace memattn::scan::avx512 {
#include "scan_rows.inl.h"
}  // namespace memattn::scan::avx512
#pragma GCC pop_options

namespace memattn::scan {
const RowTable<float> kRowsAvx512 = avx512::table;
}  // namespace memattn::scan
#endif
