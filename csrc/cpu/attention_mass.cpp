// Column mass of attention:  m_j = Σ_i e^{s_ij - ℓ_i} over the rows i of a range that see key j, ℓ given.
//
// A task owns a span of keys of one key head: it passes over the tiles of queries that see any of them, each loaded once
// for the whole span, and adds up its columns. No two tasks write the same sum, and each sum has one order.
#include "attention.h"
#include "results.h"

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "attention_mass_cpu";
constexpr int kRows = 128;  // of a tile of queries
constexpr int kTiles = 4;   // of keys, in the span of a task
constexpr int64_t kSpan = int64_t{kTiles} * kKeys;

// Rows of each sequence, as a Python slice names them.
struct RowRange {
  int64_t start, stop;

  AttentionMask::Range of(int64_t length) const {
    const auto bound = [&](int64_t at) { return std::clamp<int64_t>(at < 0 ? at + length : at, 0, length); };
    return {bound(start), std::max(bound(start), bound(stop))};
  }
};

template <class E>
struct MassTemporaries {
  using Acc = AccumulateOf<E>;
  std::vector<KeyTile<E>> keys;
  Acc *rows, *p, *unused;               // [kRows, K], [kRows, kKeys] twice
  E* operand;                           // rows, where E is not Acc
  Acc *lse, *zeros, *ones, *high, *low;  // [kRows]
  Acc* part;                            // [kKeys], of one tile of queries
  double* mass;                         // [group, kSpan]

  MassTemporaries(Arena& arena, const Attention& a, const AttentionSizes& s)
      : rows(arena.take<Acc>(int64_t{kRows} * s.ld_key)),
        p(arena.take<Acc>(int64_t{kRows} * s.ld_scores)),
        unused(arena.take<Acc>(int64_t{kRows} * s.ld_scores)),
        operand(arena.take<E>(packed_size<E>(kRows, s.ld_key))),
        lse(arena.take<Acc>(kRows)),
        zeros(arena.take<Acc>(kRows)),
        ones(arena.take<Acc>(kRows)),
        high(arena.take<Acc>(kRows)),
        low(arena.take<Acc>(kRows)),
        part(arena.take<Acc>(kKeys)),
        mass(arena.take<double>(a.group() * kSpan)) {
    for (int i = 0; i < kTiles; ++i) keys.emplace_back(arena, a, s);
  }
};

template <class E>
class Mass {
  using Acc = AccumulateOf<E>;

  struct Task {
    int64_t sequence, first;  // key of the span
  };

 public:
  Mass(const Attention& a, const Primitives<E>& isa, const RowRange& range, bool grouped, const void* lse, void* mass)
      : a_(a),
        isa_(isa),
        s_(a, isa.unit, kRows),
        range_(range),
        grouped_(grouped),
        lse_(static_cast<const Acc*>(lse)),
        mass_(static_cast<Acc*>(mass)) {}

  void run(int64_t threads) {
    std::vector<Task> tasks;
    for (int64_t n = 0; n < a_.keys.count(); ++n) {
      for (int64_t first = 0; first < a_.keys.length(n); first += kSpan) tasks.push_back({n, first});
    }
    const int64_t count = static_cast<int64_t>(tasks.size()) * a_.key_heads;
    threads = std::max<int64_t>(1, std::min(threads, count));
    const auto make = [&](Arena& arena) { return MassTemporaries<E>(arena, a_, s_); };
    const size_t bytes = bytes_of(make);
    Scratch scratch(bytes * threads);
    std::vector<MassTemporaries<E>> temporaries;
    for (int64_t i = 0; i < threads; ++i) {
      Arena arena(scratch.data() + i * bytes);
      MassTemporaries<E>& t = temporaries.emplace_back(make(arena));
      std::fill(t.zeros, t.zeros + kRows, Acc(0));
      std::fill(t.ones, t.ones + kRows, Acc(1));
      std::fill(t.unused, t.unused + int64_t{kRows} * s_.ld_scores, Acc(0));
    }
    parallel_tasks(count, threads, isa_, [&](int64_t i, int64_t worker) {
      process(tasks[i / a_.key_heads], i % a_.key_heads, temporaries[worker]);  // the first keys are seen by most
    });
  }

 private:
  void process(const Task& task, int64_t key_head, MassTemporaries<E>& t) const {
    const SeenKeys seen = a_.seen(task.sequence);
    const AttentionMask::Range wanted = range_.of(seen.queries());
    const int64_t end = std::min(task.first + kSpan, seen.keys());
    const int tiles = static_cast<int>((end - task.first + kKeys - 1) / kKeys);
    std::fill(t.mass, t.mass + a_.group() * kSpan, 0.0);
    const AttentionMask::Range rows = seen.rows(wanted.begin, wanted.end, task.first, end);
    if (rows.begin < rows.end) {
      for (int i = 0; i < tiles; ++i) {
        const int64_t from = task.first + int64_t{i} * kKeys;
        t.keys[i].load(a_, isa_, s_, task.sequence, key_head, from, std::min(from + kKeys, end));
      }
      for (int64_t row = rows.begin / kRows * kRows; row < rows.end; row += kRows) {
        for (int64_t m = 0; m < a_.group(); ++m) {
          const Left<E> queries = load(task.sequence, a_.head(key_head, m), row, rows.end, wanted, t);
          double* mass = t.mass + m * kSpan;
          for (int i = 0; i < tiles; ++i) add(seen, queries, m, row, wanted, t.keys[i], mass + i * kKeys, t);
        }
      }
    }
    store(task, key_head, end, t);
  }

