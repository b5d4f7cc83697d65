// gated_scan's gradients on the CPU.
//
// y is recomputed: spans of kSpan tokens, the last one first, from the state before each, which is kept while a first pass
// goes through a chunk longer than one span. Gate channels that read the same channel of a tiled payload are one task, which
// adds their gradients in order.
#include <numeric>
#include <tuple>

#include "gated_scan.h"

namespace memattn::scan {
namespace {

constexpr int64_t kSpan = 16;
constexpr int64_t kWidestBackward = 1024;  // channels of a task: its rows of one span stay in the second cache

using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class A>
alignas(64) constexpr A kZeros[kWidestBackward] = {};

template <class A, class S>
struct Cotangents {
  const S* y;      // as Results, each or null
  const S* ends;
  const A* final;
  S* dx;           // [tokens, width]
  A* dinitial;     // [N, channels] or null
};

// Gate channels first + k * period for k < tiles read the same channels of the narrowest payloads: a task takes them all.
struct Tiling {
  int64_t period, tiles;
  Columns of(Columns c, int64_t tile) const { return {tile * period + c.first, c.count}; }
};

template <class A, class S>
Tiling tiling_of(const Scan<A, S>& scan) {
  int64_t period = scan.channels;
  for (int p = 0; p < scan.count; ++p) period = std::gcd(period, scan.payloads[p].width);
  return {period, period ? scan.channels / period : 0};
}

template <class A>
struct BackwardRows {
  BackwardRows(Arena& arena, int payloads, int64_t width, int64_t tiles, int64_t spans)
      : width(width), gates(take_gate<A>(arena, kSpan * width)), x(arena.take<A>(width)), dy(arena.take<A>(width)),
        dx(arena.take<A>(width)) {
    for (int p = 0; p < payloads; ++p) {
      before[p] = arena.take<A>(kSpan * width);
      carry[p] = arena.take<A>(tiles * width);
      start[p] = arena.take<A>(spans * tiles * width);
      sum[p] = arena.take<A>(tiles > 1 ? kSpan * tiles * width : 0);
    }
  }
  Gate<A> gate(int64_t i) const { return {gates.high + i * width, gates.low + i * width, gates.weight + i * width}; }

  int64_t width;
  Gate<A> gates;  // [span]
  A *x, *dy, *dx;
  A* before[kPayloads];  // [span] states before each token
  A* carry[kPayloads];   // [tiles] e^g r of the token after
  A* start[kPayloads];   // [spans, tiles] states before each span
  A* sum[kPayloads];     // [span, tiles] dx of a tiled payload
};

template <class A, class S>
class BackwardChunk {
 public:
  using Scan_ = Scan<A, S>;
  BackwardChunk(const Scan_& scan, const std::array<Cotangents<A, S>, kPayloads>& cotangents, A* dg, Tiling tiling,
                Columns columns, const BackwardRows<A>& rows)
      : scan_(scan), cotangents_(cotangents), dg_(dg), tiling_(tiling), columns_(columns), rows_(rows) {}

  void run(const Run& part) {
    const int64_t spans = blocks(part.end - part.begin, kSpan);
    for (int64_t tile = 0; tile < tiling_.tiles; ++tile) {
      keep_states(part, tile, spans);
      start_carry(part, tile);
    }
    for (int64_t span = spans - 1; span >= 0; --span) {
      const int64_t begin = part.begin + span * kSpan, length = std::min(kSpan, part.end - begin);
      for (int p = 0; p < scan_.count; ++p) {
        if (tiled(p)) std::fill_n(rows_.sum[p], length * parts(p) * rows_.width, A(0));
      }
      for (int64_t tile = 0; tile < tiling_.tiles; ++tile) {
        states_of_span(begin, length, span, tile);
        for (int64_t i = length - 1; i >= 0; --i) token(begin, i, tile);
      }
      for (int p = 0; p < scan_.count; ++p) {
        if (tiled(p)) store_sums(p, begin, length);
      }
    }
    if (scan_.starts_sequence(part)) store_initial_gradient(part);
  }

 private:
  bool tiled(int p) const { return scan_.payloads[p].width < scan_.channels; }
  int64_t parts(int p) const { return scan_.payloads[p].width / tiling_.period; }
  Columns tile(int64_t k) const { return tiling_.of(columns_, k); }
  A* start(int p, int64_t span, int64_t tile) const {
    return rows_.start[p] + (span * tiling_.tiles + tile) * rows_.width;
  }
  A* carry(int p, int64_t tile) const { return rows_.carry[p] + tile * rows_.width; }
  A* sum(int p, int64_t i, int64_t part) const { return rows_.sum[p] + (i * parts(p) + part) * rows_.width; }

