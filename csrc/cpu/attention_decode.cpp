// Attention of the last tokens over a cache:  o_i = Σ_j e^{s_ij - ℓ_i} v_j,  s_ij = scale q_i·k_j + c_i - c_j.
//
// A task is a span of one row's keys, for all heads: the cache is read once, in the order it lies in memory, and that
// traffic is what bounds the step. Every task leaves its maximum, sum and unnormalised output per query row; a row's
// parts are then merged in ascending order. Spans and tiles begin at multiples of their sizes in positions, so bits
// depend neither on the thread count nor on how the cache is laid out.
#include "../common/sequences.h"
#include "attention_mask.h"
#include "blocks.h"
#include "parallel.h"
#include "results.h"

#include <cmath>
#include <limits>
#include <tuple>

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "attention_decode_cpu";
constexpr int kKeys = 64;         // of a tile
constexpr int64_t kSpan = 512;    // keys of a task
constexpr int64_t kQueries = 8;   // tokens of a task
constexpr int64_t kBytesWorthAThread = 256 << 10;

// Where the keys are: position -> slot (ring) -> row of the flattened cache (pages).
struct CacheLayout {
  int64_t capacity, page_size, max_pages, pages, ring_start;  // no ring: ring_start < 0; no pages: max_pages = 0
  const int32_t* page_table;

  bool ring() const { return ring_start >= 0; }
  int64_t ring_size() const { return capacity - ring_start; }
  // The first position beyond ring_start that is still there.
  int64_t oldest(int64_t tokens) const { return ring() ? std::max(ring_start, tokens - ring_size()) : 0; }

  struct Run {
    int64_t row, count;  // consecutive positions in consecutive rows; row -1: nothing is there
  };
  Run run(int64_t b, int64_t position, int64_t end) const {
    const bool turns = ring() && position >= ring_start;
    const int64_t slot = turns ? ring_start + (position - ring_start) % ring_size() : position;
    int64_t count = std::min(end - position, (ring() && !turns ? ring_start : capacity) - slot);
    if (max_pages == 0) return {b * capacity + slot, count};
    count = std::min(count, page_size - slot % page_size);
    const int64_t page = page_table[b * max_pages + slot / page_size];
    return {page < 0 || page >= pages ? -1 : page * page_size + slot % page_size, count};
  }
};

struct Decode {
  CacheLayout cache;
  AttentionMask mask;
  int64_t batch, tokens, heads, key_heads;
  int key_dim, value_dim;
  std::vector<int64_t> lengths;
  const void *q, *k, *v;
  Element element;
  const void *sink, *slopes;  // [heads] in the accumulate type, or null
  const double* decay;        // [rows of the cache, heads], or null
  bool tile_heads;
  double scale;

  int64_t group() const { return heads / key_heads; }
  int64_t head(int64_t key_head, int64_t member) const {
    return tile_heads ? member * key_heads + key_head : key_head * group() + member;
  }
  bool biased() const { return decay != nullptr || slopes != nullptr; }
  // The mask with the queries at the end of row b, and the first query whose position is not below 0.
  SeenKeys seen(int64_t b) const {
    AttentionMask at_end = mask;
    at_end.q_offset = lengths[b] - tokens;
    return {at_end, tokens, lengths[b]};
  }
  int64_t first_query(int64_t b) const { return std::clamp<int64_t>(tokens - lengths[b], 0, tokens); }
};

// Keys begin..end of queries first..last of row b. Those in low..high are not seen, or no longer there.
struct Part {
  int64_t b, first, last, begin, end, low, high;
};

// Query rows lie as [key head, member of its group, token]; `count` of them.
template <class Acc>
struct PartialRows {
  Acc *out, *most, *sum;

  PartialRows(Arena& arena, int64_t count, int ld)
      : out(arena.take<Acc>(count * ld)), most(arena.take<Acc>(count)), sum(arena.take<Acc>(count)) {}
};

template <class Acc>
struct Temporaries {
  Acc *q, *scores, *shrink;
  Acc *row_high, *row_low;  // [heads, tokens]
  Acc *key_high, *key_low;  // [heads, kKeys]

