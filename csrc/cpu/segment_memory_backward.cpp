// Segment memory, backward. First every read gives its queries' gradients and the table's; then segments in reverse,
// with D the gradient of the memory after a segment, M and z the memory and the normaliser before it, U = β e:
//   reads:   o = r (Q M), r = 1 / (Q z + eps):   dN = r dO,  dd = -r <dO, o>
//            dQ = dN Mᵀ + dd zᵀ,  dM += Qᵀ dN,  dz += Qᵀ dd
//   writes:  e = V - r (K M):   dU = K D,  dβ = <dU, e>,  dV = β dU,  dK = U Dᵀ + γ dzᵀ
//            and through r (K M), with P = -r dV and dd = β r <dU, r (K M)>:
//            dK += P Mᵀ + dd zᵀ,  D += Kᵀ P,  dz += Kᵀ dd
#include "segment_memory.h"
#include "results.h"

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "segment_memory_cpu_backward";

struct SegmentGradients {
  const void *d_o, *dfinal_state, *o, *states;  // dfinal_state may be null
  void *dq, *dk, *dv, *dbeta, *dinitial_state;  // the last two may be null
  void* dstates;                                // like states: what the reads give
};

template <class E>
struct BackwardScratch {
  using Acc = AccumulateOf<E>;
  SegmentRows<E> keys, dkeys;                    // or queries
  SegmentRows<E> values, dvalues, error;         // V or o; dO, dU; e
  SegmentScalars<Acc> scalars;
  Acc *memory, *dmemory, *added;                 // [K, V]
  E *operand, *transposed_operand;               // M as [K, V] and [V, K]
  E *doperand, *transposed_doperand;             // D likewise
  Acc *z, *dz, *added_z, *ones;

  BackwardScratch(Arena& arena, const SegmentSizes& s)
      : keys(arena, s.ld_key),
        dkeys(arena, s.ld_key),
        values(arena, s.ld_value),
        dvalues(arena, s.ld_value),
        error(arena, s.ld_value),
        scalars(arena),
        memory(arena.take<Acc>(int64_t{s.key_dim} * s.ld_value)),
        dmemory(arena.take<Acc>(int64_t{s.key_dim} * s.ld_value)),
        added(arena.take<Acc>(int64_t{s.key_dim} * s.ld_value)),
        operand(arena.take<E>(packed_size<E>(s.key_dim, s.ld_value))),
        transposed_operand(arena.take<E>(int64_t{s.value_dim} * s.ld_key)),
        doperand(arena.take<E>(packed_size<E>(s.key_dim, s.ld_value))),
        transposed_doperand(arena.take<E>(int64_t{s.value_dim} * s.ld_key)),
        z(arena.take<Acc>(s.key_dim)),
        dz(arena.take<Acc>(s.key_dim)),
        added_z(arena.take<Acc>(s.key_dim)),
        ones(arena.take<Acc>(std::max(s.key_dim, kSegmentRows))) {}
};

template <class E>
class SegmentBackward : SegmentKernel<E> {
  using Base = SegmentKernel<E>;
  using Base::isa_, Base::m_, Base::s_;
  using Acc = typename Base::Acc;
  using Workspace = BackwardScratch<E>;

 public:
  SegmentBackward(const SegmentMemory& memory, const Primitives<E>& isa, const SegmentGradients& gradients)
      : Base(memory, isa), g_(gradients) {}

  void run() {
    const auto make = [&](Arena& arena, int64_t workers) {
      std::vector<Workspace> all;
      for (int64_t i = 0; i < workers; ++i) all.emplace_back(arena, s_);
      return all;
    };
    const int64_t readers = m_.workers(2 * m_.read_flops()), writers = m_.workers(3 * m_.write_flops());
    const int64_t most = std::max(readers, writers);
    Scratch scratch(bytes_of([&](Arena& arena) { make(arena, most); }));
    Arena arena(scratch.data());
    std::vector<Workspace> w = make(arena, most);
    for (Workspace& each : w) std::fill(each.ones, each.ones + std::max(s_.key_dim, kSegmentRows), Acc(1));

    const std::vector<SlotReads> slots = slot_reads();
    parallel_tasks(static_cast<int64_t>(slots.size()) * m_.key_heads, readers, isa_, [&](int64_t i, int64_t worker) {
      read(slots[i / m_.key_heads], i % m_.key_heads, w[worker]);
    });
    parallel_tasks(m_.keys.count() * m_.key_heads, writers, isa_, [&](int64_t i, int64_t worker) {
      write(i / m_.key_heads, i % m_.key_heads, w[worker]);
    });
  }

 private:
  // A slot and all that read it.
  struct SlotReads {
    int64_t sequence, segment;
    std::vector<SegmentRead> reads;
  };

