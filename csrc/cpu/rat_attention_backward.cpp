// RAT attention's gradients: attention's own backward for the entries of earlier chunks, with the queries turned and the
// log-sum-exp over everything; then tile by tile in reverse, the average recomputed, the token's own entry and the scan.
//
// A task is the heads that read one key head over tokens that no restart divides: no two tasks write the same sum.
#include "rat_attention.h"
#include "results.h"

#include <tuple>

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "rat_attention_cpu_backward";

struct RatGradients {
  const void *o, *d_o, *lse;                             // as forward's results
  const void *turned_dq, *d_keys, *d_values;             // of the turned queries and of the entries, from attention
  const void *local_dq, *d_local_keys, *d_local_values;  // the same of the local rows
  const void *d_out_keys, *d_out_values;                 // cotangents, each or null
  const void *d_running_key, *d_running_value;           // the same
  const void *d_out_local_keys, *d_out_local_values;     // the same
  void *dq, *dk, *dv, *dg;                               // like the inputs
  void *d_held_keys, *d_held_values;                     // [sequences, held, heads, dim] or null
  void *d_initial_key, *d_initial_value;                 // [sequences, heads, dim] or null
  void *d_held_local_keys, *d_held_local_values;         // [sequences, held_local, heads, dim] or null
};

template <class E>
struct RatBackwardTemporaries {
  using Acc = AccumulateOf<E>;
  ScanRows<E> scan;
  Acc *dq, *dk;                     // [kTokens, dim] sums over the group
  Acc *q, *out, *d_o;               // [kTokens, dim]
  Acc *d_key, *d_value, *dv;        // [kTokens, dim]
  Acc *entry;                       // [dim]
  Acc *score, *delta, *gain;        // [kTokens]
  Acc *carry, *states;              // [group, 2, dim], [tiles, group, 2, dim]

  RatBackwardTemporaries(Arena& arena, const Rat& rat, const AttentionSizes& s, int64_t tiles)
      : scan(arena, rat.dim, s.key_dim, s.ld_key) {
    for (Acc** rows : {&dq, &dk, &q, &out, &d_o, &d_key, &d_value, &dv}) {
      *rows = arena.take<Acc>(int64_t{kTokens} * s.ld_key);
    }
    entry = arena.take<Acc>(s.ld_key);
    for (Acc** column : {&score, &delta, &gain}) *column = arena.take<Acc>(kTokens);
    carry = arena.take<Acc>(rat.group() * 2 * rat.dim);
    states = arena.take<Acc>(tiles * rat.group() * 2 * rat.dim);
  }
};

template <class E>
class RatBackward {
  using Acc = AccumulateOf<E>;
  using Temporaries = RatBackwardTemporaries<E>;

  struct Run {
    std::vector<TokenTile> tiles;
  };

 public:
  RatBackward(const Rat& rat, const Primitives<E>& isa, const AttentionSizes& s, const Rotary<Acc>& rotary,
              const RatGradients& g)
      : rat_(rat), isa_(isa), s_(s), rotary_(rotary), g_(g) {}

  void run(int64_t threads) {
    std::vector<Run> runs;
    size_t longest = 1;
    for (int64_t n = 0; n < rat_.tokens.count(); ++n) {
      for (const TokenTile& tile : token_tiles(rat_, n)) {
        if (tile.fresh) runs.emplace_back();
        runs.back().tiles.push_back(tile);
        longest = std::max(longest, runs.back().tiles.size());
      }
    }
    const auto make = [&](Arena& arena) { return Temporaries(arena, rat_, s_, longest); };
    const size_t bytes = bytes_of(make);
    Scratch scratch(bytes * threads);
    std::vector<Temporaries> temporaries;
    for (int64_t i = 0; i < threads; ++i) {
      Arena arena(scratch.data() + i * bytes);
      temporaries.push_back(make(arena));
      temporaries.back().scan.clear_padding();
    }
    const int64_t tasks = static_cast<int64_t>(runs.size()) * rat_.key_heads;
    parallel_tasks(tasks, threads, isa_, [&](int64_t i, int64_t worker) {
      process(runs[i / rat_.key_heads], i % rat_.key_heads, temporaries[worker]);
    });
    state_gradients();
  }

