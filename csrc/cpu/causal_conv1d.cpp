// causal_conv1d on the CPU: forward, backward and step. Mathematics: python/memattn/ops/causal_conv1d.py.
//
// The batch is one row of B * T tokens. A task is kTokens of them by kChannels channels, so its bits depend neither on the
// thread count nor on its neighbours; it walks its tokens in order with the inputs of the last W tokens (and backward the
// last W gradients of z) at hand as rows. The loops over a row are in isa/conv_rows.h.
// Sums over tokens, for dweight and dbias: one partial sum per token block, added in the order of the blocks.
#include <algorithm>
#include <tuple>
#include <type_traits>

#include "../common/checks.h"
#include "dispatch.h"
#include "isa/conv_rows.h"
#include "results.h"

namespace memattn::conv {
namespace {

using cpu::empty_result;
using cpu::result_like;
using rows::accumulate_type;
using rows::dispatch;
using rows::load;
using rows::store;
using rows::target;
using rows::view;

constexpr int64_t kTokens = 128;
constexpr int64_t kChannels = 256;        // rows of 1 KiB: all that a backward task keeps at hand fits a 32 KiB cache
constexpr int64_t kParallelWork = 32768;  // elements below which a second thread costs more than it saves
constexpr int64_t kStepWork = 65536;      // the same for the step, which does less per element

template <class A>
constexpr A kZeros[kChannels] = {};

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// weight or bias: of the accumulate type, or of x's.
template <class A, class S>
std::vector<A> read(const RowTable<A>& table, const Tensor& tensor) {
  std::vector<A> values(static_cast<size_t>(tensor.numel()));
  const void* data = tensor.const_data_ptr();
  if (tensor.element_size() == sizeof(A)) load(table, values.data(), static_cast<const A*>(data), tensor.numel());
  else load(table, values.data(), static_cast<const S*>(data), tensor.numel());
  return values;
}

template <class A, class S>
void write(const RowTable<A>& table, const Tensor& tensor, const A* values) {
  void* data = tensor.mutable_data_ptr();
  if (tensor.element_size() == sizeof(A)) store(table, static_cast<A*>(data), values, tensor.numel());
  else store(table, static_cast<S*>(data), values, tensor.numel());
}

// --- one call --------------------------------------------------------------------------------------------------------

struct Columns {
  int64_t block, first, count;
};

// Column `slot` of a [channels, slots] array, a state or the weight, to and from a row.
template <class A>
void gather_slot(A* row, const A* state, int64_t slot, int64_t slots, Columns c) {
  for (int64_t i = 0; i < c.count; ++i) row[i] = state[(c.first + i) * slots + slot];
}

template <class A>
void scatter_slot(A* state, const A* row, int64_t slot, int64_t slots, Columns c) {
  for (int64_t i = 0; i < c.count; ++i) state[(c.first + i) * slots + slot] = row[i];
}

template <class A, class S>
struct Call {
  const RowTable<A>& table = row_table<A>();
  const S* x;           // [tokens, channels]
  const A* state;       // [N, channels, W-1] before the sequences, or null: zero
  int64_t tokens, channels;
  int width;
  bool silu;
  std::vector<int64_t> bounds;  // [N+1]
  std::vector<A> parameters;    // [channel blocks, W+1, kChannels]: the weight of each tap, then the bias