  std::vector<SlotReads> slot_reads() const {
    std::vector<SlotReads> slots;
    std::vector<int64_t> first;  // of each sequence
    for (int64_t n = 0; n < m_.keys.count(); ++n) {
      first.push_back(static_cast<int64_t>(slots.size()));
      for (int64_t segment = 0; segment <= m_.segments(n); ++segment) slots.push_back({n, segment, {}});
    }
    for (const SegmentRead& r : m_.reads()) slots[first[r.sequence] + r.segment].reads.push_back(r);
    return slots;
  }

  const Acc* state(int64_t n, int64_t segment, int64_t head) const {
    return static_cast<const Acc*>(g_.states) + m_.slot(n, segment, head);
  }
  Acc* dstate(int64_t n, int64_t segment, int64_t head) const {
    return static_cast<Acc*>(g_.dstates) + m_.slot(n, segment, head);
  }

  // M and z before a segment, and M's operands.
  Right<E> load_slot(const Acc* slot, Workspace& w, bool both) const {
    this->load_memory(w.memory, slot, 0, m_.value_dim, s_.value_dim);
    this->load_normaliser(w.z, slot);
    isa_.pack_right_transposed(w.transposed_operand, s_.ld_key, w.memory, s_.ld_value, s_.key_dim, s_.value_dim);
    return both ? as_right(isa_, w.operand, w.memory, s_.ld_value, s_.key_dim, s_.value_dim) : Right<E>{};
  }

  void read(const SlotReads& slot, int64_t head, Workspace& w) const {
    const bool empty = m_.is_empty(slot.segment);
    load_slot(state(slot.sequence, slot.segment, head), w, false);
    std::fill(w.dmemory, w.dmemory + int64_t{s_.key_dim} * s_.ld_value, Acc(0));
    std::fill(w.dz, w.dz + s_.key_dim, Acc(0));
    for (const SegmentRead& r : slot.reads) {
      this->tiles(r.begin, r.end, [&](int64_t at, int rows) {
        const int64_t token = m_.queries.start(r.sequence) + at;
        for (int64_t h = head * m_.group(); h < (head + 1) * m_.group(); ++h) read_tile(token, rows, h, empty, w);
      });
    }
    Acc* to = dstate(slot.sequence, slot.segment, head);
    this->store_memory(to, w.dmemory, 0, m_.value_dim);
    this->store_normaliser(to, w.dz);
  }

  // dQ of a tile, and its part of dM and dz. An empty memory gives neither.
  void read_tile(int64_t token, int rows, int64_t h, bool empty, Workspace& w) const {
    const SegmentScalars<Acc>& c = w.scalars;
    const auto load = [&](SegmentRows<E>& to, const void* from, int dim, int width) {
      to.load(isa_, from, m_.element, token, m_.heads, h, dim, rows, 0, dim, width);
    };
    load(w.keys, m_.q, m_.key_dim, s_.key_dim);
    w.dkeys.count = rows;
    if (empty) {
      std::fill(w.dkeys.rows, w.dkeys.rows + int64_t{w.keys.padded} * s_.ld_key, Acc(0));
      w.dkeys.store(isa_, g_.dq, m_.element, token, m_.heads, h, m_.key_dim);
      return;
    }
    load(w.dvalues, g_.d_o, m_.value_dim, s_.value_dim);
    this->reciprocals(c.reciprocal, w.keys, w.z);
    if (m_.normalise) {
      load(w.values, g_.o, m_.value_dim, s_.value_dim);
      isa_.dot_rows(c.along, w.dvalues.rows, s_.ld_value, w.values.rows, s_.ld_value, w.keys.padded, s_.value_dim);
      for (int i = 0; i < w.keys.padded; ++i) c.along[i] *= -c.reciprocal[i];
      isa_.scale_rows(w.dvalues.rows, s_.ld_value, c.reciprocal, w.keys.padded, s_.value_dim);
    }
    isa_.gemm(w.dkeys.rows, s_.ld_key, w.dvalues.left(isa_, s_.value_dim), {w.transposed_operand, s_.ld_key},
              w.keys.padded, s_.key_dim, s_.value_dim, 0, Part::full);
    if (m_.normalise) {
      isa_.add_rows(w.dkeys.rows, s_.ld_key, c.along, w.z, 0, w.keys.padded, s_.key_dim);
      isa_.add_rows(w.dz, 0, c.along, w.keys.rows, s_.ld_key, w.keys.padded, s_.key_dim);
    }
    w.dkeys.store(isa_, g_.dq, m_.element, token, m_.heads, h, m_.key_dim);
    isa_.gemm(w.dmemory, s_.ld_value, transposed(w.keys.right(isa_, s_.key_dim)), w.dvalues.right(isa_, s_.value_dim),
              s_.key_dim, s_.value_dim, w.keys.padded, 1, Part::full);
  }

