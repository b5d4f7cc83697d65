// The loops behind scan_rows.h, written for the compiler to vectorise. Each scan_*.cpp includes this once, inside its own
// target region and a namespace of its own, so that no function compiled for one processor is linked into another's path.
// Standard headers are included before the region for the same reason.

#include "float_rows.inl.h"

template <class A>
struct Factor {
  A high, low, weight;  // e^g = high + low, weight = 1 - e^g
};

// With g = n ln 2 + r and q = e^r - 1 from its polynomial: e^g = s + s q for s = 2^n. |s q| < s, so that s - high + s q is
// the rounding error of high, exactly; 1 - e^g = (1 - s) - s q does not cancel, because 1 - s is 0 or at least 1/2.
inline Factor<float> factor(float g) {
  const float x = g < -87.3f ? -87.3f : g;
  const float shifted = x * 1.44269504f + 0x1.8p23f;  // its low mantissa bits hold the rounded n
  const float whole = shifted - 0x1.8p23f;
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float q = p * (r * r) + r;
  const float s = bits_to_float((float_to_bits(shifted) - 0x4b400000u + 127u) << 23), scaled = s * q;
  const float high = s + scaled, low = (s - high) + scaled;
  const bool forgets = g < -87.3f;  // -inf included
  return {forgets ? 0.0f : high, forgets ? 0.0f : low, (1.0f - s) - scaled};
}

inline Factor<double> factor(double g) { return {std::exp(g), 0.0, -std::expm1(g)}; }

template <class A, bool ema>
bool gate_of(A* __restrict high, A* __restrict low, A* __restrict weight, const A* __restrict g, int64_t n) {
  int above = 0;
  for (int64_t c = 0; c < n; ++c) {
    above |= g[c] > A(0);
    const Factor<A> f = factor(g[c]);
    high[c] = f.high;
    low[c] = f.low;
    weight[c] = ema ? f.weight : A(1);
  }
  return above != 0;
}

template <class A>
bool gate(Gate<A> out, const A* g, bool ema, int64_t n) {
  return ema ? gate_of<A, true>(out.high, out.low, out.weight, g, n) : gate_of<A, false>(out.high, out.low, out.weight, g, n);
}

template <class A>
void advance(A* y, const A* before, Gate<A> gate, const A* __restrict x, int64_t n) {
  const A* __restrict high = gate.high;
  const A* __restrict low = gate.low;
  const A* __restrict weight = gate.weight;
#pragma GCC ivdep  // y is `before` itself or apart from it
  for (int64_t c = 0; c < n; ++c) y[c] = high[c] * before[c] + (low[c] * before[c] + weight[c] * x[c]);
}

template <class A, bool ema>
void retreat_of(A* __restrict carry, A* __restrict dx, A* __restrict dg, Gate<A> gate, const A* __restrict dy,
                const A* __restrict before, const A* __restrict x, int64_t n) {
  const A* __restrict high = gate.high;
  const A* __restrict low = gate.low;
  const A* __restrict weight = gate.weight;
  for (int64_t c = 0; c < n; ++c) {
    const A r = dy[c] + carry[c], decayed = high[c] * r + low[c] * r;
    dx[c] += weight[c] * r;
    dg[c] += decayed * (ema ? before[c] - x[c] : before[c]);
    carry[c] = decayed;
  }
}

template <class A>
void retreat(A* carry, A* dx, A* dg, Gate<A> gate, const A* dy, const A* before, const A* x, bool ema, int64_t n) {
  if (ema) retreat_of<A, true>(carry, dx, dg, gate, dy, before, x, n);
  else retreat_of<A, false>(carry, dx, dg, gate, dy, before, x, n);
}

template <class A>
void add(A* __restrict sum, const A* __restrict x, int64_t n) {
  for (int64_t c = 0; c < n; ++c) sum[c] += x[c];
}

#if defined(MEMATTN_STREAM)
typedef float Line __attribute__((vector_size(MEMATTN_STREAM_BYTES)));

void stream(void* out, const void* in, int64_t bytes) {
  auto* to = static_cast<char*>(out);
  const auto* from = static_cast<const char*>(in);
  if ((reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(bytes)) % sizeof(Line) != 0) {
    __builtin_memcpy(out, in, static_cast<size_t>(bytes));
    return;
  }
  for (int64_t i = 0; i < bytes; i += sizeof(Line)) {
    Line line;
    __builtin_memcpy(&line, from + i, sizeof(Line));
    MEMATTN_STREAM(reinterpret_cast<float*>(to + i), line);
  }
}

void fence() { __builtin_ia32_sfence(); }
#else
void stream(void* out, const void* in, int64_t bytes) { __builtin_memcpy(out, in, static_cast<size_t>(bytes)); }

void fence() {}
#endif

constexpr RowTable<float> table = {
    {from_bfloat16, from_half, to_bfloat16, to_half}, gate<float>, advance<float>, retreat<float>, add<float>, stream, fence};
