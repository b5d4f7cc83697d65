// Segment memory, forward: the table of the normaliser, that of the memory (tasks: heads × columns of V), all reads.
#include "segment_memory.h"
#include "results.h"

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "segment_memory_cpu";
constexpr int kNarrowest = 64;  // columns of a task

template <class E>
struct ForwardScratch {
  using Acc = AccumulateOf<E>;
  SegmentRows<E> keys, values, reads;  // keys or queries; V; what keys or queries read
  SegmentScalars<Acc> scalars;
  Acc *memory, *added;  // [K, V]
  E *operand, *written;  // the memory, packed; a tile's U
  Acc *z, *segment_z, *tile_z, *ones;

  ForwardScratch(Arena& arena, const SegmentSizes& s)
      : keys(arena, s.ld_key),
        values(arena, s.ld_value),
        reads(arena, s.ld_value),
        scalars(arena),
        memory(arena.take<Acc>(int64_t{s.key_dim} * s.ld_value)),
        added(arena.take<Acc>(int64_t{s.key_dim} * s.ld_value)),
        operand(arena.take<E>(packed_size<E>(s.key_dim, s.ld_value))),
        written(arena.take<E>(int64_t{kSegmentRows} * s.ld_value)),
        z(arena.take<Acc>(s.key_dim)),
        segment_z(arena.take<Acc>(s.key_dim)),
        tile_z(arena.take<Acc>(s.key_dim)),
        ones(arena.take<Acc>(s.key_dim)) {}
};

template <class E>
class SegmentForward : SegmentKernel<E> {
  using Base = SegmentKernel<E>;
  using Base::isa_, Base::m_, Base::s_;
  using Acc = typename Base::Acc;
  using Scratches = std::vector<ForwardScratch<E>>;

 public:
  SegmentForward(const SegmentMemory& memory, const Primitives<E>& isa, void* o, void* states)
      : Base(memory, isa), o_(o), states_(static_cast<Acc*>(states)) {}

  void run() {
    const auto make = [&](Arena& arena, int64_t workers) {
      Scratches all;
      for (int64_t i = 0; i < workers; ++i) all.emplace_back(arena, s_);
      return all;
    };
    const int64_t memories = m_.keys.count() * m_.key_heads;
    const int64_t writers = m_.workers(m_.write_flops()), readers = m_.workers(m_.read_flops());
    const int64_t most = std::max(writers, readers);
    Scratch scratch(bytes_of([&](Arena& arena) { make(arena, most); }));
    Arena arena(scratch.data());
    Scratches w = make(arena, most);
    for (ForwardScratch<E>& each : w) std::fill(each.ones, each.ones + s_.key_dim, Acc(1));

    if (m_.normalise) {
      parallel_tasks(memories, writers, isa_, [&](int64_t i, int64_t worker) {
        write_normaliser(i / m_.key_heads, i % m_.key_heads, w[worker]);
      });
    }
    const int64_t wanted = std::max<int64_t>(1, (2 * writers + memories - 1) / std::max<int64_t>(1, memories));
    const int width = std::min(s_.value_dim, round_up(std::max<int>(kNarrowest, (s_.value_dim + wanted - 1) / wanted),
                                                      kNarrowest));
    const int64_t blocks = writers == 1 ? 1 : (s_.value_dim + width - 1) / width;
    parallel_tasks(memories * blocks, writers, isa_, [&](int64_t i, int64_t worker) {
      const int begin = static_cast<int>(i % blocks) * width;
      const int end = blocks == 1 ? s_.value_dim : std::min(begin + width, s_.value_dim);
      write_memory(i / blocks / m_.key_heads, i / blocks % m_.key_heads, begin, end - begin, w[worker]);
    });
    const std::vector<SegmentRead> reads = m_.reads();
    parallel_tasks(static_cast<int64_t>(reads.size()) * m_.key_heads, readers, isa_, [&](int64_t i, int64_t worker) {
      read(reads[i / m_.key_heads], i % m_.key_heads, w[worker]);
    });
  }

 private:
  const Acc* initial(int64_t n, int64_t head) const {
    return m_.initial_state ? static_cast<const Acc*>(m_.initial_state) + m_.state_row(n, head) : nullptr;
  }

