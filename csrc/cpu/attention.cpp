// Attention, forward:  o_i = Σ_j e^{s_ij - ℓ_i} v_j,  s_ij = scale q_i·k_j + c_i - c_j,  ℓ_i = log Σ_j e^{s_ij}.
//
// A task is a tile of queries of all heads that read one key head. It passes over the tiles of keys that any of its
// rows sees, each loaded once for the whole group, with the running maximum and sum of an online softmax per row; a
// sink is where that starts. Only rows that see a tile take part in its products.
#include "attention.h"

#include <tuple>

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "attention_cpu";
constexpr int kRows = 128;  // of a tile of queries, over the group

int query_rows(const Attention& a) { return static_cast<int>(std::max<int64_t>(32, kRows / a.group())); }

// One head's rows of a tile of queries.
template <class E>
struct QueryRows {
  using Acc = AccumulateOf<E>;
  Acc *rows, *out;         // [queries, K], [queries, V]
  E* buffer;               // rows as an operand, where E is not Acc
  Acc *most, *sum, *high, *low;  // [queries]
  Left<E> left{};

  QueryRows(Arena& arena, const AttentionSizes& s)
      : rows(arena.take<Acc>(int64_t{s.queries} * s.ld_key)),
        out(arena.take<Acc>(int64_t{s.queries} * s.ld_value)),
        buffer(arena.take<E>(packed_size<E>(s.queries, s.ld_key))),
        most(arena.take<Acc>(s.queries)),
        sum(arena.take<Acc>(s.queries)),
        high(arena.take<Acc>(s.queries)),
        low(arena.take<Acc>(s.queries)) {}
};

template <class E>
struct ForwardTemporaries {
  using Acc = AccumulateOf<E>;
  std::vector<QueryRows<E>> heads;
  KeyTile<E> keys;
  Acc *scores, *shrink;  // [queries, kKeys], [queries]
  E *weights, *values;   // scores and value rows as operands, where E is not Acc

  ForwardTemporaries(Arena& arena, const Attention& a, const AttentionSizes& s)
      : keys(arena, a, s),
        scores(arena.take<Acc>(int64_t{s.queries} * s.ld_scores)),
        shrink(arena.take<Acc>(s.queries)),
        weights(arena.take<E>(packed_size<E>(s.queries, s.ld_scores))),
        values(arena.take<E>(packed_size<E>(kKeys, s.ld_value))) {
    for (int64_t m = 0; m < a.group(); ++m) heads.emplace_back(arena, s);
  }
};

template <class E>
class Forward {
  using Acc = AccumulateOf<E>;

