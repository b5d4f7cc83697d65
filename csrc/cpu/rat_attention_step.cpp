// RAT attention, one or a few tokens: the running state advances in place, and its query reads the row's entries once, tile by
// tile, with an online softmax that starts from the token's own entry. A task is one head of one batch row.
#include "rat_attention.h"

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "rat_attention_step_cpu";

struct RatPool {
  void *keys, *values;                // [rows, capacity, heads, dim] of the element type
  void *running_key, *running_value;  // [rows, heads, dim] in the accumulate type
  void *local_keys, *local_values;    // [rows, prefix + window - 1, heads, dim] of the element type, or null
  int64_t rows, capacity, local;
};

template <class E>
struct StepRows {
  using Acc = AccumulateOf<E>;
  Acc *k, *v, *q, *turned, *out, *keys, *values, *scores;
  Acc* gates;

  StepRows(Arena& arena, int ld)
      : k(arena.take<Acc>(ld)),
        v(arena.take<Acc>(ld)),
        q(arena.take<Acc>(ld)),
        turned(arena.take<Acc>(ld)),
        out(arena.take<Acc>(ld)),
        keys(arena.take<Acc>(int64_t{kKeys} * ld)),
        values(arena.take<Acc>(int64_t{kKeys} * ld)),
        scores(arena.take<Acc>(kKeys)),
        gates(arena.take<Acc>(int64_t{3} * ld)) {}
};

template <class E>
class RatStep {
  using Acc = AccumulateOf<E>;

 public:
  RatStep(const Rat& rat, const Primitives<E>& isa, const RatPool& pool, void* o)
      : rat_(rat), isa_(isa), pool_(pool), o_(o), width_(round_up(rat.dim, isa.unit)), ld_(leading(width_)),
        rotary_(rotary_of<Acc>(rat)) {}

  // Batch row b on row rows[b] of the pool, −1: padding.
  void run(const std::vector<int64_t>& rows, int64_t threads) const {
    const auto make = [&](Arena& arena) { return StepRows<E>(arena, ld_); };
    const size_t bytes = bytes_of(make);
    Scratch scratch(bytes * threads);
    parallel_tasks(rat_.tokens.count() * rat_.heads, threads, isa_, [&](int64_t i, int64_t worker) {
      Arena arena(scratch.data() + worker * bytes);
      StepRows<E> t = make(arena);
      const int64_t b = i / rat_.heads, h = i % rat_.heads;
      for (int64_t token = 0; token < rat_.tokens.length(b); ++token) step(b, rows[b], h, token, t);
    });
  }

 private:
  void step(int64_t b, int64_t row, int64_t h, int64_t i, StepRows<E>& t) const {
    const int64_t token = rat_.tokens.start(b) + i, p = rat_.start[b] + i, at = token * rat_.width() + rat_.row(h);
    std::fill(t.out, t.out + width_, Acc(0));
    Acc total = 1;
    if (row >= 0) {
      const int64_t held = row * rat_.width() + rat_.row(h);
      Acc* key = static_cast<Acc*>(pool_.running_key) + held;
      Acc* value = static_cast<Acc*>(pool_.running_value) + held;
      advance(token, p, h, at, key, value, t);
      total = attend(row, h, p, key, value, t);
      leave(row, h, p, key, value, t);
    }
    const Acc inverse = 1 / total;
    isa_.store_rows(offset(o_, rat_.element, at), rat_.element, 0, t.out, ld_, &inverse, 1, rat_.dim);
  }

  void advance(int64_t token, int64_t p, int64_t h, int64_t at, Acc* key, Acc* value, StepRows<E>& t) const {
    const auto& table = scan::row_table<Acc>();
    const int64_t key_head = rat_.key_head(h);
    load_head(isa_, t.q, ld_, 1, width_, rat_.q, rat_.element, token, rat_.key_heads, key_head, 1, rat_.dim);
    load_head(isa_, t.k, ld_, 1, width_, rat_.k, rat_.element, token, rat_.key_heads, key_head, 1, rat_.dim);
    load_head(isa_, t.v, ld_, 1, width_, rat_.v, rat_.element, token, rat_.heads, h, 1, rat_.dim);
    if (rat_.restart > 0 && p % rat_.restart == 0) {
      std::fill_n(key, rat_.dim, Acc(0));
      std::fill_n(value, rat_.dim, Acc(0));
    }
    const scan::Gate<Acc> gate{t.gates, t.gates + ld_, t.gates + 2 * ld_};
    table.gate(gate, static_cast<const Acc*>(rat_.g) + at, true, rat_.dim);
    table.advance(key, key, gate, t.k, rat_.dim);
    table.advance(value, value, gate, t.v, rat_.dim);
  }

