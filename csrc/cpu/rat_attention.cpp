// RAT attention, forward: the running average of a tile of tokens is made in scratch, leaves its chunk ends behind as entries,
// and is where the online softmax over the entries of earlier chunks starts. Nothing else of the average is stored.
//
// An item is one head of one sequence, its tiles in order. Where there are fewer items than threads, all entries of an item
// are made first, and its tiles then attend in parallel, each made a second time; the bits are the same.
#include "rat_attention.h"
#include "results.h"

#include <tuple>

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "rat_attention_cpu";

struct RatResults {
  void *o, *keys, *values;  // like v; [entries, heads, dim] of `element`
  void *running_key, *running_value;  // in the accumulate type
  void *local_keys, *local_values;    // [local rows, heads, dim] of `element`
  void* lse;                          // in the accumulate type
};

template <class E>
struct RatTemporaries {
  using Acc = AccumulateOf<E>;
  ForwardTemporaries<E> attention;
  ScanRows<E> scan;
  Running<Acc> running;

  RatTemporaries(Arena& arena, const Rat& rat, const Attention& a, const AttentionSizes& s)
      : attention(arena, a, s),
        scan(arena, rat.dim, s.key_dim, s.ld_key),
        running{arena.take<Acc>(rat.dim), arena.take<Acc>(rat.dim)} {}
};

template <class E>
class RatForward {
  using Acc = AccumulateOf<E>;
  using Temporaries = RatTemporaries<E>;

 public:
  RatForward(const Rat& rat, const Primitives<E>& isa, const RatResults& results)
      : rat_(rat),
        isa_(isa),
        results_(results),
        a_(entry_attention(rat, rat.q, results.keys, results.values)),
        s_(a_, isa.unit, kTokens),
        attention_(a_, isa, s_, results.o, static_cast<Acc*>(results.lse)),
        near_(local_attention(rat, rat.q, results.local_keys, results.local_values)),
        local_(near_, isa, s_, results.o, static_cast<Acc*>(results.lse)),
        rotary_(rotary_of<Acc>(rat)) {}

  void run(int64_t threads) {
    copy_state();
    const int64_t count = rat_.tokens.count();
    std::vector<std::vector<TokenTile>> tiles(count);
    std::vector<int64_t> cost;
    int64_t longest = 0;
    for (int64_t n = 0; n < count; ++n) {
      tiles[n] = token_tiles(rat_, n);
      longest = std::max<int64_t>(longest, tiles[n].size());
      cost.insert(cost.end(), rat_.heads, (rat_.tokens.length(n) + 1) * (rat_.start[n] + rat_.tokens.length(n) + 256));
    }
    const WorkPlan plan = plan_work(cost, threads);
    const auto make = [&](Arena& arena) { return Temporaries(arena, rat_, a_, s_); };
    const size_t bytes = bytes_of(make);
    Scratch scratch(bytes * threads);
    std::vector<Temporaries> temporaries;
    for (int64_t i = 0; i < threads; ++i) {
      Arena arena(scratch.data() + i * bytes);
      temporaries.push_back(make(arena));
      temporaries.back().scan.clear_padding();
    }
    parallel_tasks(plan.whole.size(), threads, isa_, [&](int64_t i, int64_t worker) {
      Temporaries& t = temporaries[worker];
      const int64_t item = plan.whole[i], h = item % rat_.heads;
      for (const TokenTile& tile : tiles[item / rat_.heads]) {
        if (tile.fresh) start_running(rat_, tile, h, t.running);
        average(tile, h, t.running, t);
        leave_entries(tile, h, t);
        attend(tile, h, t);
      }
    });
    std::vector<Acc> states(plan.shared.empty() ? 0 : longest * 2 * rat_.dim);
    const auto before = [&](int64_t tile) {
      return Running<Acc>{states.data() + tile * 2 * rat_.dim, states.data() + (tile * 2 + 1) * rat_.dim};
    };
    for (int64_t item : plan.shared) {
      const std::vector<TokenTile>& own = tiles[item / rat_.heads];
      const int64_t h = item % rat_.heads;
      const std::vector<int64_t> runs = runs_of(own);
      parallel_tasks(static_cast<int64_t>(runs.size()) - 1, threads, isa_, [&](int64_t i, int64_t worker) {
        Temporaries& t = temporaries[worker];
        start_running(rat_, own[runs[i]], h, t.running);
        for (int64_t j = runs[i]; j < runs[i + 1]; ++j) {
          std::copy_n(t.running.key, rat_.dim, before(j).key);
          std::copy_n(t.running.value, rat_.dim, before(j).value);
          average(own[j], h, t.running, t);
          leave_entries(own[j], h, t);
        }
      });
      parallel_tasks(own.size(), threads, isa_, [&](int64_t i, int64_t worker) {
        const int64_t j = static_cast<int64_t>(own.size()) - 1 - i;  // the last see most entries
        average(own[j], h, before(j), temporaries[worker]);
        attend(own[j], h, temporaries[worker]);
      });
    }
  }