  // The sums of a tile, of a segment and of all segments are kept apart: each is rounded at its own size.
  void write_normaliser(int64_t n, int64_t head, ForwardScratch<E>& w) const {
    const Acc one = 1;
    this->load_normaliser(w.z, initial(n, head));
    for (int64_t segment = 0; segment < m_.segments(n); ++segment) {
      this->store_normaliser(states_ + m_.slot(n, segment, head), w.z);
      std::fill(w.segment_z, w.segment_z + s_.key_dim, Acc(0));
      this->tiles_of_segment(n, segment, [&](int64_t token, int rows) {
        this->load_keys(w.keys, token, head, rows);
        this->counts(w.scalars.count, w.scalars.along, w.keys, w.z);
        std::fill(w.tile_z, w.tile_z + s_.key_dim, Acc(0));
        isa_.add_rows(w.tile_z, 0, w.scalars.count, w.keys.rows, w.keys.ld, w.keys.padded, s_.key_dim);
        isa_.add_rows(w.segment_z, 0, &one, w.tile_z, 0, 1, s_.key_dim);
      });
      isa_.add_rows(w.z, 0, &one, w.segment_z, 0, 1, s_.key_dim);
    }
    this->store_normaliser(states_ + m_.slot(n, m_.segments(n), head), w.z);
  }

  // Columns begin..begin+width of every slot.
  void write_memory(int64_t n, int64_t head, int begin, int width, ForwardScratch<E>& w) const {
    const int cols = std::min(width, m_.value_dim - begin), ld = s_.ld_value;
    this->load_memory(w.memory, initial(n, head), begin, cols, width);
    for (int64_t segment = 0; segment < m_.segments(n); ++segment) {
      Acc* slot = states_ + m_.slot(n, segment, head);
      this->store_memory(slot, w.memory, begin, cols);
      this->load_normaliser(w.z, slot);
      const Right<E> frozen = as_right(isa_, w.operand, w.memory, ld, s_.key_dim, width);
      Acc keep = 0;
      this->tiles_of_segment(n, segment, [&](int64_t token, int rows) {
        const Acc* fresh = erase(token, head, rows, begin, cols, width, frozen, w);
        isa_.pack_right(w.written, ld, fresh, ld, w.scalars.beta, w.keys.padded, width);
        isa_.gemm(w.added, ld, transposed(w.keys.right(isa_, s_.key_dim)), {w.written, ld}, s_.key_dim, width,
                  w.keys.padded, keep, Part::full);
        keep = 1;
      });
      isa_.add_rows(w.memory, ld, w.ones, w.added, ld, s_.key_dim, width);
    }
    this->store_memory(states_ + m_.slot(n, m_.segments(n), head), w.memory, begin, cols);
  }

  // Loads a tile's keys, values and beta; V, or with the delta rule V less what the keys read.
  const Acc* erase(int64_t token, int64_t head, int rows, int begin, int cols, int width, Right<E> frozen,
                   ForwardScratch<E>& w) const {
    this->load_keys(w.keys, token, head, rows);
    w.values.load(isa_, m_.v, m_.element, token, m_.key_heads, head, m_.value_dim, rows, begin, cols, width);
    this->load_beta(w.scalars.beta, token, head, rows, w.keys.padded);
    if (!m_.delta) return w.values.rows;
    isa_.gemm(w.reads.rows, s_.ld_value, w.keys.left(isa_, s_.key_dim), frozen, w.keys.padded, width, s_.key_dim, 0,
              Part::full);
    this->reciprocals(w.scalars.reciprocal, w.keys, w.z);
    isa_.residual_rows(w.reads.rows, s_.ld_value, w.scalars.reciprocal, w.values.rows, s_.ld_value, w.keys.padded,
                       width);
    return w.reads.rows;
  }

  void read(const SegmentRead& r, int64_t head, ForwardScratch<E>& w) const {
    const Acc* slot = states_ + m_.slot(r.sequence, r.segment, head);
    this->load_memory(w.memory, slot, 0, m_.value_dim, s_.value_dim);
    this->load_normaliser(w.z, slot);
    const Right<E> memory = as_right(isa_, w.operand, w.memory, s_.ld_value, s_.key_dim, s_.value_dim);
    this->tiles(r.begin, r.end, [&](int64_t at, int rows) {
      const int64_t token = m_.queries.start(r.sequence) + at;
      for (int64_t h = head * m_.group(); h < (head + 1) * m_.group(); ++h) {
        w.keys.load(isa_, m_.q, m_.element, token, m_.heads, h, m_.key_dim, rows, 0, m_.key_dim, s_.key_dim);
        w.reads.count = rows;
        isa_.gemm(w.reads.rows, s_.ld_value, w.keys.left(isa_, s_.key_dim), memory, w.keys.padded, s_.value_dim,
                  s_.key_dim, 0, Part::full);
        this->reciprocals(w.scalars.reciprocal, w.keys, w.z);
        w.reads.store(isa_, o_, m_.element, token, m_.heads, h, m_.value_dim, w.scalars.reciprocal);
      }
    });
  }

  void* o_;
  Acc* states_;
};