  // Rows row..end of one head, of a tile at most. Those that are not there, not wanted or see nothing get ℓ = inf, hence
  // no weight.
  Left<E> load(int64_t sequence, int64_t head, int64_t row, int64_t end, const AttentionMask::Range& wanted,
               MassTemporaries<E>& t) const {
    const int rows = static_cast<int>(std::min<int64_t>(end - row, kRows)), padded = round_up(rows, s_.unit);
    const int64_t token = a_.queries.start(sequence) + row;
    constexpr Acc infinity = std::numeric_limits<Acc>::infinity();
    load_head(isa_, t.rows, s_.ld_key, padded, s_.key_dim, a_.q, a_.element, token, a_.heads, head, rows, a_.key_dim);
    for (int i = 0; i < padded; ++i) {
      const bool counts = i < rows && row + i >= wanted.begin;
      const Acc lse = counts ? lse_[(token + i) * a_.heads + head] : infinity;
      t.lse[i] = lse == -infinity ? infinity : lse;
    }
    if (a_.decay) {
      const int64_t at = a_.keys.start(sequence) + row + a_.offset(sequence);
      load_decay(t.high, t.low, a_, at, head, rows, padded);
    }
    return as_left(isa_, t.operand, t.rows, s_.ld_key, padded, s_.key_dim);
  }

  // What the loaded rows give to one tile of keys.
  void add(const SeenKeys& seen, const Left<E>& queries, int64_t member, int64_t row,
           const AttentionMask::Range& wanted, const KeyTile<E>& keys, double* mass, MassTemporaries<E>& t) const {
    const int64_t first = std::max(row, wanted.begin), last = std::min(row + kRows, wanted.end);
    const AttentionMask::Range rows = seen.rows(first, last, keys.begin, keys.begin + keys.count);
    if (rows.begin == rows.end) return;
    const int from = static_cast<int>(rows.begin - row) / s_.unit * s_.unit;
    const int n = round_up(static_cast<int>(rows.end - row), s_.unit) - from, ld = s_.ld_scores;
    isa_.gemm(t.p, ld, rows_from(queries, from), {keys.transposed, ld}, n, keys.width, s_.key_dim, 0, Part::full);
    const int64_t begin = row + from, end = std::min(begin + n, seen.queries());
    if (!seen.all(begin, end, keys.begin, keys.begin + keys.width)) {
      seen.hide(t.p, ld, begin, begin + n, keys.begin, keys.width);
    }
    isa_.softmax_rows_backward(t.p, t.unused, ld, Acc(a_.scale), keys.bias(member, t.high + from, t.low + from),
                               t.lse + from, t.zeros, n, keys.width);
    std::fill(t.part, t.part + keys.width, Acc(0));
    isa_.add_rows(t.part, 0, t.ones, t.p, ld, n, keys.width);
    for (int j = 0; j < keys.count; ++j) mass[j] += t.part[j];
  }

  void store(const Task& task, int64_t key_head, int64_t end, const MassTemporaries<E>& t) const {
    const int64_t token = a_.keys.start(task.sequence) + task.first;
    for (int64_t j = 0; j < end - task.first; ++j) {
      double total = 0;
      for (int64_t m = 0; m < a_.group(); ++m) {
        const double mass = t.mass[m * kSpan + j];
        total += mass;
        if (!grouped_) mass_[(token + j) * a_.heads + a_.head(key_head, m)] = static_cast<Acc>(mass);
      }
      if (grouped_) mass_[(token + j) * a_.key_heads + key_head] = static_cast<Acc>(total);
    }
  }

  const Attention& a_;
  const Primitives<E>& isa_;
  const AttentionSizes s_;
  const RowRange range_;
  const bool grouped_;
  const Acc* lse_;
  Acc* mass_;
};

Tensor attention_mass(Tensor q, Tensor k, Tensor lse, std::optional<Tensor> decay, std::optional<Tensor> cu_seqlens_q,
                      std::optional<Tensor> cu_seqlens_k, int64_t causal, int64_t window, int64_t prefix_len,
                      int64_t block_size, int64_t summary, int64_t dilation, int64_t dilated_window,
                      int64_t dilated_prefix, int64_t q_offset, bool tile_heads, double scale, int64_t start,
                      int64_t stop, bool grouped) {
  Attention a = read_arguments(kOp, q, k, k, std::nullopt, decay, cu_seqlens_q, cu_seqlens_k,
                               {causal, window, prefix_len, block_size, summary, dilation, dilated_window,
                                dilated_prefix, q_offset, tile_heads, scale});
  a.value_dim = 0;  // of the tiles of keys that are shared with attention
  const ScalarType sums = state_dtype(q.scalar_type());
  check_tensor(kOp, "lse", lse, {sums}, {q.size(0), q.size(1), q.size(2)});
  Tensor mass = empty_result(k, {k.size(0), k.size(1), grouped ? a.key_heads : a.heads}, sums);
  with_primitives(q.scalar_type(), [&](const auto& isa) {
    Mass(a, isa, {start, stop}, grouped, lse.const_data_ptr(), mass.mutable_data_ptr())
        .run(torch::stable::get_num_threads());
  });
  return mass;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("attention_mass_cpu", TORCH_BOX(&attention_mass)); }

}  // namespace memattn::cpu