 private:
  // Numbers of the fresh tiles, and of the tiles' end.
  static std::vector<int64_t> runs_of(const std::vector<TokenTile>& tiles) {
    std::vector<int64_t> runs;
    for (size_t i = 0; i < tiles.size(); ++i) {
      if (tiles[i].fresh) runs.push_back(i);
    }
    runs.push_back(tiles.size());
    return runs;
  }

  // Entries that the state held, and the running state of sequences without tokens.
  void copy_state() const {
    const int64_t width = rat_.width();
    for (int64_t n = 0; n < rat_.tokens.count(); ++n) {
      const int64_t entries = rat_.entries.start(n), local = rat_.local.start(n);
      copy_rows(rat_.keys, n * rat_.held, results_.keys, entries, rat_.entries_before(n));
      copy_rows(rat_.values, n * rat_.held, results_.values, entries, rat_.entries_before(n));
      copy_rows(rat_.local_keys, n * rat_.held_local, results_.local_keys, local, rat_.local_before(n));
      copy_rows(rat_.local_values, n * rat_.held_local, results_.local_values, local, rat_.local_before(n));
      if (rat_.tokens.length(n) > 0) continue;
      for (const auto& [from, to] : {std::pair(rat_.running_key, results_.running_key),
                                     std::pair(rat_.running_value, results_.running_value)}) {
        Acc* out = static_cast<Acc*>(to) + n * width;
        if (from) std::copy_n(static_cast<const Acc*>(from) + n * width, width, out);
        else std::fill_n(out, width, Acc(0));
      }
    }
  }

  void copy_rows(const void* from, int64_t row, void* to, int64_t to_row, int64_t count) const {
    if (count == 0) return;
    const int64_t width = rat_.width();
    std::copy_n(static_cast<const std::byte*>(offset(from, rat_.element, row * width)),
                count * width * cpu::bytes_of(rat_.element),
                static_cast<std::byte*>(offset(to, rat_.element, to_row * width)));
  }

  void average(const TokenTile& tile, int64_t h, Running<Acc> running, Temporaries& t) const {
    t.scan.run(rat_, isa_, tile, h, running);
  }

  void leave_entries(const TokenTile& tile, int64_t h, Temporaries& t) const {
    const int64_t n = tile.sequence, p = rat_.start[n] + tile.first;
    Acc* turned = t.scan.k;  // the rows are not needed again
    if (rat_.has_local()) leave_local(tile, h, t);
    for (int64_t i = rat_.stride - 1 - p % rat_.stride; i < tile.last - tile.first; i += rat_.stride) {
      const int64_t row = rat_.entries.start(n) + (p + i + 1) / rat_.stride - 1;
      std::copy_n(t.scan.key(i + 1), rat_.dim, turned);
      rotary_.turn(turned, turned, (p + i) / rat_.unit);
      const int64_t at = row * rat_.width() + rat_.row(h);
      isa_.store_rows(offset(results_.keys, rat_.element, at), rat_.element, 0, turned, t.scan.ld, nullptr, 1, rat_.dim);
      isa_.store_rows(offset(results_.values, rat_.element, at), rat_.element, 0, t.scan.value(i + 1), t.scan.ld, nullptr,
                      1, rat_.dim);
    }
    if (tile.last < rat_.tokens.length(n)) return;
    const int64_t at = n * rat_.width() + rat_.row(h);
    std::copy_n(t.running.key, rat_.dim, static_cast<Acc*>(results_.running_key) + at);
    std::copy_n(t.running.value, rat_.dim, static_cast<Acc*>(results_.running_value) + at);
  }

