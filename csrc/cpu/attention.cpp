// Attention, forward:  o_i = Σ_j e^{s_ij - ℓ_i} v_j,  s_ij = scale q_i·k_j + c_i - c_j,  ℓ_i = log Σ_j e^{s_ij}.
//
// A task is a tile of queries of all heads that read one key head. It passes over the tiles of keys that any of its
// rows sees, each loaded once for the whole group, with the running maximum and sum of an online softmax per row; a
// sink, a first score and value, or both, is where that starts. Only rows that see a tile take part in its products.
#include "attention_forward.h"
#include "results.h"

#include <tuple>

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "attention_cpu";
constexpr int kRows = 128;  // of a tile of queries, over the group

int query_rows(const Attention& a) { return static_cast<int>(std::max<int64_t>(32, kRows / a.group())); }

template <class E>
class Forward {
  using Acc = AccumulateOf<E>;

 public:
  Forward(const Attention& a, const Primitives<E>& isa, void* o, void* lse)
      : a_(a), isa_(isa), s_(a, isa.unit, query_rows(a)), tile_(a, isa, s_, o, static_cast<Acc*>(lse)) {}

  void run(int64_t threads) {
    struct Tile {
      int64_t sequence, first;
    };
    std::vector<Tile> tiles;
    for (int64_t n = 0; n < a_.queries.count(); ++n) {
      for (int64_t first = 0; first < a_.queries.length(n); first += s_.queries) tiles.push_back({n, first});
    }
    const int64_t count = static_cast<int64_t>(tiles.size());
    threads = std::max<int64_t>(1, std::min(threads, count * a_.key_heads));
    const auto make = [&](Arena& arena) { return ForwardTemporaries<E>(arena, a_, s_); };
    const size_t bytes = bytes_of(make);
    Scratch scratch(bytes * threads);
    std::vector<ForwardTemporaries<E>> temporaries;
    for (int64_t i = 0; i < threads; ++i) {
      Arena arena(scratch.data() + i * bytes);
      temporaries.push_back(make(arena));
    }
    parallel_tasks(count * a_.key_heads, threads, isa_, [&](int64_t i, int64_t worker) {
      const Tile& tile = tiles[count - 1 - i / a_.key_heads];  // the last see most keys under a causal mask
      process(tile.sequence, i % a_.key_heads, tile.first, temporaries[worker]);
    });
  }

 private:
  void process(int64_t sequence, int64_t key_head, int64_t first, ForwardTemporaries<E>& t) const {
    const int64_t last = std::min(first + s_.queries, a_.queries.length(sequence));
    for (int64_t m = 0; m < a_.group(); ++m) start(t.heads[m], sequence, a_.head(key_head, m), first, last);
    tile_.attend(sequence, key_head, first, last, t);
    for (int64_t m = 0; m < a_.group(); ++m) tile_.finish(t.heads[m], sequence, a_.head(key_head, m), first, last);
  }

  void start(QueryRows<E>& head, int64_t sequence, int64_t h, int64_t first, int64_t last) const {
    const int rows = static_cast<int>(last - first);
    const int64_t token = a_.queries.start(sequence) + first;
    load_head(isa_, head.rows, s_.ld_key, s_.queries, s_.key_dim, a_.q, a_.element, token, a_.heads, h, rows,
              a_.key_dim);
    head.left = as_left(isa_, head.buffer, head.rows, s_.ld_key, s_.queries, s_.key_dim);
    std::fill(head.out, head.out + int64_t{s_.queries} * s_.ld_value, Acc(0));
    const Acc sink = a_.sink_of<Acc>(h);
    std::fill(head.most, head.most + s_.queries, sink);
    std::fill(head.sum, head.sum + s_.queries, Acc(sink != -std::numeric_limits<Acc>::infinity()));
    if (a_.first_scores) begin_with_first(head, token, h, rows);
    if (a_.decay) {
      load_decay(head.high, head.low, a_, a_.keys.start(sequence) + first + a_.offset(sequence), h, rows, s_.queries);
    }
  }

