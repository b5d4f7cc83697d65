// What the passes of gated_scan share: a call's arguments, runs of chunks, blocks of channels. Mathematics:
// python/memattn/ops/gated_scan.py.
//
// Time is walked token by token with the states of a block of channels at hand as rows; the loops over a row are in
// isa/scan_rows.h. A task is a run of whole chunks (a whole sequence where there are none) by one block of channels, so its
// bits depend neither on the thread count nor on its neighbours.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "../common/sequences.h"
#include "dispatch.h"
#include "isa/scan_rows.h"
#include "parallel.h"
#include "results.h"

namespace memattn::scan {

using cpu::Arena;
using cpu::empty_result;
using cpu::result_like;
using cpu::zero_result;
using rows::accumulate_type;

inline constexpr int64_t kNarrowest = 64;          // channels of a task, at least
inline constexpr int64_t kRun = 128;             // tokens of a task, at least, where chunks are shorter
inline constexpr int64_t kParallelWork = 32768;  // elements below which a second thread costs more than it saves
inline constexpr int kPayloads = 2;

inline int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

struct Columns {
  int64_t first, count;
};

// --- one call --------------------------------------------------------------------------------------------------------

template <class A, class S>
struct Payload {
  const S* x;        // [tokens, width]
  const A* initial;  // [N, channels] or null: zero
  int64_t width;     // channel c of the gate reads channel c % width
};

// Rows begin..end of the tokens: whole chunks of one sequence.
struct Run {
  int64_t sequence, begin, end;
};

template <class A, class S>
struct Scan {
  const RowTable<A>& table = row_table<A>();
  const A* g;  // [tokens, channels]
  std::array<Payload<A, S>, kPayloads> payloads;
  int count;  // of payloads
  int64_t channels, tokens, chunk;  // chunk: 0 where there are none
  bool ema;
  SequenceLayout sequences;

  bool starts_sequence(const Run& run) const { return run.begin == sequences.start(run.sequence); }
  bool ends_sequence(const Run& run) const { return run.end == sequences.end(run.sequence); }
  int64_t slot(const Run& part) const {
    return sequences.slot(part.sequence, (part.begin - sequences.start(part.sequence)) / chunk, chunk);
  }
};

template <class A, class S>
std::vector<Run> runs_of(const Scan<A, S>& scan) {
  std::vector<Run> runs;
  for (int64_t n = 0; n < scan.sequences.count(); ++n) {
    const int64_t end = scan.sequences.end(n);
    const int64_t step = scan.chunk ? blocks(kRun, scan.chunk) * scan.chunk : std::max<int64_t>(1, scan.sequences.length(n));
    for (int64_t at = scan.sequences.start(n); at < end; at += step) runs.push_back({n, at, std::min(at + step, end)});
  }
  return runs;
}

template <class A, class S, class Work>
void for_chunks(const Scan<A, S>& scan, const Run& run, const Work& work) {
  const int64_t step = scan.chunk ? scan.chunk : run.end - run.begin;
  for (int64_t at = run.begin; at < run.end; at += step) work(Run{run.sequence, at, std::min(at + step, run.end)});
}

// The payload's channels under `columns` of the gate, as a row.
template <class A, class S>
const A* payload_row(const Scan<A, S>& scan, const Payload<A, S>& payload, int64_t t, Columns columns, A* scratch) {
  const S* row = payload.x + t * payload.width;
  int64_t at = columns.first % payload.width;
  if (at + columns.count <= payload.width) return rows::view(scan.table, scratch, row + at, columns.count);
  for (int64_t done = 0; done < columns.count; at = 0) {
    const int64_t n = std::min(payload.width - at, columns.count - done);
    rows::load(scan.table, scratch + done, row + at, n);
    done += n;
  }
  return scratch;
}

template <class A, class S>
void state_before(const Scan<A, S>& scan, int p, const Run& part, Columns columns, A* state) {
  const A* initial = scan.payloads[p].initial;
  if (initial && scan.starts_sequence(part)) {
    std::copy_n(initial + part.sequence * scan.channels + columns.first, columns.count, state);
  } else {
    std::fill_n(state, columns.count, A(0));
  }
}

// The widest blocks of channels that still give every worker a task: what is adjacent in memory is read at once.
struct ColumnBlocks {
  ColumnBlocks(int64_t channels, int64_t runs, int64_t workers, int64_t widest) : channels(channels) {
    const int64_t wanted = blocks(workers, std::max<int64_t>(1, runs));
    const int64_t narrow = blocks(blocks(channels, wanted), kNarrowest) * kNarrowest;
    width = std::clamp(narrow, kNarrowest, widest);
    count = blocks(channels, width);
  }
  Columns operator[](int64_t block) const { return {block * width, std::min(width, channels - block * width)}; }