  // out = sum of e^{score - most} times values, own entry included; returns the sum of the weights.
  Acc attend(int64_t row, int64_t h, int64_t p, const Acc* key, const Acc* value, StepRows<E>& t) const {
    Acc most = 0, total = 1, shrink = 1;
    std::fill(t.turned, t.turned + width_, Acc(0));
    std::copy_n(key, rat_.dim, t.turned);
    isa_.dot_rows(&most, t.q, ld_, t.turned, ld_, 1, width_);
    most *= static_cast<Acc>(rat_.scale);
    std::copy_n(value, rat_.dim, t.out);
    std::copy_n(t.q, width_, t.turned);
    rotary_.turn(t.turned, t.q, p / rat_.unit);
    // Rows begin..end of a table with `rows` rows for each row of the pool.
    const auto take_in = [&](const void* all_keys, const void* all_values, int64_t rows, int64_t begin, int64_t end) {
      for (int64_t from = begin; from < end; from += kKeys) {
        const int count = static_cast<int>(std::min<int64_t>(kKeys, end - from)), padded = round_up(count, isa_.unit);
        const int64_t at = ((row * rows + from) * rat_.heads + h) * rat_.dim;
        const auto [keys, key_stride] = entries(all_keys, at, t.keys, count);
        isa_.dot_rows(t.scores, keys, key_stride, t.turned, 0, count, width_);
        std::fill(t.scores + count, t.scores + padded, -std::numeric_limits<Acc>::infinity());
        isa_.softmax_rows(t.scores, kKeys, static_cast<Acc>(rat_.scale), {}, &most, &total, &shrink, 1, padded);
        if (shrink != 1) isa_.scale_rows(t.out, ld_, &shrink, 1, width_);
        const auto [values, value_stride] = entries(all_values, at, t.values, count);
        isa_.add_rows(t.out, 0, t.scores, values, value_stride, count, width_);
      }
    };
    const int64_t prefix = rat_.prefix, recent = rat_.window - 1, left = std::max<int64_t>(p - recent, 0);
    take_in(pool_.keys, pool_.values, pool_.capacity, prefix / rat_.stride, std::min(left / rat_.stride, pool_.capacity));
    if (!rat_.has_local()) return total;
    take_in(pool_.local_keys, pool_.local_values, pool_.local, 0, std::min(prefix, p));
    for (int64_t j = std::max(left, prefix); j < p;) {
      const int64_t slot = j % recent, count = std::min(p - j, recent - slot);
      take_in(pool_.local_keys, pool_.local_values, pool_.local, prefix + slot, prefix + slot + count);
      j += count;
    }
    return total;
  }

  // `count` rows of entries and their stride: in place where they are of the accumulate type and fill whole vectors.
  std::pair<const Acc*, int> entries(const void* base, int64_t at, Acc* buffer, int count) const {
    const void* from = offset(base, rat_.element, at);
    if (rat_.element == element_of_accumulate<Acc>() && width_ == rat_.dim) {
      return {static_cast<const Acc*>(from), static_cast<int>(rat_.width())};
    }
    isa_.load_rows(buffer, ld_, count, width_, from, rat_.element, rat_.width(), count, rat_.dim);
    return {buffer, ld_};
  }