  Temporaries(Arena& arena, const Decode& d, int64_t rows, int ld_key, int ld_scores)
      : q(arena.take<Acc>(rows * ld_key)),
        scores(arena.take<Acc>(rows * ld_scores)),
        shrink(arena.take<Acc>(rows)),
        row_high(arena.take<Acc>(d.biased() ? rows : 0)),
        row_low(arena.take<Acc>(d.biased() ? rows : 0)),
        key_high(arena.take<Acc>(d.biased() ? d.heads * kKeys : 0)),
        key_low(arena.take<Acc>(d.biased() ? d.heads * kKeys : 0)) {}
};

template <class E>
class DecodeKernel {
  using Acc = AccumulateOf<E>;
  static constexpr Acc kNothing = -std::numeric_limits<Acc>::infinity();

 public:
  DecodeKernel(const Decode& d, const Primitives<E>& isa, void* o, void* lse)
      : d_(d),
        isa_(isa),
        o_(o),
        lse_(static_cast<Acc*>(lse)),
        ld_key_(leading(d.key_dim)),
        ld_value_(leading(d.value_dim)),
        ld_scores_(leading(kKeys)),
        rows_(d.heads * std::min(d.tokens, kQueries)) {}

  void run(int64_t threads) {
    struct Block {
      int64_t b, first, last;
      size_t begin, end;  // its parts
    };
    std::vector<Part> parts;
    std::vector<Block> blocks;
    for (int64_t b = 0; b < d_.batch; ++b) {
      for (int64_t first = 0; first < d_.tokens; first += kQueries) {
        const int64_t last = std::min(first + kQueries, d_.tokens);
        const size_t begin = parts.size();
        add_parts(parts, b, first, last);
        blocks.push_back({b, first, last, begin, parts.size()});
      }
    }
    const auto make_partial = [&](Arena& arena) { return PartialRows<Acc>(arena, rows_, ld_value_); };
    const auto make = [&](Arena& arena) { return Temporaries<Acc>(arena, d_, rows_, ld_key_, ld_scores_); };
    const size_t partial_bytes = bytes_of(make_partial), bytes = bytes_of(make);
    const int64_t count = static_cast<int64_t>(parts.size());
    const int64_t traffic = count * kSpan * d_.key_heads * (d_.key_dim + d_.value_dim) * bytes_of(d_.element);
    threads = std::clamp<int64_t>(traffic / kBytesWorthAThread, 1, threads);
    Scratch partial_scratch(partial_bytes * count), scratch(bytes * threads);
    std::vector<PartialRows<Acc>> partial;
    for (int64_t i = 0; i < count; ++i) {
      Arena arena(partial_scratch.data() + i * partial_bytes);
      partial.push_back(make_partial(arena));
    }
    parallel_tasks(count, threads, isa_, [&](int64_t i, int64_t worker) {
      Arena arena(scratch.data() + worker * bytes);
      process(parts[i], partial[i], make(arena));
    });
    parallel_tasks(static_cast<int64_t>(blocks.size()), threads, isa_, [&](int64_t i, int64_t) {
      const Block& block = blocks[i];
      merge(block.b, block.first, block.last, partial.data() + block.begin, partial.data() + block.end);
    });
  }

 private:
  void add_parts(std::vector<Part>& parts, int64_t b, int64_t first, int64_t last) const {
    first = std::max(first, d_.first_query(b));
    if (first >= last) return;
    const SeenKeys seen = d_.seen(b);
    const int64_t end = std::max(seen.range(last - 1).end, seen.prefix());
    const int64_t low = std::min(d_.cache.ring() ? d_.cache.ring_start : seen.prefix(), end);
    const int64_t wanted = seen.prefix() > low ? low : seen.range(first).begin;
    const int64_t high = std::max({low, wanted, d_.cache.oldest(d_.lengths[b])});
    for (int64_t span = 0; span * kSpan < end; ++span) {
      if (span * kSpan >= low) span = std::max(span, high / kSpan);
      if (span * kSpan >= end) break;
      parts.push_back({b, first, last, span * kSpan, std::min((span + 1) * kSpan, end), low, high});
    }
  }