  void leave_local(const TokenTile& tile, int64_t h, Temporaries& t) const {
    const int64_t n = tile.sequence, p = rat_.start[n] + tile.first, count = tile.last - tile.first;
    const int64_t at = rat_.local_row(n, p) * rat_.width() + rat_.row(h);
    const int rows = static_cast<int>(count);
    for (int64_t i = 0; i < count; ++i) {
      Acc* turned = t.scan.k + i * t.scan.ld;
      std::copy_n(t.scan.key(i + 1), rat_.dim, turned);
      rotary_.turn(turned, turned, (p + i) / rat_.unit);
    }
    isa_.store_rows(offset(results_.local_keys, rat_.element, at), rat_.element, rat_.width(), t.scan.k, t.scan.ld,
                    nullptr, rows, rat_.dim);
    isa_.store_rows(offset(results_.local_values, rat_.element, at), rat_.element, rat_.width(), t.scan.value(1),
                    t.scan.ld, nullptr, rows, rat_.dim);
  }

  void attend(const TokenTile& tile, int64_t h, Temporaries& t) const {
    QueryRows<E>& head = t.attention.heads[0];
    const int rows = static_cast<int>(tile.last - tile.first);
    const int64_t token = rat_.tokens.start(tile.sequence) + tile.first, p = rat_.start[tile.sequence] + tile.first;
    load_head(isa_, head.rows, s_.ld_key, s_.queries, s_.key_dim, rat_.q, rat_.element, token, rat_.key_heads,
              rat_.key_head(h), rows, rat_.dim);
    isa_.dot_rows(head.most, head.rows, s_.ld_key, t.scan.key(1), s_.ld_key, rows, s_.key_dim);
    for (int i = 0; i < rows; ++i) {
      head.most[i] *= static_cast<Acc>(rat_.scale);
      Acc* q = head.rows + int64_t{i} * s_.ld_key;
      rotary_.turn(q, q, (p + i) / rat_.unit);
      std::copy_n(t.scan.value(i + 1), s_.value_dim, head.out + int64_t{i} * s_.ld_value);
    }
    std::fill(head.most + rows, head.most + s_.queries, Acc(0));
    std::fill(head.sum, head.sum + s_.queries, Acc(1));
    std::fill(head.out + int64_t{rows} * s_.ld_value, head.out + int64_t{s_.queries} * s_.ld_value, Acc(0));
    head.left = as_left(isa_, head.buffer, head.rows, s_.ld_key, s_.queries, s_.key_dim);
    attention_.attend(tile.sequence, h, tile.first, tile.last, t.attention);
    if (rat_.has_local()) local_.attend(tile.sequence, h, tile.first, tile.last, t.attention);
    attention_.finish(head, tile.sequence, h, tile.first, tile.last);
  }

  const Rat& rat_;
  const Primitives<E>& isa_;
  const RatResults results_;
  const Attention a_;
  const AttentionSizes s_;
  const QueryTile<E> attention_;
  const Attention near_;
  const QueryTile<E> local_;
  const Rotary<Acc> rotary_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rat_attention(
    Tensor q, Tensor k, Tensor v, Tensor g, MaybeTensor keys, MaybeTensor values, MaybeTensor running_key,
    MaybeTensor running_value, MaybeTensor local_keys, MaybeTensor local_values, MaybeTensor length,
    MaybeTensor cu_seqlens, int64_t restart, int64_t stride, int64_t unit, int64_t window, int64_t prefix_len,
    double rope_base, bool tile_heads, double scale) {
  const Rat rat = read_rat(kOp, q, k, v, g, keys, values, running_key, running_value, local_keys, local_values, length,
                           cu_seqlens, {restart, stride, unit, window, prefix_len, rope_base, tile_heads, scale});
  const int64_t batch = v.size(0), heads = v.size(2), dim = v.size(3), count = rat.tokens.count();
  const ScalarType sums = state_dtype(v.scalar_type());
  const auto rows = [&](int64_t count) { return zero_result(v, {batch, count, heads, dim}); };
  const auto running = [&] { return empty_result(v, {count, heads, dim}, sums); };
  Tensor o = result_like(v), out_keys = rows(rat.entry_rows), out_values = rows(rat.entry_rows);
  Tensor out_local_keys = rows(rat.local_rows), out_local_values = rows(rat.local_rows);
  Tensor final_key = running(), final_value = running();
  Tensor lse = empty_result(v, {batch, v.size(1), heads}, sums);
  const RatResults results{o.mutable_data_ptr(),
                           out_keys.mutable_data_ptr(),
                           out_values.mutable_data_ptr(),
                           final_key.mutable_data_ptr(),
                           final_value.mutable_data_ptr(),
                           out_local_keys.mutable_data_ptr(),
                           out_local_values.mutable_data_ptr(),
                           lse.mutable_data_ptr()};
  with_primitives(v.scalar_type(), [&]<class E>(const Primitives<E>& isa) {
    RatForward<E>(rat, isa, results).run(torch::stable::get_num_threads());
  });
  return {o, out_keys, out_values, final_key, final_value, out_local_keys, out_local_values, lse};
}

}  // namespace

