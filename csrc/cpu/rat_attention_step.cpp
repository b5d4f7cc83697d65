// RAT attention, one or a few tokens: the running state advances in place and starts an online softmax of its own; the row's
// entries are read once, all heads together, since they lie beside each other, in ranges that run in parallel; the parts are
// joined in order. Ranges have one size, so that bits do not depend on the thread count.
#include "rat_attention.h"
#include "results.h"

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "rat_attention_step_cpu";
constexpr int64_t kRange = 256;  // entries of a task

struct RatPool {
  void *keys, *values;                // [rows, capacity, heads, dim] of the element type
  void *running_key, *running_value;  // [rows, heads, dim] in the accumulate type
  void *local_keys, *local_values;    // [rows, local, heads, dim] of the element type, or null
  int64_t rows, capacity, local;
};

// A softmax over some entries, of every head: out [heads, ld] = sum of e^{score - most} times values, sum of the weights.
template <class Acc>
struct SoftmaxPart {
  Acc *out, *most, *sum;
};

template <class E>
struct StepRows {
  using Acc = AccumulateOf<E>;
  Acc *entry, *scores, *by_head, *shrink;  // [heads, ld], [kKeys, heads], [heads, kKeys], [heads]

  StepRows(Arena& arena, int64_t heads, int ld)
      : entry(arena.take<Acc>(heads * ld)),
        scores(arena.take<Acc>(kKeys * heads)),
        by_head(arena.take<Acc>(heads * kKeys)),
        shrink(arena.take<Acc>(heads)) {}
};

template <class E>
class RatStep {
  using Acc = AccumulateOf<E>;

 public:
  RatStep(const Rat& rat, const Primitives<E>& isa, const RatPool& pool, void* o)
      : rat_(rat), isa_(isa), pool_(pool), o_(o), heads_(static_cast<int>(rat.heads)),
        width_(round_up(rat.dim, isa.unit)), ld_(width_ == rat.dim ? width_ : leading(width_)),
        rotary_(rotary_of<Acc>(rat)) {}

  // Batch row b on row rows[b] of the pool, −1: padding.
  void run(const std::vector<int64_t>& rows, int64_t threads) {
    const int64_t batch = rat_.tokens.count(), tokens = batch ? rat_.tokens.length(0) : 0;
    int64_t ranges = 0;
    for (int64_t b = 0; b < batch; ++b) ranges = std::max(ranges, ranges_of(rat_.start[b] + tokens - 1));
    const auto make_rows = [&](Arena& arena) { return StepRows<E>(arena, heads_, ld_); };
    const size_t bytes = bytes_of(make_rows);
    Arena counter;
    take_parts(counter, batch, ranges);
    Scratch scratch(bytes * threads + counter.used());
    Arena arena(scratch.data() + bytes * threads);
    take_parts(arena, batch, ranges);
    for (int64_t i = 0; i < tokens; ++i) {
      parallel_tasks(batch, threads, isa_, [&](int64_t b, int64_t) {
        if (rows[b] >= 0) own_entry(b, rows[b], i);
      });
      parallel_tasks(batch * ranges, threads, isa_, [&](int64_t task, int64_t worker) {
        const int64_t b = task / ranges, range = task % ranges;
        if (rows[b] < 0 || range >= ranges_of(rat_.start[b] + i)) return;
        Arena own(scratch.data() + worker * bytes);
        read_range(b, rows[b], i, range, make_rows(own));
      });
      parallel_tasks(batch, threads, isa_, [&](int64_t b, int64_t) { finish(b, rows[b], i); });
    }
  }

 private:
  // Ranges of the entries that the token at position p sees.
  int64_t ranges_of(int64_t p) const { return (seen(p) + kRange - 1) / kRange; }
  int64_t seen(int64_t p) const {
    const int64_t prefix = std::min(rat_.prefix, p);
    return seen_of_grid(p) + prefix + p - std::max(left(p), prefix);
  }
  // The first position inside the window.
  int64_t left(int64_t p) const { return std::max<int64_t>(p - (rat_.window - 1), 0); }
  int64_t seen_of_grid(int64_t p) const {
    return std::max<int64_t>(std::min(left(p) / rat_.stride, pool_.capacity) - rat_.prefix / rat_.stride, 0);
  }

  // Where entry i of those that the token at p sees lies: first the grid, then the prefix, then the window.
  struct Place {
    bool local;
    int64_t row;
  };
  Place place(int64_t p, int64_t i) const {
    const int64_t grid = seen_of_grid(p), prefix = std::min(rat_.prefix, p);
    if (i < grid) return {false, rat_.prefix / rat_.stride + i};
    if (i < grid + prefix) return {true, i - grid};
    return {true, rat_.prefix + (std::max(left(p), rat_.prefix) + i - grid - prefix) % (rat_.window - 1)};
  }