  void process(const Part& part, const PartialRows<Acc>& partial, const Temporaries<Acc>& t) const {
    const int64_t queries = part.last - part.first, rows = d_.heads * queries;
    std::fill(partial.out, partial.out + rows * ld_value_, Acc(0));
    std::fill(partial.most, partial.most + rows, kNothing);
    std::fill(partial.sum, partial.sum + rows, Acc(0));
    load_queries(part, t);
    for (int64_t from = part.begin; from < part.end; from += kKeys) {
      const int64_t to = std::min(from + kKeys, part.end);
      if (from < part.low || to > part.high) add_tile(part, from, to, partial, t);
    }
  }

  void load_queries(const Part& part, const Temporaries<Acc>& t) const {
    const int64_t queries = part.last - part.first;
    for (int64_t row = 0; row < d_.heads * queries; ++row) {
      const int64_t h = head_of(row / queries), i = part.first + row % queries;
      isa_.load_rows(t.q + row * ld_key_, ld_key_, 1, round_up(d_.key_dim, 16),
                     offset(d_.q, d_.element, ((part.b * d_.tokens + i) * d_.heads + h) * d_.key_dim), d_.element, 0, 1,
                     d_.key_dim);
      if (!d_.biased()) continue;
      const int64_t position = d_.lengths[part.b] - d_.tokens + i;
      split(t.row_high[row], t.row_low[row],
            bias(h, position, d_.cache.run(part.b, position, position + 1).row));
    }
  }

  // Every query row takes in the keys from..to, as far as they are there.
  void add_tile(const Part& part, int64_t from, int64_t to, const PartialRows<Acc>& partial,
                const Temporaries<Acc>& t) const {
    const int queries = static_cast<int>(part.last - part.first), rows = static_cast<int>(d_.heads) * queries;
    const int per_key_head = static_cast<int>(d_.group()) * queries, count = static_cast<int>(to - from);
    const int width = round_up(count, isa_.unit), key_heads = static_cast<int>(d_.key_heads);
    for (int row = 0; row < rows; ++row) {
      Acc* scores = t.scores + int64_t{row} * ld_scores_;
      std::fill(scores + count, scores + width, kNothing);
    }
    if (d_.biased()) load_key_bias(t, to, count, {-1, width - count});
    for_each_run(part, from, to, [&](int64_t position, CacheLayout::Run run) {
      const int at = static_cast<int>(position - from), n = static_cast<int>(run.count);
      if (run.row < 0) {
        for (int row = 0; row < rows; ++row) {
          Acc* scores = t.scores + int64_t{row} * ld_scores_ + at;
          std::fill(scores, scores + n, kNothing);
        }
      } else {
        const int64_t stride = d_.key_heads * d_.key_dim;
        isa_.score_keys(t.scores + at, ld_scores_, t.q, ld_key_, offset(d_.k, d_.element, run.row * stride), d_.element,
                        stride, n, key_heads, per_key_head, d_.key_dim);
      }
      if (d_.biased()) load_key_bias(t, position, at, run);
    });
    const SeenKeys seen = d_.seen(part.b);
    const bool whole = seen.all(part.first, part.last, from, to);
    for (int64_t block = 0; block < d_.heads; ++block) {
      const int64_t row = block * queries;
      Acc* scores = t.scores + row * ld_scores_;
      if (!whole) seen.hide(scores, ld_scores_, part.first, part.last, from, width);
      PairBias<Acc> bias{};
      if (d_.biased()) {
        bias = {t.row_high + row, t.row_low + row, t.key_high + block * kKeys, t.key_low + block * kKeys};
      }
      isa_.softmax_rows(scores, ld_scores_, Acc(d_.scale), bias, partial.most + row, partial.sum + row, t.shrink + row,
                        queries, width);
    }
    if (std::any_of(t.shrink, t.shrink + rows, [](Acc x) { return x != 1; })) {
      isa_.scale_rows(partial.out, ld_value_, t.shrink, rows, round_up(d_.value_dim, 16));
    }
    for_each_run(part, from, to, [&](int64_t position, CacheLayout::Run run) {
      if (run.row < 0) return;
      const int64_t stride = d_.key_heads * d_.value_dim;
      isa_.weigh_values(partial.out, ld_value_, t.scores + (position - from), ld_scores_,
                        offset(d_.v, d_.element, run.row * stride), d_.element, stride, static_cast<int>(run.count),
                        key_heads, per_key_head, d_.value_dim);
    });
  }

