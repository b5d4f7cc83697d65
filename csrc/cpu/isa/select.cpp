// The table in use: the best one that this processor has, or the one that MEMATTN_CPU_ISA names. Read once per process.
#include "../../common/cpu_features.h"
#include "primitives.h"

namespace memattn::cpu {
namespace {

Isa selected() {
  static const Isa isa = choose_isa();  // throws again at the next call if the forced one is not available
  return isa;
}

}  // namespace

template <>
const Primitives<float>* primitives<float>() {
  switch (selected()) {
    case Isa::portable: return &portable_f32;
    case Isa::avx2: return &avx2_f32;
    default: return &avx512_f32;
  }
}

template <>
const Primitives<double>* primitives<double>() {
  selected();
  return &portable_f64;
}

template <>
const Primitives<bf16>* primitives<bf16>() {
  switch (selected()) {
    case Isa::avx512_bf16: return &avx512_bf16;
    case Isa::amx: return &amx_bf16;
    default: return nullptr;
  }
}

}  // namespace memattn::cpu