  void take_parts(Arena& arena, int64_t batch, int64_t ranges) {
    turned_ = arena.take<Acc>(batch * heads_ * ld_);
    parts_.clear();
    for (int64_t i = 0; i < batch * (ranges + 1); ++i) {
      Acc* out = arena.take<Acc>(heads_ * ld_);
      Acc* most = arena.take<Acc>(heads_);
      parts_.push_back({out, most, arena.take<Acc>(heads_)});
    }
    per_row_ = ranges + 1;
  }
  const SoftmaxPart<Acc>& part(int64_t b, int64_t i) const { return parts_[b * per_row_ + i]; }
  Acc* turned(int64_t b) const { return turned_ + b * heads_ * ld_; }

  // Part 0 of row b: the running state, advanced by token i, as the only entry; and the token's queries, turned.
  void own_entry(int64_t b, int64_t row, int64_t i) const {
    const auto& table = scan::row_table<Acc>();
    const int64_t token = rat_.tokens.start(b) + i, p = rat_.start[b] + i;
    const SoftmaxPart<Acc>& own = part(b, 0);
    alignas(64) Acc k[256], v[256], high[256], low[256], weight[256];
    for (int64_t h = 0; h < heads_; ++h) {
      const int64_t held = row * rat_.width() + rat_.row(h), key_head = rat_.key_head(h);
      Acc* key = static_cast<Acc*>(pool_.running_key) + held;
      Acc* value = static_cast<Acc*>(pool_.running_value) + held;
      Acc *q = turned(b) + h * ld_, *out = own.out + h * ld_;
      load_head(isa_, q, ld_, 1, width_, rat_.q, rat_.element, token, rat_.key_heads, key_head, 1, rat_.dim);
      load_head(isa_, k, 256, 1, width_, rat_.k, rat_.element, token, rat_.key_heads, key_head, 1, rat_.dim);
      load_head(isa_, v, 256, 1, width_, rat_.v, rat_.element, token, rat_.heads, h, 1, rat_.dim);
      if (rat_.restart > 0 && p % rat_.restart == 0) {
        std::fill_n(key, rat_.dim, Acc(0));
        std::fill_n(value, rat_.dim, Acc(0));
      }
      const scan::Gate<Acc> gate{high, low, weight};
      table.gate(gate, static_cast<const Acc*>(rat_.g) + token * rat_.width() + rat_.row(h), true, rat_.dim);
      table.advance(key, key, gate, k, rat_.dim);
      table.advance(value, value, gate, v, rat_.dim);
      std::fill(out, out + width_, Acc(0));
      std::copy_n(key, rat_.dim, out);
      isa_.dot_rows(own.most + h, q, ld_, out, ld_, 1, width_);
      own.most[h] *= static_cast<Acc>(rat_.scale);
      own.sum[h] = 1;
      std::copy_n(value, rat_.dim, out);
      rotary_.turn(q, q, p / rat_.unit);
    }
  }

  // Part range + 1 of row b: its entries, tile by tile; every key and value is read once, all heads in one sweep.
  void read_range(int64_t b, int64_t row, int64_t i, int64_t range, const StepRows<E>& t) const {
    const SoftmaxPart<Acc>& own = part(b, range + 1);
    const int64_t p = rat_.start[b] + i, end = std::min((range + 1) * kRange, seen(p));
    std::fill(own.out, own.out + heads_ * ld_, Acc(0));
    std::fill(own.most, own.most + heads_, -std::numeric_limits<Acc>::infinity());
    std::fill(own.sum, own.sum + heads_, Acc(0));
    for (int64_t from = range * kRange; from < end; from += kKeys) {
      const int count = static_cast<int>(std::min<int64_t>(kKeys, end - from)), padded = round_up(count, isa_.unit);
      for (int j = 0; j < count; ++j) {
        const auto [keys, ld] = entry(pool_.keys, pool_.local_keys, row, place(p, from + j), t.entry);
        isa_.dot_rows(t.scores + j * heads_, keys, ld, turned(b), ld_, heads_, width_);
      }
      for (int h = 0; h < heads_; ++h) {
        Acc* scores = t.by_head + h * kKeys;
        for (int j = 0; j < count; ++j) scores[j] = t.scores[j * heads_ + h];
        std::fill(scores + count, scores + padded, -std::numeric_limits<Acc>::infinity());
      }
      isa_.softmax_rows(t.by_head, kKeys, static_cast<Acc>(rat_.scale), {}, own.most, own.sum, t.shrink, heads_, padded);
      isa_.scale_rows(own.out, ld_, t.shrink, heads_, width_);
      for (int j = 0; j < count; ++j) {
        for (int h = 0; h < heads_; ++h) t.scores[j * heads_ + h] = t.by_head[h * kKeys + j];
        const auto [values, ld] = entry(pool_.values, pool_.local_values, row, place(p, from + j), t.entry);
        isa_.add_rows(own.out, ld_, t.scores + j * heads_, values, ld, heads_, width_);
      }
    }
  }