  // visit(position, run) over from..to; what is in low..high of the part is not there.
  template <class Visit>
  void for_each_run(const Part& part, int64_t from, int64_t to, const Visit& visit) const {
    for (int64_t position = from; position < to;) {
      CacheLayout::Run run;
      if (position >= part.low && position < part.high) {
        run = {-1, std::min(to, part.high) - position};
      } else {
        run = d_.cache.run(part.b, position, position < part.low ? std::min(to, part.low) : to);
      }
      visit(position, run);
      position += run.count;
    }
  }

  void load_key_bias(const Temporaries<Acc>& t, int64_t position, int at, CacheLayout::Run run) const {
    for (int64_t block = 0; block < d_.heads; ++block) {
      for (int64_t j = 0; j < run.count; ++j) {
        const int64_t to = block * kKeys + at + j;
        split(t.key_high[to], t.key_low[to], bias(head_of(block), position + j, run.row < 0 ? -1 : run.row + j));
      }
    }
  }

  double bias(int64_t h, int64_t position, int64_t row) const {
    double c = d_.decay && row >= 0 ? d_.decay[row * d_.heads + h] : 0.0;
    if (d_.slopes) c -= static_cast<double>(static_cast<const Acc*>(d_.slopes)[h]) * static_cast<double>(position);
    return c;
  }

  static void split(Acc& high, Acc& low, double c) {
    high = static_cast<Acc>(c);
    low = static_cast<Acc>(c - static_cast<double>(high));
  }

  int64_t head_of(int64_t block) const { return d_.head(block / d_.group(), block % d_.group()); }

  // Parts begin..end of one block of queries become rows of o and lse.
  void merge(int64_t b, int64_t first, int64_t last, PartialRows<Acc>* begin, PartialRows<Acc>* end) const {
    const int64_t live = std::clamp(d_.first_query(b), first, last), queries = last - live;
    std::vector<Acc> total(leading(d_.value_dim));
    for (int64_t i = first; i < last; ++i) {
      for (int64_t block = 0; block < d_.heads; ++block) {
        const int64_t h = head_of(block), at = (b * d_.tokens + i) * d_.heads + h;
        const int64_t row = block * queries + (i - live);
        Acc most = i >= live && d_.sink ? static_cast<const Acc*>(d_.sink)[h] : kNothing;
        Acc sum = most == kNothing ? 0 : 1;
        std::fill(total.begin(), total.end(), Acc(0));
        for (PartialRows<Acc>* part = begin; part < end && i >= live; ++part) {
          if (part->sum[row] == 0) continue;
          const Acc top = std::max(most, part->most[row]);
          const Acc keep = std::exp(most - top), take = std::exp(part->most[row] - top);
          sum = keep * sum + take * part->sum[row];
          isa_.scale_rows(total.data(), ld_value_, &keep, 1, round_up(d_.value_dim, 16));
          isa_.add_rows(total.data(), ld_value_, &take, part->out + row * ld_value_, ld_value_, 1,
                        round_up(d_.value_dim, 16));
          most = top;
        }
        const Acc reciprocal = sum == 0 ? Acc(0) : 1 / sum;
        lse_[at] = sum == 0 ? kNothing : most + std::log(sum);
        isa_.store_rows(offset(o_, d_.element, at * d_.value_dim), d_.element, 0, total.data(), ld_value_, &reciprocal,
                        1, d_.value_dim);
      }
    }
  }

  const Decode& d_;
  const Primitives<E>& isa_;
  void* o_;
  Acc* lse_;
  const int ld_key_, ld_value_, ld_scores_;
  const int64_t rows_;
};

