// Nearest keys: the k largest of q_i . k_j for every query, whose scores never leave the cache.
//
// A task is a block of queries against a part of the keys. Tile by tile of keys the product is computed with a column for
// every query; what exceeds the query's cut, soon almost nothing, joins its candidates (topk.h).
#include "blocks.h"
#include "topk.h"

#include <optional>
#include <tuple>

namespace memattn::topk {
namespace {

using cpu::Arena;
using cpu::Element;
using cpu::Scratch;
using cpu::round_up;

constexpr const char* kOp = "knn_cpu";
constexpr int64_t kMostNeighbours = 128;
constexpr int64_t kQueries = 256;           // of a task
constexpr int kKeys = 64;                   // of a tile
constexpr int64_t kPartKeys = 4096;         // least of a task that shares its queries with others
constexpr int64_t kTaskRows = 64;           // queries whose parts are joined by one task
constexpr double kTiny = 1e-12;             // added to a squared length, as in the reference

// The op's arguments, checked.
struct Knn {
  int64_t batch, queries, heads, tokens, key_heads, k;
  int dim;
  const void *q, *keys;  // [batch, queries, heads, dim], [batch, tokens, key_heads, dim]
  Element element;
  std::vector<int64_t> lengths;  // keys of each batch row; empty: all
  bool cosine;
  double threshold;

  int64_t group() const { return heads / key_heads; }
  int64_t rows() const { return queries * group(); }  // that share one head's keys
  int64_t length(int64_t b) const { return lengths.empty() ? tokens : lengths[b]; }
  // Where query row r of a key head stands among all [batch, queries, heads].
  int64_t place(int64_t b, int64_t key_head, int64_t r) const {
    return (b * queries + r / group()) * heads + key_head * group() + r % group();
  }
};

template <class A>
struct Found {
  A* values;                  // [batch, queries, heads, k]
  int32_t *indices, *counts;  // likewise, [batch, queries, heads]
};

struct TaskGrid {
  int64_t blocks, parts, count;  // of queries per key head, of keys; tasks

  TaskGrid(const Knn& a, int64_t threads) : blocks((a.rows() + kQueries - 1) / kQueries), parts(1) {
    const int64_t whole = a.batch * a.key_heads * blocks;
    if (whole < 4 * threads && whole % threads != 0) parts = std::clamp<int64_t>(a.tokens / kPartKeys, 1, threads);
    count = whole * parts;
  }
};

// A bound for vectors: everything that passes the cut exceeds it, also where subnormals are read as zeros.
template <class A>
A loose(Cut<A> cut) {
  constexpr A normal = std::numeric_limits<A>::min();
  if (!cut.inclusive) return cut.value;
  if (std::abs(cut.value) <= normal) return -2 * normal;
  return std::nextafter(cut.value, -std::numeric_limits<A>::infinity());
}

template <class E>
struct Block {
  using A = cpu::AccumulateOf<E>;
  A *rows, *key_rows, *reciprocal;  // [kQueries, dim], [kKeys, dim] as loaded; 1 / length of each
  E *columns, *packed;              // queries as right operand [dim, kQueries], keys as left
  A* scores;                        // [kKeys, kQueries]
  int32_t* offsets;                 // of scores
  A* bounds;                        // [kQueries], loose cuts
  Cut<A>* cuts;                     // [kQueries]
  Candidates<A>* candidates;        // [kQueries]
  Spare<A> spare;
  int64_t used = 0;
  int width, ld, ld_scores = cpu::leading(kQueries);

  Block(Arena& arena, const Knn& a, int unit)
      : spare(arena, candidate_capacity(a.k)), width(round_up(a.dim, unit)), ld(cpu::leading(width)) {
    rows = arena.take<A>(kQueries * ld);
    key_rows = arena.take<A>(int64_t{kKeys} * ld);
    reciprocal = arena.take<A>(kQueries);
    columns = arena.take<E>(int64_t{width} * ld_scores);
    packed = arena.take<E>(cpu::packed_size<E>(kKeys, ld));
    scores = arena.take<A>(int64_t{kKeys} * ld_scores);
    offsets = arena.take<int32_t>(kKeys * kQueries + kSlack);
    bounds = arena.take<A>(kQueries);
    cuts = arena.take<Cut<A>>(kQueries);
    candidates = arena.take<Candidates<A>>(kQueries);
    const int64_t count = std::min(kQueries, a.rows());
    for (int64_t i = 0; i < count; ++i) {
      const Candidates<A> own = make_candidates<A>(arena, a.k);
      if (candidates) candidates[i] = own;
    }
  }

