// Top-k's rows for any processor, and the double ones behind float64.
#include "topk_rows.h"

#include "../../common/cpu_features.h"

#pragma GCC push_options
#pragma GCC optimize("no-trapping-math")  // lets selects between floats become masks
namespace memattn::topk::portable {
#include "topk_rows.inl.h"
}  // namespace memattn::topk::portable
#pragma GCC pop_options

namespace memattn::topk {

const Table<float> kTopkPortable = {
    {portable::from_bfloat16, portable::from_half, portable::to_bfloat16, portable::to_half},
    portable::keep_larger<float>,
    portable::append<float>,
    portable::above<float>,
    portable::below<float>,
    portable::extend<float>,
    portable::exceeding<float>};
static const Table<double> kTopkPortableDouble = {
    {}, portable::keep_larger<double>, portable::append<double>, portable::above<double>, portable::below<double>,
    portable::extend<double>,
    portable::exceeding<double>};

template <>
const Table<double>& table<double>() {
  return kTopkPortableDouble;
}

template <>
const Table<float>& table<float>() {
  static const Isa isa = choose_isa();  // throws again at the next call if the forced one is not available
#if defined(MEMATTN_X86)
  if (isa >= Isa::avx512) return kTopkAvx512;
  if (isa == Isa::avx2) return kTopkAvx2;
#endif
  return kTopkPortable;
}

}  // namespace memattn::topk