Rat read_rat(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const MaybeTensor& keys,
             const MaybeTensor& values, const MaybeTensor& running_key, const MaybeTensor& running_value,
             const MaybeTensor& local_keys, const MaybeTensor& local_values, const MaybeTensor& length,
             const MaybeTensor& cu_seqlens, const RatSettings& settings) {
  check_tensor(op, "q", q, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double},
               {kAnySize, kAnySize, kAnySize, kAnySize});
  const ScalarType type = q.scalar_type(), sums = state_dtype(type);
  const int64_t batch = q.size(0), length_of_row = q.size(1), key_heads = q.size(2), dim = q.size(3);
  check_tensor(op, "k", k, {type}, {batch, length_of_row, key_heads, dim});
  check_tensor(op, "v", v, {type}, {batch, length_of_row, kAnySize, dim});
  const int64_t heads = v.size(2);
  check_tensor(op, "g", g, {sums}, {batch, length_of_row, heads, dim});
  if (key_heads == 0 || heads == 0 || heads % key_heads != 0) {
    fail(op, "v must have a positive multiple of k's ", key_heads, " heads; got ", heads);
  }
  if (dim < 1 || dim > 256) fail(op, "head dimension must be 1 to 256; got ", dim);
  if (settings.rope_base > 0 && dim % 2 != 0) fail(op, "rotary positions need an even head dimension; got ", dim);
  if (settings.restart < 0 || settings.stride < 1 || settings.unit < 1) {
    fail(op, "restart must be 0 or more, stride and unit 1 or more; got ", settings.restart, ", ", settings.stride, ", ",
         settings.unit);
  }
  if (settings.window < 1 || settings.prefix < 0) {
    fail(op, "window must be 1 or more, prefix_len 0 or more; got ", settings.window, ", ", settings.prefix);
  }
  Rat rat{};
  rat.restart = std::min(settings.restart, kFarthest);
  rat.stride = std::min(settings.stride, kFarthest);
  rat.unit = settings.unit;
  rat.window = std::min(settings.window, kFarthest);
  rat.prefix = std::min(settings.prefix, kFarthest);
  rat.tokens = cu_seqlens ? SequenceLayout::packed(read_cu_seqlens(op, *cu_seqlens, batch, length_of_row))
                          : SequenceLayout::batch(batch, length_of_row);
  const int64_t count = rat.tokens.count();
  const bool continues = keys.has_value();
  if (continues != values.has_value() || continues != running_key.has_value() ||
      continues != running_value.has_value() || continues != length.has_value()) {
    fail(op, "keys, values, running_key, running_value and length must be given together");
  }
  rat.held = continues ? keys->size(1) : 0;
  check_tensor(op, "keys", keys, {type}, {count, rat.held, heads, dim});
  check_tensor(op, "values", values, {type}, {count, rat.held, heads, dim});
  check_tensor(op, "running_key", running_key, {sums}, {count, heads, dim});
  check_tensor(op, "running_value", running_value, {sums}, {count, heads, dim});
  check_tensor(op, "length", length, {ScalarType::Long}, {count});
  rat.start = continues ? read_indices(*length) : std::vector<int64_t>(count, 0);
  for (int64_t p : rat.start) {
    if (p < 0 || p > kFarthest || p / rat.stride > rat.held) {
      fail(op, "length must be 0 or more and have left at most the ", rat.held, " entries given; got ", p);
    }
  }
  if ((continues && rat.has_local()) != local_keys.has_value() || local_keys.has_value() != local_values.has_value()) {
    fail(op, "local_keys and local_values must be given with the other parts where there is a window or a prefix");
  }
  rat.held_local = local_keys ? rat.prefix + rat.window - 1 : 0;
  check_tensor(op, "local_keys", local_keys, {type}, {count, rat.held_local, heads, dim});
  check_tensor(op, "local_values", local_values, {type}, {count, rat.held_local, heads, dim});
  std::vector<int64_t> bounds{0}, local_bounds{0};
  rat.entry_rows = rat.held + (length_of_row + rat.stride - 1) / rat.stride;
  rat.local_rows = rat.has_local() ? rat.held_local + length_of_row : 0;
  for (int64_t n = 0; n < count; ++n) {
    bounds.push_back(cu_seqlens ? rat.tokens.end(n) / rat.stride + (n + 1) * (rat.held + 1) : (n + 1) * rat.entry_rows);
    local_bounds.push_back(cu_seqlens && rat.has_local() ? rat.tokens.end(n) + (n + 1) * rat.held_local
                                                         : (n + 1) * rat.local_rows);
  }
  if (cu_seqlens) {
    rat.entry_rows = bounds.back();
    rat.local_rows = local_bounds.back();
  }
  rat.entries = SequenceLayout::packed(std::move(bounds));
  rat.local = SequenceLayout::packed(std::move(local_bounds));
  rat.heads = heads;
  rat.key_heads = key_heads;
  rat.dim = static_cast<int>(dim);
  rat.element = element_of(type);
  rat.q = q.const_data_ptr();
  rat.k = k.const_data_ptr();
  rat.v = v.const_data_ptr();
  rat.g = g.const_data_ptr();
  if (continues) {
    rat.keys = keys->const_data_ptr();
    rat.values = values->const_data_ptr();
    rat.running_key = running_key->const_data_ptr();
    rat.running_value = running_value->const_data_ptr();
  }
  rat.local_keys = local_keys ? local_keys->const_data_ptr() : nullptr;
  rat.local_values = local_values ? local_values->const_data_ptr() : nullptr;
  rat.rope_base = settings.rope_base;
  rat.scale = settings.scale;
  rat.tile_heads = settings.tile_heads;
  return rat;
}