  int64_t sequences() const { return static_cast<int64_t>(bounds.size()) - 1; }
  int64_t channel_blocks() const { return blocks(channels, kChannels); }
  Columns columns(int64_t block) const {
    const int64_t first = block * kChannels;
    return {block, first, std::min(kChannels, channels - first)};
  }
  const A* weights(Columns c) const { return parameters.data() + c.block * (width + 1) * kChannels; }
  const A* bias(Columns c) const { return weights(c) + width * kChannels; }
};

template <class A, class S>
Call<A, S> make_call(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& state, std::vector<int64_t> bounds, bool silu) {
  Call<A, S> call{.x = static_cast<const S*>(x.const_data_ptr()),
                  .state = state ? static_cast<const A*>(state->const_data_ptr()) : nullptr,
                  .tokens = x.size(0) * x.size(1),
                  .channels = x.size(2),
                  .width = static_cast<int>(weight.size(1)),
                  .silu = silu,
                  .bounds = std::move(bounds),
                  .parameters = {}};
  const std::vector<A> taps = read<A, S>(call.table, weight);
  const std::vector<A> shift = bias ? read<A, S>(call.table, *bias) : std::vector<A>(static_cast<size_t>(call.channels));
  call.parameters.resize(static_cast<size_t>(call.channel_blocks() * (call.width + 1) * kChannels));
  for (int64_t block = 0; block < call.channel_blocks(); ++block) {
    const Columns c = call.columns(block);
    A* rows = call.parameters.data() + block * (call.width + 1) * kChannels;
    for (int w = 0; w < call.width; ++w) gather_slot(rows + w * kChannels, taps.data(), w, call.width, c);
    std::copy_n(shift.data() + c.first, c.count, rows + call.width * kChannels);
  }
  return call;
}

// Runs work(row, columns) for each of `rows` rows of tasks and each channel block; `elements` per row and channel.
template <class A, class S, class Work>
void for_tasks(const Call<A, S>& call, int64_t rows, int64_t elements, const Work& work) {
  const int64_t per_row = call.channel_blocks();
  const int64_t grain = std::max<int64_t>(1, kParallelWork / (elements * std::min(kChannels, call.channels) + 1));
  torch::stable::parallel_for(0, rows * per_row, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) work(task / per_row, call.columns(task % per_row));
  });
}

// The part of a token block that lies in one sequence.
struct Piece {
  int64_t sequence, begin, end;              // of the piece
  int64_t sequence_begin, sequence_end;
};

template <class Work>
void for_pieces(const std::vector<int64_t>& bounds, int64_t block, const Work& work) {
  const int64_t begin = block * kTokens, end = std::min(begin + kTokens, bounds.back());
  // The last sequence that begins at or before the block: empty ones are passed over.
  auto n = std::upper_bound(bounds.begin(), bounds.end(), begin) - bounds.begin() - 1;
  for (; n + 1 < static_cast<int64_t>(bounds.size()) && bounds[n] < end; ++n) {
    const int64_t from = std::max(begin, bounds[n]), to = std::min(end, bounds[n + 1]);
    if (from < to) work(Piece{n, from, to, bounds[n], bounds[n + 1]});
  }
}

// --- the inputs of the last W tokens ---------------------------------------------------------------------------------

template <class A, class S>
class Window {
 public:
  Window(const Call<A, S>& call, const Piece& piece, Columns columns) : call_(call), piece_(piece), columns_(columns) {}

  // Takes in token t and drops the oldest. Before the sequence lies its initial state.
  void push(int64_t t) {
    const int width = call_.width;
    for (int w = 0; w + 1 < width; ++w) rows_[w] = rows_[w + 1];
    rows_[width - 1] = input(t, storage_[next_]);
    next_ = next_ + 1 == width ? 0 : next_ + 1;
  }
  void push_history(int64_t t) {
    for (int64_t i = t - call_.width + 1; i < t; ++i) push(i);
  }
  const A* const* rows() const { return rows_; }

 private:
  const A* input(int64_t t, A* scratch) const {
    if (t >= piece_.sequence_begin) return view(call_.table, scratch, call_.x + t * call_.channels + columns_.first, columns_.count);
    if (call_.state == nullptr) return kZeros<A>;
    const int64_t slots = call_.width - 1;
    gather_slot(scratch, call_.state + piece_.sequence * call_.channels * slots, t - piece_.sequence_begin + slots, slots,
                columns_);
    return scratch;
  }

  const Call<A, S>& call_;
  const Piece piece_;
  const Columns columns_;
  int next_ = 0;
  const A* rows_[kMaxWidth] = {};  // oldest first
  alignas(64) A storage_[kMaxWidth][kChannels];
};

// --- forward ---------------------------------------------------------------------------------------------------------