 private:
  Running<Acc> of(Acc* base, int64_t i) const { return {base + i * 2 * rat_.dim, base + (i * 2 + 1) * rat_.dim}; }

  void process(const Run& run, int64_t key_head, Temporaries& t) const {
    const int64_t group = rat_.group(), count = static_cast<int64_t>(run.tiles.size());
    for (int64_t m = 0; m < group; ++m) {
      const int64_t h = rat_.head(key_head, m);
      start_running(rat_, run.tiles[0], h, of(t.states, m));
      for (int64_t i = 0; i + 1 < count; ++i) {
        std::copy_n(of(t.states, i * group + m).key, 2 * rat_.dim, of(t.states, (i + 1) * group + m).key);
        t.scan.run(rat_, isa_, run.tiles[i], h, of(t.states, (i + 1) * group + m));
      }
      start_carry(run.tiles.back(), h, of(t.carry, m));
    }
    for (int64_t i = count - 1; i >= 0; --i) {
      const TokenTile& tile = run.tiles[i];
      const int rows = static_cast<int>(tile.last - tile.first);
      std::fill(t.dq, t.dq + int64_t{rows} * s_.ld_key, Acc(0));
      std::fill(t.dk, t.dk + int64_t{rows} * s_.ld_key, Acc(0));
      for (int64_t m = 0; m < group; ++m) {
        member(tile, rat_.head(key_head, m), of(t.states, i * group + m), of(t.carry, m), t);
      }
      const int64_t at = ((rat_.tokens.start(tile.sequence) + tile.first) * rat_.key_heads + key_head) * rat_.dim;
      const int64_t width = rat_.key_heads * rat_.dim;
      isa_.store_rows(offset(g_.dq, rat_.element, at), rat_.element, width, t.dq, s_.ld_key, nullptr, rows, rat_.dim);
      isa_.store_rows(offset(g_.dk, rat_.element, at), rat_.element, width, t.dk, s_.ld_key, nullptr, rows, rat_.dim);
    }
    const TokenTile& first = run.tiles[0];
    for (int64_t m = 0; first.first == 0 && g_.d_initial_key && m < group; ++m) {
      const int64_t at = first.sequence * rat_.width() + rat_.row(rat_.head(key_head, m));
      const Running<Acc> carry = of(t.carry, m);
      const bool used = !rat_.starts_fresh(first.sequence);
      for (int c = 0; c < rat_.dim; ++c) {
        static_cast<Acc*>(g_.d_initial_key)[at + c] = used ? carry.key[c] : Acc(0);
        static_cast<Acc*>(g_.d_initial_value)[at + c] = used ? carry.value[c] : Acc(0);
      }
    }
  }

  void start_carry(const TokenTile& last, int64_t h, Running<Acc> carry) const {
    const bool ends = last.last == rat_.tokens.length(last.sequence);
    const int64_t at = last.sequence * rat_.width() + rat_.row(h);
    for (const auto& [to, from] : {std::pair(carry.key, g_.d_running_key), std::pair(carry.value, g_.d_running_value)}) {
      if (ends && from) std::copy_n(static_cast<const Acc*>(from) + at, rat_.dim, to);
      else std::fill_n(to, rat_.dim, Acc(0));
    }
  }

