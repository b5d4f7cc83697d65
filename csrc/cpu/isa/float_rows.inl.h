// 16-bit conversions behind float_rows.h, written for the compiler to vectorise. Included once in each namespace of a table,
// inside its target region.

using memattn::rows::BFloat16;
using memattn::rows::Half;

inline float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t float_to_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

void from_bfloat16(float* __restrict out, const BFloat16* __restrict in, int64_t n) {
  for (int64_t c = 0; c < n; ++c) out[c] = bits_to_float(static_cast<uint32_t>(in[c].bits) << 16);
}

// Round to nearest even; NaN keeps its sign and stays quiet.
void to_bfloat16(BFloat16* __restrict out, const float* __restrict in, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    const uint32_t bits = float_to_bits(in[c]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u;
    out[c].bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
}

// The exponent is rebased by a multiplication, which also normalises half's subnormals.
void from_half(float* __restrict out, const Half* __restrict in, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    const uint32_t half = in[c].bits, magnitude = half & 0x7fffu;
    const uint32_t finite = float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f);
    const uint32_t special = 0x7f800000u | (magnitude << 13);
    out[c] = bits_to_float((magnitude >= 0x7c00u ? special : finite) | ((half & 0x8000u) << 16));
  }
}

// Adding a power of two whose last bit is half's last bit makes the float adder do the rounding.
void to_half(Half* __restrict out, const float* __restrict in, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    const uint32_t bits = float_to_bits(in[c]), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const float value = bits_to_float(magnitude) * 0x1p112f * 0x1p-110f;  // overflows to inf where half does
    const uint32_t exponent = magnitude & 0x7f800000u;
    const uint32_t bias = (exponent < 0x38800000u ? 0x38800000u : exponent) + 0x07800000u;
    const uint32_t sum = float_to_bits(bits_to_float(bias) + value);
    const uint32_t half = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
    out[c].bits = static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : half));
  }
}
