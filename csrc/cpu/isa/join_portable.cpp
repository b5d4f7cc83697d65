// Rows of merge_states and gated_combine for any processor, and the double ones behind float64.
#include "join_rows.h"

#include <cmath>

#include "../../common/cpu_features.h"

#pragma GCC push_options
#pragma GCC optimize("no-trapping-math")  // lets selects between floats become masks
namespace memattn::join::portable {
#include "join_rows.inl.h"
}  // namespace memattn::join::portable
#pragma GCC pop_options

namespace memattn::join {

const RowTable<float> kRowsPortable = portable::table;
static const RowTable<double> kRowsPortableDouble = {
    {}, portable::weigh<double>, portable::dot<double>, portable::sum<double>, portable::combine<double>,
    portable::differentiate<double>};

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

}  // namespace memattn::join