  // What later tokens see of this one.
  void leave(int64_t row, int64_t h, int64_t p, const Acc* key, const Acc* value, StepRows<E>& t) const {
    std::copy_n(key, rat_.dim, t.turned);
    rotary_.turn(t.turned, t.turned, p / rat_.unit);
    const auto put = [&](void* keys, void* values, int64_t rows, int64_t to) {
      const int64_t at = ((row * rows + to) * rat_.heads + h) * rat_.dim;
      isa_.store_rows(offset(keys, rat_.element, at), rat_.element, 0, t.turned, ld_, nullptr, 1, rat_.dim);
      isa_.store_rows(offset(values, rat_.element, at), rat_.element, 0, value, ld_, nullptr, 1, rat_.dim);
    };
    const int64_t entry = (p + 1) / rat_.stride - 1, recent = rat_.window - 1;
    if ((p + 1) % rat_.stride == 0 && entry < pool_.capacity) put(pool_.keys, pool_.values, pool_.capacity, entry);
    if (p < rat_.prefix) put(pool_.local_keys, pool_.local_values, pool_.local, p);
    if (recent > 0) put(pool_.local_keys, pool_.local_values, pool_.local, rat_.prefix + p % recent);
  }

  const Rat& rat_;
  const Primitives<E>& isa_;
  const RatPool pool_;
  void* o_;
  const int width_, ld_;
  const Rotary<Acc> rotary_;
};

Tensor rat_attention_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor keys, Tensor values, Tensor running_key,
                          Tensor running_value, MaybeTensor local_keys, MaybeTensor local_values, Tensor length,
                          MaybeTensor state_indices, int64_t restart, int64_t stride, int64_t unit, int64_t window,
                          int64_t prefix_len, double rope_base, bool tile_heads, double scale) {
  constexpr auto none = std::nullopt;
  Rat rat = read_rat(kOp, q, k, v, g, none, none, none, none, none, none, none, none,
                     {restart, stride, unit, window, prefix_len, rope_base, tile_heads, scale});
  const int64_t batch = v.size(0), heads = v.size(2), dim = v.size(3), pool = length.numel();
  const ScalarType type = v.scalar_type(), sums = state_dtype(type);
  check_tensor(kOp, "length", length, {ScalarType::Long}, {state_indices ? kAnySize : batch});
  check_tensor(kOp, "keys", keys, {type}, {pool, kAnySize, heads, dim});
  check_tensor(kOp, "values", values, {type}, {pool, keys.size(1), heads, dim});
  check_tensor(kOp, "running_key", running_key, {sums}, {pool, heads, dim});
  check_tensor(kOp, "running_value", running_value, {sums}, {pool, heads, dim});
  if (rat.has_local() != local_keys.has_value() || rat.has_local() != local_values.has_value()) {
    fail(kOp, "local_keys and local_values must be given where there is a window or a prefix, and only there");
  }
  const int64_t local = rat.prefix + rat.window - 1;
  check_tensor(kOp, "local_keys", local_keys, {type}, {pool, local, heads, dim});
  check_tensor(kOp, "local_values", local_values, {type}, {pool, local, heads, dim});
  check_tensor(kOp, "state_indices", state_indices, {ScalarType::Int, ScalarType::Long}, {batch});
  std::vector<int64_t> rows = state_indices ? read_indices(*state_indices) : std::vector<int64_t>();
  auto* lengths = static_cast<int64_t*>(length.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    if (!state_indices) rows.push_back(b);
    if (rows[b] >= pool) rows[b] = -1;  // an index that must not be followed
    if (rows[b] < 0) continue;
    rat.start[b] = std::clamp<int64_t>(lengths[rows[b]], 0, kFarthest);
    lengths[rows[b]] = rat.start[b] + v.size(1);
  }
  Tensor o = torch::stable::empty_like(v);
  const auto rows_of = [](const MaybeTensor& x) { return x ? x->mutable_data_ptr() : nullptr; };
  const RatPool to{keys.mutable_data_ptr(),
                   values.mutable_data_ptr(),
                   running_key.mutable_data_ptr(),
                   running_value.mutable_data_ptr(),
                   rows_of(local_keys),
                   rows_of(local_values),
                   pool,
                   keys.size(1),
                   local};
  with_primitives(type, [&]<class E>(const Primitives<E>& isa) {
    RatStep<E>(rat, isa, to, o.mutable_data_ptr()).run(rows, torch::stable::get_num_threads());
  });
  return o;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("rat_attention_step_cpu", TORCH_BOX(&rat_attention_step)); }

}  // namespace memattn::cpu