  // One value head of a tile: dq and dk gain its share, dv and dg are its own.
  void member(const TokenTile& tile, int64_t h, Running<Acc> before, Running<Acc> carry, Temporaries& t) const {
    const int64_t n = tile.sequence, token = rat_.tokens.start(n) + tile.first, p = rat_.start[n] + tile.first;
    const int rows = static_cast<int>(tile.last - tile.first), ld = s_.ld_key, dim = rat_.dim;
    t.scan.run(rat_, isa_, tile, h, before);
    own_entries(token, p, rows, h, t);
    add_turned(g_.turned_dq, token, p, rows, h, t);
    if (rat_.has_local()) add_turned(g_.local_dq, token, p, rows, h, t);
    for (int64_t i = rat_.stride - 1 - p % rat_.stride; i < rows; i += rat_.stride) {
      const int64_t row = rat_.entries.start(n) + (p + i + 1) / rat_.stride - 1;
      add_entry({g_.d_keys, g_.d_out_keys}, {g_.d_values, g_.d_out_values}, row * rat_.width() + rat_.row(h), p + i, i, t);
    }
    for (int64_t i = 0; rat_.has_local() && i < rows; ++i) {
      add_entry({g_.d_local_keys, g_.d_out_local_keys}, {g_.d_local_values, g_.d_out_local_values},
                rat_.local_row(n, p + i) * rat_.width() + rat_.row(h), p + i, i, t);
    }
    const auto& table = scan::row_table<Acc>();
    std::fill(t.dv, t.dv + int64_t{rows} * ld, Acc(0));
    for (int64_t i = rows - 1; i >= 0; --i) {
      Acc* dg = static_cast<Acc*>(g_.dg) + (token + i) * rat_.width() + rat_.row(h);
      std::fill_n(dg, dim, Acc(0));
      const scan::Gate<Acc> gate = t.scan.gate(i);
      table.retreat(carry.key, t.dk + i * ld, dg, gate, t.d_key + i * ld, t.scan.before(rat_, t.scan.keys, p, i), t.scan.k + i * ld,
                    true, dim);
      table.retreat(carry.value, t.dv + i * ld, dg, gate, t.d_value + i * ld, t.scan.before(rat_, t.scan.values, p, i),
                    t.scan.v + i * ld, true, dim);
      if (rat_.restart > 0 && (p + i) % rat_.restart == 0) {
        std::fill_n(carry.key, dim, Acc(0));
        std::fill_n(carry.value, dim, Acc(0));
      }
    }
    const int64_t at = token * rat_.width() + rat_.row(h);
    isa_.store_rows(offset(g_.dv, rat_.element, at), rat_.element, rat_.width(), t.dv, ld, nullptr, rows, dim);
  }

  // What every token's own entry gives to dq and to the gradients of its running key and value.
  void own_entries(int64_t token, int64_t p, int rows, int64_t h, Temporaries& t) const {
    const int ld = s_.ld_key, width = s_.key_dim, dim = rat_.dim;
    const auto load = [&](Acc* x, const void* from) {
      load_head(isa_, x, ld, rows, width, from, rat_.element, token, rat_.heads, h, rows, dim);
    };
    load(t.out, g_.o);
    load(t.d_o, g_.d_o);
    load_head(isa_, t.q, ld, rows, width, rat_.q, rat_.element, token, rat_.key_heads, rat_.key_head(h), rows, dim);
    isa_.dot_rows(t.delta, t.d_o, ld, t.out, ld, rows, width);
    isa_.dot_rows(t.score, t.q, ld, t.scan.key(1), ld, rows, width);
    isa_.dot_rows(t.gain, t.d_o, ld, t.scan.value(1), ld, rows, width);
    for (int i = 0; i < rows; ++i) {
      const Acc lse = static_cast<const Acc*>(g_.lse)[(token + i) * rat_.heads + h];
      const Acc weight = std::exp(static_cast<Acc>(rat_.scale) * t.score[i] - lse);
      t.score[i] = weight;
      // Alone, o is the running value, and Δ only differs by o's rounding.
      const bool alone = (p + i) / (rat_.has_local() ? 1 : rat_.stride) == 0;
      t.gain[i] = alone ? Acc(0) : static_cast<Acc>(rat_.scale) * weight * (t.gain[i] - t.delta[i]);
    }
    std::fill(t.d_key, t.d_key + int64_t{rows} * ld, Acc(0));
    std::fill(t.d_value, t.d_value + int64_t{rows} * ld, Acc(0));
    isa_.add_rows(t.dq, ld, t.gain, t.scan.key(1), ld, rows, width);
    isa_.add_rows(t.d_key, ld, t.gain, t.q, ld, rows, width);
    isa_.add_rows(t.d_value, ld, t.score, t.d_o, ld, rows, width);
  }

