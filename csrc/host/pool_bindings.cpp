// What Python sees of the page tables of a K/V memory. Arrays of numbers come as addresses of contiguous int64 (or
// float64) host memory that the caller keeps alive and has sized: no tensor library is needed here.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <system_error>

#include "mapping.h"
#include "page_table.h"

namespace py = pybind11;

namespace memattn::pool {
namespace {

using Address = uintptr_t;

template <class T = int64_t>
T* array(Address address) {
  return reinterpret_cast<T*>(address);
}

void raise_os_error(const std::system_error& error) {
  PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), std::string(error.what())).ptr());
}

// [pages, 8]: tokens, oldest and newest id, hits, clock of the last use, attention mass, pinned, row of the summary.
constexpr int kStatistics = 8;

void write_statistics(const PageTable& table, int64_t stream, Address out) {
  double* to = array<double>(out);
  for (int32_t handle : table.stream(stream).pages) {
    const Page& p = table.page(handle);
    const double row[kStatistics] = {double(p.count), double(p.oldest), double(p.newest), double(p.hits),
                                     double(p.last),  p.mass,           double(p.pinned), double(p.summary)};
    to = std::copy(row, row + kStatistics, to);
  }
}

void restore_statistics(PageTable& table, int64_t stream, int64_t ordinal, int64_t hits, double mass, bool pinned) {
  Page& page = table.page(stream, ordinal);
  page.hits = hits;
  page.mass = mass;
  table.pin(stream, ordinal, pinned);
}

void add_mass(PageTable& table, int64_t stream, Address ordinals, Address mass, int64_t count, double decay) {
  if (decay != 1.0) {
    for (size_t o = 0; o < table.stream(stream).pages.size(); ++o) table.page(stream, o).mass *= decay;
  }
  for (int64_t i = 0; i < count; ++i) table.page(stream, array(ordinals)[i]).mass += array<double>(mass)[i];
}

void write_frames(const PageTable& table, int64_t stream, int tier, Address out) {
  int64_t n = 0;
  for (int32_t handle : table.stream(stream).pages) array<int32_t>(out)[n++] = table.page(handle).frame[tier];
}

// Row of the summary, tokens, the nearest tier that has the page, and its frame there.
std::tuple<int32_t, int32_t, int, int32_t> describe(const PageTable& table, int32_t handle) {
  const Page& page = table.page(handle);
  for (int tier = 0; tier < kTiers; ++tier) {
    if (page.frame[tier] != kNone) return {page.summary, page.count, tier, page.frame[tier]};
  }
  throw std::logic_error("page table: a page without a frame");
}

// ids, positions, tags [count, page_size] of pages.
void read_tokens(const PageTable& table, Address streams, Address ordinals, int64_t count, Address ids,
                 Address positions, Address tags) {
  int64_t n = 0;
  for (int64_t i = 0; i < count; ++i) {
    for (const Token& token : table.page(array(streams)[i], array(ordinals)[i]).tokens) {
      array(ids)[n] = token.id;
      array(positions)[n] = token.position;
      array(tags)[n++] = token.tag;
    }
  }
}

void bind_plan(py::module_& m) {
  py::class_<Plan>(m, "PagePlan")
      .def_property_readonly("copies",
                             [](const Plan& plan) {
                               py::list copies;
                               for (const Copy& c : plan.copies) copies.append(py::make_tuple(c.from, c.to, c.sources, c.targets));
                               return copies;
                             })
      .def_property_readonly("summaries",
                             [](const Plan& plan) {
                               py::list moves;
                               for (const SummaryMove& s : plan.summaries) moves.append(py::make_tuple(s.stream, s.from, s.to));
                               return moves;
                             })
      .def_readonly("erased", &Plan::erased)
      .def_readonly("erased_rows", &Plan::erased_rows);
}

void bind_mapping(py::module_& m) {
  py::class_<Mapping, std::shared_ptr<Mapping>>(m, "Mapping")
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def(py::init<std::string, int64_t>(), py::arg("folder"), py::arg("limit"))
      .def("ensure", &Mapping::ensure)
      .def("will_need", &Mapping::will_need)
      .def("unmap_pages", &Mapping::unmap_pages)
      .def_property_readonly("address", &Mapping::address)
      .def_property_readonly("bytes", &Mapping::bytes)
      .def_property_readonly("limit", &Mapping::limit)
      .def_property_readonly("descriptor", &Mapping::descriptor);
}

