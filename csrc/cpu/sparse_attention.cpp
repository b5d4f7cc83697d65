// Sparse attention, forward:  o_i = Σ_j e^{s_ij - ℓ_i} v_j,  s_ij = scale q_i·k_j + bias,  over the tokens j of a list.
//
// The heads of a group read one list: they are the rows of every product, and the tokens are copied together by tiles,
// which is also where 16-bit numbers become float, once for the whole group. A list is cut into spans of entries, each
// with an online softmax of its own; the spans of a row are merged in ascending order. Where there are few lists the
// spans are tasks, else the lists are: the same sums in the same order, so that bits depend neither on the thread count
// nor on how many queries there are.
#include "sparse_attention.h"

#include <cmath>
#include <limits>
#include <tuple>

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "sparse_attention_cpu";
constexpr int64_t kSpan = 512;  // tokens of a span, or one entry
constexpr int64_t kBytesWorthAThread = 256 << 10;

// Maximum, sum and unnormalised output of the rows of a group.
template <class Acc>
struct PartialRows {
  Acc *out, *most, *sum;

  PartialRows(Arena& arena, const SparseSizes& s)
      : out(arena.take<Acc>(int64_t{s.group} * s.ld_value)),
        most(arena.take<Acc>(s.group)),
        sum(arena.take<Acc>(s.group)) {}
};

template <class E>
struct Temporaries {
  using Acc = AccumulateOf<E>;
  PartialRows<Acc> total, part;
  Acc *q, *rows, *scores, *shrink;  // [group, K], [kTokens, K or V], [group, kTokens], [group]
  Acc *nothing, *taken;             // bias of the rows, which is 0, and of the tokens

  Temporaries(Arena& arena, const SparseSizes& s)
      : total(arena, s),
        part(arena, s),
        q(arena.take<Acc>(int64_t{s.group} * s.ld_key)),
        rows(arena.take<Acc>(int64_t{kTokens} * std::max(s.ld_key, s.ld_value))),
        scores(arena.take<Acc>(int64_t{s.group} * s.ld_scores)),
        shrink(arena.take<Acc>(s.group)),
        nothing(arena.take<Acc>(std::max(s.group, kTokens))),
        taken(arena.take<Acc>(kTokens)) {}
};

template <class E>
class Forward {
  using Acc = AccumulateOf<E>;
  static constexpr Acc kNothing = -std::numeric_limits<Acc>::infinity();

 public:
  Forward(const SparseAttention& a, const Primitives<E>& isa, void* o, void* lse)
      : a_(a),
        isa_(isa),
        s_(a, isa.unit),
        o_(o),
        lse_(static_cast<Acc*>(lse)),
        step_(std::max<int64_t>(1, kSpan / a.unit)),
        spans_((a.entries + step_ - 1) / step_),
        rows_(a.rows_by_lists()) {}

  void run(int64_t threads) {
    const int64_t lists = static_cast<int64_t>(rows_.size()) * a_.key_heads;
    if (lists == 0) return;
    const int64_t tokens = std::min(a_.entries * a_.unit, longest());
    const int64_t traffic = lists * tokens * (a_.key_dim + a_.value_dim) * bytes_of(a_.element);
    threads = std::clamp<int64_t>(traffic / kBytesWorthAThread, 1, threads);
    const bool split = threads > 1 && spans_ > 1 && lists < 4 * threads;
    const auto make_partial = [&](Arena& arena) { return PartialRows<Acc>(arena, s_); };
    const auto make = [&](Arena& arena) { return Temporaries<E>(arena, s_); };
    const size_t partial_bytes = bytes_of(make_partial), bytes = bytes_of(make);
    Scratch partial_scratch(split ? partial_bytes * lists * spans_ : 0), scratch(bytes * threads);
    std::vector<Temporaries<E>> temporaries;
    for (int64_t i = 0; i < threads; ++i) {
      Arena arena(scratch.data() + i * bytes);
      temporaries.push_back(make(arena));
      std::fill_n(temporaries[i].nothing, std::max(s_.group, kTokens), Acc(0));
    }
    const auto partial = [&](int64_t i) {
      Arena arena(partial_scratch.data() + i * partial_bytes);
      return make_partial(arena);
    };
    if (split) {
      parallel_tasks(lists * spans_, threads, isa_, [&](int64_t i, int64_t worker) {
        attend(i / spans_, i % spans_, partial(i), temporaries[worker]);
      });
    }
    parallel_tasks(lists, threads, isa_, [&](int64_t i, int64_t worker) {
      Temporaries<E>& t = temporaries[worker];
      begin(i, t.total);
      for (int64_t span = 0; span < spans_; ++span) {
        if (!split) attend(i, span, t.part, t);
        merge(t.total, split ? partial(i * spans_ + span) : t.part);
      }
      finish(i, t.total);
    });
  }

