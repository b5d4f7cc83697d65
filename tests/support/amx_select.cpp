// Stands in for csrc/cpu/isa/select.cpp in the test build of the AMX table: bf16 operands always go there.
#include "../../csrc/cpu/isa/primitives.h"

namespace memattn::cpu {

template <>
const Primitives<float>* primitives<float>() {
  return &portable_f32;
}

template <>
const Primitives<double>* primitives<double>() {
  return &portable_f64;
}

template <>
const Primitives<bf16>* primitives<bf16>() {
  return &amx_bf16;
}

}  // namespace memattn::cpu