  void begin_with_first(QueryRows<E>& head, int64_t token, int64_t h, int rows) const {
    constexpr Acc nothing = -std::numeric_limits<Acc>::infinity();
    const Acc sink = a_.sink_of<Acc>(h);
    load_head(isa_, head.out, s_.ld_value, s_.queries, s_.value_dim, a_.first_values, a_.element, token, a_.heads, h,
              rows, a_.value_dim);
    for (int i = 0; i < rows; ++i) {
      const Acc first = static_cast<const Acc*>(a_.first_scores)[(token + i) * a_.heads + h];
      head.most[i] = std::max(first, sink);
      head.sum[i] = head.most[i] == nothing ? Acc(0) : std::exp(first - head.most[i]);
    }
    if (sink == nothing) return;
    isa_.scale_rows(head.out, s_.ld_value, head.sum, s_.queries, s_.value_dim);
    for (int i = 0; i < rows; ++i) head.sum[i] += std::exp(sink - head.most[i]);
  }

  const Attention& a_;
  const Primitives<E>& isa_;
  const AttentionSizes s_;
  const QueryTile<E> tile_;
};

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> sink,
                                     std::optional<Tensor> decay, std::optional<Tensor> cu_seqlens_q,
                                     std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> first_scores,
                                     std::optional<Tensor> first_values, int64_t causal, int64_t window,
                                     int64_t prefix_len, int64_t block_size, int64_t summary, int64_t dilation,
                                     int64_t dilated_window, int64_t dilated_prefix, int64_t q_offset, bool tile_heads,
                                     double scale) {
  Attention a = read_arguments(kOp, q, k, v, sink, decay, cu_seqlens_q, cu_seqlens_k,
                                     {causal, window, prefix_len, block_size, summary, dilation, dilated_window,
                                      dilated_prefix, q_offset, tile_heads, scale});
  begin_with(kOp, a, q, v, first_scores, first_values);
  const std::vector<int64_t> rows{q.size(0), q.size(1), q.size(2)};
  Tensor o = empty_result(q, {q.size(0), q.size(1), q.size(2), v.size(3)});
  Tensor lse = empty_result(q, rows, state_dtype(q.scalar_type()));
  attend(a, q.scalar_type(), o.mutable_data_ptr(), lse.mutable_data_ptr());
  return {o, lse};
}

}  // namespace

void attend(const Attention& a, ScalarType type, void* o, void* lse) {
  with_primitives(type, [&](const auto& isa) { Forward(a, isa, o, lse).run(torch::stable::get_num_threads()); });
}