  // The gradient of turned queries, turned back, joins dq.
  void add_turned(const void* turned_dq, int64_t token, int64_t p, int rows, int64_t h, Temporaries& t) const {
    const int ld = s_.ld_key;
    load_head(isa_, t.out, ld, rows, s_.key_dim, turned_dq, rat_.element, token, rat_.heads, h, rows, rat_.dim);
    for (int i = 0; i < rows; ++i) {
      Acc* turned = t.out + int64_t{i} * ld;
      rotary_.turn_back(turned, turned, (p + i) / rat_.unit);
      for (int c = 0; c < rat_.dim; ++c) t.dq[int64_t{i} * ld + c] += turned[c];
    }
  }

  // The gradients of what token i of the tile left at element `at`, the keys' turned back, join its own.
  void add_entry(std::initializer_list<const void*> keys, std::initializer_list<const void*> values, int64_t at,
                 int64_t position, int64_t i, Temporaries& t) const {
    const auto load = [&](const void* from) {
      isa_.load_rows(t.entry, s_.ld_key, 1, s_.key_dim, offset(from, rat_.element, at), rat_.element, 0, 1, rat_.dim);
    };
    const auto add = [&](Acc* sum) {
      for (int c = 0; c < rat_.dim; ++c) sum[c] += t.entry[c];
    };
    for (const void* from : keys) {
      if (!from) continue;
      load(from);
      rotary_.turn_back(t.entry, t.entry, position / rat_.unit);
      add(t.d_key + i * s_.ld_key);
    }
    for (const void* from : values) {
      if (!from) continue;
      load(from);
      add(t.d_value + i * s_.ld_key);
    }
  }

  // Of the entries that the state held, and of the running state where there were no tokens.
  void state_gradients() const {
    if (!g_.d_held_keys) return;
    const int64_t width = rat_.width();
    std::vector<Acc> sum(round_up(static_cast<int>(width), s_.unit)), part(sum.size());
    for (int64_t n = 0; n < rat_.tokens.count(); ++n) {
      for (int64_t c = 0; c < rat_.held; ++c) {
        const int64_t from = (rat_.entries.start(n) + c) * width, to = (n * rat_.held + c) * width;
        held_gradient(g_.d_held_keys, g_.d_keys, g_.d_out_keys, from, to, c < rat_.entries_before(n), sum, part);
        held_gradient(g_.d_held_values, g_.d_values, g_.d_out_values, from, to, c < rat_.entries_before(n), sum, part);
      }
      for (int64_t c = 0; c < rat_.held_local; ++c) {
        const int64_t from = (rat_.local.start(n) + c) * width, to = (n * rat_.held_local + c) * width;
        const bool used = c < rat_.local_before(n);
        held_gradient(g_.d_held_local_keys, g_.d_local_keys, g_.d_out_local_keys, from, to, used, sum, part);
        held_gradient(g_.d_held_local_values, g_.d_local_values, g_.d_out_local_values, from, to, used, sum, part);
      }
      if (rat_.tokens.length(n) > 0) continue;
      for (const auto& [to, from] : {std::pair(g_.d_initial_key, g_.d_running_key),
                                     std::pair(g_.d_initial_value, g_.d_running_value)}) {
        Acc* out = static_cast<Acc*>(to) + n * width;
        if (from) std::copy_n(static_cast<const Acc*>(from) + n * width, width, out);
        else std::fill_n(out, width, Acc(0));
      }
    }
  }