  // D and dz gain what the reads of a slot gave.
  void gain(const Acc* from, Workspace& w) const {
    const Acc one = 1;
    this->load_memory(w.added, from, 0, m_.value_dim, s_.value_dim);
    this->load_normaliser(w.added_z, from);
    isa_.add_rows(w.dmemory, s_.ld_value, w.ones, w.added, s_.ld_value, s_.key_dim, s_.value_dim);
    isa_.add_rows(w.dz, 0, &one, w.added_z, 0, 1, s_.key_dim);
  }

  void write(int64_t n, int64_t head, Workspace& w) const {
    const Acc* given =
        g_.dfinal_state ? static_cast<const Acc*>(g_.dfinal_state) + m_.state_row(n, head) : nullptr;
    const Acc one = 1;
    this->load_memory(w.dmemory, given, 0, m_.value_dim, s_.value_dim);
    this->load_normaliser(w.dz, given);
    gain(dstate(n, m_.segments(n), head), w);
    for (int64_t segment = m_.segments(n) - 1; segment >= 0; --segment) {
      const Right<E> memory = load_slot(state(n, segment, head), w, m_.delta);
      const Right<E> after = as_right(isa_, w.doperand, w.dmemory, s_.ld_value, s_.key_dim, s_.value_dim);
      isa_.pack_right_transposed(w.transposed_doperand, s_.ld_key, w.dmemory, s_.ld_value, s_.key_dim, s_.value_dim);
      std::fill(w.added_z, w.added_z + s_.key_dim, Acc(0));
      Acc keep = 0;
      this->tiles_of_segment(n, segment, [&](int64_t token, int rows) {
        write_tile(token, rows, head, memory, after, keep, w);
        keep = 1;
      });
      if (m_.delta) {
        isa_.add_rows(w.dmemory, s_.ld_value, w.ones, w.added, s_.ld_value, s_.key_dim, s_.value_dim);
        isa_.add_rows(w.dz, 0, &one, w.added_z, 0, 1, s_.key_dim);
      }
      gain(dstate(n, segment, head), w);
    }
    if (g_.dinitial_state == nullptr) return;
    Acc* to = static_cast<Acc*>(g_.dinitial_state) + m_.state_row(n, head);
    this->store_memory(to, w.dmemory, 0, m_.value_dim);
    this->store_normaliser(to, w.dz);
  }

  // dK, dV and dβ of a tile, and with the delta rule its part of what D and dz gain.
  void write_tile(int64_t token, int rows, int64_t head, Right<E> memory, Right<E> after, Acc keep,
                  Workspace& w) const {
    const SegmentScalars<Acc>& c = w.scalars;
    const int ldv = s_.ld_value, ldk = s_.ld_key;
    this->load_keys(w.keys, token, head, rows);
    w.values.load(isa_, m_.v, m_.element, token, m_.key_heads, head, m_.value_dim, rows, 0, m_.value_dim, s_.value_dim);
    const int n = w.keys.padded;
    w.dkeys.count = w.dvalues.count = rows;
    w.dkeys.padded = w.dvalues.padded = w.error.padded = n;
    this->load_beta(c.beta, token, head, rows, n);
    this->counts(c.count, c.along, w.keys, w.z);

    isa_.gemm(w.dvalues.rows, ldv, w.keys.left(isa_, s_.key_dim), after, n, s_.value_dim, s_.key_dim, 0, Part::full);
    SegmentRows<E>* error = &w.values;
    if (m_.delta) {
      isa_.gemm(w.error.rows, ldv, w.keys.left(isa_, s_.key_dim), memory, n, s_.value_dim, s_.key_dim, 0, Part::full);
      this->reciprocals(c.reciprocal, w.keys, w.z);
      isa_.dot_rows(c.along, w.dvalues.rows, ldv, w.error.rows, ldv, n, s_.value_dim);
      isa_.residual_rows(w.error.rows, ldv, c.reciprocal, w.values.rows, ldv, n, s_.value_dim);
      error = &w.error;
    }
    if (g_.dbeta) store_dbeta(token, rows, head, error->rows, w);
    isa_.scale_rows(error->rows, ldv, c.beta, n, s_.value_dim);
    isa_.gemm(w.dkeys.rows, ldk, error->left(isa_, s_.value_dim), {w.transposed_doperand, ldk}, n, s_.key_dim,
              s_.value_dim, 0, Part::full);
    if (m_.normalise) isa_.add_rows(w.dkeys.rows, ldk, c.count, w.dz, 0, n, s_.key_dim);
    isa_.scale_rows(w.dvalues.rows, ldv, c.beta, n, s_.value_dim);
    w.dvalues.store(isa_, g_.dv, m_.element, token, m_.key_heads, head, m_.value_dim);
    if (m_.delta) erase_tile(keep, w);
    w.dkeys.store(isa_, g_.dk, m_.element, token, m_.key_heads, head, m_.key_dim);
  }