  // States before every span; the last span itself is not walked.
  void keep_states(const Run& part, int64_t k, int64_t spans) {
    const Columns c = tile(k);
    for (int p = 0; p < scan_.count; ++p) state_before(scan_, p, part, c, start(p, 0, k));
    for (int64_t span = 0; span + 1 < spans; ++span) {
      for (int p = 0; p < scan_.count; ++p) std::copy_n(start(p, span, k), c.count, start(p, span + 1, k));
      for (int64_t t = part.begin + span * kSpan; t < part.begin + (span + 1) * kSpan; ++t) {
        const Gate<A> gate = rows_.gate(0);
        scan_.table.gate(gate, scan_.g + t * scan_.channels + c.first, scan_.ema, c.count);
        for (int p = 0; p < scan_.count; ++p) {
          A* state = start(p, span + 1, k);
          scan_.table.advance(state, state, gate, payload_row(scan_, scan_.payloads[p], t, c, rows_.x), c.count);
        }
      }
    }
  }

  void start_carry(const Run& part, int64_t k) {
    const Columns c = tile(k);
    for (int p = 0; p < scan_.count; ++p) {
      const Cotangents<A, S>& d = cotangents_[p];
      if (d.ends) rows::load(scan_.table, carry(p, k), d.ends + scan_.slot(part) * scan_.channels + c.first, c.count);
      else std::fill_n(carry(p, k), c.count, A(0));
      if (d.final && scan_.ends_sequence(part)) {
        scan_.table.add(carry(p, k), d.final + part.sequence * scan_.channels + c.first, c.count);
      }
    }
  }

  void states_of_span(int64_t begin, int64_t length, int64_t span, int64_t k) {
    const Columns c = tile(k);
    for (int p = 0; p < scan_.count; ++p) std::copy_n(start(p, span, k), c.count, rows_.before[p]);
    for (int64_t i = 0; i < length; ++i) {
      const Gate<A> gate = rows_.gate(i);
      scan_.table.gate(gate, scan_.g + (begin + i) * scan_.channels + c.first, scan_.ema, c.count);
      for (int p = 0; i + 1 < length && p < scan_.count; ++p) {
        const A* x = payload_row(scan_, scan_.payloads[p], begin + i, c, rows_.x);
        A* before = rows_.before[p] + i * rows_.width;
        scan_.table.advance(before + rows_.width, before, gate, x, c.count);
      }
    }
  }

  void token(int64_t begin, int64_t i, int64_t k) {
    const Columns c = tile(k);
    const int64_t t = begin + i, at = t * scan_.channels + c.first;
    A* dg = dg_ + at;
    std::fill_n(dg, c.count, A(0));
    for (int p = 0; p < scan_.count; ++p) {
      const Cotangents<A, S>& d = cotangents_[p];
      S* out = d.dx + at;  // of a payload that is not tiled
      A* dx = tiled(p) ? sum(p, i, k % parts(p)) : rows::target(rows_.dx, out);
      if (!tiled(p)) std::fill_n(dx, c.count, A(0));
      const A* dy = d.y ? rows::view(scan_.table, rows_.dy, d.y + at, c.count) : kZeros<A>;
      const A* x = payload_row(scan_, scan_.payloads[p], t, c, rows_.x);
      scan_.table.retreat(carry(p, k), dx, dg, rows_.gate(i), dy, rows_.before[p] + i * rows_.width, x, scan_.ema,
                          c.count);
      if (!tiled(p)) rows::store(scan_.table, out, dx, c.count);
    }
  }

  void store_sums(int p, int64_t begin, int64_t length) {
    const int64_t width = scan_.payloads[p].width;
    for (int64_t i = 0; i < length; ++i) {
      for (int64_t part = 0; part < parts(p); ++part) {
        S* out = cotangents_[p].dx + (begin + i) * width + part * tiling_.period + columns_.first;
        rows::store(scan_.table, out, sum(p, i, part), columns_.count);
      }
    }
  }

  void store_initial_gradient(const Run& part) {
    for (int p = 0; p < scan_.count; ++p) {
      for (int64_t k = 0; cotangents_[p].dinitial && k < tiling_.tiles; ++k) {
        const Columns c = tile(k);
        std::copy_n(carry(p, k), c.count, cotangents_[p].dinitial + part.sequence * scan_.channels + c.first);
      }
    }
  }