Attention read_arguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                         const std::optional<Tensor>& sink, const std::optional<Tensor>& decay,
                         const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
                         const AttentionSettings& settings) {
  check_tensor(op, "q", q, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double},
               {kAnySize, kAnySize, kAnySize, kAnySize});
  const ScalarType type = q.scalar_type();
  const int64_t b = q.size(0), heads = q.size(2), key_dim = q.size(3);
  check_tensor(op, "k", k, {type}, {b, kAnySize, kAnySize, key_dim});
  const int64_t keys = k.size(1), key_heads = k.size(2);
  check_tensor(op, "v", v, {type}, {b, keys, key_heads, kAnySize});
  const int64_t value_dim = v.size(3);
  if (key_heads < 1 || heads < 1 || heads % key_heads != 0) {
    fail(op, "q must have a positive multiple of k's heads; got ", heads, " and ", key_heads);
  }
  if (key_dim < 1 || key_dim > 256 || value_dim < 1 || value_dim > 256) {
    fail(op, "head dimensions must be 1 to 256; got K = ", key_dim, ", V = ", value_dim);
  }
  check_tensor(op, "sink", sink, {state_dtype(type)}, {heads});
  check_tensor(op, "decay", decay, {ScalarType::Double}, {b, keys, heads});
  const AttentionSettings& s = settings;
  for (int64_t size : {s.window, s.prefix_len, s.block_size, s.summary, s.dilation, s.dilated_window, s.dilated_prefix,
                       s.q_offset == kAtTheEnd ? 0 : s.q_offset}) {
    if (size < 0) fail(op, "sizes of the mask must not be negative; got ", size);
  }
  if (s.q_offset > kFarthest) fail(op, "q_offset must be at most 2^48; got ", s.q_offset);
  if (s.causal < 0 || s.causal > 2) fail(op, "causal must be 0, 1 or 2; got ", s.causal);
  if (cu_seqlens_q.has_value() != cu_seqlens_k.has_value()) {
    fail(op, "cu_seqlens must be given for both or none of q, k");
  }

  Attention a{};
  const bool packed = cu_seqlens_q.has_value();
  a.queries = packed ? SequenceLayout::packed(read_cu_seqlens(op, *cu_seqlens_q, b, q.size(1)))
                     : SequenceLayout::batch(b, q.size(1));
  a.keys =
      packed ? SequenceLayout::packed(read_cu_seqlens(op, *cu_seqlens_k, b, keys)) : SequenceLayout::batch(b, keys);
  if (a.queries.count() != a.keys.count()) {
    fail(op, "cu_seqlens must have as many sequences of k as of q; got ", a.keys.count(), " and ", a.queries.count());
  }
  for (int64_t n = 0; s.q_offset == kAtTheEnd && n < a.queries.count(); ++n) {
    if (a.queries.length(n) > a.keys.length(n)) {
      fail(op, "queries at the end of their keys must not be more than those; sequence ", n, " has ",
           a.queries.length(n), " queries and ", a.keys.length(n), " keys");
    }
  }
  for (int64_t n = 0; decay && s.q_offset != kAtTheEnd && n < a.queries.count(); ++n) {
    if (a.queries.length(n) > 0 && a.queries.length(n) + s.q_offset > a.keys.length(n)) {
      fail(op, "with decay every query needs a key at its position; sequence ", n, " has ", a.queries.length(n),
           " queries from ", s.q_offset, " and ", a.keys.length(n), " keys");
    }
  }
  const auto size = [](int64_t tokens) { return std::min(tokens, 2 * kFarthest); };  // beyond every distance
  a.mask = {static_cast<Causal>(s.causal), size(s.window),         size(s.prefix_len),     size(s.block_size), size(s.summary),
            size(s.dilation),              size(s.dilated_window), size(s.dilated_prefix), s.q_offset};
  a.heads = heads;
  a.key_heads = key_heads;
  a.key_dim = static_cast<int>(key_dim);
  a.value_dim = static_cast<int>(value_dim);
  a.q = q.const_data_ptr();
  a.k = k.const_data_ptr();
  a.v = v.const_data_ptr();
  a.element = element_of(type);
  a.sink = sink ? sink->const_data_ptr() : nullptr;
  a.decay = decay ? decay->const_data_ptr<double>() : nullptr;
  a.tile_heads = s.tile_heads;
  a.scale = s.scale;
  return a;
}

void begin_with(const char* op, Attention& a, const Tensor& q, const Tensor& v, const std::optional<Tensor>& scores,
                const std::optional<Tensor>& values) {
  const int64_t batch = q.size(0), length = q.size(1), heads = q.size(2);
  if (scores.has_value() != values.has_value()) {
    fail(op, "first scores and values must both be given or both be left out");
  }
  check_tensor(op, "first scores", scores, {state_dtype(q.scalar_type())}, {batch, length, heads});
  check_tensor(op, "first values", values, {q.scalar_type()}, {batch, length, heads, v.size(3)});
  a.first_scores = scores ? scores->const_data_ptr() : nullptr;
  a.first_values = values ? values->const_data_ptr() : nullptr;
}

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("attention_cpu", TORCH_BOX(&attention)); }

}  // namespace memattn::cpu