  // Through what the keys read: c.along is <dU, K M>, dvalues is β dU.
  void erase_tile(Acc keep, Workspace& w) const {
    const SegmentScalars<Acc>& c = w.scalars;
    const int n = w.keys.padded;
    for (int i = 0; i < n; ++i) {
      c.along[i] *= c.beta[i] * c.reciprocal[i] * c.reciprocal[i];
      c.reciprocal[i] = -c.reciprocal[i];
    }
    isa_.scale_rows(w.dvalues.rows, s_.ld_value, c.reciprocal, n, s_.value_dim);
    isa_.gemm(w.dkeys.rows, s_.ld_key, w.dvalues.left(isa_, s_.value_dim), {w.transposed_operand, s_.ld_key}, n,
              s_.key_dim, s_.value_dim, 1, Part::full);
    isa_.gemm(w.added, s_.ld_value, transposed(w.keys.right(isa_, s_.key_dim)), w.dvalues.right(isa_, s_.value_dim),
              s_.key_dim, s_.value_dim, n, keep, Part::full);
    if (!m_.normalise) return;
    isa_.add_rows(w.dkeys.rows, s_.ld_key, c.along, w.z, 0, n, s_.key_dim);
    isa_.add_rows(w.added_z, 0, c.along, w.keys.rows, s_.ld_key, n, s_.key_dim);
  }

  void store_dbeta(int64_t token, int rows, int64_t head, const Acc* error, Workspace& w) const {
    alignas(64) Acc dots[kSegmentRows];
    isa_.dot_rows(dots, w.dvalues.rows, s_.ld_value, error, s_.ld_value, w.keys.padded, s_.value_dim);
    isa_.store_rows(offset(g_.dbeta, m_.beta_element, token * m_.key_heads + head), m_.beta_element, m_.key_heads, dots,
                    1, nullptr, rows, 1);
  }

  const SegmentGradients g_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> segment_memory_backward(
    Tensor d_o, std::optional<Tensor> dfinal_state, Tensor q, Tensor k, Tensor v, std::optional<Tensor> beta,
    std::optional<Tensor> initial_state, std::optional<Tensor> cu_seqlens, std::optional<Tensor> cu_seqlens_k, Tensor o,
    Tensor states, int64_t query_segment, int64_t key_segment, bool delta, bool normalise, bool correction, bool causal,
    double eps) {
  const SegmentMemory m =
      read_arguments(kOp, q, k, v, beta, initial_state, cu_seqlens, cu_seqlens_k,
                     {query_segment, key_segment, delta, normalise, correction, causal, eps});
  const ScalarType type = q.scalar_type(), state = state_dtype(type);
  for (const auto& [name, x] : {std::pair{"do", &d_o}, std::pair{"o", &o}}) {
    check_tensor(kOp, name, *x, {type}, {q.size(0), q.size(1), m.heads, m.value_dim});
  }
  check_tensor(kOp, "dfinal_state", dfinal_state, {state}, {m.keys.count(), m.key_heads, m.key_dim, m.columns()});
  check_tensor(kOp, "states", states, {state}, {m.slots(), m.key_heads, m.key_dim, m.columns()});
  const auto gradient_of = [&](const std::optional<Tensor>& x) {
    return x ? result_like(*x) : empty_result(q, {0});
  };
  Tensor dq = result_like(q), dk = result_like(k), dv = result_like(v);
  Tensor dbeta = gradient_of(beta), dinitial = gradient_of(initial_state), dstates = result_like(states);
  const auto read = [](const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; };
  const auto data = [](const Tensor& tensor, bool wanted) { return wanted ? tensor.mutable_data_ptr() : nullptr; };
  const SegmentGradients gradients{d_o.const_data_ptr(),
                                   read(dfinal_state),
                                   o.const_data_ptr(),
                                   states.const_data_ptr(),
                                   dq.mutable_data_ptr(),
                                   dk.mutable_data_ptr(),
                                   dv.mutable_data_ptr(),
                                   data(dbeta, beta.has_value()),
                                   data(dinitial, initial_state.has_value()),
                                   dstates.mutable_data_ptr()};
  with_primitives(type, [&](const auto& isa) { SegmentBackward(m, isa, gradients).run(); });
  return {dq, dk, dv, dbeta, dinitial};
}

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) {
  m.impl("segment_memory_cpu_backward", TORCH_BOX(&segment_memory_backward));
}

}  // namespace
}  // namespace memattn::cpu
