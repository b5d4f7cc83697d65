// causal_conv1d's rows for any processor, and the double ones behind float64.
#include "conv_rows.h"

#include <cmath>

#include "../../common/cpu_features.h"

#pragma GCC push_options
#pragma GCC optimize("no-trapping-math")  // lets selects between floats become masks
namespace memattn::conv::portable {
#include "conv_rows.inl.h"
}  // namespace memattn::conv::portable
#pragma GCC pop_options

namespace memattn::conv {

const RowTable<float> kRowsPortable = portable::table;
const RowTable<double> kRowsPortableDouble = {
    {}, portable::taps<double>, portable::silu<double>,
    portable::silu_slope<double>, portable::add_products<double>, portable::step<double>};

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

}  // namespace memattn::conv
