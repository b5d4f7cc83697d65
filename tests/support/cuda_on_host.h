// Just enough CUDA to run a kernel's source on the host: one std::thread per CUDA thread, one block after another.
// It checks indexing, predication, barriers and arithmetic. It says nothing about speed, coalescing or the memory model.
#pragma once

#include <barrier>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time, so one copy per kernel is one copy per block

struct float4 {
  float x, y, z, w;
};
struct Index {
  unsigned x = 0;
};
inline thread_local Index threadIdx;
inline Index blockIdx;

namespace cuda_on_host {
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
inline std::vector<float> exchange;

// A thread that leaves the kernel early must not be waited for: the barriers drop it.
template <typename Kernel, typename Arguments>
void launch(Kernel kernel, unsigned blocks, unsigned threads, const Arguments& arguments) {
  for (unsigned block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    exchange.assign(threads, 0.f);
    block_barrier = std::make_unique<std::barrier<>>(threads);
    warp_barriers.clear();
    for (unsigned w = 0; w < threads / 32; ++w) warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads; ++t) {
      running.emplace_back([&, t] {
        threadIdx.x = t;
        kernel(arguments);
        warp_barriers[t / 32]->arrive_and_drop();
        block_barrier->arrive_and_drop();
      });
    }
    for (auto& thread : running) thread.join();
  }
}
}  // namespace cuda_on_host

// After a barrier one warp, another one each time, is held back: a shared buffer that is written again too early is then
// overwritten before that warp has read it.
inline void __syncthreads() {
  thread_local unsigned passed = 0;
  cuda_on_host::block_barrier->arrive_and_wait();
  if (passed++ % cuda_on_host::warp_barriers.size() == threadIdx.x / 32) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  auto& warp = *cuda_on_host::warp_barriers[threadIdx.x / 32];
  cuda_on_host::exchange[threadIdx.x] = value;
  warp.arrive_and_wait();
  const float other = cuda_on_host::exchange[threadIdx.x ^ static_cast<unsigned>(mask)];
  warp.arrive_and_wait();
  return other;
}

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
