// Gated delta rule, forward:  S_t = (I - β_t k_t k_tᵀ) e^{g_t} S_{t-1} + β_t k_t v_tᵀ,   o_t = scale S_tᵀ q_t.
//
// Chunks of C tokens, rows stacked; G the cumulative sum of g in the chunk, S0 [K, V] the state at its start:
//   L = stril(β_i (k_i·k_j) e^{G_i-G_j})     T = (I + L)^-1     A = tril(scale (q_i·k_j) e^{G_i-G_j})
//   R = K S0     E = V - e^G R     X = β E     Vn = T X
//   O = scale e^G (Q S0) + A Vn
//   S1 = e^{G_C} S0 + Kᵀ (e^{G_C-G} Vn)
// This residual form needs no W = T (β e^G K): 3 products of C·K·V and 4 half products of C·C·max(K, V) per chunk.
// Only differences of G are exponentiated, after masking; T is always computed in the accumulate type. Linear attention
// is the same without K S0, L and T: Vn = V.
#include "gated_delta_rule_items.h"
#include "results.h"

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "gated_delta_rule_cpu";

struct Outputs {
  void *o, *denominator;               // like v; accumulate type [tokens, value_heads], or null
  void *final_state, *solve, *states;  // accumulate type, or null
};

// T and A of one chunk of one value head.
template <class E>
struct HeadBlock {
  using Acc = AccumulateOf<E>;
  GateBlock<Acc> gates;
  Acc *solve, *attention;
  E *solve_buffer, *attention_buffer;
  Left<E> solve_left{}, attention_left{};

  HeadBlock(Arena& arena, const BlockSizes& s)
      : gates(arena, s),
        solve(arena.take<Acc>(s.if_erasing(int64_t{s.chunk} * s.ld_chunk))),
        attention(arena.take<Acc>(int64_t{s.chunk} * s.ld_chunk)),
        solve_buffer(arena.take<E>(s.if_erasing(packed_size<E>(s.chunk, s.ld_chunk)))),
        attention_buffer(arena.take<E>(packed_size<E>(s.chunk, s.ld_chunk))) {}
};

// A prepared chunk of one item.
template <class E>
struct ChunkSlot {
  KeyBlock<E> keys;
  std::vector<HeadBlock<E>> heads;

  ChunkSlot(Arena& arena, const BlockSizes& s, int value_heads) : keys(arena, s) {
    for (int i = 0; i < value_heads; ++i) heads.emplace_back(arena, s);
  }
};

// What a thread needs while it works on one chunk.
template <class E>
struct ForwardTemporaries {
  using Acc = AccumulateOf<E>;
  E* transposed_keys;           // [K, C]
  Acc *decay, *lower;           // [C, C]
  Acc *reads, *values, *fresh;  // K S0 over Q S0 [2 C, V]; V; Vn
  E *state_operand, *right;     // [K, V], [C, V]
  Acc* row_scale;               // [C]

  ForwardTemporaries(Arena& arena, const BlockSizes& s)
      : transposed_keys(arena.take<E>(int64_t{s.key_dim} * s.ld_chunk)),
        decay(arena.take<Acc>(int64_t{s.chunk} * s.ld_chunk)),
        lower(arena.take<Acc>(s.if_erasing(int64_t{s.chunk} * s.ld_chunk))),
        reads(arena.take<Acc>(int64_t{2} * s.chunk * s.ld_value)),
        values(arena.take<Acc>(int64_t{s.chunk} * s.ld_value)),
        fresh(arena.take<Acc>(s.if_erasing(int64_t{s.chunk} * s.ld_value))),
        state_operand(arena.take<E>(packed_size<E>(s.key_dim, s.ld_value))),
        right(arena.take<E>(int64_t{s.chunk} * s.ld_value)),
        row_scale(arena.take<Acc>(s.chunk)) {}
};

template <class E>
class Forward {
  using Acc = AccumulateOf<E>;

 public:
  Forward(const DeltaRule& rule, const Primitives<E>& isa, const Outputs& out)
      : rule_(rule), isa_(isa), out_(out), s_(rule, isa.unit) {
    const int64_t state_bytes = state_size() * int64_t{sizeof(Acc)};
    heads_per_item_ = std::clamp<int64_t>(kScratchPerThread / 2 / state_bytes, 1, rule.group());
  }