void bind_table(py::module_& m) {
  py::class_<PageTable>(m, "PageTable")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, uint64_t, PageTable::Grow>(), py::arg("streams"),
           py::arg("page_size"), py::arg("device_frames"), py::arg("host_frames"), py::arg("file_frames"),
           py::arg("seed"), py::arg("grow_file"))
      .def("reserve", &PageTable::reserve)
      .def("place",
           [](PageTable& t, int64_t stream, int64_t after, int64_t count, Address ids, Address positions, Address tags,
              Address rows) {
             return t.place(stream, after, {count, array(ids), array(positions), array(tags)}, array(rows));
           })
      .def("adopt",
           [](PageTable& t, int64_t stream, Address ids, Address positions, Address tags) {
             return t.adopt(stream, array(ids), array(positions), array(tags));
           })
      .def("make_writable",
           [](PageTable& t, int64_t stream, Address ordinals, int64_t count) {
             return t.make_writable(stream, array(ordinals), count);
           })
      .def("load",
           [](PageTable& t, Address streams, Address ordinals, int64_t count, bool used) {
             return t.load(array(streams), array(ordinals), count, used);
           })
      .def("find",
           [](const PageTable& t, int64_t stream, Address ids, int64_t count, Address ordinals, Address rows) {
             t.find(stream, array(ids), count, array(ordinals), array(rows));
           })
      .def("erase",
           [](PageTable& t, int64_t stream, Address ids, int64_t count) { return t.erase(stream, array(ids), count); })
      .def("remove",
           [](PageTable& t, int64_t stream, Address ids, int64_t count) { return t.remove(stream, array(ids), count); })
      .def("drop_pages",
           [](PageTable& t, int64_t stream, const std::vector<int64_t>& ordinals) {
             return t.drop_pages(stream, ordinals.data(), ordinals.size());
           })
      .def("shared", &PageTable::shared)
      .def("snapshot", &PageTable::snapshot)
      .def("roll_back", &PageTable::roll_back)
      .def("discard", &PageTable::discard)
      .def("oldest_tokens", &PageTable::oldest_tokens)
      .def("random_tokens", &PageTable::random_tokens)
      .def("pages", [](const PageTable& t, int64_t stream) { return t.stream(stream).pages.size(); })
      .def("tokens", [](const PageTable& t, int64_t stream) { return t.stream(stream).tokens; })
      .def("next_id", [](const PageTable& t, int64_t stream) { return t.stream(stream).next_id; })
      .def("set_next_id", [](PageTable& t, int64_t stream, int64_t id) { t.stream(stream).next_id = id; })
      .def("fill", [](const PageTable& t, int64_t stream, int64_t ordinal) { return t.page(stream, ordinal).fill; })
      .def("occupancy",
           [](const PageTable& t, int64_t stream, int64_t ordinal) {
             const Page& p = t.page(stream, ordinal);
             return py::make_tuple(p.fill, p.count, p.pinned);
           })
      .def("handle", [](const PageTable& t, int64_t stream, int64_t o) { return t.stream(stream).pages.at(o); })
      .def("describe", &describe)
      .def("read_tokens", &read_tokens)
      .def("summary_rows", [](const PageTable& t, int64_t stream) { return t.stream(stream).summaries; })
      .def("page_ids",
           [](const PageTable& t, int32_t handle, Address out) {
             int64_t* to = array(out);
             for (const Token& token : t.page(handle).tokens) *to++ = token.id;
           })
      .def("pin", &PageTable::pin)
      .def("write_statistics", &write_statistics)
      .def("restore_statistics", &restore_statistics)
      .def("add_mass", &add_mass)
      .def("write_frames", &write_frames)
      .def("frames", [](const PageTable& t, int tier) { return t.frames(tier).capacity; })
      .def("frames_reached", [](const PageTable& t, int tier) { return t.frames(tier).reached(); })
      .def("frames_used", [](const PageTable& t, int tier) { return t.frames(tier).capacity - t.frames(tier).free(); })
      .def_property_readonly("pages_held", &PageTable::pages_held)
      .def_property_readonly("pages_pinned", &PageTable::pages_pinned)
      .def_property_readonly("bytes", &PageTable::bytes)
      .def_readonly("hits", &PageTable::hits)
      .def_readonly("misses", &PageTable::misses)
      .def_readonly("clock", &PageTable::clock)
      .def_readwrite("random_state", &PageTable::random_state);
}

}  // namespace

void bind(py::module_& m) {
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const std::system_error& error) {
      raise_os_error(error);
    }
  });
  bind_plan(m);
  bind_mapping(m);
  bind_table(m);
}

}  // namespace memattn::pool