template <class A, class S>
void forward_piece(const Call<A, S>& call, const Piece& piece, Columns c, S* y) {
  alignas(64) A scratch[kChannels];
  Window<A, S> window(call, piece, c);
  window.push_history(piece.begin);
  for (int64_t t = piece.begin; t < piece.end; ++t) {
    window.push(t);
    S* out = y + t * call.channels + c.first;
    A* z = target(scratch, out);
    call.table.taps(z, window.rows(), call.weights(c), kChannels, call.bias(c), call.width, c.count);
    if (call.silu) call.table.silu(z, c.count);
    store(call.table, out, z, c.count);
  }
}

template <class A, class S>
void write_final_state(const Call<A, S>& call, int64_t sequence, Columns c, A* final_state) {
  const int64_t begin = call.bounds[sequence], end = call.bounds[sequence + 1], slots = call.width - 1;
  Window<A, S> window(call, Piece{sequence, begin, end, begin, end}, c);
  window.push_history(end);
  for (int64_t s = 0; s < slots; ++s) {  // nothing was pushed for token `end`, so the oldest row is unused
    scatter_slot(final_state + sequence * call.channels * slots, window.rows()[s + 1], s, slots, c);
  }
}

template <class A, class S>
void forward(const Call<A, S>& call, S* y, A* final_state) {
  for_tasks(call, blocks(call.tokens, kTokens), std::min(kTokens, call.tokens), [&](int64_t block, Columns c) {
    for_pieces(call.bounds, block, [&](const Piece& piece) { forward_piece(call, piece, c, y); });
  });
  if (final_state == nullptr) return;
  for_tasks(call, call.sequences(), call.width, [&](int64_t n, Columns c) { write_final_state(call, n, c, final_state); });
}

// --- backward --------------------------------------------------------------------------------------------------------

template <class A, class S>
struct Gradients {
  const S* dy;
  const A* dfinal;  // [N, channels, W-1] or null
  S* dx;
  A* partial;       // [token blocks, W+1, channels]
  A* dstate;        // [N, channels, W-1] or null
};

// dz of token t, whose inputs are `rows`.
template <class A, class S>
void output_gradient(const Call<A, S>& call, const S* dy, const A* const* rows, int64_t t, Columns c, A* dz) {
  load(call.table, dz, dy + t * call.channels + c.first, c.count);
  if (!call.silu) return;
  alignas(64) A z[kChannels];
  call.table.taps(z, rows, call.weights(c), kChannels, call.bias(c), call.width, c.count);
  call.table.silu_slope(dz, z, c.count);
}

// What the final state's gradient adds to the input at `position` tokens after the sequence's end (so below 0).
template <class A, class S>
const A* through_final_state(const Call<A, S>& call, const A* dfinal, int64_t sequence, int64_t position, Columns c, A* row) {
  const int64_t slots = call.width - 1, slot = position + slots;
  if (dfinal == nullptr || slot < 0) return kZeros<A>;
  gather_slot(row, dfinal + sequence * call.channels * slots, slot, slots, c);
  return row;
}

// dx of the piece: dx_u = Σ_j weight[W-1-j] dz_{u+j}, once the last of those dz is known. Its dweight and dbias: sums.
template <class A, class S>
void backward_piece(const Call<A, S>& call, const Gradients<A, S>& grad, const Piece& piece, Columns c, A* sums) {
  alignas(64) A storage[kMaxWidth][kChannels], scratch[kChannels], extra[kChannels];
  const A* ahead[kMaxWidth];  // ahead[w] = dz_{u + W-1 - w}: newest first, so that tap w of dx is weight[w]
  std::fill_n(ahead, kMaxWidth, kZeros<A>);
  const int last = call.width - 1;
  Window<A, S> window(call, piece, c);
  window.push_history(piece.begin);
  for (int64_t t = piece.begin; t < piece.end + last; ++t) {
    std::copy_backward(ahead, ahead + last, ahead + last + 1);
    ahead[0] = kZeros<A>;
    if (t < piece.sequence_end) {
      A* dz = storage[(t - piece.begin) % call.width];
      window.push(t);
      output_gradient(call, grad.dy, window.rows(), t, c, dz);
      if (t < piece.end) call.table.add_products(sums, kChannels, dz, window.rows(), call.width, c.count);
      ahead[0] = dz;
    }
    const int64_t u = t - last;
    if (u < piece.begin) continue;
    S* out = grad.dx + u * call.channels + c.first;
    A* row = target(scratch, out);
    const A* start = through_final_state(call, grad.dfinal, piece.sequence, u - piece.sequence_end, c, extra);
    call.table.taps(row, ahead, call.weights(c), kChannels, start, call.width, c.count);
    store(call.table, out, row, c.count);
  }
}