  const Scan_& scan_;
  const std::array<Cotangents<A, S>, kPayloads>& cotangents_;
  A* dg_;
  const Tiling tiling_;
  const Columns columns_;
  const BackwardRows<A>& rows_;
};

template <class A, class S>
void backward(const Scan<A, S>& scan, const std::array<Cotangents<A, S>, kPayloads>& cotangents, A* dg) {
  const std::vector<Run> runs = runs_of(scan);
  const Tiling tiling = tiling_of(scan);
  int64_t longest = 0;
  for (const Run& run : runs) longest = std::max(longest, run.end - run.begin);
  const int64_t spans = blocks(scan.chunk ? std::min(longest, scan.chunk) : longest, kSpan);
  const int64_t workers = workers_for(scan.tokens * scan.channels);
  const ColumnBlocks columns(tiling.period, static_cast<int64_t>(runs.size()), workers, kWidestBackward);
  const auto make = [&](Arena& arena) { return BackwardRows<A>(arena, scan.count, columns.width, tiling.tiles, spans); };
  const size_t bytes = cpu::bytes_of(make);
  cpu::Scratch scratch(static_cast<size_t>(workers) * bytes);
  cpu::parallel_tasks(static_cast<int64_t>(runs.size()) * columns.count, workers, Nothing{}, [&](int64_t task, int64_t worker) {
    Arena arena(scratch.data() + static_cast<size_t>(worker) * bytes);
    const BackwardRows<A> rows = make(arena);
    BackwardChunk<A, S> chunk(scan, cotangents, dg, tiling, columns[task % columns.count], rows);
    for_chunks(scan, runs[static_cast<size_t>(task / columns.count)], [&](const Run& part) { chunk.run(part); });
  });
  for (int p = 0; p < scan.count; ++p) {
    pass_on(scan.sequences, scan.channels, cotangents[p].final, cotangents[p].dinitial);
  }
}

Tensors5 gated_scan_cpu_backward(const MaybeTensor& dy, const MaybeTensor& dy2, const MaybeTensor& dends,
                                 const MaybeTensor& dends2, const MaybeTensor& dfinal, const MaybeTensor& dfinal2,
                                 const Tensor& g, const Tensor& x, const MaybeTensor& x2, const MaybeTensor& initial_state,
                                 const MaybeTensor& initial_state2, const MaybeTensor& cu_seqlens, bool ema,
                                 int64_t chunk_size) {
  constexpr const char* op = "gated_scan_cpu_backward";
  const Arguments a = read_arguments(op, g, x, x2, initial_state, initial_state2, cu_seqlens, ema, chunk_size);
  if ((dends || dends2) && chunk_size == 0) fail(op, "dends needs a chunk_size; got 0 (none)");
  const int64_t batch = a.batch(), channels = a.channels(), count = a.sequences.count();
  const int64_t slots = a.chunk && batch ? a.sequences.slots(a.chunk) / batch : 0;
  const MaybeTensor given[3][kPayloads] = {{dy, dy2}, {dends, dends2}, {dfinal, dfinal2}};
  for (int p = 0; p < kPayloads; ++p) {
    check_tensor(op, p ? "dy2" : "dy", given[0][p], {a.type()}, {batch, g.size(1), channels});
    check_tensor(op, p ? "dends2" : "dends", given[1][p], {a.type()}, {batch, slots, channels});
    check_tensor(op, p ? "dfinal_state2" : "dfinal_state", given[2][p], {g.scalar_type()}, {count, channels});
  }
  Tensor dg = result_like(g), dx[kPayloads], dinitial[kPayloads];
  for (int p = 0; p < kPayloads; ++p) {
    dx[p] = a.has(p) ? result_like(*a.x[p]) : a.empty(a.type());
    dinitial[p] = a.initial[p] ? result_like(*a.initial[p]) : a.empty(g.scalar_type());
  }
  rows::dispatch(a.type(), [&]<class A, class S>(A, S) {
    std::array<Cotangents<A, S>, kPayloads> cotangents{};
    for (int p = 0; p < kPayloads; ++p) {
      cotangents[p] = {data<S>(given[0][p]), data<S>(given[1][p]), data<A>(given[2][p]), data<S>(dx[p], a.has(p)),
                       data<A>(dinitial[p], a.initial[p].has_value())};
    }
    backward(make_scan<A, S>(a), cotangents, static_cast<A*>(dg.mutable_data_ptr()));
  });
  return {dg, dx[0], dx[1], dinitial[0], dinitial[1]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("gated_scan_cpu_backward", TORCH_BOX(&gated_scan_cpu_backward)); }

}  // namespace memattn::scan
