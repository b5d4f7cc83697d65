// From a tensor's dtype to the element and accumulate types of the ops that work on rows of channels.
#pragma once

#include "../common/checks.h"
#include "isa/float_rows.h"

namespace memattn::rows {

// Of sums and states.
inline ScalarType accumulate_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

// Calls f with values of the accumulate type and of the element type.
template <class F>
void dispatch(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::BFloat16: return f(float{}, BFloat16{});
    case ScalarType::Half: return f(float{}, Half{});
    default: return f(float{}, float{});
  }
}

}  // namespace memattn::rows