 private:
  // List i is that of a key head and a query row: neighbouring queries read the same tokens.
  int64_t row_of(int64_t i) const { return rows_[i % rows_.size()]; }
  int64_t key_head_of(int64_t i) const { return i / static_cast<int64_t>(rows_.size()); }

  int64_t longest() const {
    int64_t most = 0;
    for (int64_t n = 0; n < a_.queries.count(); ++n) most = std::max(most, a_.memory.length(n));
    return most;
  }

  // The rows of a group take in one span of their list.
  void attend(int64_t list, int64_t span, PartialRows<Acc> part, Temporaries<E>& t) const {
    const int64_t row = row_of(list), key_head = key_head_of(list), used = a_.used(row, key_head);
    std::fill_n(part.out, int64_t{s_.group} * s_.ld_value, Acc(0));
    std::fill_n(part.most, s_.group, kNothing);
    std::fill_n(part.sum, s_.group, Acc(0));
    const HeadRows<E> keys(isa_, a_, a_.k, key_head, a_.key_dim, s_.key_dim, s_.ld_key);
    const HeadRows<E> values(isa_, a_, a_.v, key_head, a_.value_dim, s_.value_dim, s_.ld_value);
    TokenCursor cursor(a_, row, key_head, span * step_, std::min((span + 1) * step_, used));
    TokenTile tiles[2];
    cursor.fill(tiles[0]);
    if (tiles[0].tokens == 0) return;
    load_group(isa_, t.q, s_.ld_key, s_.key_dim, a_.q, a_, row, key_head, a_.key_dim);
    for (int at = 0; tiles[at].tokens > 0; at ^= 1) {
      cursor.fill(tiles[at ^ 1]);
      keys.load(t.rows, tiles[at], tiles[at ^ 1]);
      weigh(tiles[at], a_.bias_of<Acc>(row, key_head), part, t);
      values.load(t.rows, tiles[at], tiles[at ^ 1]);
      isa_.weigh_values(part.out, s_.ld_value, t.scores, s_.ld_scores, t.rows, element_of_accumulate<Acc>(),
                        s_.ld_value, tiles[at].tokens, 1, s_.group, s_.value_dim);
    }
  }

  // The weights of the tokens whose keys are in t.rows.
  void weigh(const TokenTile& tile, const Acc* bias, PartialRows<Acc> part, Temporaries<E>& t) const {
    const int width = round_up(tile.tokens, s_.unit);
    isa_.score_keys(t.scores, s_.ld_scores, t.q, s_.ld_key, t.rows, element_of_accumulate<Acc>(), s_.ld_key,
                    tile.tokens, 1, s_.group, s_.key_dim);
    for (int m = 0; m < s_.group; ++m) {
      Acc* scores = t.scores + int64_t{m} * s_.ld_scores;
      std::fill(scores + tile.tokens, scores + width, kNothing);
    }
    PairBias<Acc> pairs{};
    if (bias) {
      load_bias(t.taken, tile, bias);
      std::fill(t.taken + tile.tokens, t.taken + width, Acc(0));
      pairs = {t.nothing, t.nothing, t.taken, t.nothing};
    }
    isa_.softmax_rows(t.scores, s_.ld_scores, Acc(a_.scale), pairs, part.most, part.sum, t.shrink, s_.group, width);
    if (std::any_of(t.shrink, t.shrink + s_.group, [](Acc x) { return x != 1; })) {
      isa_.scale_rows(part.out, s_.ld_value, t.shrink, s_.group, s_.value_dim);
    }
  }