template <class A, class S>
void backward_block(const Call<A, S>& call, const Gradients<A, S>& grad, int64_t block, Columns c) {
  alignas(64) A sums[(kMaxWidth + 1) * kChannels] = {};
  for_pieces(call.bounds, block, [&](const Piece& piece) { backward_piece(call, grad, piece, c, sums); });
  for (int w = 0; w <= call.width; ++w) {
    std::copy_n(sums + w * kChannels, c.count, grad.partial + (block * (call.width + 1) + w) * call.channels + c.first);
  }
}

// dstate[s] = Σ_{t ≤ s} weight[s-t] dz_t, and what a sequence shorter than W-1 hands on from the final state.
template <class A, class S>
void initial_state_gradient(const Call<A, S>& call, const Gradients<A, S>& grad, int64_t sequence, Columns c) {
  alignas(64) A dz[kMaxWidth][kChannels], row[kChannels], extra[kChannels];
  const int64_t begin = call.bounds[sequence], length = call.bounds[sequence + 1] - begin, slots = call.width - 1;
  Window<A, S> window(call, Piece{sequence, begin, begin + length, begin, begin + length}, c);
  window.push_history(begin);
  for (int64_t t = 0; t < std::min(slots, length); ++t) {
    window.push(begin + t);
    output_gradient(call, grad.dy, window.rows(), begin + t, c, dz[t]);
  }
  for (int64_t s = 0; s < slots; ++s) {
    const A* taps[kMaxWidth];  // taps[w] = dz_{s-w}
    for (int64_t w = 0; w < call.width; ++w) taps[w] = w <= s && s - w < length ? dz[s - w] : kZeros<A>;
    const A* start = s < length ? kZeros<A> : through_final_state(call, grad.dfinal, sequence, s - length - slots, c, extra);
    call.table.taps(row, taps, call.weights(c), kChannels, start, call.width, c.count);
    scatter_slot(grad.dstate + sequence * call.channels * slots, row, s, slots, c);
  }
}

template <class A, class S>
void backward(const Call<A, S>& call, const Gradients<A, S>& grad, const Tensor& dweight, const Tensor& dbias) {
  const int64_t token_blocks = blocks(call.tokens, kTokens);
  const int taps = call.width + 1;
  for_tasks(call, token_blocks, std::min(kTokens, call.tokens),
            [&](int64_t block, Columns c) { backward_block(call, grad, block, c); });
  std::vector<double> sums(static_cast<size_t>(taps * call.channels), 0.0);
  for_tasks(call, taps, token_blocks, [&](int64_t w, Columns c) {
    for (int64_t block = 0; block < token_blocks; ++block) {
      const A* partial = grad.partial + (block * taps + w) * call.channels;
      for (int64_t i = c.first; i < c.first + c.count; ++i) sums[static_cast<size_t>(w * call.channels + i)] += partial[i];
    }
  });
  std::vector<A> weights(static_cast<size_t>(call.width * call.channels));
  for (int64_t i = 0; i < call.width * call.channels; ++i) {
    weights[static_cast<size_t>(i)] = static_cast<A>(sums[static_cast<size_t>(i % call.width * call.channels + i / call.width)]);
  }
  write<A, S>(call.table, dweight, weights.data());
  if (dbias.numel() > 0) write<A, S>(call.table, dbias, std::vector<A>(sums.end() - call.channels, sums.end()).data());
  if (grad.dstate == nullptr) return;
  for_tasks(call, call.sequences(), 2 * call.width, [&](int64_t n, Columns c) { initial_state_gradient(call, grad, n, c); });
}