  // An entry of a row [heads, dim] and its leading dimension: in place where it is of the accumulate type and fills vectors.
  std::pair<const Acc*, int> entry(const void* grid, const void* local, int64_t row, Place at, Acc* buffer) const {
    const void* from = at.local ? offset(local, rat_.element, (row * pool_.local + at.row) * rat_.width())
                                : offset(grid, rat_.element, (row * pool_.capacity + at.row) * rat_.width());
    if (rat_.element == element_of_accumulate<Acc>() && width_ == rat_.dim) {
      return {static_cast<const Acc*>(from), rat_.dim};
    }
    isa_.load_rows(buffer, ld_, heads_, width_, from, rat_.element, rat_.dim, heads_, rat_.dim);
    return {buffer, ld_};
  }

  // Joins the parts of row b, writes o, and leaves an entry where a chunk ends.
  void finish(int64_t b, int64_t row, int64_t i) const {
    const int64_t p = rat_.start[b] + i, at = (rat_.tokens.start(b) + i) * rat_.width();
    const SoftmaxPart<Acc>& own = part(b, 0);
    for (int64_t h = 0; h < heads_; ++h) {
      Acc* out = own.out + h * ld_;
      Acc inverse = 0;
      if (row < 0) {
        std::fill(out, out + width_, Acc(0));
      } else {
        inverse = 1 / join(b, h, ranges_of(p));
      }
      isa_.store_rows(offset(o_, rat_.element, at + rat_.row(h)), rat_.element, 0, out, ld_, &inverse, 1, rat_.dim);
      if (row >= 0) leave(row, h, p, out);
    }
  }

  // Head h of part 0 becomes the joined softmax; returns the sum of the weights.
  Acc join(int64_t b, int64_t h, int64_t ranges) const {
    const SoftmaxPart<Acc>& own = part(b, 0);
    Acc most = own.most[h];
    for (int64_t r = 1; r <= ranges; ++r) most = part(b, r).most[h] > most ? part(b, r).most[h] : most;
    Acc weight = std::exp(own.most[h] - most), total = weight * own.sum[h];
    isa_.scale_rows(own.out + h * ld_, ld_, &weight, 1, width_);
    for (int64_t r = 1; r <= ranges; ++r) {
      weight = std::exp(part(b, r).most[h] - most);
      total += weight * part(b, r).sum[h];
      isa_.add_rows(own.out + h * ld_, ld_, &weight, part(b, r).out + h * ld_, ld_, 1, width_);
    }
    return total;
  }

  // What later tokens see of this one.
  void leave(int64_t row, int64_t h, int64_t p, Acc* buffer) const {
    const int64_t held = row * rat_.width() + rat_.row(h), c = (p + 1) / rat_.stride - 1, recent = rat_.window - 1;
    std::copy_n(static_cast<const Acc*>(pool_.running_key) + held, rat_.dim, buffer);
    rotary_.turn(buffer, buffer, p / rat_.unit);
    const auto put = [&](void* keys, void* values, int64_t rows, int64_t to) {
      const int64_t at = (row * rows + to) * rat_.width() + rat_.row(h);
      isa_.store_rows(offset(keys, rat_.element, at), rat_.element, 0, buffer, ld_, nullptr, 1, rat_.dim);
      isa_.store_rows(offset(values, rat_.element, at), rat_.element, 0,
                      static_cast<const Acc*>(pool_.running_value) + held, ld_, nullptr, 1, rat_.dim);
    };
    if ((p + 1) % rat_.stride == 0 && c < pool_.capacity) put(pool_.keys, pool_.values, pool_.capacity, c);
    if (p < rat_.prefix) put(pool_.local_keys, pool_.local_values, pool_.local, p);
    if (recent > 0) put(pool_.local_keys, pool_.local_values, pool_.local, rat_.prefix + p % recent);
  }

  const Rat& rat_;
  const Primitives<E>& isa_;
  const RatPool pool_;
  void* o_;
  const int heads_, width_, ld_;
  const Rotary<Acc> rotary_;
  Acc* turned_ = nullptr;                // [batch, heads, ld] the token's queries
  std::vector<SoftmaxPart<Acc>> parts_;  // [batch, per_row_]
  int64_t per_row_ = 1;
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
  Tensor o = result_like(v);
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