  void held_gradient(void* out, const void* seen, const void* handed_on, int64_t from, int64_t to, bool used,
                     std::vector<Acc>& sum, std::vector<Acc>& part) const {
    const int width = static_cast<int>(rat_.width()), padded = static_cast<int>(sum.size());
    const auto load = [&](std::vector<Acc>& x, const void* source) {
      isa_.load_rows(x.data(), padded, 1, padded, offset(source, rat_.element, from), rat_.element, 0, 1, width);
    };
    std::fill(sum.begin(), sum.end(), Acc(0));
    if (used) load(sum, seen);
    if (used && handed_on) {
      load(part, handed_on);
      for (int c = 0; c < width; ++c) sum[c] += part[c];
    }
    isa_.store_rows(offset(out, rat_.element, to), rat_.element, 0, sum.data(), padded, nullptr, 1, width);
  }

  const Rat& rat_;
  const Primitives<E>& isa_;
  const AttentionSizes& s_;
  const Rotary<Acc>& rotary_;
  const RatGradients g_;
};

// Every value head's queries [tokens, heads, dim], turned.
template <class E>
void turn_queries(const Rat& rat, const Primitives<E>& isa, const Rotary<AccumulateOf<E>>& rotary, void* turned) {
  constexpr int64_t grain = 64;
  for (int64_t n = 0; n < rat.tokens.count(); ++n) {
    torch::stable::parallel_for(0, rat.tokens.length(n), grain, [&](int64_t begin, int64_t end) {
      std::vector<AccumulateOf<E>> row(256);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t token = rat.tokens.start(n) + i;
        for (int64_t h = 0; h < rat.heads; ++h) {
          load_head(isa, row.data(), 256, 1, rat.dim, rat.q, rat.element, token, rat.key_heads, rat.key_head(h), 1, rat.dim);
          rotary.turn(row.data(), row.data(), (rat.start[n] + i) / rat.unit);
          isa.store_rows(offset(turned, rat.element, (token * rat.heads + h) * rat.dim), rat.element, 0, row.data(), 256,
                         nullptr, 1, rat.dim);
        }
      }
    });
  }
}

using Tensors10 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

const void* data(const MaybeTensor& x) { return x ? x->const_data_ptr() : nullptr; }