// --- step ------------------------------------------------------------------------------------------------------------

template <class A, class S>
void step(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& state,
          const std::vector<int64_t>& rows, bool silu, const Tensor& y) {
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2), pool = state.size(0);
  const int width = static_cast<int>(weight.size(1));
  const RowTable<A>& table = row_table<A>();
  std::vector<A> converted;
  if (weight.scalar_type() != state.scalar_type()) converted = read<A, S>(table, weight);
  const A* taps = converted.empty() ? static_cast<const A*>(weight.const_data_ptr()) : converted.data();
  const std::vector<A> shift = bias ? read<A, S>(table, *bias) : std::vector<A>();
  const auto* in = static_cast<const S*>(x.const_data_ptr());
  auto* out = static_cast<S*>(y.mutable_data_ptr());
  auto* pooled = static_cast<A*>(state.mutable_data_ptr());

  const int64_t per_row = blocks(channels, kChannels), elements = tokens * std::min(kChannels, channels);
  const int64_t grain = std::max<int64_t>(1, kStepWork / (elements + 1));
  torch::stable::parallel_for(0, batch * per_row, grain, [&](int64_t begin, int64_t end) {
    alignas(64) A scratch_x[kChannels], scratch_z[kChannels];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / per_row, first = task % per_row * kChannels, n = std::min(kChannels, channels - first);
      const int64_t row = rows.empty() ? b : rows[static_cast<size_t>(b)];
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t at = (b * tokens + t) * channels + first;
        if (row < 0 || row >= pool) {  // padding, or an index that must not be followed
          std::fill_n(out + at, n, S{});
          continue;
        }
        A* z = target(scratch_z, out + at);
        table.step(z, view(table, scratch_x, in + at, n), pooled + (row * channels + first) * (width - 1), taps + first * width,
                   shift.empty() ? kZeros<A> : shift.data() + first, width, n);
        if (silu) table.silu(z, n);
        store(table, out + at, z, n);
      }
    }
  });
}

// --- the ops ---------------------------------------------------------------------------------------------------------

// weight or bias: x's dtype, or the accumulate type beside 16-bit x.
template <class T>
void check_parameter(const char* op, const char* name, const T& tensor, ScalarType type, std::initializer_list<int64_t> shape) {
  const ScalarType wide = accumulate_type(type);
  if (type == wide) check_tensor(op, name, tensor, {type}, shape);
  else check_tensor(op, name, tensor, {type, wide}, shape);
}

void check_inputs(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_tensor(op, "x", x, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double},
               {kAnySize, kAnySize, kAnySize});
  check_parameter(op, "weight", weight, x.scalar_type(), {x.size(2), kAnySize});
  if (weight.size(1) < 2 || weight.size(1) > kMaxWidth) fail(op, "weight must have 2 to 4 taps; got ", weight.size(1));
  check_parameter(op, "bias", bias, x.scalar_type(), {x.size(2)});
}

// Sequence bounds in the row of B * T tokens.
std::vector<int64_t> read_bounds(const char* op, const Tensor& x, const std::optional<Tensor>& cu_seqlens) {
  if (cu_seqlens) return read_cu_seqlens(op, *cu_seqlens, x.size(0), x.size(1));
  std::vector<int64_t> bounds(static_cast<size_t>(x.size(0) + 1));
  for (size_t n = 0; n < bounds.size(); ++n) bounds[n] = static_cast<int64_t>(n) * x.size(1);
  return bounds;
}