  // States, slots and temporaries of the items being worked on.
  struct Workspace {
    std::vector<Acc*> states;  // one per value head of every item
    std::vector<ChunkSlot<E>> slots;
    std::vector<ForwardTemporaries<E>> temporaries;
  };

  void run(int64_t threads) { run_items(*this, make_items(rule_, heads_per_item_), threads, isa_); }

  Workspace workspace(Arena& arena, int64_t items, int64_t chunks, int64_t workers, bool /*shared*/) const {
    Workspace w;
    for (int64_t i = 0; i < items * heads_per_item_; ++i) w.states.push_back(arena.take<Acc>(state_size()));
    for (int64_t i = 0; i < items * chunks; ++i) w.slots.emplace_back(arena, s_, heads_per_item_);
    for (int64_t i = 0; i < workers; ++i) w.temporaries.emplace_back(arena, s_);
    return w;
  }

  int64_t chunks_alone() const { return 1; }

  // As many as the scratch allows.
  int64_t chunks_shared(int64_t items, int64_t most, int64_t threads) const {
    const auto bytes = [&](int64_t chunks) {
      return static_cast<int64_t>(bytes_of([&](Arena& arena) { workspace(arena, items, chunks, threads, true); }));
    };
    const int64_t fixed = bytes(0), per_chunk = bytes(1) - fixed;
    return std::clamp<int64_t>((kScratchPerThread * threads - fixed) / per_chunk, 1, std::max<int64_t>(most, 1));
  }

  template <class Each>
  void process(const Item* items, int64_t count, Workspace& w, int64_t wave, int64_t threads, const Each& each) {
    const int64_t heads = count * heads_per_item_, most = most_chunks(items, count);
    const ColumnBlocks blocks(rule_, s_, heads, threads);
    const auto item_of = [&](int64_t head) -> const Item& { return items[head / heads_per_item_]; };
    const auto exists = [&](int64_t head) { return head % heads_per_item_ < item_of(head).value_heads; };
    each(heads, [&](int64_t head, int64_t) {
      if (exists(head)) start_state(item_of(head), head % heads_per_item_, w.states[head]);
    });
    for (int64_t first = 0; first < most; first += wave) {
      each(count * wave, [&](int64_t i, int64_t worker) {
        const int64_t chunk = first + i % wave;
        if (chunk < items[i / wave].chunks) prepare(items[i / wave], chunk, w.slots[i], w.temporaries[worker]);
      });
      each(heads * blocks.count, [&](int64_t i, int64_t worker) {
        const int64_t head = i / blocks.count, block = i % blocks.count;
        if (!exists(head)) return;
        for (int64_t chunk = first; chunk < std::min(first + wave, item_of(head).chunks); ++chunk) {
          const ChunkSlot<E>& slot = w.slots[head / heads_per_item_ * wave + chunk - first];
          scan(item_of(head), head % heads_per_item_, chunk, slot, w.states[head], w.temporaries[worker],
               blocks.begin(block), blocks.end(block));
        }
      });
    }
    each(heads, [&](int64_t head, int64_t) {
      if (exists(head)) finish_state(item_of(head), head % heads_per_item_, w.states[head]);
    });
  }

 private:
  int64_t state_size() const { return int64_t{s_.key_dim} * s_.ld_value; }

  int64_t state_row(const Item& item, int64_t head) const {
    return (item.sequence * rule_.value_heads + item.first_value_head + head) * rule_.key_dim * rule_.columns();
  }

  void start_state(const Item& item, int64_t head, Acc* state) const {
    const int rows = rule_.initial_state ? rule_.key_dim : 0;
    const void* from = rule_.initial_state
                           ? offset(rule_.initial_state, element_of_accumulate<Acc>(), state_row(item, head))
                           : nullptr;
    isa_.load_rows(state, s_.ld_value, s_.key_dim, s_.value_dim, from, element_of_accumulate<Acc>(), rule_.columns(),
                   rows, rule_.columns());
  }

  void finish_state(const Item& item, int64_t head, const Acc* state) const {
    if (out_.final_state == nullptr) return;
    isa_.store_rows(offset(out_.final_state, element_of_accumulate<Acc>(), state_row(item, head)),
                    element_of_accumulate<Acc>(), rule_.columns(), state, s_.ld_value, nullptr, rule_.key_dim,
                    rule_.columns());
  }