  void begin(int64_t list, PartialRows<Acc> total) const {
    std::fill_n(total.out, int64_t{s_.group} * s_.ld_value, Acc(0));
    for (int m = 0; m < s_.group; ++m) {
      total.most[m] = a_.sink ? static_cast<const Acc*>(a_.sink)[key_head_of(list) * s_.group + m] : kNothing;
      total.sum[m] = Acc(total.most[m] != kNothing);
    }
  }

  void merge(PartialRows<Acc> total, PartialRows<Acc> part) const {
    for (int m = 0; m < s_.group; ++m) {
      if (part.sum[m] == 0) continue;
      Acc* out = total.out + int64_t{m} * s_.ld_value;
      const Acc top = std::max(total.most[m], part.most[m]);
      const Acc keep = std::exp(total.most[m] - top), take = std::exp(part.most[m] - top);
      total.sum[m] = keep * total.sum[m] + take * part.sum[m];
      total.most[m] = top;
      isa_.scale_rows(out, s_.ld_value, &keep, 1, s_.value_dim);
      isa_.add_rows(out, s_.ld_value, &take, part.out + int64_t{m} * s_.ld_value, s_.ld_value, 1, s_.value_dim);
    }
  }

  void finish(int64_t list, PartialRows<Acc> total) const {
    const int64_t at = row_of(list) * a_.heads + key_head_of(list) * s_.group;
    for (int m = 0; m < s_.group; ++m) {
      const Acc sum = total.sum[m];
      lse_[at + m] = sum == 0 ? kNothing : total.most[m] + std::log(sum);
      total.sum[m] = sum == 0 ? Acc(0) : 1 / sum;
    }
    isa_.store_rows(offset(o_, a_.element, at * a_.value_dim), a_.element, a_.value_dim, total.out, s_.ld_value,
                    total.sum, s_.group, a_.value_dim);
  }

  const SparseAttention& a_;
  const Primitives<E>& isa_;
  const SparseSizes s_;
  void* o_;
  Acc* lse_;
  const int64_t step_, spans_;  // entries of a span; spans of a list
  const std::vector<int64_t> rows_;  // that go list by list
};

std::tuple<Tensor, Tensor> sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, std::optional<Tensor> counts,
                                            std::optional<Tensor> q_positions, std::optional<Tensor> bias,
                                            std::optional<Tensor> sink, std::optional<Tensor> page_table,
                                            std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
                                            int64_t unit, double scale) {
  const SparseAttention a = read_sparse_arguments(kOp, q, k, v, indices, counts, q_positions, bias, sink, page_table,
                                                  cu_seqlens_q, cu_seqlens_k, unit, scale);
  Tensor o = empty_result(q, {q.size(0), q.size(1), q.size(2), v.size(3)});
  Tensor lse = empty_result(q, {q.size(0), q.size(1), q.size(2)}, state_dtype(q.scalar_type()));
  with_primitives(q.scalar_type(), [&](const auto& isa) {
    Forward(a, isa, o.mutable_data_ptr(), lse.mutable_data_ptr()).run(torch::stable::get_num_threads());
  });
  attend_blocks(a, q.scalar_type(), o.mutable_data_ptr(), lse.mutable_data_ptr());
  return {o, lse};
}

}  // namespace