Tensors10 rat_attention_backward(Tensor d_o, MaybeTensor d_out_keys, MaybeTensor d_out_values, MaybeTensor d_final_key,
                                 MaybeTensor d_final_value, MaybeTensor d_out_local_keys, MaybeTensor d_out_local_values,
                                 Tensor o, Tensor out_keys, Tensor out_values, Tensor out_local_keys,
                                 Tensor out_local_values, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor g,
                                 MaybeTensor keys, MaybeTensor values, MaybeTensor running_key,
                                 MaybeTensor running_value, MaybeTensor local_keys, MaybeTensor local_values,
                                 MaybeTensor length, MaybeTensor cu_seqlens, int64_t restart, int64_t stride,
                                 int64_t unit, int64_t window, int64_t prefix_len, double rope_base, bool tile_heads,
                                 double scale) {
  const Rat rat = read_rat(kOp, q, k, v, g, keys, values, running_key, running_value, local_keys, local_values, length,
                           cu_seqlens, {restart, stride, unit, window, prefix_len, rope_base, tile_heads, scale});
  const ScalarType type = v.scalar_type(), sums = state_dtype(type);
  const int64_t batch = v.size(0), heads = v.size(2), dim = v.size(3), count = rat.tokens.count();
  check_tensor(kOp, "do", d_o, {type}, {batch, v.size(1), heads, dim});
  check_tensor(kOp, "o", o, {type}, {batch, v.size(1), heads, dim});
  check_tensor(kOp, "lse", lse, {sums}, {batch, v.size(1), heads});
  check_tensor(kOp, "out_keys", out_keys, {type}, {batch, rat.entry_rows, heads, dim});
  check_tensor(kOp, "out_values", out_values, {type}, {batch, rat.entry_rows, heads, dim});
  check_tensor(kOp, "dout_keys", d_out_keys, {type}, {batch, rat.entry_rows, heads, dim});
  check_tensor(kOp, "dout_values", d_out_values, {type}, {batch, rat.entry_rows, heads, dim});
  for (const auto& [name, rows] : {std::pair("out_local_keys", &out_local_keys), {"out_local_values", &out_local_values}}) {
    check_tensor(kOp, name, *rows, {type}, {batch, rat.local_rows, heads, dim});
  }
  check_tensor(kOp, "dlocal_keys", d_out_local_keys, {type}, {batch, rat.local_rows, heads, dim});
  check_tensor(kOp, "dlocal_values", d_out_local_values, {type}, {batch, rat.local_rows, heads, dim});
  check_tensor(kOp, "dfinal_key", d_final_key, {sums}, {count, heads, dim});
  check_tensor(kOp, "dfinal_value", d_final_value, {sums}, {count, heads, dim});

  const auto like = [&](const MaybeTensor& x) {
    return x ? result_like(*x) : empty_result(v, {0}, sums);
  };
  Tensor dq = result_like(q), dk = result_like(k), dv = result_like(v);
  Tensor dg = result_like(g), d_keys = result_like(out_keys);
  Tensor d_values = result_like(out_values), turned = result_like(v);
  Tensor turned_dq = result_like(v), d_held_keys = like(keys), d_held_values = like(values);
  Tensor d_initial_key = like(running_key), d_initial_value = like(running_value);
  Tensor d_local_keys = result_like(out_local_keys), local_dq = rat.has_local() ? result_like(v)
                                                                                              : like(std::nullopt);
  Tensor d_local_values = result_like(out_local_values);
  Tensor d_held_local_keys = like(local_keys), d_held_local_values = like(local_values);
  with_primitives(type, [&]<class E>(const Primitives<E>& isa) {
    const Rotary<AccumulateOf<E>> rotary = rotary_of<AccumulateOf<E>>(rat);
    turn_queries(rat, isa, rotary, turned.mutable_data_ptr());
    const Attention a = entry_attention(rat, turned.const_data_ptr(), out_keys.const_data_ptr(), out_values.const_data_ptr());
    differentiate(a, type,
                  {o.const_data_ptr(), d_o.const_data_ptr(), lse.const_data_ptr(), nullptr, turned_dq.mutable_data_ptr(),
                   d_keys.mutable_data_ptr(), d_values.mutable_data_ptr(), nullptr},
                  nullptr);
    if (rat.has_local()) {
      differentiate(local_attention(rat, turned.const_data_ptr(), out_local_keys.const_data_ptr(),
                                    out_local_values.const_data_ptr()),
                    type,
                    {o.const_data_ptr(), d_o.const_data_ptr(), lse.const_data_ptr(), nullptr,
                     local_dq.mutable_data_ptr(), d_local_keys.mutable_data_ptr(), d_local_values.mutable_data_ptr(),
                     nullptr},
                    nullptr);
    }
    const AttentionSizes sizes(a, isa.unit, kTokens);
    const auto wanted = [&](Tensor& x) { return keys ? x.mutable_data_ptr() : nullptr; };
    RatBackward<E>(rat, isa, sizes, rotary,
                   {o.const_data_ptr(), d_o.const_data_ptr(), lse.const_data_ptr(), turned_dq.const_data_ptr(),
                    d_keys.const_data_ptr(), d_values.const_data_ptr(), local_dq.const_data_ptr(),
                    d_local_keys.const_data_ptr(), d_local_values.const_data_ptr(), data(d_out_keys),
                    data(d_out_values), data(d_final_key), data(d_final_value), data(d_out_local_keys),
                    data(d_out_local_values), dq.mutable_data_ptr(), dk.mutable_data_ptr(), dv.mutable_data_ptr(),
                    dg.mutable_data_ptr(), wanted(d_held_keys), wanted(d_held_values), wanted(d_initial_key),
                    wanted(d_initial_value), wanted(d_held_local_keys), wanted(d_held_local_values)})
        .run(torch::stable::get_num_threads());
  });
  return {dq, dk, dv, dg, d_held_keys, d_held_values, d_initial_key, d_initial_value, d_held_local_keys,
          d_held_local_values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) {
  m.impl("rat_attention_cpu_backward", TORCH_BOX(&rat_attention_backward));
}

}  // namespace memattn::cpu
