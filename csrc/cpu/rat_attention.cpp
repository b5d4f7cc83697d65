// RAT attention, forward: the running average of a tile of tokens is made in scratch, leaves its chunk ends behind as entries,
// and is where the online softmax over the entries of earlier chunks starts. Nothing else of the average is stored.
//
// An item is one head of one sequence, its tiles in order. Where there are fewer items than threads, all entries of an item
// are made first, and its tiles then attend in parallel, each made a second time; the bits are the same.
#include "rat_attention.h"

#include <tuple>

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "rat_attention_cpu";

struct RatResults {
  void *o, *keys, *values;  // like v; [entries, heads, dim] of `element`
  void *running_key, *running_value, *lse;  // in the accumulate type
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
      const int64_t bytes = rat_.entries_before(n) * width * bytes_of_element();
      for (const auto& [from, to] : {std::pair(rat_.keys, results_.keys), std::pair(rat_.values, results_.values)}) {
        if (bytes == 0) continue;
        const void* source = offset(from, rat_.element, n * rat_.held * width);
        std::copy_n(static_cast<const std::byte*>(source), bytes,
                    static_cast<std::byte*>(offset(to, rat_.element, rat_.entries.start(n) * width)));
      }
      if (rat_.tokens.length(n) > 0) continue;
      for (const auto& [from, to] : {std::pair(rat_.running_key, results_.running_key),
                                     std::pair(rat_.running_value, results_.running_value)}) {
        Acc* out = static_cast<Acc*>(to) + n * width;
        if (from) std::copy_n(static_cast<const Acc*>(from) + n * width, width, out);
        else std::fill_n(out, width, Acc(0));
      }
    }
  }

  int64_t bytes_of_element() const { return cpu::bytes_of(rat_.element); }

  void average(const TokenTile& tile, int64_t h, Running<Acc> running, Temporaries& t) const {
    t.scan.run(rat_, isa_, tile, h, running);
  }

  void leave_entries(const TokenTile& tile, int64_t h, Temporaries& t) const {
    const int64_t n = tile.sequence, p = rat_.start[n] + tile.first;
    Acc* turned = t.scan.k;  // the rows are not needed again
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
    attention_.finish(head, tile.sequence, h, tile.first, tile.last);
  }

  const Rat& rat_;
  const Primitives<E>& isa_;
  const RatResults results_;
  const Attention a_;
  const AttentionSizes s_;
  const QueryTile<E> attention_;
  const Rotary<Acc> rotary_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rat_attention(
    Tensor q, Tensor k, Tensor v, Tensor g, MaybeTensor keys, MaybeTensor values, MaybeTensor running_key,
    MaybeTensor running_value, MaybeTensor length, MaybeTensor cu_seqlens, int64_t restart, int64_t stride, int64_t unit,
    double rope_base, bool tile_heads, double scale) {
  const Rat rat = read_rat(kOp, q, k, v, g, keys, values, running_key, running_value, length, cu_seqlens,
                           {restart, stride, unit, rope_base, tile_heads, scale});
  const int64_t batch = v.size(0), heads = v.size(2), dim = v.size(3), count = rat.tokens.count();
  const ScalarType sums = state_dtype(v.scalar_type());
  const auto entries = [&] { return torch::stable::new_zeros(v, {batch, rat.entry_rows, heads, dim}); };
  const auto running = [&] { return torch::stable::new_empty(v, {count, heads, dim}, sums); };
  Tensor o = torch::stable::empty_like(v), out_keys = entries(), out_values = entries();
  Tensor final_key = running(), final_value = running();
  Tensor lse = torch::stable::new_empty(v, {batch, v.size(1), heads}, sums);
  const RatResults results{o.mutable_data_ptr(),         out_keys.mutable_data_ptr(),    out_values.mutable_data_ptr(),
                           final_key.mutable_data_ptr(), final_value.mutable_data_ptr(), lse.mutable_data_ptr()};
  with_primitives(v.scalar_type(), [&]<class E>(const Primitives<E>& isa) {
    RatForward<E>(rat, isa, results).run(torch::stable::get_num_threads());
  });
  return {o, out_keys, out_values, final_key, final_value, lse};
}

}  // namespace

Rat read_rat(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const MaybeTensor& keys,
             const MaybeTensor& values, const MaybeTensor& running_key, const MaybeTensor& running_value,
             const MaybeTensor& length, const MaybeTensor& cu_seqlens, const RatSettings& settings) {
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
  Rat rat{};
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
    if (p < 0 || p / settings.stride > rat.held) {
      fail(op, "length must be 0 or more and have left at most the ", rat.held, " entries given; got ", p);
    }
  }
  std::vector<int64_t> bounds{0};
  rat.entry_rows = rat.held + (length_of_row + settings.stride - 1) / settings.stride;
  for (int64_t n = 0; n < count; ++n) {
    bounds.push_back(cu_seqlens ? rat.tokens.end(n) / settings.stride + (n + 1) * (rat.held + 1)
                                : (n + 1) * rat.entry_rows);
  }
  if (cu_seqlens) rat.entry_rows = bounds.back();
  rat.entries = SequenceLayout::packed(std::move(bounds));
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
  rat.restart = settings.restart;
  rat.stride = settings.stride;
  rat.unit = settings.unit;
  rat.rope_base = settings.rope_base;
  rat.scale = settings.scale;
  rat.tile_heads = settings.tile_heads;
  return rat;
}

Attention entry_attention(const Rat& rat, const void* queries, const void* keys, const void* values) {
  Attention a{};
  a.queries = rat.tokens;
  a.keys = rat.entries;
  a.mask.summary = rat.stride;
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

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("rat_attention_cpu", TORCH_BOX(&rat_attention)); }

}  // namespace memattn::cpu