std::tuple<Tensor, Tensor, Tensor> segment_memory(
    Tensor q, Tensor k, Tensor v, std::optional<Tensor> beta, std::optional<Tensor> initial_state,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> cu_seqlens_k, int64_t query_segment, int64_t key_segment,
    bool delta, bool normalise, bool correction, bool causal, double eps) {
  const SegmentMemory m =
      read_arguments(kOp, q, k, v, beta, initial_state, cu_seqlens, cu_seqlens_k,
                     {query_segment, key_segment, delta, normalise, correction, causal, eps});
  const ScalarType type = q.scalar_type(), state = state_dtype(type);
  const std::vector<int64_t> rows{q.size(0), q.size(1), m.heads, m.value_dim};
  const std::vector<int64_t> finals{m.keys.count(), m.key_heads, m.key_dim, m.columns()};
  const std::vector<int64_t> table{m.slots(), m.key_heads, m.key_dim, m.columns()};
  Tensor o = empty_result(q, rows, type), final_state = empty_result(q, finals, state);
  Tensor states = m.keys.has_unused_slots() ? zero_result(q, table, state)
                                            : empty_result(q, table, state);
  with_primitives(type, [&](const auto& isa) {
    SegmentForward(m, isa, o.mutable_data_ptr(), states.mutable_data_ptr()).run();
  });
  const int64_t bytes = bytes_of(element_of(state)), size = m.key_heads * m.state_size() * bytes;
  for (int64_t n = 0; n < m.keys.count(); ++n) {
    std::memcpy(static_cast<char*>(final_state.mutable_data_ptr()) + n * size,
                static_cast<const char*>(states.const_data_ptr()) + m.slot(n, m.segments(n), 0) * bytes, size);
  }
  return {o, final_state, states};
}

}  // namespace

SegmentMemory read_arguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                             const std::optional<Tensor>& beta, const std::optional<Tensor>& initial_state,
                             const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& cu_seqlens_k,
                             const SegmentSettings& settings) {
  check_tensor(op, "q", q, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double},
               {kAnySize, kAnySize, kAnySize, kAnySize});
  const ScalarType type = q.scalar_type(), state = state_dtype(type);
  const int64_t b = q.size(0), t = q.size(1), heads = q.size(2), key_dim = q.size(3);
  check_tensor(op, "k", k, {type}, {b, kAnySize, kAnySize, key_dim});
  const int64_t tokens = k.size(1), key_heads = k.size(2);
  check_tensor(op, "v", v, {type}, {b, tokens, key_heads, kAnySize});
  const int64_t value_dim = v.size(3);
  check_tensor(op, "beta", beta, {type, state}, {b, tokens, key_heads});
  if (key_heads < 1 || heads < 1 || heads % key_heads != 0) {
    fail(op, "q must have a positive multiple of k's heads; got ", heads, " and ", key_heads);
  }
  if (key_dim < 1 || key_dim > 1024 || value_dim < 1 || value_dim > 8192) {
    fail(op, "K must be 1 to 1024 and V 1 to 8192; got K = ", key_dim, ", V = ", value_dim);
  }
  if (settings.query_segment < 1 || settings.key_segment < 1) {
    fail(op, "segments must have at least 1 token; got ", settings.query_segment, " and ", settings.key_segment);
  }
  if (cu_seqlens.has_value() != cu_seqlens_k.has_value()) {
    fail(op, "cu_seqlens and cu_seqlens_k must be given together");
  }
  SegmentMemory m{};
  static_cast<SegmentSettings&>(m) = settings;
  m.query_segment = std::min(settings.query_segment, kFarthest);
  m.key_segment = std::min(settings.key_segment, kFarthest);
  const auto layout = [&](const std::optional<Tensor>& bounds, int64_t length) {
    return bounds ? SequenceLayout::packed(read_cu_seqlens(op, *bounds, b, length)) : SequenceLayout::batch(b, length);
  };
  m.queries = layout(cu_seqlens, t);
  m.keys = layout(cu_seqlens_k, tokens);
  if (m.queries.count() != m.keys.count()) {
    fail(op, "cu_seqlens_k must hold as many sequences as cu_seqlens; got ", m.keys.count(), " and ",
         m.queries.count());
  }
  m.heads = heads;
  m.key_heads = key_heads;
  m.key_dim = static_cast<int>(key_dim);
  m.value_dim = static_cast<int>(value_dim);
  m.q = q.const_data_ptr();
  m.k = k.const_data_ptr();
  m.v = v.const_data_ptr();
  m.beta = beta ? beta->const_data_ptr() : nullptr;
  m.element = element_of(type);
  m.beta_element = beta ? element_of(beta->scalar_type()) : m.element;
  m.initial_state = initial_state ? initial_state->const_data_ptr() : nullptr;
  check_tensor(op, "initial_state", initial_state, {state}, {m.keys.count(), key_heads, key_dim, m.columns()});
  return m;
}

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("segment_memory_cpu", TORCH_BOX(&segment_memory)); }

}  // namespace memattn::cpu
