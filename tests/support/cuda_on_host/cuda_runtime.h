// Just enough CUDA to compile .cu files, launchers included, with g++ and run them on CPU tensors.
//
// Blocks run one after another. The threads of a block are fibers: one runs until it waits at a barrier or a shuffle or
// ends, then another goes on; the order is drawn anew at every barrier, so that what only works in one order shows.
// Shared memory holds NaN when a block begins. This checks indexing, predication, barriers, arithmetic, launchers and
// argument checks; it says nothing about speed, coalescing or the memory model, and is no GPU run.
#pragma once

#include <setjmp.h>
#include <torch/csrc/stable/tensor.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one at a time, so one copy per kernel is one copy per block.
#define __shared__ static __attribute__((section("cuda_shared")))
extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr int kWarp = 32;
constexpr size_t kStack = size_t{64} << 10;

class Block {
 public:
  explicit Block(unsigned threads) : fibers_(threads), exchange_(threads) {
    if (threads % kWarp) throw std::runtime_error("cuda_on_host: a block must have whole warps");
    for (Fiber& fiber : fibers_) fiber.stack = std::make_unique_for_overwrite<char[]>(kStack);
  }

  void run(const std::function<void()>& body) {
    std::memset(__start_cuda_shared, 0xff, static_cast<size_t>(__stop_cuda_shared - __start_cuda_shared));
    body_ = &body;
    for (unsigned t = 0; t < fibers_.size(); ++t) start(t);
    while (turn()) continue;
  }

  // Leaves the thread until all that still run, of its warp or of the block, are here.
  void wait(bool warp) {
    Fiber& fiber = fibers_[threadIdx.x];
    fiber.waits = warp ? Waits::warp : Waits::block;
    if (_setjmp(fiber.here) == 0) _longjmp(scheduler_, 1);
  }

  // Two places by turns: a thread writes the one when all have read the other.
  float exchange(float value, unsigned partner) {
    const unsigned turn = fibers_[threadIdx.x].shuffles++ & 1;
    exchange_[threadIdx.x][turn] = value;
    wait(true);
    return exchange_[partner][turn];
  }

 private:
  enum class Waits { no, warp, block, ended };
  struct Fiber {
    ucontext_t start;
    jmp_buf here;  // unlike swapcontext, jumps make no system call
    std::unique_ptr<char[]> stack;
    Waits waits;
    bool started;
    unsigned shuffles;
  };

  static void enter(unsigned high, unsigned low) {
    auto* block = reinterpret_cast<Block*>(uint64_t{high} << 32 | low);
    (*block->body_)();
    block->fibers_[threadIdx.x].waits = Waits::ended;
    _longjmp(block->scheduler_, 1);
  }

  void start(unsigned t) {
    Fiber& fiber = fibers_[t];
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.waits = Waits::no;
    fiber.started = false;
    fiber.shuffles = 0;
    const auto self = reinterpret_cast<uint64_t>(this);
    makecontext(&fiber.start, reinterpret_cast<void (*)()>(enter), 2, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self));
  }

  void resume(unsigned t) {
    Fiber& fiber = fibers_[t];
    threadIdx.x = t;
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }

  // Runs what can run, warp by warp in a drawn order, and opens barriers; false when all threads have ended.
  bool turn() {
    std::vector<unsigned> warps(fibers_.size() / kWarp);
    for (unsigned w = 0; w < warps.size(); ++w) warps[w] = w;
    std::shuffle(warps.begin(), warps.end(), random_);
    for (unsigned w : warps) run_warp(w * kWarp, random_() & 1);
    bool running = false;
    for (const Fiber& fiber : fibers_) running |= fiber.waits != Waits::ended;
    for (Fiber& fiber : fibers_) {
      if (fiber.waits == Waits::block) fiber.waits = Waits::no;
    }
    return running;
  }

  // Until every thread of the warp waits for the block or has ended.
  void run_warp(unsigned first, bool backwards) {
    for (bool again = true; again;) {
      for (unsigned i = 0; i < kWarp; ++i) {
        const unsigned t = first + (backwards ? kWarp - 1 - i : i);
        if (fibers_[t].waits == Waits::no) resume(t);
      }
      bool shuffling = false, away = false;
      for (unsigned t = first; t < first + kWarp; ++t) {
        shuffling |= fibers_[t].waits == Waits::warp;
        away |= fibers_[t].waits != Waits::warp;
      }
      if (shuffling && away) throw std::runtime_error("cuda_on_host: part of a warp is missing at a shuffle");
      for (unsigned t = first; shuffling && t < first + kWarp; ++t) fibers_[t].waits = Waits::no;
      again = shuffling;
    }
  }

  const std::function<void()>* body_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<std::array<float, 2>> exchange_;
  jmp_buf scheduler_;
  std::mt19937 random_{0};
};

inline Block* block = nullptr;

}  // namespace cuda_on_host

template <typename Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments), const Arguments& arguments) {
  if (config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x > 1024) {
    throw std::runtime_error("cuda_on_host: no such grid: " + std::to_string(config->gridDim.x) + " blocks of " +
                             std::to_string(config->blockDim.x));
  }
  cuda_on_host::Block block(config->blockDim.x);
  cuda_on_host::block = &block;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned b = 0; b < gridDim.x; ++b) {
    blockIdx.x = b;
    block.run([&] { kernel(arguments); });
  }
  return cudaSuccess;
}

inline void __syncthreads() { cuda_on_host::block->wait(false); }
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  return cuda_on_host::block->exchange(value, threadIdx.x ^ static_cast<unsigned>(mask));
}
template <typename Word>
void __stwb(Word* to, Word word) {
  *to = word;
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

// What the launchers ask of torch's CUDA library. Their tensors are on the CPU here, and so is their registration.
#define aoti_torch_get_current_cuda_stream(index, stream) (static_cast<void>(*(stream) = nullptr), 0)
#define torch_c10_cuda_check_msg(...) static_cast<void>(__error_msg)
#define torch_c10_cuda_free_error_msg(message) static_cast<void>(message)
#define is_cuda is_cpu
#define CUDA CPU