  void prepare(const Item& item, int64_t chunk, ChunkSlot<E>& slot, ForwardTemporaries<E>& t) const {
    slot.keys.prepare(rule_, isa_, s_, item.sequence, chunk, item.head, t.transposed_keys);
    const int n = slot.keys.padded;
    for (int i = 0; i < item.value_heads; ++i) {
      HeadBlock<E>& head = slot.heads[i];
      GateBlock<Acc>& gates = head.gates;
      gates.prepare(rule_, isa_, slot.keys.first_token, slot.keys.rows, n, item.first_value_head + i);
      isa_.decay_matrix(t.decay, s_.ld_chunk, gates.high, gates.low, n);
      if (s_.erases) {
        isa_.chunk_scores(t.lower, head.attention, s_.ld_chunk, slot.keys.kk, slot.keys.qk, t.decay, gates.beta,
                          Acc(rule_.scale), n);
        isa_.unit_lower_inverse(head.solve, s_.ld_chunk, t.lower, s_.ld_chunk, n);
        head.solve_left = as_left(isa_, head.solve_buffer, head.solve, s_.ld_chunk, n, n);
      } else {
        isa_.causal_scores(head.attention, s_.ld_chunk, slot.keys.qk, t.decay, Acc(rule_.scale), n);
      }
      head.attention_left = as_left(isa_, head.attention_buffer, head.attention, s_.ld_chunk, n, n);
      if (out_.solve) save_solve(item, chunk, i, head.solve, std::min(n, rule_.chunk_size));
    }
  }

  void save_solve(const Item& item, int64_t chunk, int head, const Acc* solve, int n) const {
    const int64_t c = rule_.chunk_size, slot = rule_.sequences.slot(item.sequence, chunk, c);
    Acc* to = static_cast<Acc*>(out_.solve) + (slot * rule_.value_heads + item.first_value_head + head) * c * c;
    std::fill(to, to + c * c, Acc(0));
    isa_.store_rows(to, element_of_accumulate<Acc>(), c, solve, s_.ld_chunk, nullptr, n, n);
  }

  void save_state(const Item& item, int64_t chunk, int64_t head, const Acc* state, int begin, int end) const {
    const int64_t slot =
        rule_.sequences.slot(item.sequence, chunk / rule_.checkpoint_every, rule_.chunk_size * rule_.checkpoint_every);
    Acc* to = static_cast<Acc*>(out_.states) +
              (slot * rule_.value_heads + item.first_value_head + head) * rule_.key_dim * rule_.columns();
    isa_.store_rows(to + begin, element_of_accumulate<Acc>(), rule_.columns(), state + begin, s_.ld_value, nullptr,
                    rule_.key_dim, std::min(end, rule_.columns()) - begin);
  }

  // Columns begin..end of one chunk: reads S0, writes O and S1.
  void scan(const Item& item, int64_t value_head, int64_t chunk, const ChunkSlot<E>& slot, Acc* whole_state,
            ForwardTemporaries<E>& t, int begin, int end) const {
    const KeyBlock<E>& keys = slot.keys;
    const HeadBlock<E>& head = slot.heads[value_head];
    const int n = keys.padded, width = end - begin, ld = s_.ld_value, first = keys.first_reader(s_);
    Acc* state = whole_state + begin;
    if (out_.states && chunk % rule_.checkpoint_every == 0)
      save_state(item, chunk, value_head, whole_state, begin, end);

    RowsAhead ahead = rows_of_next_chunk(item, value_head, chunk);
    const Right<E> s0 = as_right(isa_, t.state_operand, state, ld, s_.key_dim, width);
    Acc *reads = t.reads, *outputs = t.reads + int64_t{n} * ld;
    ahead.fetch();
    isa_.gemm(reads + int64_t{first} * ld, ld, rows_from(keys.kq_left, first), s0, 2 * n - first, width, s_.key_dim, 0,
              Part::full);

    load_values(rule_, isa_, keys, item.first_value_head + value_head, t.values, ld, begin, width);
    if (s_.erases) {
      isa_.residual_rows(reads, ld, head.gates.from_start, t.values, ld, n, width);
      isa_.pack_right(t.right, ld, reads, ld, head.gates.beta, n, width);
      ahead.fetch();
      isa_.gemm(t.fresh, ld, head.solve_left, {t.right, ld}, n, width, n, 0, Part::lower_a);
    }
    const Acc* fresh = s_.erases ? t.fresh : t.values;

    for (int i = 0; i < n; ++i) t.row_scale[i] = Acc(rule_.scale) * head.gates.from_start[i];
    isa_.scale_rows(outputs, ld, t.row_scale, n, width);
    ahead.fetch();
    isa_.gemm(outputs, ld, head.attention_left, as_right(isa_, t.right, fresh, ld, n, width), n, width, n, 1,
              Part::lower_a);
    store_output(keys, item.first_value_head + value_head, outputs, t.row_scale, begin, width);

    isa_.pack_right(t.right, ld, fresh, ld, head.gates.to_end, n, width);
    ahead.fetch();
    isa_.gemm(state, ld, transposed(keys.kq_right), {t.right, ld}, s_.key_dim, width, n, head.gates.whole, Part::full);
  }