std::tuple<Tensor, Tensor> attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,
                                            std::optional<Tensor> page_table, std::optional<Tensor> sink,
                                            std::optional<Tensor> decay_cache, std::optional<Tensor> alibi_slopes,
                                            int64_t ring_start, int64_t causal, int64_t window, int64_t prefix_len,
                                            int64_t block_size, int64_t dilation, int64_t dilated_window,
                                            int64_t dilated_prefix, bool tile_heads, double scale) {
  check_tensor(kOp, "q", q, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double},
               {kAnySize, kAnySize, kAnySize, kAnySize});
  const ScalarType type = q.scalar_type(), sums = state_dtype(type);
  const int64_t batch = q.size(0), heads = q.size(2), key_dim = q.size(3);
  check_tensor(kOp, "k_cache", k_cache, {type}, {page_table ? kAnySize : batch, kAnySize, kAnySize, key_dim});
  const int64_t rows = k_cache.size(0), size = k_cache.size(1), key_heads = k_cache.size(2);
  check_tensor(kOp, "v_cache", v_cache, {type}, {rows, size, key_heads, kAnySize});
  check_tensor(kOp, "cache_seqlens", cache_seqlens, {ScalarType::Int, ScalarType::Long}, {batch});
  check_tensor(kOp, "page_table", page_table, {ScalarType::Int}, {batch, kAnySize});
  check_tensor(kOp, "sink", sink, {sums}, {heads});
  check_tensor(kOp, "decay_cache", decay_cache, {ScalarType::Double}, {rows, size, heads});
  check_tensor(kOp, "alibi_slopes", alibi_slopes, {sums}, {heads});
  const int64_t value_dim = v_cache.size(3);
  if (key_heads < 1 || heads < 1 || heads % key_heads) {
    fail(kOp, "q must have a positive multiple of the cache's ", key_heads, " heads; got ", heads);
  }
  if (key_dim < 1 || key_dim > 256 || value_dim < 1 || value_dim > 256) {
    fail(kOp, "head dimensions must be 1..256; got ", key_dim, " and ", value_dim);
  }
  for (int64_t term : {window, prefix_len, block_size, dilation, dilated_window, dilated_prefix}) {
    if (term < 0) fail(kOp, "sizes of the mask must not be negative; got ", term);
  }
  if (causal < 0 || causal > 2) fail(kOp, "causal must be 0, 1 or 2; got ", causal);

  Decode d{};
  d.cache = {size, size, 0, rows, ring_start, nullptr};
  if (page_table) {
    d.cache.max_pages = page_table->size(1);
    d.cache.capacity = size * d.cache.max_pages;
    d.cache.page_table = page_table->const_data_ptr<int32_t>();
  }
  if (ring_start < -1 || (ring_start > 0 && ring_start >= d.cache.capacity)) {
    fail(kOp, "ring_start must be -1 (no ring) or a slot of the ", d.cache.capacity, "; got ", ring_start);
  }
  const auto of_mask = [](int64_t tokens) { return std::min(tokens, 2 * kFarthest); };  // beyond every distance
  d.mask = {static_cast<Causal>(causal), of_mask(window),         of_mask(prefix_len),     of_mask(block_size), 0,
            of_mask(dilation),           of_mask(dilated_window), of_mask(dilated_prefix), /*q_offset=*/0};
  d.batch = batch;
  d.tokens = q.size(1);
  d.heads = heads;
  d.key_heads = key_heads;
  d.key_dim = static_cast<int>(key_dim);
  d.value_dim = static_cast<int>(value_dim);
  d.lengths = read_indices(cache_seqlens);
  for (int64_t& length : d.lengths) {
    length = std::max<int64_t>(length, 0);
    length = std::min(length, d.cache.ring() && d.cache.capacity > 0 ? kFarthest : d.cache.capacity);
  }
  d.q = q.const_data_ptr();
  d.k = k_cache.const_data_ptr();
  d.v = v_cache.const_data_ptr();
  d.element = element_of(type);
  d.sink = sink ? sink->const_data_ptr() : nullptr;
  d.slopes = alibi_slopes ? alibi_slopes->const_data_ptr() : nullptr;
  d.decay = decay_cache ? decay_cache->const_data_ptr<double>() : nullptr;
  d.tile_heads = tile_heads;
  d.scale = scale;

  Tensor o = empty_result(q, {batch, d.tokens, heads, value_dim});
  Tensor lse = empty_result(q, {batch, d.tokens, heads}, sums);
  with_primitives(type, [&](const auto& isa) {
    DecodeKernel(d, isa, o.mutable_data_ptr(), lse.mutable_data_ptr()).run(torch::stable::get_num_threads());
  });
  return {o, lse};
}

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("attention_decode_cpu", TORCH_BOX(&attention_decode)); }

}  // namespace
}  // namespace memattn::cpu