  void load_queries(const Knn& a, const cpu::Primitives<E>& isa, int64_t b, int64_t key_head, int64_t first, int64_t count) {
    const int padded = round_up(static_cast<int>(count), isa.unit);
    used = padded;
    for (int64_t i = 0; i < padded; ++i) {
      const int64_t at = i < count ? a.place(b, key_head, first + i) * a.dim : 0;
      isa.load_rows(rows + i * ld, ld, 1, width, cpu::offset(a.q, a.element, at), a.element, a.dim, i < count, a.dim);
    }
    if (a.cosine) isa.l2norm_rows(rows, ld, reciprocal, static_cast<A>(kTiny), padded, width);
    isa.pack_right_transposed(columns, ld_scores, rows, ld, padded, width);
    const A least = static_cast<A>(a.threshold);
    const Cut<A> cut{least, least > -std::numeric_limits<A>::infinity()};
    for (int64_t i = 0; i < padded; ++i) {
      cuts[i] = cut;
      bounds[i] = i < count ? loose(cut) : std::numeric_limits<A>::infinity();
      if (i < count) candidates[i].count = 0;
    }
  }

  void score_keys(const Knn& a, const cpu::Primitives<E>& isa, int64_t b, int64_t key_head, int64_t token, int count) {
    const int64_t at = ((b * a.tokens + token) * a.key_heads + key_head) * a.dim;
    const int padded = round_up(count, isa.unit);
    isa.load_rows(key_rows, ld, padded, width, cpu::offset(a.keys, a.element, at), a.element, a.key_heads * a.dim, count,
                  a.dim);
    if (a.cosine) isa.l2norm_rows(key_rows, ld, reciprocal, static_cast<A>(kTiny), padded, width);
    isa.gemm(scores, ld_scores, cpu::as_left(isa, packed, key_rows, ld, padded, width), {columns, ld_scores}, padded,
             static_cast<int>(used), width, 0, cpu::Part::full);
  }