SparseAttention read_sparse_arguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                      const Tensor& indices, const std::optional<Tensor>& counts,
                                      const std::optional<Tensor>& q_positions, const std::optional<Tensor>& bias,
                                      const std::optional<Tensor>& sink, const std::optional<Tensor>& page_table,
                                      const std::optional<Tensor>& cu_seqlens_q,
                                      const std::optional<Tensor>& cu_seqlens_k, int64_t unit, double scale) {
  check_tensor(op, "q", q, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double},
               {kAnySize, kAnySize, kAnySize, kAnySize});
  const ScalarType type = q.scalar_type(), sums = state_dtype(type);
  const int64_t batch = q.size(0), length = q.size(1), heads = q.size(2), key_dim = q.size(3);
  check_tensor(op, "k", k, {type}, {page_table ? kAnySize : batch, kAnySize, kAnySize, key_dim});
  const int64_t key_heads = k.size(2);
  check_tensor(op, "v", v, {type}, {k.size(0), k.size(1), key_heads, kAnySize});
  const int64_t value_dim = v.size(3);
  if (key_heads < 1 || heads < 1 || heads % key_heads) {
    fail(op, "q must have a positive multiple of k's ", key_heads, " heads; got ", heads);
  }
  if (key_dim < 1 || key_dim > 256 || value_dim < 1 || value_dim > 256) {
    fail(op, "head dimensions must be 1..256; got ", key_dim, " and ", value_dim);
  }
  check_tensor(op, "indices", indices, {ScalarType::Int}, {batch, length, kAnySize, kAnySize});
  const int64_t list_heads = indices.size(2), entries = indices.size(3);
  if (list_heads != 1 && list_heads != key_heads) {
    fail(op, "indices must have 1 or k's ", key_heads, " heads; got ", list_heads);
  }
  check_tensor(op, "counts", counts, {ScalarType::Int}, {batch, length, list_heads});
  check_tensor(op, "q_positions", q_positions, {ScalarType::Int, ScalarType::Long}, {batch, length});
  check_tensor(op, "bias", bias, {sums}, {batch, length, key_heads, entries});
  check_tensor(op, "sink", sink, {sums}, {heads});
  check_tensor(op, "page_table", page_table, {ScalarType::Int}, {batch, kAnySize});
  if (unit < 1 || unit > std::numeric_limits<int32_t>::max()) fail(op, "unit must be 1..2^31 - 1; got ", unit);
  if (cu_seqlens_q.has_value() != cu_seqlens_k.has_value() || (cu_seqlens_q && page_table)) {
    fail(op, "cu_seqlens must be given for both or none of q, k, and without page_table");
  }

  SparseAttention a{};
  a.queries = cu_seqlens_q ? SequenceLayout::packed(read_cu_seqlens(op, *cu_seqlens_q, batch, length))
                           : SequenceLayout::batch(batch, length);
  a.memory.rows = cu_seqlens_k ? SequenceLayout::packed(read_cu_seqlens(op, *cu_seqlens_k, batch, k.size(1)))
                               : SequenceLayout::batch(batch, k.size(1));
  if (a.queries.count() != a.memory.rows.count()) {
    fail(op, "cu_seqlens must have as many sequences of k as of q; got ", a.memory.rows.count(), " and ",
         a.queries.count());
  }
  if (page_table) {
    a.memory = {SequenceLayout::batch(batch, 0), true, page_table->const_data_ptr<int32_t>(), k.size(1),
                page_table->size(1), k.size(0)};
  }
  a.heads = heads;
  a.key_heads = key_heads;
  a.list_heads = list_heads;
  a.entries = entries;
  a.unit = unit;
  a.key_dim = static_cast<int>(key_dim);
  a.value_dim = static_cast<int>(value_dim);
  a.q = q.const_data_ptr();
  a.k = k.const_data_ptr();
  a.v = v.const_data_ptr();
  a.element = element_of(type);
  a.indices = indices.const_data_ptr<int32_t>();
  a.counts = counts ? counts->const_data_ptr<int32_t>() : nullptr;
  if (q_positions) a.last = read_indices(*q_positions);
  a.bias = bias ? bias->const_data_ptr() : nullptr;
  a.sink = sink ? sink->const_data_ptr() : nullptr;
  a.scale = scale;
  for (int64_t n = 0; n < a.queries.count(); ++n) a.sequence.insert(a.sequence.end(), a.queries.length(n), n);
  return a;
}

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("sparse_attention_cpu", TORCH_BOX(&sparse_attention)); }

}  // namespace memattn::cpu
