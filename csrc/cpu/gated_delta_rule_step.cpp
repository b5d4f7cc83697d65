// One or a few tokens of the gated delta rule with the state pool updated in place. Per value head and token:
//   r = kᵀ S     p = qᵀ S     u = β (v - e^g r)     o = e^g p + (q·k) u     S = e^g S + k uᵀ
// so a state is read once for both products and once more for its update: the step is bound by that traffic. Linear
// attention needs no r and passes over its state once: S = e^g S + k vᵀ, o = qᵀ S. Always in the accumulate type. Tasks are batch rows × value heads (× column blocks if those are few); tiny calls stay serial.
#include "gated_delta_rule.h"

namespace memattn::cpu {
namespace {

constexpr int kMaxDim = 272;  // the widest head and a column of ones, in whole vectors
constexpr int64_t kBytesWorthAThread = 256 << 10;

struct Step {
  const DeltaRule& rule;
  int64_t batch, tokens, pool;
  void *o, *denominator, *state;
  std::vector<int64_t> rows;  // pool row of every batch row; outside the pool is padding
};

template <class E>
class StepKernel {
  using Acc = AccumulateOf<E>;

 public:
  StepKernel(const Step& step, const Primitives<E>& isa) : step_(step), rule_(step.rule), isa_(isa) {}

  void run(int64_t threads) const {
    const int64_t states = step_.batch * rule_.value_heads;
    if (states == 0 || step_.tokens == 0) return;
    const bool whole = states >= threads || rule_.divides();
    const int width = whole ? rule_.columns() : std::min(rule_.columns(), 64);
    const int64_t blocks = (rule_.columns() + width - 1) / width;
    const int64_t bytes = step_.tokens * rule_.key_dim * width * int64_t{sizeof(Acc)};
    torch::stable::parallel_for(0, states * blocks, std::max<int64_t>(1, kBytesWorthAThread / bytes),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t i = begin; i < end; ++i) {
                                    const int first = static_cast<int>(i % blocks) * width;
                                    columns(i / blocks, first, std::min(width, rule_.columns() - first));
                                  }
                                });
  }

 private:
  // Columns first..first+count of one state over all tokens.
  void columns(int64_t batch_head, int first, int count) const {
    const int64_t b = batch_head / rule_.value_heads, value_head = batch_head % rule_.value_heads;
    const int64_t head = value_head / rule_.group(), row = step_.rows[b];
    alignas(64) Acc k[kMaxDim], q[kMaxDim], v[kMaxDim], o[kMaxDim];
    for (int64_t t = 0; t < step_.tokens; ++t) {
      const int64_t token = b * step_.tokens + t, at = token * rule_.value_heads + value_head;
      if (row < 0 || row >= step_.pool) {
        std::fill(o, o + count, Acc(0));
      } else {
        load_unit(k, rule_.k, token * rule_.heads + head);
        load_unit(q, rule_.q, token * rule_.heads + head);
        for (int i = 0; i < rule_.key_dim; ++i) q[i] *= Acc(rule_.scale);
        load_values(v, at, first, count);
        const Acc decay = rule_.g ? std::exp(static_cast<const Acc*>(rule_.g)[at]) : Acc(1);
        Acc* state = static_cast<Acc*>(step_.state) +
                     (row * rule_.value_heads + value_head) * rule_.key_dim * rule_.columns() + first;
        if (rule_.erases()) {
          isa_.step_columns(state, rule_.columns(), k, q, v, decay, load_beta(at), o, rule_.key_dim, count);
        } else {
          isa_.write_columns(state, rule_.columns(), k, q, v, decay, o, rule_.key_dim, count);
        }
      }
      store_output(o, at, first, count);
    }
  }

  // Columns of one row of o, and its denominator with the block that holds it.
  void store_output(const Acc* o, int64_t row, int first, int count) const {
    Acc reciprocal = 0;
    if (const int weight = weight_column(rule_, first, count); weight >= 0) {
      static_cast<Acc*>(step_.denominator)[row] = o[weight];
      reciprocal = reciprocal_or_zero(o[weight]);
    }
    isa_.store_rows(offset(step_.o, rule_.output_element, row * rule_.value_dim + first), rule_.output_element, 0, o,
                    kMaxDim, rule_.divides() ? &reciprocal : nullptr, 1, value_columns(rule_, first, count));
  }

  // One row of q or k, normalised if asked.
  void load_unit(Acc* x, const void* from, int64_t row) const {
    const int width = round_up(rule_.key_dim, 16);
    isa_.load_rows(x, kMaxDim, 1, width, offset(from, rule_.element, row * rule_.key_dim), rule_.element, 0, 1,
                   rule_.key_dim);
    Acc reciprocal_norm;
    if (rule_.qk_l2norm) isa_.l2norm_rows(x, kMaxDim, &reciprocal_norm, Acc(kL2NormEps), 1, width);
  }

  // Columns of one row of v, with the one of a normalised sum.
  void load_values(Acc* v, int64_t row, int first, int count) const {
    const int cols = value_columns(rule_, first, count);
    isa_.load_rows(v, kMaxDim, 1, cols, offset(rule_.v, rule_.element, row * rule_.value_dim + first), rule_.element, 0,
                   1, cols);
    std::fill(v + cols, v + count, Acc(1));
  }

  Acc load_beta(int64_t row) const {
    Acc beta = 1;
    if (rule_.beta)
      isa_.load_rows(&beta, 1, 1, 1, offset(rule_.beta, rule_.beta_element, row), rule_.beta_element, 0, 1, 1);
    return beta;
  }

  const Step& step_;
  const DeltaRule& rule_;
  const Primitives<E>& isa_;
};

Tensor gated_delta_rule_step(Tensor q, Tensor k, Tensor v, std::optional<Tensor> g, std::optional<Tensor> beta,
                             Tensor state, std::optional<Tensor> state_indices, double scale, bool qk_l2norm) {
  const char* op = "gated_delta_rule_step_cpu";
  const DeltaRule rule = read_arguments(op, q, k, v, g, beta, std::nullopt, std::nullopt, scale, qk_l2norm, 64, 1);
  return run_step(op, rule, q, v, state, state_indices).first;
}

}  // namespace

std::pair<Tensor, Tensor> run_step(const char* op, const DeltaRule& rule, const Tensor& q, const Tensor& v,
                                   const Tensor& state, const std::optional<Tensor>& state_indices) {
  const int64_t batch = q.size(0), tokens = q.size(1), pool = state_indices ? kAnySize : batch;
  check_tensor(op, "state", state, {state_dtype(q.scalar_type())},
               {pool, rule.value_heads, rule.key_dim, rule.columns()});
  check_tensor(op, "state_indices", state_indices, {ScalarType::Int, ScalarType::Long}, {batch});
  auto [o, denominator] = empty_outputs(rule, v);
  Step step{rule, batch, tokens, state.size(0), o.mutable_data_ptr(), denominator.mutable_data_ptr(),
            state.mutable_data_ptr(), {}};
  if (state_indices) {
    step.rows = read_indices(*state_indices);
  } else {
    step.rows.resize(batch);
    std::iota(step.rows.begin(), step.rows.end(), 0);
  }
  with_primitives(q.scalar_type(),
                  [&](const auto& isa) { StepKernel(step, isa).run(torch::stable::get_num_threads()); });
  return {o, denominator};
}

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) { m.impl("gated_delta_rule_step_cpu", TORCH_BOX(&gated_delta_rule_step)); }

}  // namespace memattn::cpu