std::tuple<Tensor, Tensor> causal_conv1d_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                             const std::optional<Tensor>& initial_state,
                                             const std::optional<Tensor>& cu_seqlens, bool silu, bool output_final_state) {
  constexpr const char* op = "causal_conv1d_cpu";
  check_inputs(op, x, weight, bias);
  std::vector<int64_t> bounds = read_bounds(op, x, cu_seqlens);
  const int64_t sequences = static_cast<int64_t>(bounds.size()) - 1, channels = x.size(2), slots = weight.size(1) - 1;
  const ScalarType state_type = accumulate_type(x.scalar_type());
  check_tensor(op, "initial_state", initial_state, {state_type}, {sequences, channels, slots});

  Tensor y = result_like(x);
  Tensor final_state = output_final_state ? empty_result(x, {sequences, channels, slots}, state_type)
                                         : empty_result(x, {0}, state_type);
  dispatch(x.scalar_type(), [&]<class A, class S>(A, S) {
    const auto call = make_call<A, S>(x, weight, bias, initial_state, std::move(bounds), silu);
    A* final_data = output_final_state ? static_cast<A*>(final_state.mutable_data_ptr()) : nullptr;
    forward(call, static_cast<S*>(y.mutable_data_ptr()), final_data);
  });
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_cpu_backward(
    const Tensor& dy, const std::optional<Tensor>& dfinal_state, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens,
    bool silu) {
  constexpr const char* op = "causal_conv1d_cpu_backward";
  check_inputs(op, x, weight, bias);
  std::vector<int64_t> bounds = read_bounds(op, x, cu_seqlens);
  const int64_t sequences = static_cast<int64_t>(bounds.size()) - 1, channels = x.size(2), slots = weight.size(1) - 1;
  const ScalarType state_type = accumulate_type(x.scalar_type());
  check_tensor(op, "dy", dy, {x.scalar_type()}, {x.size(0), x.size(1), channels});
  check_tensor(op, "initial_state", initial_state, {state_type}, {sequences, channels, slots});
  check_tensor(op, "dfinal_state", dfinal_state, {state_type}, {sequences, channels, slots});

  Tensor dx = result_like(x), dweight = result_like(weight);
  Tensor dbias = bias ? result_like(*bias) : empty_result(x, {0}, weight.scalar_type());
  Tensor dstate = initial_state ? result_like(*initial_state) : empty_result(x, {0}, state_type);
  Tensor partial = empty_result(x, {blocks(x.size(0) * x.size(1), kTokens), weight.size(1) + 1, channels}, state_type);
  dispatch(x.scalar_type(), [&]<class A, class S>(A, S) {
    const auto call = make_call<A, S>(x, weight, bias, initial_state, std::move(bounds), silu);
    const Gradients<A, S> grad{
        .dy = static_cast<const S*>(dy.const_data_ptr()),
        .dfinal = dfinal_state ? static_cast<const A*>(dfinal_state->const_data_ptr()) : nullptr,
        .dx = static_cast<S*>(dx.mutable_data_ptr()),
        .partial = static_cast<A*>(partial.mutable_data_ptr()),
        .dstate = initial_state ? static_cast<A*>(dstate.mutable_data_ptr()) : nullptr};
    backward(call, grad, dweight, dbias);
  });
  return {dx, dweight, dbias, dstate};
}

Tensor causal_conv1d_step_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& state,
                              const std::optional<Tensor>& state_indices, bool silu) {
  constexpr const char* op = "causal_conv1d_step_cpu";
  check_inputs(op, x, weight, bias);
  const int64_t pool = state_indices ? kAnySize : x.size(0);
  check_tensor(op, "state", state, {accumulate_type(x.scalar_type())}, {pool, x.size(2), weight.size(1) - 1});
  check_tensor(op, "state_indices", state_indices, {ScalarType::Int, ScalarType::Long}, {x.size(0)});

  Tensor y = result_like(x);
  const std::vector<int64_t> rows = state_indices ? read_indices(*state_indices) : std::vector<int64_t>();
  dispatch(x.scalar_type(), [&]<class A, class S>(A, S) { step<A, S>(x, weight, bias, state, rows, silu, y); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) {
  m.impl("causal_conv1d_cpu", TORCH_BOX(&causal_conv1d_cpu));
  m.impl("causal_conv1d_cpu_backward", TORCH_BOX(&causal_conv1d_cpu_backward));
  m.impl("causal_conv1d_step_cpu", TORCH_BOX(&causal_conv1d_step_cpu));
}

}  // namespace memattn::conv