  // Columns of o, and the denominator with the block that holds it. An output that is divided has one block.
  void store_output(const KeyBlock<E>& keys, int64_t value_head, const Acc* outputs, Acc* reciprocal, int begin,
                    int width) const {
    const int64_t row = keys.first_token * rule_.value_heads + value_head;
    if (const int weight = weight_column(rule_, begin, width); weight >= 0) {
      Acc* denominator = static_cast<Acc*>(out_.denominator) + row;
      for (int i = 0; i < keys.rows; ++i) {
        denominator[i * rule_.value_heads] = outputs[int64_t{i} * s_.ld_value + weight];
        reciprocal[i] = reciprocal_or_zero(denominator[i * rule_.value_heads]);
      }
    }
    isa_.store_rows(offset(out_.o, rule_.output_element, row * rule_.value_dim + begin), rule_.output_element,
                    rule_.value_heads * rule_.value_dim, outputs, s_.ld_value, rule_.divides() ? reciprocal : nullptr,
                    keys.rows, value_columns(rule_, begin, width));
  }

  // The value rows of this head, and with the first head the keys and queries of the item.
  RowsAhead rows_of_next_chunk(const Item& item, int64_t value_head, int64_t chunk) const {
    RowsAhead ahead;
    const int64_t token = rule_.sequences.start(item.sequence) + (chunk + 1) * rule_.chunk_size;
    const int64_t rows = std::min<int64_t>(rule_.sequences.end(item.sequence) - token, rule_.chunk_size);
    const int64_t row = token * rule_.value_heads + item.first_value_head + value_head;
    ahead.add(rule_.v, rule_.element, row * rule_.value_dim, rule_.value_heads * rule_.value_dim, rows,
              rule_.value_dim);
    if (value_head > 0) return ahead;
    for (const void* x : {rule_.k, rule_.q}) {
      const int64_t first = (token * rule_.heads + item.head) * rule_.key_dim;
      ahead.add(x, rule_.element, first, rule_.heads * rule_.key_dim, rows, rule_.key_dim);
    }
    return ahead;
  }

  const DeltaRule& rule_;
  const Primitives<E>& isa_;
  const Outputs out_;
  const BlockSizes s_;
  int64_t heads_per_item_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_delta_rule(
    Tensor q, Tensor k, Tensor v, std::optional<Tensor> g, std::optional<Tensor> beta,
    std::optional<Tensor> initial_state, std::optional<Tensor> cu_seqlens, double scale, bool qk_l2norm,
    int64_t chunk_size, int64_t checkpoint_every, bool output_final_state, bool save) {
  const DeltaRule rule =
      read_arguments(kOp, q, k, v, g, beta, initial_state, cu_seqlens, scale, qk_l2norm, chunk_size, checkpoint_every);
  const ForwardResults results = run_forward(rule, q, v, output_final_state, save);
  return {results.o, results.final_state, results.solve, results.states};
}

}  // namespace

std::pair<Tensor, Tensor> empty_outputs(const DeltaRule& rule, const Tensor& v) {
  const ScalarType state = state_dtype(v.scalar_type());
  const std::vector<int64_t> rows{v.size(0), v.size(1), v.size(2)}, none{0};
  const std::vector<int64_t> all{v.size(0), v.size(1), v.size(2), v.size(3)};
  return {empty_result(v, all, rule.memory == Memory::sum_and_weight ? state : v.scalar_type()),
          empty_result(v, rule.weighs() ? rows : none, state)};
}