  void add_scores(const Table<A>& table, int64_t k, int64_t token, int count) {
    const int64_t found = table.exceeding(offsets, scores, ld_scores, count, static_cast<int>(used), bounds);
    for (int64_t n = 0; n < found; ++n) {
      const int32_t key = offsets[n] / ld_scores, query = offsets[n] % ld_scores;
      const A score = scores[offsets[n]];
      if (!cuts[query].passed_by(score)) continue;
      Candidates<A>& to = candidates[query];
      to.values[to.count] = score;
      to.positions[to.count] = static_cast<int32_t>(token + key);
      if (++to.count < to.capacity) continue;
      keep_best(table, to, cuts[query], k, spare);
      bounds[query] = cuts[query].value;
    }
  }
};

template <class A>
void store(const Knn& a, const Found<A>& found, int64_t row, const Candidates<A>& best) {
  std::copy_n(best.values, best.count, found.values + row * a.k);
  std::copy_n(best.positions, best.count, found.indices + row * a.k);
  std::fill_n(found.values + row * a.k + best.count, a.k - best.count, -std::numeric_limits<A>::infinity());
  std::fill_n(found.indices + row * a.k + best.count, a.k - best.count, -1);
  found.counts[row] = static_cast<int32_t>(best.count);
}

// One task: a block of queries against a part of the keys, its selections to `deliver(row, candidates)`.
template <class E, class Deliver>
void search(const Knn& a, const cpu::Primitives<E>& isa, Block<E>& block, const TaskGrid& grid, int64_t task,
            const Deliver& deliver) {
  using A = cpu::AccumulateOf<E>;
  const Table<A>& rows = table<A>();
  const int64_t part = task % grid.parts, whole = task / grid.parts;
  const int64_t key_head = whole / grid.blocks % a.key_heads, b = whole / grid.blocks / a.key_heads;
  const int64_t first = whole % grid.blocks * kQueries, count = std::min(kQueries, a.rows() - first);
  const int64_t tiles = (a.length(b) + kKeys - 1) / kKeys;
  const int64_t begin = tiles * part / grid.parts * kKeys, end = std::min(a.length(b), tiles * (part + 1) / grid.parts * kKeys);
  block.load_queries(a, isa, b, key_head, first, count);
  for (int64_t token = begin; token < end; token += kKeys) {
    const int keys = static_cast<int>(std::min<int64_t>(kKeys, end - token));
    block.score_keys(a, isa, b, key_head, token, keys);
    block.add_scores(rows, a.k, token, keys);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (block.candidates[i].count > a.k) keep_best(rows, block.candidates[i], block.cuts[i], a.k, block.spare);
    deliver(a.place(b, key_head, first + i), block.candidates[i]);
  }
}

template <class E>
void search_all(const Knn& a, const cpu::Primitives<E>& isa, const Found<cpu::AccumulateOf<E>>& found) {
  using A = cpu::AccumulateOf<E>;
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const TaskGrid grid(a, threads);
  const int64_t workers = std::min(threads, grid.count), total = a.batch * a.queries * a.heads;
  const auto make_block = [&](Arena& arena) { return Block<E>(arena, a, isa.unit); };
  const auto make_partial = [&](Arena& arena) {
    return Partial<A>(arena, grid.parts > 1 ? total : 0, grid.parts, a.k);
  };
  const auto make_spare = [&](Arena& arena) { return Spare<A>(arena, grid.parts * a.k); };
  const size_t block_bytes = cpu::bytes_of(make_block), spare_bytes = cpu::bytes_of(make_spare);
  Scratch scratch(workers * (block_bytes + spare_bytes) + cpu::bytes_of(make_partial));
  std::vector<Block<E>> blocks;
  std::vector<Spare<A>> spares;
  for (int64_t i = 0; i < workers; ++i) {
    Arena arena(scratch.data() + i * (block_bytes + spare_bytes));
    blocks.push_back(make_block(arena));
    spares.push_back(make_spare(arena));
  }
  Arena rest(scratch.data() + workers * (block_bytes + spare_bytes));
  const Partial<A> partial = make_partial(rest);

  cpu::parallel_tasks(grid.count, workers, isa, [&](int64_t task, int64_t worker) {
    search(a, isa, blocks[worker], grid, task, [&](int64_t row, const Candidates<A>& best) {
      if (grid.parts == 1) return store(a, found, row, best);
      partial.put(row * grid.parts + task % grid.parts, best);
    });
  });
  if (grid.parts == 1) return;
  cpu::parallel_tasks((total + kTaskRows - 1) / kTaskRows, workers, isa, [&](int64_t task, int64_t worker) {
    for (int64_t row = task * kTaskRows; row < std::min(total, (task + 1) * kTaskRows); ++row) {
      Candidates<A> all = partial.joined(row);
      Cut<A> cut{};
      if (all.count > a.k) keep_best(table<A>(), all, cut, a.k, spares[worker]);
      store(a, found, row, all);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> knn(Tensor q, Tensor keys, int64_t k, std::optional<Tensor> lengths, bool cosine,
                                       double threshold) {
  const ScalarType type = q.scalar_type();
  check_tensor(kOp, "q", q, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double},
               {kAnySize, kAnySize, kAnySize, kAnySize});
  const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), dim = q.size(3);
  check_tensor(kOp, "keys", keys, {type}, {batch, kAnySize, kAnySize, dim});
  check_tensor(kOp, "lengths", lengths, {ScalarType::Int, ScalarType::Long}, {batch});
  const int64_t tokens = keys.size(1), key_heads = keys.size(2);
  if (k < 1 || k > kMostNeighbours) fail(kOp, "k must be 1 to ", kMostNeighbours, "; got ", k);
  if (key_heads < 1 || heads % key_heads != 0) 
    fail(kOp, "q must have a positive multiple of the heads of keys, ", key_heads, "; got ", heads);
  if (dim < 1 || dim > 4096) fail(kOp, "head dimension must be 1 to 4096; got ", dim);
  if (tokens > std::numeric_limits<int32_t>::max()) fail(kOp, "keys must be fewer than 2^31; got ", tokens);
  std::vector<int64_t> counts;
  if (lengths) counts = read_indices(*lengths);
  for (int64_t& n : counts) n = std::clamp<int64_t>(n, 0, tokens);
  const Knn a{batch, queries, heads, tokens, key_heads, k, static_cast<int>(dim), q.const_data_ptr(),
              keys.const_data_ptr(), cpu::element_of(type), counts, cosine, threshold};
  Tensor values = empty_result(q, {batch, queries, heads, k}, cpu::state_dtype(type));
  Tensor indices = empty_result(q, {batch, queries, heads, k}, ScalarType::Int);
  Tensor used = empty_result(q, {batch, queries, heads}, ScalarType::Int);
  if (used.numel() == 0) return {values, indices, used};
  const auto run = [&]<class E>(const cpu::Primitives<E>& isa) {
    using A = cpu::AccumulateOf<E>;
    search_all<E>(a, isa, {static_cast<A*>(values.mutable_data_ptr()), indices.mutable_data_ptr<int32_t>(),
                           used.mutable_data_ptr<int32_t>()});
  };
  if (cosine && type != ScalarType::Double) {  // lengths of 1 are not for 16 bits
    run(*cpu::primitives<float>());
  } else {
    cpu::with_primitives(type, run);
  }
  return {values, indices, used};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("knn_cpu", TORCH_BOX(&knn)); }

}  // namespace memattn::topk
