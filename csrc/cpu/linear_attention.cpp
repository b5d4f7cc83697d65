// Linear attention: the chunk engine of the gated delta rule with its erase term off. With a normaliser V ends in a column
// of ones, so that the last column of the state is z and that of the output q·z, which is divided by or handed out.
#include "gated_delta_rule.h"

namespace memattn::cpu {
namespace {

Memory memory_of(bool normaliser, bool divide) {
  if (!normaliser) return Memory::sum;
  return divide ? Memory::normalised_sum : Memory::sum_and_weight;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> g,
                                                            std::optional<Tensor> initial_state,
                                                            std::optional<Tensor> cu_seqlens, double scale,
                                                            bool normaliser, bool divide, int64_t chunk_size,
                                                            int64_t checkpoint_every, bool output_final_state,
                                                            bool save) {
  const DeltaRule rule = read_arguments("linear_attention_cpu", q, k, v, g, std::nullopt, initial_state, cu_seqlens,
                                        scale, false, chunk_size, checkpoint_every, memory_of(normaliser, divide));
  const ForwardResults results = run_forward(rule, q, v, output_final_state, save);
  return {results.o, results.denominator, results.final_state, results.states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_backward(
    Tensor d_o, std::optional<Tensor> ddenominator, std::optional<Tensor> dfinal_state, Tensor q, Tensor k, Tensor v,
    std::optional<Tensor> g, std::optional<Tensor> initial_state, std::optional<Tensor> cu_seqlens,
    std::optional<Tensor> o, std::optional<Tensor> denominator, Tensor states, double scale, bool normaliser,
    bool divide, int64_t chunk_size, int64_t checkpoint_every) {
  const char* op = "linear_attention_cpu_backward";
  const DeltaRule rule = read_arguments(op, q, k, v, g, std::nullopt, initial_state, cu_seqlens, scale, false,
                                        chunk_size, checkpoint_every, memory_of(normaliser, divide));
  const std::optional<Tensor> no_solve, no_beta;
  auto [dq, dk, dv, dg, dbeta, dinitial] =
      run_backward(op, rule, {d_o, ddenominator, dfinal_state, o, denominator, no_solve, states}, q, k, v, g, no_beta,
                   initial_state);
  return {dq, dk, dv, dg, dinitial};
}

std::tuple<Tensor, Tensor> linear_attention_step(Tensor q, Tensor k, Tensor v, std::optional<Tensor> g, Tensor state,
                                                 std::optional<Tensor> state_indices, double scale, bool normaliser,
                                                 bool divide) {
  const char* op = "linear_attention_step_cpu";
  const DeltaRule rule = read_arguments(op, q, k, v, g, std::nullopt, std::nullopt, std::nullopt, scale, false, 64, 1,
                                        memory_of(normaliser, divide));
  return run_step(op, rule, q, v, state, state_indices);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(memattn, CPU, m) {
  m.impl("linear_attention_cpu", TORCH_BOX(&linear_attention));
  m.impl("linear_attention_cpu_backward", TORCH_BOX(&linear_attention_backward));
  m.impl("linear_attention_step_cpu", TORCH_BOX(&linear_attention_step));
}

}  // namespace memattn::cpu
