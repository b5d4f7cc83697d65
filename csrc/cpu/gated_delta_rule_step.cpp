// Gated delta rule, one or a few tokens with the state pool updated in place. Per value head and token:
//   r = kᵀ S     p = qᵀ S     u = β (v - e^g r)     o = e^g p + (q·k) u     S = e^g S + k uᵀ
// so a state is read once for both products and once more for its update: the step is bound by that traffic. Always in
// the accumulate type. Tasks are batch rows × value heads (× column blocks if those are few); tiny calls stay serial.
#include "gated_delta_rule.h"

namespace memattn::cpu {
namespace {

constexpr const char* kOp = "gated_delta_rule_step_cpu";
constexpr int kMaxDim = 256;
constexpr int64_t kBytesWorthAThread = 256 << 10;

struct Step {
  int64_t batch, tokens, heads, value_heads, pool;
  int key_dim, value_dim;
  const void *q, *k, *v, *g, *beta;
  void *o, *state;
  Element element, beta_element;
  std::vector<int64_t> rows;  // pool row of every batch row; outside the pool is padding
  double scale;
  bool qk_l2norm;
};

template <class E>
class StepKernel {
  using Acc = AccumulateOf<E>;

 public:
  StepKernel(const Step& step, const Primitives<E>& isa) : step_(step), isa_(isa) {}

  void run(int64_t threads) const {
    const int64_t states = step_.batch * step_.value_heads;
    if (states == 0 || step_.tokens == 0) return;
    const int width = states >= threads ? step_.value_dim : std::min(step_.value_dim, 64);
    const int64_t blocks = (step_.value_dim + width - 1) / width;
    const int64_t bytes = step_.tokens * step_.key_dim * width * int64_t{sizeof(Acc)};
    torch::stable::parallel_for(0, states * blocks, std::max<int64_t>(1, kBytesWorthAThread / bytes),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) {
                                    const int first = static_cast<int>(i % blocks) * width;
                                    columns(i / blocks, first, std::min(width, step_.value_dim - first));
                                  }
                                });
  }

 private:
  // Columns first..first+count of one state over all tokens.
  void columns(int64_t batch_head, int first, int count) const {
    const int64_t b = batch_head / step_.value_heads, value_head = batch_head % step_.value_heads;
    const int64_t head = value_head / (step_.value_heads / step_.heads), row = step_.rows[b];
    alignas(64) Acc k[kMaxDim], q[kMaxDim], v[kMaxDim], o[kMaxDim];
    for (int64_t t = 0; t < step_.tokens; ++t) {
      const int64_t token = b * step_.tokens + t, at = token * step_.value_heads + value_head;
      void* output = offset(step_.o, step_.element, at * step_.value_dim + first);
      if (row < 0 || row >= step_.pool) {
        std::fill(o, o + count, Acc(0));
      } else {
        load_unit(k, step_.k, token * step_.heads + head);
        load_unit(q, step_.q, token * step_.heads + head);
        for (int i = 0; i < step_.key_dim; ++i) q[i] *= Acc(step_.scale);
        isa_.load_rows(v, kMaxDim, 1, count, offset(step_.v, step_.element, at * step_.value_dim + first),
                       step_.element, 0, 1, count);
        const Acc decay = step_.g ? std::exp(static_cast<const Acc*>(step_.g)[at]) : Acc(1);
        Acc beta = 1;
        if (step_.beta)
          isa_.load_rows(&beta, 1, 1, 1, offset(step_.beta, step_.beta_element, at), step_.beta_element, 0, 1, 1);
        Acc* state = static_cast<Acc*>(step_.state) +
                     (row * step_.value_heads + value_head) * step_.key_dim * step_.value_dim + first;
        isa_.step_columns(state, step_.value_dim, k, q, v, decay, beta, o, step_.key_dim, count);
      }
      isa_.store_rows(output, step_.element, 0, o, kMaxDim, nullptr, 1, count);
    }
  }

  // One row of q or k, normalised if asked.
  void load_unit(Acc* x, const void* from, int64_t row) const {
    const int width = round_up(step_.key_dim, 16);
    isa_.load_rows(x, kMaxDim, 1, width, offset(from, step_.element, row * step_.key_dim), step_.element, 0, 1,
                   step_.key_dim);
    Acc reciprocal_norm;
    if (step_.qk_l2norm) isa_.l2norm_rows(x, kMaxDim, &reciprocal_norm, Acc(kL2NormEps), 1, width);
  }

  const Step& step_;
  const Primitives<E>& isa_;
};

Tensor gated_delta_rule_step(Tensor q, Tensor k, Tensor v, std::optional<Tensor> g, std::optional<Tensor> beta,
                             Tensor state, std::optional<Tensor> state_indices, double scale, bool qk_l2norm) {
  const DeltaRule rule = read_arguments(kOp, q, k, v, g, beta, std::nullopt, std::nullopt, scale, qk_l2norm, 64, 1);
  const int64_t batch = q.size(0), tokens = q.size(1);
  const int64_t pool = state_indices ? kAnySize : batch;
  check_tensor(kOp, "state", state, {state_dtype(q.scalar_type())},
               {pool, rule.value_heads, rule.key_dim, rule.value_dim});
  check_tensor(kOp, "state_indices", state_indices, {ScalarType::Int, ScalarType::Long}, {batch});
  Step step{batch,
            tokens,
            rule.heads,
            rule.value_heads,
            state.size(0),
            rule.key_dim,
            rule.value_dim,
            rule.q,
            rule.k,
            rule.v,
            rule.g,
            rule.beta,
            nullptr,
            state.mutable_data_ptr(),
            rule.element,
            rule.beta_element,
            {},
            scale,
            qk_l2norm};
  if (state_indices) {
    step.rows = read_indices(*state_indices);
  } else {
    step.rows.resize(batch);
    std::iota(step.rows.begin(), step.rows.end(), 0);
  }
  Tensor o = torch::stable::empty_like(v);
  step.o = o.mutable_data_ptr();
  with_primitives(q.scalar_type(),
                  [&](const auto& isa) { StepKernel(step, isa).run(torch::stable::get_num_threads()); });
  return o;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("gated_delta_rule_step_cpu", TORCH_BOX(&gated_delta_rule_step)); }

}  // namespace memattn::cpu
