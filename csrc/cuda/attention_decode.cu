// attention_decode on CUDA: checks, dispatch and launch. The mathematics and the blocks' work: .cuh beside this.
//
// The grid follows from shapes and capacity alone; lengths stay on the device. No host synchronisation, the current
// stream, no allocation but the outputs and the splits' parts: the call can be captured in a CUDA graph.
#include <tuple>

#include "launch.h"

#include "attention_decode.cuh"

namespace memattn::decode {
namespace {

constexpr const char* kOp = "attention_decode_cuda";
constexpr int64_t kMaxDim = 256;
constexpr auto kFloat = ScalarType::Float;
constexpr auto kCuda = Place::cuda;
constexpr auto kAny = kAnySize;

struct Inputs {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const Tensor& lengths;
  const MaybeTensor &page_table, &sink, &decay, &slopes;
  int64_t ring_start;
  Mask mask;
  bool tile_heads;
  double scale;

  int64_t batch() const { return q.size(0); }
  int64_t tokens() const { return q.size(1); }
  int64_t heads() const { return q.size(2); }
  int64_t key_heads() const { return k.size(2); }
  int64_t capacity() const { return page_table ? page_table->size(1) * k.size(1) : k.size(1); }
  int64_t prefix_splits() const { return ring_start < 0 ? 0 : ceil_div(ring_start, kSpan); }
  int64_t splits() const {
    if (ring_start < 0) return ceil_div(capacity(), kSpan);
    return prefix_splits() + ceil_div(capacity() - ring_start, kSpan) + 1;  // a ring may begin inside a span
  }
};

// What memory safety needs; what a value means is checked in Python.
void check_all(const Inputs& in) {
  const ScalarType dtype = in.q.scalar_type();
  check_tensor(kOp, "q", in.q, {kFloat, ScalarType::BFloat16, ScalarType::Half}, {kAny, kAny, kAny, kAny}, kCuda);
  const int64_t batch = in.batch(), key_dim = in.q.size(3), rows = in.page_table ? kAny : batch;
  check_tensor(kOp, "k_cache", in.k, {dtype}, {rows, kAny, kAny, key_dim}, kCuda);
  check_tensor(kOp, "v_cache", in.v, {dtype}, {in.k.size(0), in.k.size(1), in.key_heads(), kAny}, kCuda);
  check_tensor(kOp, "cache_seqlens", in.lengths, {ScalarType::Int, ScalarType::Long}, {batch}, kCuda);
  check_tensor(kOp, "page_table", in.page_table, {ScalarType::Int}, {batch, kAny}, kCuda);
  check_tensor(kOp, "sink", in.sink, {kFloat}, {in.heads()}, kCuda);
  check_tensor(kOp, "decay_cache", in.decay, {ScalarType::Double}, {in.k.size(0), in.k.size(1), in.heads()}, kCuda);
  check_tensor(kOp, "alibi_slopes", in.slopes, {kFloat}, {in.heads()}, kCuda);
  check_one_device(kOp, in.q, {in.k, in.v, in.lengths, in.page_table, in.sink, in.decay, in.slopes});
  if (in.heads() < 1 || in.key_heads() < 1 || in.heads() % in.key_heads() != 0) {
    fail(kOp, "the heads of q must be a positive multiple of those of k_cache; got ", in.heads(), " and ", in.key_heads());
  }
  const int64_t value_dim = in.v.size(3);
  if (key_dim < 1 || key_dim > kMaxDim || value_dim < 1 || value_dim > kMaxDim) {
    fail(kOp, "K and V must be in 1..", kMaxDim, "; got ", key_dim, " and ", value_dim);
  }
  if (in.ring_start >= std::max<int64_t>(in.capacity(), 1)) {
    fail(kOp, "ring_start must be below the capacity ", in.capacity(), "; got ", in.ring_start);
  }
}

template <typename T>
Arguments<T> arguments_of(const Inputs& in, const Tensor& o, const Tensor& lse, const Tensor& parts,
                          const Tensor& statistics) {
  Arguments<T> a{};
  a.q = static_cast<const T*>(in.q.const_data_ptr());
  a.k = static_cast<const T*>(in.k.const_data_ptr());
  a.v = static_cast<const T*>(in.v.const_data_ptr());
  a.lengths = indices_of(in.lengths);
  a.sink = pointer<float>(in.sink, kFloat);
  a.decay = pointer<double>(in.decay, ScalarType::Double);
  a.slopes = pointer<float>(in.slopes, kFloat);
  a.statistics = static_cast<float2*>(statistics.mutable_data_ptr());
  a.parts = static_cast<float*>(parts.mutable_data_ptr());
  a.o = static_cast<T*>(o.mutable_data_ptr());
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  const int64_t max_pages = in.page_table ? in.page_table->size(1) : 0;
  a.cache = {in.capacity(), in.ring_start, pointer<int32_t>(in.page_table, ScalarType::Int), max_pages, in.k.size(1),
             in.k.size(0)};
  a.mask = in.mask;
  a.tokens = in.tokens();
  a.heads = in.heads();
  a.key_heads = in.key_heads();
  a.splits = in.splits();
  a.prefix_splits = in.prefix_splits();
  a.key_dim = static_cast<int>(in.q.size(3));
  a.value_dim = static_cast<int>(in.v.size(3));
  a.scale = static_cast<float>(in.scale) * kLog2e;
  a.tile_heads = in.tile_heads;
  constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
  const auto address = reinterpret_cast<uintptr_t>(a.q) | reinterpret_cast<uintptr_t>(a.k) | reinterpret_cast<uintptr_t>(a.v);
  a.aligned = a.key_dim % kWidth == 0 && a.value_dim % kWidth == 0 && address % 16 == 0;
  return a;
}

template <typename T, int kDim>
auto split_kernel_for(int rows) {
  return rows == 1 ? split_kernel<T, kDim, 1> : rows == 4 ? split_kernel<T, kDim, 4> : split_kernel<T, kDim, 8>;
}

template <typename T>
void run(const Inputs& in, Arguments<T> a, cudaStream_t stream) {
  const int64_t sharing = a.tokens * a.group();  // query rows of a key head
  const int rows = sharing == 1 ? 1 : sharing <= 4 ? 4 : 8;
  a.row_blocks = ceil_div(sharing, rows);
  const int64_t blocks = in.batch() * a.key_heads * a.row_blocks * a.splits, merges = in.batch() * a.tokens * a.heads;
  if (blocks > kMaxInt || merges > kMaxInt) {
    fail(kOp, "B * HKV * ceil(t * HQ / HKV / ", rows, ") * ceil(capacity / ", kSpan, ") and B * t * HQ must be below 2^31; got ",
         blocks, " and ", merges);
  }
  const int dim = std::max(a.key_dim, a.value_dim);
  const auto kernel = dim <= 64    ? split_kernel_for<T, 64>(rows)
                      : dim <= 128 ? split_kernel_for<T, 128>(rows)
                                   : split_kernel_for<T, 256>(rows);
  if (blocks > 0) launch(kernel, blocks, kThreads, stream, a);
  launch(merge_kernel<T>, merges, kThreads, stream, a);
}

std::tuple<Tensor, Tensor> attention_decode_cuda(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens,
                                                 MaybeTensor page_table, MaybeTensor sink, MaybeTensor decay_cache,
                                                 MaybeTensor alibi_slopes, int64_t ring_start, int64_t causal,
                                                 int64_t window, int64_t prefix_len, int64_t block_size, int64_t dilation,
                                                 int64_t dilated_window, int64_t dilated_prefix, bool tile_heads,
                                                 double scale) {
  const Mask mask{causal, window, prefix_len, block_size, dilation, dilated_window, dilated_prefix};
  const Inputs in{q, k_cache, v_cache, cache_seqlens, page_table, sink, decay_cache, alibi_slopes, ring_start, mask,
                  tile_heads, scale};
  check_all(in);
  const OnDeviceOf here(q);
  const int64_t batch = in.batch(), tokens = in.tokens(), heads = in.heads(), value_dim = v_cache.size(3);
  Tensor o = torch::stable::new_empty(q, {batch, tokens, heads, value_dim});
  Tensor lse = torch::stable::new_empty(q, {batch, tokens, heads}, kFloat);
  if (lse.numel() == 0) return {o, lse};
  Tensor parts = torch::stable::new_empty(q, {batch, tokens, heads, in.splits(), value_dim}, kFloat);
  Tensor statistics = torch::stable::new_empty(q, {batch, tokens, heads, in.splits(), 2}, kFloat);
  with_element(q.scalar_type(), [&]<typename T>(T) {
    run<T>(in, arguments_of<T>(in, o, lse, parts, statistics), here.stream());
  });
  return {o, lse};
}

}  // namespace
}  // namespace memattn::decode

STABLE_TORCH_LIBRARY_IMPL(memattn, CUDA, m) {
  m.impl("attention_decode_cuda", TORCH_BOX(&memattn::decode::attention_decode_cuda));
}