namespace {

Attention attention_over(const Rat& rat, const SequenceLayout& rows, const void* queries, const void* keys,
                         const void* values) {
  Attention a{};
  a.queries = rat.tokens;
  a.keys = rows;
  a.q_offsets = rat.start;
  a.heads = a.key_heads = rat.heads;
  a.key_dim = a.value_dim = rat.dim;
  a.q = queries;
  a.k = keys;
  a.v = values;
  a.element = rat.element;
  a.scale = rat.scale;
  return a;
}

}  // namespace

Attention entry_attention(const Rat& rat, const void* queries, const void* keys, const void* values) {
  Attention a = attention_over(rat, rat.entries, queries, keys, values);
  a.mask.summary = rat.stride;
  a.mask.first = rat.prefix / rat.stride;
  for (int64_t& offset : a.q_offsets) offset -= rat.window - 1;
  return a;
}

Attention local_attention(const Rat& rat, const void* queries, const void* keys, const void* values) {
  Attention a = attention_over(rat, rat.local, queries, keys, values);
  a.mask.causal = Causal::tokens;
  a.mask.causal_prefix = true;
  a.mask.prefix_len = rat.prefix;
  a.mask.window = rat.window - 1;
  if (a.mask.window == 0) a.mask.summary = kFarthest;  // nothing but the prefix
  for (int64_t n = 0; n < rat.tokens.count(); ++n) a.q_offsets[n] += rat.local_origin(n) - 1;
  return a;
}

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("rat_attention_cpu", TORCH_BOX(&rat_attention)); }

}  // namespace memattn::cpu