 public:
  Forward(const Attention& a, const Primitives<E>& isa, void* o, void* lse)
      : a_(a), isa_(isa), o_(o), lse_(static_cast<Acc*>(lse)), s_(a, isa.unit, query_rows(a)) {}

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
    const SeenKeys seen = a_.seen(sequence);
    const int64_t last = std::min(first + s_.queries, seen.queries());
    for (int64_t m = 0; m < a_.group(); ++m) start(t.heads[m], sequence, a_.head(key_head, m), first, last);
    const int64_t begin = seen.range(first).begin, end = std::max(seen.range(last - 1).end, seen.prefix());
    for (int64_t from = 0; from < end; from += kKeys) {
      if (from >= seen.prefix() && from + kKeys <= begin) {
        from = begin / kKeys * kKeys;
      }
      const int64_t to = std::min(from + kKeys, end);
      const int64_t cut = from < seen.prefix() ? from : std::max(from, begin / s_.unit * s_.unit);
      const AttentionMask::Range rows = seen.rows(first, last, cut, to);
      if (rows.begin == rows.end) continue;
      t.keys.load(a_, isa_, s_, sequence, key_head, cut, to);
      add_tile(seen, first, rows, t);
    }
    for (int64_t m = 0; m < a_.group(); ++m) finish(t.heads[m], sequence, a_.head(key_head, m), first, last);
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
    if (a_.decay) {
      load_decay(head.high, head.low, a_, a_.keys.start(sequence) + first + a_.offset(sequence), h, rows, s_.queries);
    }
  }

  // Rows `seen_rows` of every head take in the loaded tile of keys.
  void add_tile(const SeenKeys& seen, int64_t first, AttentionMask::Range seen_rows, ForwardTemporaries<E>& t) const {
    const int from = static_cast<int>(seen_rows.begin - first) / s_.unit * s_.unit;
    const int to = round_up(static_cast<int>(seen_rows.end - first), s_.unit), n = to - from, width = t.keys.width;
    const int64_t last = std::min(first + to, seen.queries());
    const bool whole = seen.all(first + from, last, t.keys.begin, t.keys.begin + width);
    const Right<E> values = as_right(isa_, t.values, t.keys.values, s_.ld_value, width, s_.value_dim);
    for (size_t m = 0; m < t.heads.size(); ++m) {
      QueryRows<E>& head = t.heads[m];
      Acc* out = head.out + int64_t{from} * s_.ld_value;
      isa_.gemm(t.scores, s_.ld_scores, rows_from(head.left, from), {t.keys.transposed, s_.ld_scores}, n, width,
                s_.key_dim, 0, Part::full);
      if (!whole) seen.hide(t.scores, s_.ld_scores, first + from, first + to, t.keys.begin, width);
      isa_.softmax_rows(t.scores, s_.ld_scores, Acc(a_.scale), t.keys.bias(m, head.high + from, head.low + from),
                        head.most + from, head.sum + from, t.shrink, n, width);
      if (std::any_of(t.shrink, t.shrink + n, [](Acc x) { return x != 1; })) {
        isa_.scale_rows(out, s_.ld_value, t.shrink, n, s_.value_dim);
      }
      isa_.gemm(out, s_.ld_value, as_left(isa_, t.weights, t.scores, s_.ld_scores, n, width), values, n, s_.value_dim,
                width, 1, Part::full);
    }
  }

  void finish(QueryRows<E>& head, int64_t sequence, int64_t h, int64_t first, int64_t last) const {
    const int rows = static_cast<int>(last - first);
    const int64_t token = a_.queries.start(sequence) + first;
    for (int i = 0; i < rows; ++i) {
      const Acc sum = head.sum[i];
      const bool empty = sum == 0;
      lse_[(token + i) * a_.heads + h] = empty ? -std::numeric_limits<Acc>::infinity() : head.most[i] + std::log(sum);
      head.sum[i] = empty ? Acc(0) : 1 / sum;
    }
    isa_.store_rows(offset(o_, a_.element, (token * a_.heads + h) * a_.value_dim), a_.element, a_.heads * a_.value_dim,
                    head.out, s_.ld_value, head.sum, rows, a_.value_dim);
  }

  const Attention& a_;
  const Primitives<E>& isa_;
  void* o_;
  Acc* lse_;
  const AttentionSizes s_;
};

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> sink,
                                     std::optional<Tensor> decay, std::optional<Tensor> cu_seqlens_q,
                                     std::optional<Tensor> cu_seqlens_k, int64_t causal, int64_t window,
                                     int64_t prefix_len, int64_t block_size, int64_t summary, int64_t dilation,
                                     int64_t dilated_window, int64_t dilated_prefix, int64_t q_offset, bool tile_heads,
                                     double scale) {
  const Attention a = read_arguments(kOp, q, k, v, sink, decay, cu_seqlens_q, cu_seqlens_k,
                                     {causal, window, prefix_len, block_size, summary, dilation, dilated_window,
                                      dilated_prefix, q_offset, tile_heads, scale});
  const std::vector<int64_t> rows{q.size(0), q.size(1), q.size(2)};
  Tensor o = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), v.size(3)});
  Tensor lse = torch::stable::new_empty(q, rows, state_dtype(q.scalar_type()));
  with_primitives(q.scalar_type(), [&](const auto& isa) {
    Forward(a, isa, o.mutable_data_ptr(), lse.mutable_data_ptr()).run(torch::stable::get_num_threads());
  });
  return {o, lse};
}

}  // namespace

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
  a.mask = {static_cast<Causal>(s.causal), s.window,   s.prefix_len,     s.block_size,
            s.summary,                     s.dilation, s.dilated_window, s.dilated_prefix, s.q_offset};
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

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("attention_cpu", TORCH_BOX(&attention)); }

}  // namespace memattn::cpu