  int64_t channels, width, count;
};

// What work on threads needs around it: nothing.
struct Nothing {
  void enter() const {}
  void leave() const {}
};

inline int64_t workers_for(int64_t elements) {
  return std::clamp<int64_t>(elements / kParallelWork, 1, torch::stable::get_num_threads());
}

template <class A>
Gate<A> take_gate(Arena& arena, int64_t count) {
  A* high = arena.take<A>(count);
  A* low = arena.take<A>(count);
  return {high, low, arena.take<A>(count)};
}

// A sequence without tokens hands on what it was given.
template <class A>
void pass_on(const SequenceLayout& sequences, int64_t channels, const A* given, A* result) {
  if (result == nullptr) return;
  for (int64_t n = 0; n < sequences.count(); ++n) {
    if (sequences.length(n) > 0) continue;
    if (given) std::copy_n(given + n * channels, channels, result + n * channels);
    else std::fill_n(result + n * channels, channels, A(0));
  }
}

// --- arguments ---------------------------------------------------------------------------------------------------------

using MaybeTensor = std::optional<Tensor>;

template <class T>
const T* data(const MaybeTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <class T>
T* data(const Tensor& tensor, bool wanted) {
  return wanted ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

// Checked tensors of a call.
struct Arguments {
  const char* op;
  Tensor g;
  std::array<MaybeTensor, kPayloads> x, initial;
  SequenceLayout sequences;
  bool ema;
  int64_t chunk;

  ScalarType type() const { return x[0]->scalar_type(); }
  int64_t batch() const { return g.size(0); }
  int64_t channels() const { return g.size(2); }
  bool has(int p) const { return x[static_cast<size_t>(p)].has_value(); }
  Tensor empty(ScalarType dtype) const { return empty_result(g, {0}, dtype); }
};

inline void check_payload(const char* op, const char* name, const Tensor& x, const Tensor& g, ScalarType type) {
  check_tensor(op, name, x, {type}, {g.size(0), g.size(1), kAnySize});
  const int64_t width = x.size(2), channels = g.size(2);
  if (width != channels && (width == 0 || channels % width != 0)) {
    fail(op, name, " must have a divisor of g's ", channels, " channels; got ", width);
  }
}

inline Arguments read_arguments(const char* op, const Tensor& g, const Tensor& x, const MaybeTensor& x2, const MaybeTensor& initial,
                         const MaybeTensor& initial2, const MaybeTensor& cu_seqlens, bool ema, int64_t chunk) {
  check_tensor(op, "x", x, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double},
               {kAnySize, kAnySize, kAnySize});
  const ScalarType type = x.scalar_type(), wide = accumulate_type(type);
  check_tensor(op, "g", g, {wide}, {kAnySize, kAnySize, kAnySize});
  check_payload(op, "x", x, g, type);
  if (x2) check_payload(op, "x2", *x2, g, type);
  if (chunk < 0) fail(op, "chunk_size must be 0 (none) or more; got ", chunk);
  SequenceLayout sequences = cu_seqlens ? SequenceLayout::packed(read_cu_seqlens(op, *cu_seqlens, g.size(0), g.size(1)))
                                        : SequenceLayout::batch(g.size(0), g.size(1));
  check_tensor(op, "initial_state", initial, {wide}, {sequences.count(), g.size(2)});
  check_tensor(op, "initial_state2", initial2, {wide}, {sequences.count(), g.size(2)});
  return {op, g, {x, x2}, {initial, initial2}, std::move(sequences), ema, std::min(chunk, kFarthest)};
}

template <class A, class S>
Scan<A, S> make_scan(const Arguments& a) {
  Scan<A, S> scan{.g = static_cast<const A*>(a.g.const_data_ptr()),
                  .payloads = {},
                  .count = a.has(1) ? 2 : 1,
                  .channels = a.channels(),
                  .tokens = a.g.size(0) * a.g.size(1),
                  .chunk = a.chunk,
                  .ema = a.ema,
                  .sequences = a.sequences};
  for (int p = 0; p < scan.count; ++p) scan.payloads[p] = {data<S>(a.x[p]), data<A>(a.initial[p]), a.x[p]->size(2)};
  return scan;
}

}  // namespace memattn::scan
