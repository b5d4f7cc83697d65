// gated_scan and its step on CUDA: checks, dispatch and launch. The mathematics is in ops/gated_scan.py.
//
// Bound by bytes. Forward the floor is g and x in, y out, 4 + 2s bytes per number with payloads of s bytes; chunks of up to
// kSegment tokens are at it, longer chains read g and x twice, 4 + s more. Backward the floor is g, x, dy in, dg, dx out,
// 8 + 3s bytes; chains read g, x and dy twice, 4 + 2s more. What chains keep per segment is 1/kSegment of that. A payload
// narrower than the gate adds 8 bytes per number of the gate: its dx under every channel, written and read once.
// No host synchronisation, no atomics, the current stream: the call can be captured in a CUDA graph.
#include <tuple>

#include "launch.h"

#include "gated_scan.cuh"
#include "gated_scan_backward.cuh"

namespace memattn::scan {
namespace {

constexpr auto kFloat = ScalarType::Float;
constexpr auto kCuda = Place::cuda;
constexpr auto kAny = kAnySize;
constexpr int64_t kFewChannels = 4 * kThreads;  // below this, vectors would leave most of a block's threads idle

struct Inputs {
  const char* op;
  const Tensor& g;
  const MaybeTensor x[kPayloads], initial[kPayloads];
  const MaybeTensor& cu_seqlens;
  bool ema;
  int64_t chunk_size;