ForwardResults run_forward(const DeltaRule& rule, const Tensor& q, const Tensor& v, bool output_final_state, bool save) {
  const SequenceLayout& sequences = rule.sequences;
  const int64_t hv = rule.value_heads, c = rule.chunk_size, every = c * rule.checkpoint_every;
  const auto state_tensor = [&](bool wanted, std::initializer_list<int64_t> shape) {
    const std::vector<int64_t> sizes = wanted ? std::vector<int64_t>(shape) : std::vector<int64_t>{0};
    const bool zero = wanted && sequences.has_unused_slots();
    return zero ? zero_result(q, sizes, state_dtype(q.scalar_type()))
                : empty_result(q, sizes, state_dtype(q.scalar_type()));
  };
  const bool save_solve = save && rule.erases();
  auto [o, denominator] = empty_outputs(rule, v);
  Tensor final_state = state_tensor(output_final_state, {sequences.count(), hv, rule.key_dim, rule.columns()});
  Tensor solve = state_tensor(save_solve, {sequences.slots(c), hv, c, c});
  Tensor states = state_tensor(save, {sequences.slots(every), hv, rule.key_dim, rule.columns()});

  const auto data = [](const Tensor& tensor, bool wanted) { return wanted ? tensor.mutable_data_ptr() : nullptr; };
  const Outputs outputs{o.mutable_data_ptr(), data(denominator, rule.weighs()), data(final_state, output_final_state), data(solve, save_solve),
                        data(states, save)};
  with_primitives(q.scalar_type(),
                  [&](const auto& isa) { Forward(rule, isa, outputs).run(torch::stable::get_num_threads()); });
  return {o, denominator, final_state, solve, states};
}

DeltaRule read_arguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                         const std::optional<Tensor>& g, const std::optional<Tensor>& beta,
                         const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens,
                         double scale, bool qk_l2norm, int64_t chunk_size, int64_t checkpoint_every, Memory memory) {
  check_tensor(op, "q", q, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double},
               {kAnySize, kAnySize, kAnySize, kAnySize});
  const ScalarType type = q.scalar_type(), state = state_dtype(type);
  const int64_t b = q.size(0), t = q.size(1), heads = q.size(2), key_dim = q.size(3);
  check_tensor(op, "k", k, {type}, {b, t, heads, key_dim});
  check_tensor(op, "v", v, {type}, {b, t, kAnySize, kAnySize});
  const int64_t value_heads = v.size(2), value_dim = v.size(3);
  if (heads < 1 || value_heads < 1 || value_heads % heads != 0) {
    fail(op, "v must have a positive multiple of q's heads; got ", value_heads, " and ", heads);
  }
  if (key_dim < 1 || key_dim > 256 || value_dim < 1 || value_dim > 256) {
    fail(op, "head dimensions must be 1 to 256; got K = ", key_dim, ", V = ", value_dim);
  }
  if (chunk_size != 16 && chunk_size != 32 && chunk_size != 64) {
    fail(op, "chunk_size must be 16, 32 or 64; got ", chunk_size);
  }
  if (checkpoint_every < 1) fail(op, "checkpoint_every must be at least 1; got ", checkpoint_every);
  check_tensor(op, "g", g, {state}, {b, t, value_heads});
  check_tensor(op, "beta", beta, {type, state}, {b, t, value_heads});

  DeltaRule rule{};
  rule.sequences =
      cu_seqlens ? SequenceLayout::packed(read_cu_seqlens(op, *cu_seqlens, b, t)) : SequenceLayout::batch(b, t);
  rule.memory = memory;
  rule.heads = heads;
  rule.value_heads = value_heads;
  rule.key_dim = static_cast<int>(key_dim);
  rule.value_dim = static_cast<int>(value_dim);
  rule.q = q.const_data_ptr();
  rule.k = k.const_data_ptr();
  rule.v = v.const_data_ptr();
  rule.g = g ? g->const_data_ptr() : nullptr;
  rule.beta = beta ? beta->const_data_ptr() : nullptr;
  rule.element = element_of(type);
  rule.beta_element = beta ? element_of(beta->scalar_type()) : rule.element;
  rule.initial_state = initial_state ? initial_state->const_data_ptr() : nullptr;
  rule.scale = scale;
  rule.qk_l2norm = qk_l2norm;
  rule.chunk_size = static_cast<int>(chunk_size);
  rule.checkpoint_every = std::min(checkpoint_every, kFarthest);
  rule.output_element = memory == Memory::sum_and_weight ? element_of(state) : rule.element;
  check_tensor(op, "initial_state", initial_state, {state},
               {rule.sequences.count(), value_heads, key_dim, rule.columns()});
  return rule;
}

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("gated_delta_rule_cpu", TORCH_BOX(&gated_delta_rule)); }

}  // namespace memattn::cpu
