// gated_scan's rows for any processor, and the double ones behind float64.
#include "scan_rows.h"

#include <cmath>

#include "../../common/cpu_features.h"

#pragma GCC push_options
#pragma GCC optimize("no-trapping-math")  // lets selects between floats become masks
namespace memattn::scan::portable {
#include "scan_rows.inl.h"
}  // namespace memattn::scan::portable
#pragma GCC pop_options

namespace memattn::scan {

const RowTable<float> kRowsPortable = portable::table;
static const RowTable<double> kRowsPortableDouble = {
    {}, portable::gate<double>, portable::advance<double>, portable::retreat<double>, portable::add<double>,
    portable::stream, portable::fence};

template <>
const RowTable<double>& row_table<double>() {
  return kRowsPortableDouble;
}

template <>
const RowTable<float>& row_table<float>() {
  static const Isa isa = choose_isa();  // throws again at the next call if the forced one is not available
#if defined(MEMATTN_X86)
  if (isa >= Isa::avx512) return kRowsAvx512;
  if (isa == Isa::avx2) return kRowsAvx2;
#endif
  return kRowsPortable;
}

}  // namespace memattn::scan