  int64_t batch() const { return g.size(0); }
  int64_t channels() const { return g.size(2); }
  int64_t sequences() const { return cu_seqlens ? cu_seqlens->size(0) - 1 : batch(); }
  int count() const { return x[1] ? 2 : 1; }
  ScalarType type() const { return x[0]->scalar_type(); }
  int64_t ends_per_row() const {
    const int64_t length = g.size(1), span = std::min(chunk_size, length + 1);  // so that no sum overflows
    return cu_seqlens ? length / span + sequences() : ceil_div(length, span);
  }
  bool narrow(int p) const { return x[p]->size(2) != channels(); }
};

void check_all(const Inputs& in) {
  const char* op = in.op;
  check_tensor(op, "g", in.g, {kFloat}, {kAny, kAny, kAny}, kCuda);
  const int64_t batch = in.batch(), length = in.g.size(1), channels = in.channels();
  check_tensor(op, "x", in.x[0], {kFloat, ScalarType::BFloat16, ScalarType::Half}, {batch, length, kAny}, kCuda);
  check_tensor(op, "x2", in.x[1], {in.type()}, {batch, length, kAny}, kCuda);
  for (int p = 0; p < in.count(); ++p) {
    const int64_t width = in.x[p]->size(2);
    if (width != channels && (width == 0 || channels % width != 0)) {
      fail(op, p ? "x2" : "x", " must have a divisor of g's ", channels, " channels; got ", width);
    }
  }
  check_tensor(op, "cu_seqlens", in.cu_seqlens, {ScalarType::Int, ScalarType::Long}, {kAny}, kCuda);
  if (in.cu_seqlens && (batch != 1 || in.cu_seqlens->size(0) < 2)) {
    fail(op, "cu_seqlens needs a batch of 1 and two entries; got B = ", batch, " and ", in.cu_seqlens->size(0));
  }
  check_tensor(op, "initial_state", in.initial[0], {kFloat}, {in.sequences(), channels}, kCuda);
  check_tensor(op, "initial_state2", in.initial[1], {kFloat}, {in.sequences(), channels}, kCuda);
  if (in.chunk_size < 0) fail(op, "chunk_size must be 0 (none) or more; got ", in.chunk_size);
  check_one_device(op, in.g, {in.x[0], in.x[1], in.initial[0], in.initial[1], in.cu_seqlens});
}

Layout layout_of(const Inputs& in) {
  Layout l{};
  const int64_t length = in.g.size(1);
  l.cu_seqlens = indices_of(in.cu_seqlens);
  l.tokens = length;
  l.sequences = in.sequences();
  l.chunked = in.chunk_size > 0;
  l.span = l.chunked ? std::min(in.chunk_size, length + 1) : kSegment;
  l.segments = l.chunked ? static_cast<int>(std::max<int64_t>(1, ceil_div(std::min(l.span, length), kSegment))) : 1;
  l.slots_per_row = in.cu_seqlens ? length / l.span + l.sequences : std::max<int64_t>(1, ceil_div(length, l.span));
  l.slots = in.batch() * l.slots_per_row;
  return l;
}

// Whether some chain may have more than one segment.
bool linked(const Inputs& in) {
  return in.g.size(1) > kSegment && (in.chunk_size == 0 || in.chunk_size > kSegment);
}

template <typename T>
T* data(const Tensor& x) {
  return x.numel() ? static_cast<T*>(x.mutable_data_ptr()) : nullptr;
}

template <typename T>
const T* data(const MaybeTensor& x) {
  return x && x->numel() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// Whether rows of every given matrix can be read kVector numbers at a time.
template <int kVector>
bool vectors_fit(int64_t channels, std::initializer_list<const MaybeTensor*> matrices) {
  if (channels < kFewChannels) return false;
  for (const MaybeTensor* x : matrices) {
    if (!*x || (*x)->numel() == 0) continue;
    const int64_t bytes = (*x)->scalar_type() == kFloat ? 4 : 2;
    const auto address = reinterpret_cast<uintptr_t>((*x)->const_data_ptr());
    if ((*x)->size(-1) % kVector != 0 || address % (bytes * kVector) != 0) return false;
  }
  return channels % kVector == 0;
}

// What chains keep per segment: rows of [segments, D].
class Scratch {
 public:
  Scratch(const Inputs& in, const Layout& l, int64_t rows)
      : stride_(l.slots * l.segments * in.channels()),
        memory_(torch::stable::new_empty(in.g, {linked(in) ? rows * stride_ : 0}, kFloat)) {}
  float* row(int64_t i) const { return memory_.numel() ? memory_.mutable_data_ptr<float>() + i * stride_ : nullptr; }

 private:
  int64_t stride_;
  Tensor memory_;
};

template <typename T>
Scan<T> scan_of(const Inputs& in, const Layout& layout, const Scratch& scratch, int vector) {
  Scan<T> a{};
  a.layout = layout;
  a.g = in.g.const_data_ptr<float>();
  a.sums = scratch.row(0);
  for (int p = 0; p < in.count(); ++p) {
    a.payloads[p] = {data<T>(in.x[p]), data<float>(in.initial[p]), in.x[p]->size(2), scratch.row(1 + p)};
  }
  a.channels = in.channels();
  a.column_blocks = ceil_div(a.channels, kThreads * vector);
  a.ema = in.ema;
  return a;
}

int64_t blocks_of(const char* op, int64_t rows, int64_t column_blocks) {
  const int64_t blocks = rows * column_blocks;
  if (blocks > kMaxInt) fail(op, "segments of ", kSegment, " tokens by blocks of channels must be below 2^31; got ", blocks);
  return blocks;
}

// Calls `go` with the number of payloads and the vector width as constants.
template <int kVector, typename Go>
void with_sizes(const Inputs& in, bool vectors, const Go& go) {
  const auto count = [&]<int kCount>() {
    vectors ? go.template operator()<kCount, kVector>() : go.template operator()<kCount, 1>();
  };
  in.x[1] ? count.template operator()<2>() : count.template operator()<1>();
}

template <typename T>
void link(const Inputs& in, const Links<T>& a, cudaStream_t stream) {
  const int64_t chains = a.layout.chunked ? a.layout.slots : a.layout.sequences;
  launch(link_kernel<T>, blocks_of(in.op, chains, a.column_blocks), kThreads, stream, a);
}

template <typename T>
Links<T> links_of(const Scan<T>& scan) {
  Links<T> a{};
  a.layout = scan.layout;
  a.sums = scan.sums;
  a.channels = scan.channels;
  a.column_blocks = ceil_div(scan.channels, kThreads);
  for (int p = 0; p < kPayloads; ++p) {
    a.carry[p] = scan.payloads[p].carry;
    a.outside[p] = scan.payloads[p].initial;
  }
  return a;
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename T>
void forward(const Inputs& in, const Tensor (&y)[kPayloads], const Tensor (&ends)[kPayloads],
             const Tensor (&final)[kPayloads], cudaStream_t stream) {
  const Layout layout = layout_of(in);
  const Scratch scratch(in, layout, 1 + in.count());
  const MaybeTensor g = in.g, out[] = {y[0], y[1], ends[0], ends[1], final[0], final[1]};
  const bool vectors = vectors_fit<4>(in.channels(), {&g, &in.x[0], &in.x[1], &in.initial[0], &in.initial[1], &out[0],
                                                      &out[1], &out[2], &out[3], &out[4], &out[5]});
  with_sizes<4>(in, vectors, [&]<int kCount, int kVector>() {
    Forward<T> a{};
    a.scan = scan_of<T>(in, layout, scratch, kVector);
    for (int p = 0; p < kCount; ++p) {
      a.y[p] = data<T>(y[p]);
      a.ends[p] = data<T>(ends[p]);
      a.final[p] = data<float>(final[p]);
    }
    const int64_t blocks = blocks_of(in.op, layout.slots * layout.segments, a.scan.column_blocks);
    if (linked(in)) {
      launch(summarise_kernel<T, kCount, kVector>, blocks, kThreads, stream, a.scan);
      link(in, links_of(a.scan), stream);
    }
    launch(forward_kernel<T, kCount, kVector>, blocks, kThreads, stream, a);
  });
}

using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensors6 gated_scan_cuda(const Tensor& g, const Tensor& x, const MaybeTensor& x2, const MaybeTensor& initial_state,
                         const MaybeTensor& initial_state2, const MaybeTensor& cu_seqlens, bool ema, int64_t chunk_size,
                         bool emit_all, bool emit_ends, bool output_final_state) {
  const Inputs in{"gated_scan_cuda", g, {x, x2}, {initial_state, initial_state2}, cu_seqlens, ema, chunk_size};
  check_all(in);
  if (emit_ends && chunk_size == 0) fail(in.op, "emit_ends needs a chunk_size; got 0 (none)");
  const OnDeviceOf here(g);
  Tensor y[kPayloads], ends[kPayloads], final[kPayloads];
  for (int p = 0; p < kPayloads; ++p) {
    const auto tensor = [&](bool wanted, std::initializer_list<int64_t> shape, ScalarType dtype) {
      return wanted && p < in.count() ? torch::stable::new_empty(g, shape, dtype)
                                      : torch::stable::new_empty(g, {0}, dtype);
    };
    y[p] = tensor(emit_all, {in.batch(), g.size(1), in.channels()}, in.type());
    ends[p] = tensor(emit_ends, {in.batch(), emit_ends ? in.ends_per_row() : 0, in.channels()}, in.type());
    final[p] = tensor(output_final_state, {in.sequences(), in.channels()}, kFloat);
  }
  if (in.batch() && in.channels()) {
    with_element(in.type(), [&]<typename T>(T) { forward<T>(in, y, ends, final, here.stream()); });
  }
  return {y[0], y[1], ends[0], ends[1], final[0], final[1]};
}

// --- backward --------------------------------------------------------------------------------------------------------

struct Cotangents {
  const MaybeTensor dy[kPayloads], dends[kPayloads], dfinal[kPayloads];
};

struct Gradients {
  Tensor dg, dx[kPayloads], wide[kPayloads], dinitial[kPayloads];
};

void check_cotangents(const Inputs& in, const Cotangents& d) {
  const char* names[][kPayloads] = {{"dy", "dy2"}, {"dends", "dends2"}, {"dfinal_state", "dfinal_state2"}};
  for (int p = 0; p < kPayloads; ++p) {
    check_tensor(in.op, names[0][p], d.dy[p], {in.type()}, {in.batch(), in.g.size(1), in.channels()}, kCuda);
    const int64_t ends = in.chunk_size ? in.ends_per_row() : 0;
    check_tensor(in.op, names[1][p], d.dends[p], {in.type()}, {in.batch(), ends, in.channels()}, kCuda);
    check_tensor(in.op, names[2][p], d.dfinal[p], {kFloat}, {in.sequences(), in.channels()}, kCuda);
    check_one_device(in.op, in.g, {d.dy[p], d.dends[p], d.dfinal[p]});
  }
}

template <typename T>
void backward(const Inputs& in, const Cotangents& d, const Gradients& out, cudaStream_t stream) {
  const Layout layout = layout_of(in);
  const Scratch scratch(in, layout, 1 + 2 * in.count());
  const MaybeTensor g = in.g, more[] = {out.dg, out.dx[0], out.dx[1], out.dinitial[0], out.dinitial[1]};
  const bool vectors = vectors_fit<2>(
      in.channels(), {&g, &in.x[0], &in.x[1], &in.initial[0], &in.initial[1], &d.dy[0], &d.dy[1], &d.dends[0],
                      &d.dends[1], &d.dfinal[0], &d.dfinal[1], &more[0], &more[1], &more[2], &more[3], &more[4]});
  with_sizes<2>(in, vectors, [&]<int kCount, int kVector>() {
    Backward<T> a{};
    a.scan = scan_of<T>(in, layout, scratch, kVector);
    a.dg = data<float>(out.dg);
    for (int p = 0; p < kCount; ++p) {
      a.dy[p] = data<T>(d.dy[p]);
      a.dends[p] = data<T>(d.dends[p]);
      a.dfinal[p] = data<float>(d.dfinal[p]);
      a.reaching[p] = scratch.row(1 + kCount + p);
      a.dx[p] = in.narrow(p) ? nullptr : data<T>(out.dx[p]);
      a.wide[p] = in.narrow(p) ? data<float>(out.wide[p]) : nullptr;
      a.dinitial[p] = data<float>(out.dinitial[p]);
    }
    const int64_t blocks = blocks_of(in.op, layout.slots * layout.segments, a.scan.column_blocks);
    if (linked(in)) {
      launch(summarise_backward_kernel<T, kCount, kVector>, blocks, kThreads, stream, a);
      Links<T> links = links_of(a.scan);
      link(in, links, stream);
      links.backwards = true;
      for (int p = 0; p < kCount; ++p) {
        links.carry[p] = a.reaching[p];
        links.outside[p] = a.dfinal[p];
        links.ends[p] = a.dends[p];
      }
      link(in, links, stream);
    }
    launch(backward_kernel<T, kCount, kVector>, blocks, kThreads, stream, a);
    for (int p = 0; p < kCount; ++p) {
      if (!a.wide[p]) continue;
      const Tiles<T> tiles{a.wide[p], data<T>(out.dx[p]), out.dx[p].numel(), in.channels(), in.x[p]->size(2)};
      launch(add_tiles_kernel<T>, blocks_of(in.op, ceil_div(tiles.count, kThreads), 1), kThreads, stream, tiles);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_scan_cuda_backward(
    const MaybeTensor& dy, const MaybeTensor& dy2, const MaybeTensor& dends, const MaybeTensor& dends2,
    const MaybeTensor& dfinal_state, const MaybeTensor& dfinal_state2, const Tensor& g, const Tensor& x,
    const MaybeTensor& x2, const MaybeTensor& initial_state, const MaybeTensor& initial_state2,
    const MaybeTensor& cu_seqlens, bool ema, int64_t chunk_size) {
  const Inputs in{"gated_scan_cuda_backward", g, {x, x2}, {initial_state, initial_state2}, cu_seqlens, ema, chunk_size};
  check_all(in);
  const Cotangents d{{dy, dy2}, {dends, dends2}, {dfinal_state, dfinal_state2}};
  check_cotangents(in, d);
  const OnDeviceOf here(g);
  Gradients out;
  out.dg = torch::stable::empty_like(g);
  for (int p = 0; p < kPayloads; ++p) {
    const bool has = p < in.count();
    out.dx[p] = has ? torch::stable::empty_like(*in.x[p]) : torch::stable::new_empty(g, {0}, in.type());
    const int64_t wide = has && in.narrow(p) ? g.numel() : 0;
    out.wide[p] = torch::stable::new_empty(g, {wide}, kFloat);
    out.dinitial[p] = in.initial[p] ? torch::stable::empty_like(*in.initial[p]) : torch::stable::new_empty(g, {0}, kFloat);
  }
  if (in.batch() && in.channels()) {
    with_element(in.type(), [&]<typename T>(T) { backward<T>(in, d, out, here.stream()); });
  }
  return {out.dg, out.dx[0], out.dx[1], out.dinitial[0], out.dinitial[1]};
}

// --- step ------------------------------------------------------------------------------------------------------------

template <typename T>
void step(const Inputs& in, const Tensor& state, const MaybeTensor& restart, const MaybeTensor& indices, const Tensor& y,
          cudaStream_t stream) {
  const MaybeTensor g = in.g, pool = state, out = y;
  const bool vectors = vectors_fit<4>(in.channels(), {&g, &in.x[0], &pool, &out});
  Step<T> a{};
  a.g = in.g.const_data_ptr<float>();
  a.x = data<T>(in.x[0]);
  a.state = data<float>(state);
  a.restart = data<bool>(restart);
  a.indices = indices_of(indices);
  a.y = data<T>(y);
  a.channels = in.channels();
  a.width = in.x[0]->size(2);
  a.pool = state.size(0);
  a.tokens = in.g.size(1);
  a.column_blocks = ceil_div(a.channels, kThreads * (vectors ? 4 : 1));
  a.ema = in.ema;
  const int64_t blocks = blocks_of(in.op, in.batch(), a.column_blocks);
  launch(vectors ? step_kernel<T, 4> : step_kernel<T, 1>, blocks, kThreads, stream, a);
}

Tensor gated_scan_step_cuda(const Tensor& g, const Tensor& x, const Tensor& state, const MaybeTensor& restart,
                            const MaybeTensor& state_indices, bool ema) {
  const MaybeTensor none;
  const Inputs in{"gated_scan_step_cuda", g, {x, none}, {none, none}, none, ema, 0};
  check_all(in);
  check_tensor(in.op, "state", state, {kFloat}, {state_indices ? kAny : in.batch(), in.channels()}, kCuda);
  check_tensor(in.op, "restart", restart, {ScalarType::Bool}, {in.batch()}, kCuda);
  check_tensor(in.op, "state_indices", state_indices, {ScalarType::Int, ScalarType::Long}, {in.batch()}, kCuda);
  check_one_device(in.op, g, {state, restart, state_indices});
  const OnDeviceOf here(g);
  Tensor y = torch::stable::new_empty(g, {in.batch(), g.size(1), in.channels()}, in.type());
  if (y.numel() == 0) return y;
  with_element(in.type(), [&]<typename T>(T) { step<T>(in, state, restart, state_indices, y, here.stream()); });
  return y;
}

}  // namespace
}  // namespace memattn::scan

STABLE_TORCH_LIBRARY_IMPL(memattn, CUDA, m) {
  m.impl("gated_scan_cuda", TORCH_BOX(&memattn::scan::gated_scan_cuda));
  m.impl("gated_scan_cuda_backward", TORCH_BOX(&memattn::scan::gated_scan_cuda_backward));
  m.impl("gated_scan_step_cuda", TORCH_BOX(&memattn::scan::gated_scan_step_cuda));
}
