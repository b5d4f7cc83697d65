// gated_scan on the CPU: forward and step.
#include <atomic>
#include <tuple>

#include "gated_scan.h"

namespace memattn::scan {
namespace {

constexpr int64_t kChannels = 512;  // that one loop goes through, so that gates and states stay in the first cache
constexpr int64_t kWidest = 8192;   // channels of a task
constexpr int64_t kStreamed = int64_t{16} << 20;  // bytes of a result from which it bypasses the cache

using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// --- forward ---------------------------------------------------------------------------------------------------------

template <class A, class S>
struct Results {
  S* y;      // [tokens, channels] or null
  S* ends;   // [slots, channels] or null
  A* final;  // [N, channels] or null
};

template <class A>
struct ForwardRows {
  ForwardRows(Arena& arena, int64_t width)
      : gate(take_gate<A>(arena, kChannels)), x(arena.take<A>(kChannels)), y(arena.take<A>(kChannels)) {
    for (A*& row : states) row = arena.take<A>(width);
  }
  Gate<A> gate;
  A *x, *y;
  A* states[kPayloads];
};

// A row of a large result goes past the cache, which it would leave before anyone reads it.
template <class A, class S>
void store_result(const Scan<A, S>& scan, S* out, const A* row, int64_t n, A* scratch) {
  const int64_t bytes = n * static_cast<int64_t>(sizeof(S));
  if (scan.tokens * scan.channels * static_cast<int64_t>(sizeof(S)) < kStreamed) return rows::store(scan.table, out, row, n);
  if constexpr (std::is_same_v<A, S>) return scan.table.stream(out, row, bytes);
  auto* rounded = reinterpret_cast<S*>(scratch);
  rows::store(scan.table, rounded, row, n);
  scan.table.stream(out, rounded, bytes);
}

// Whether a gate was above 0.
template <class A, class S>
bool forward_token(const Scan<A, S>& scan, const std::array<Results<A, S>, kPayloads>& results, int64_t t, Columns c,
                   int64_t offset, const ForwardRows<A>& rows) {
  const bool grows = scan.table.gate(rows.gate, scan.g + t * scan.channels + c.first, scan.ema, c.count);
  for (int p = 0; p < scan.count; ++p) {
    A* state = rows.states[p] + offset;
    scan.table.advance(state, state, rows.gate, payload_row(scan, scan.payloads[p], t, c, rows.x), c.count);
    if (results[p].y) store_result(scan, results[p].y + t * scan.channels + c.first, state, c.count, rows.y);
  }
  return grows;
}

template <class A, class S>
bool forward_chunk(const Scan<A, S>& scan, const std::array<Results<A, S>, kPayloads>& results, const Run& part, Columns c,
                   const ForwardRows<A>& rows) {
  bool grows = false;
  for (int p = 0; p < scan.count; ++p) state_before(scan, p, part, c, rows.states[p]);
  for (int64_t t = part.begin; t < part.end; ++t) {
    for (int64_t at = 0; at < c.count; at += kChannels) {
      grows |= forward_token(scan, results, t, {c.first + at, std::min(kChannels, c.count - at)}, at, rows);
    }
  }
  for (int p = 0; p < scan.count; ++p) {
    const auto& [y, ends, final] = results[p];
    if (ends) rows::store(scan.table, ends + scan.slot(part) * scan.channels + c.first, rows.states[p], c.count);
    if (final && scan.ends_sequence(part)) {
      std::copy_n(rows.states[p], c.count, final + part.sequence * scan.channels + c.first);
    }
  }
  return grows;
}

template <class A, class S>
void forward(const Scan<A, S>& scan, const std::array<Results<A, S>, kPayloads>& results) {
  const std::vector<Run> runs = runs_of(scan);
  const int64_t workers = workers_for(scan.tokens * scan.channels);
  const ColumnBlocks columns(scan.channels, static_cast<int64_t>(runs.size()), workers, kWidest);
  const auto make = [&](Arena& arena) { return ForwardRows<A>(arena, columns.width); };
  const size_t bytes = cpu::bytes_of(make);
  cpu::Scratch scratch(static_cast<size_t>(workers) * bytes);
  std::atomic<bool> grows{false};
  cpu::parallel_tasks(static_cast<int64_t>(runs.size()) * columns.count, workers, Nothing{}, [&](int64_t task, int64_t worker) {
    Arena arena(scratch.data() + static_cast<size_t>(worker) * bytes);
    const ForwardRows<A> rows = make(arena);
    for_chunks(scan, runs[static_cast<size_t>(task / columns.count)], [&](const Run& part) {
      if (forward_chunk(scan, results, part, columns[task % columns.count], rows)) grows = true;
    });
    scan.table.fence();
  });
  // Found on the way, because a pass of its own would read a third of all there is to move once more.
  if (grows) fail("gated_scan", "g has a value above 0; a natural-log decay must be \u2264 0");
  for (int p = 0; p < scan.count; ++p) pass_on(scan.sequences, scan.channels, scan.payloads[p].initial, results[p].final);
}

Tensors6 gated_scan_cpu(const Tensor& g, const Tensor& x, const MaybeTensor& x2, const MaybeTensor& initial_state,
                        const MaybeTensor& initial_state2, const MaybeTensor& cu_seqlens, bool ema, int64_t chunk_size,
                        bool emit_all, bool emit_ends, bool output_final_state) {
  constexpr const char* op = "gated_scan_cpu";
  const Arguments a = read_arguments(op, g, x, x2, initial_state, initial_state2, cu_seqlens, ema, chunk_size);
  if (emit_ends && chunk_size == 0) fail(op, "emit_ends needs a chunk_size; got 0 (none)");
  const int64_t batch = a.batch(), channels = a.channels(), slots = emit_ends ? a.sequences.slots(a.chunk) : 0;
  const int64_t per_row = batch ? slots / batch : 0;
  Tensor y[kPayloads], ends[kPayloads], final[kPayloads];
  for (int p = 0; p < kPayloads; ++p) {
    const auto tensor = [&](bool wanted, std::initializer_list<int64_t> shape, ScalarType dtype, bool zero) {
      if (!wanted || !a.has(p)) return a.empty(dtype);
      return zero ? zero_result(g, shape, dtype) : empty_result(g, shape, dtype);
    };
    y[p] = tensor(emit_all, {batch, g.size(1), channels}, a.type(), false);
    ends[p] = tensor(emit_ends, {batch, per_row, channels}, a.type(), a.sequences.has_unused_slots());
    final[p] = tensor(output_final_state, {a.sequences.count(), channels}, g.scalar_type(), false);
  }
  rows::dispatch(a.type(), [&]<class A, class S>(A, S) {
    std::array<Results<A, S>, kPayloads> results{};
    for (int p = 0; p < kPayloads; ++p) {
      results[p] = {data<S>(y[p], emit_all), data<S>(ends[p], emit_ends), data<A>(final[p], output_final_state)};
    }
    forward(make_scan<A, S>(a), results);
  });
  return {y[0], y[1], ends[0], ends[1], final[0], final[1]};
}

// --- step ------------------------------------------------------------------------------------------------------------

template <class A, class S>
void step(const Scan<A, S>& scan, int64_t batch, A* pool, int64_t pool_rows, const std::vector<int64_t>& indices,
          const bool* restart, S* y) {
  const int64_t tokens = batch ? scan.tokens / batch : 0, columns = blocks(scan.channels, kChannels);
  const int64_t grain = std::max<int64_t>(1, kParallelWork / (tokens * std::min(kChannels, scan.channels) + 1));
  torch::stable::parallel_for(0, batch * columns, grain, [&](int64_t begin, int64_t end) {
    alignas(64) A gates[3][kChannels], scratch[kChannels];
    const Gate<A> gate{gates[0], gates[1], gates[2]};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / columns, first = task % columns * kChannels;
      const int64_t row = indices.empty() ? b : indices[static_cast<size_t>(b)];
      const Columns c{first, std::min(kChannels, scan.channels - first)};
      const bool live = row >= 0 && row < pool_rows;  // else padding, or an index that must not be followed
      A* state = live ? pool + row * scan.channels + first : nullptr;
      if (live && restart && restart[b]) std::fill_n(state, c.count, A(0));
      for (int64_t t = b * tokens; t < (b + 1) * tokens; ++t) {
        S* out = y + t * scan.channels + first;
        if (!live) {
          std::fill_n(out, c.count, S{});
          continue;
        }
        scan.table.gate(gate, scan.g + t * scan.channels + first, scan.ema, c.count);
        scan.table.advance(state, state, gate, payload_row(scan, scan.payloads[0], t, c, scratch), c.count);
        rows::store(scan.table, out, state, c.count);
      }
    }
  });
}

Tensor gated_scan_step_cpu(const Tensor& g, const Tensor& x, const Tensor& state, const MaybeTensor& restart,
                           const MaybeTensor& state_indices, bool ema) {
  constexpr const char* op = "gated_scan_step_cpu";
  const Arguments a = read_arguments(op, g, x, std::nullopt, std::nullopt, std::nullopt, std::nullopt, ema, 0);
  check_tensor(op, "state", state, {g.scalar_type()}, {state_indices ? kAnySize : a.batch(), a.channels()});
  check_tensor(op, "restart", restart, {ScalarType::Bool}, {a.batch()});
  check_tensor(op, "state_indices", state_indices, {ScalarType::Int, ScalarType::Long}, {a.batch()});
  Tensor y = empty_result(g, {a.batch(), g.size(1), a.channels()}, a.type());
  const std::vector<int64_t> indices = state_indices ? read_indices(*state_indices) : std::vector<int64_t>();
  rows::dispatch(a.type(), [&]<class A, class S>(A, S) {
    step(make_scan<A, S>(a), a.batch(), static_cast<A*>(state.mutable_data_ptr()), state.size(0), indices,
         data<bool>(restart), static_cast<S*>(y.mutable_data_ptr()));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) {
  m.impl("gated_scan_cpu", TORCH_BOX(&gated_scan_cpu));
  m.impl("gated_scan_step_cpu", TORCH_BOX(&gated_scan_step_cpu));
}

}  // namespace memattn::scan
