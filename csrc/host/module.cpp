// memattn._host: host code without tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../common/cpu_features.h"

namespace memattn {
void bind_segment_events(pybind11::module_& m);  // segment_events.cpp
}  // namespace memattn
namespace memattn::pool {
void bind(pybind11::module_& m);  // pool_bindings.cpp
}

PYBIND11_MODULE(_host, m) {
  m.doc() = "Tensor-free host code of memattn.";
  m.def("available_isas", &memattn::available_isas, "The instruction-set tables this processor can run, general first.");
  m.def("selected_isa", &memattn::selected_isa, "The table the CPU kernels use: the last available, or MEMATTN_CPU_ISA.");
  memattn::bind_segment_events(m);
  memattn::pool::bind(m);
}
