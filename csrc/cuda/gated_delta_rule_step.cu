// The gated delta rule's step and linear attention's on CUDA: checks, dispatch and launch. Mathematics: .cuh beside this.
//
// Bound by the state: every step reads and writes K * V floats per value head, and all else is small beside it, so the
// kernel's one duty is to move that state once, in whole lines, with enough loads in flight.
// No host synchronisation, the current stream, no allocation but the outputs: the call can be captured in a CUDA graph.
#include <tuple>

#include "launch.h"

#include "gated_delta_rule_step.cuh"

namespace memattn::step {
namespace {

constexpr int64_t kMaxKeyDim = 256, kMaxValueDim = 65536;

struct Inputs {
  const char* op;
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const MaybeTensor& g;
  const MaybeTensor& beta;
  const Tensor& state;
  const MaybeTensor& indices;
  Memory memory;
  float scale;
  bool l2norm;

  int64_t columns() const { return v.size(3) + (memory == Memory::sum_and_weight); }
  int64_t blocks() const { return v.size(0) * v.size(2) * ceil_div(columns(), kBlockColumns); }
};

// What memory safety needs; what a value means is checked in Python.
void check_all(const Inputs& in) {
  constexpr auto kFloat = ScalarType::Float;
  constexpr auto kCuda = Place::cuda;
  constexpr auto kAny = kAnySize;
  const auto& [op, q, k, v, g, beta, state, indices, memory, scale, l2norm] = in;
  const ScalarType dtype = q.scalar_type();
  check_tensor(op, "q", q, {kFloat, ScalarType::BFloat16, ScalarType::Half}, {kAny, kAny, kAny, kAny}, kCuda);
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), key_dim = q.size(3);
  check_tensor(op, "k", k, {dtype}, {batch, tokens, heads, key_dim}, kCuda);
  check_tensor(op, "v", v, {dtype}, {batch, tokens, kAny, kAny}, kCuda);
  const int64_t value_heads = v.size(2), value_dim = v.size(3);
  check_tensor(op, "g", g, {kFloat}, {batch, tokens, value_heads}, kCuda);
  check_tensor(op, "beta", beta, {dtype, kFloat}, {batch, tokens, value_heads}, kCuda);
  const int64_t pool = indices ? kAny : batch;
  check_tensor(op, "state", state, {kFloat}, {pool, value_heads, key_dim, in.columns()}, kCuda);
  check_tensor(op, "state_indices", indices, {ScalarType::Int, ScalarType::Long}, {batch}, kCuda);
  check_one_device(op, q, {k, v, state, g, beta, indices});
  if (heads < 1 || value_heads < 1 || value_heads % heads != 0) {
    fail(op, "the heads of v must be a positive multiple of those of q; got ", value_heads, " and ", heads);
  }
  if (key_dim < 1 || key_dim > kMaxKeyDim || value_dim < 1 || value_dim > kMaxValueDim) {
    fail(op, "K must be in 1..", kMaxKeyDim, " and V in 1..", kMaxValueDim, "; got ", key_dim, " and ", value_dim);
  }
  if (tokens > kMaxInt || in.blocks() > kMaxInt) {
    fail(op, "t and B * HV * ceil(V / ", kBlockColumns, ") must be below 2^31; got ", tokens, " and ", in.blocks());
  }
}

template <typename T, Memory kMemory, bool kAligned>
auto kernel_for(int64_t key_dim) {
  return key_dim <= 4 * kRowGroups   ? gated_delta_rule_step_kernel<T, kMemory, 4, kAligned>
         : key_dim <= 8 * kRowGroups ? gated_delta_rule_step_kernel<T, kMemory, 8, kAligned>
                                     : gated_delta_rule_step_kernel<T, kMemory, kMaxKeyDim / kRowGroups, kAligned>;
}

template <typename T>
auto kernel_for(const Inputs& in, bool aligned) {
  const int64_t key_dim = in.q.size(3);
  switch (in.memory) {
    case Memory::delta:
      return aligned ? kernel_for<T, Memory::delta, true>(key_dim) : kernel_for<T, Memory::delta, false>(key_dim);
    case Memory::sum:
      return aligned ? kernel_for<T, Memory::sum, true>(key_dim) : kernel_for<T, Memory::sum, false>(key_dim);
    default:
      return aligned ? kernel_for<T, Memory::sum_and_weight, true>(key_dim)
                     : kernel_for<T, Memory::sum_and_weight, false>(key_dim);
  }
}

// Where a step's outputs go: o in q's dtype, or with a normaliser the two parts in float.
struct Outputs {
  const Tensor* o;
  const Tensor* numerator;
  const Tensor* denominator;
};

template <typename T>
T* data(const Tensor* x) {
  return x ? static_cast<T*>(x->mutable_data_ptr()) : nullptr;
}

template <typename T>
void run(const Inputs& in, const Outputs& out, cudaStream_t stream) {
  Arguments<T> a{};
  a.q = static_cast<const T*>(in.q.const_data_ptr());
  a.k = static_cast<const T*>(in.k.const_data_ptr());
  a.v = static_cast<const T*>(in.v.const_data_ptr());
  a.g = pointer<float>(in.g, ScalarType::Float);
  a.beta_float = pointer<float>(in.beta, ScalarType::Float);
  a.beta = a.beta_float ? nullptr : pointer<T>(in.beta, in.q.scalar_type());
  a.indices = indices_of(in.indices);
  a.state = static_cast<float*>(in.state.mutable_data_ptr());
  a.o = data<T>(out.o);
  a.numerator = data<float>(out.numerator);
  a.denominator = data<float>(out.denominator);
  a.pool = in.state.size(0);
  a.tokens = static_cast<int>(in.q.size(1));
  a.heads = static_cast<int>(in.q.size(2));
  a.value_heads = static_cast<int>(in.v.size(2));
  a.key_dim = static_cast<int>(in.q.size(3));
  a.value_dim = static_cast<int>(in.v.size(3));
  a.columns = static_cast<int>(in.columns());
  a.column_blocks = static_cast<int>(ceil_div(a.columns, kBlockColumns));
  a.scale = in.scale;
  a.l2norm = in.l2norm;
  const bool aligned = a.columns % kVector == 0 && reinterpret_cast<uintptr_t>(a.state) % 16 == 0;
  launch(kernel_for<T>(in, aligned), in.blocks(), kThreads, stream, a);
}

Tensor gated_delta_rule_step_cuda(Tensor q, Tensor k, Tensor v, MaybeTensor g, MaybeTensor beta, Tensor state,
                                  MaybeTensor state_indices, double scale, bool qk_l2norm) {
  const Inputs in{"gated_delta_rule_step_cuda", q, k, v, g, beta, state, state_indices, Memory::delta,
                  static_cast<float>(scale), qk_l2norm};
  check_all(in);
  const OnDeviceOf here(q);
  Tensor o = torch::stable::empty_like(v);
  if (o.numel() == 0) return o;
  with_element(q.scalar_type(), [&]<typename T>(T) { run<T>(in, {&o, nullptr, nullptr}, here.stream()); });
  return o;
}

template <typename T>
void divide(const Tensor& numerator, const Tensor& denominator, const Tensor& o, cudaStream_t stream) {
  const Quotient<T> a{numerator.const_data_ptr<float>(), denominator.const_data_ptr<float>(),
                      static_cast<T*>(o.mutable_data_ptr()), o.numel(), static_cast<int>(o.size(3))};
  launch(divide_kernel<T>, ceil_div(a.count, kThreads), kThreads, stream, a);
}

std::tuple<Tensor, Tensor> linear_attention_step_cuda(Tensor q, Tensor k, Tensor v, MaybeTensor g, Tensor state,
                                                      MaybeTensor state_indices, double scale, bool normaliser,
                                                      bool divides) {
  const MaybeTensor no_beta;
  const Inputs in{"linear_attention_step_cuda", q, k, v, g, no_beta, state, state_indices,
                  normaliser ? Memory::sum_and_weight : Memory::sum, static_cast<float>(scale), false};
  check_all(in);
  const OnDeviceOf here(q);
  const int64_t batch = v.size(0), tokens = v.size(1), heads = v.size(2);
  const auto floats = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(v, shape, ScalarType::Float);
  };
  Tensor denominator = normaliser ? floats({batch, tokens, heads}) : floats({0});
  Tensor numerator = normaliser ? floats({batch, tokens, heads, v.size(3)}) : floats({0});
  Tensor o = normaliser && !divides ? numerator : torch::stable::empty_like(v);
  if (o.numel() == 0) return {o, denominator};
  with_element(q.scalar_type(), [&]<typename T>(T) {
    run<T>(in, normaliser ? Outputs{nullptr, &numerator, &denominator} : Outputs{&o, nullptr, nullptr}, here.stream());
    if (normaliser && divides) divide<T>(numerator, denominator, o, here.stream());
  });
  return {o, denominator};
}

}  // namespace
}  // namespace memattn::step

STABLE_TORCH_LIBRARY_IMPL(memattn, CUDA, m) {
  m.impl("gated_delta_rule_step_cuda", TORCH_BOX(&memattn::step::gated_delta_rule_step_cuda));
  m.impl("linear_attention_step_cuda", TORCH_BOX(&memattn::step::linear_attention_step_cuda));
}
