// Rotary positions, half-split: channel c of the first half turns with channel c of the second by position base^(-2c/dim).
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace memattn::cpu {

template <class Acc>
class Rotary {
 public:
  // For positions first..last; base 0 turns nothing. Angles are summed up in double.
  Rotary(double base, int dim, int64_t first, int64_t last) : half_(base > 0 ? dim / 2 : 0), first_(first) {
    if (half_ == 0 || last < first) return;
    table_.resize((last - first + 1) * 2 * half_);
    std::vector<double> rate(half_);
    for (int c = 0; c < half_; ++c) rate[c] = std::pow(base, -static_cast<double>(c) / half_);
    torch::stable::parallel_for(first, last + 1, 256, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        Acc* cosine = table_.data() + (p - first_) * 2 * half_;
        for (int c = 0; c < half_; ++c) {
          cosine[c] = static_cast<Acc>(std::cos(p * rate[c]));
          cosine[half_ + c] = static_cast<Acc>(std::sin(p * rate[c]));
        }
      }
    });
  }

  // out = x turned to `position`; out may be x.
  void turn(Acc* out, const Acc* x, int64_t position) const { turn_by(out, x, position, Acc(1)); }
  // The transpose, which is the gradient.
  void turn_back(Acc* out, const Acc* x, int64_t position) const { turn_by(out, x, position, Acc(-1)); }

 private:
  void turn_by(Acc* out, const Acc* x, int64_t position, Acc direction) const {
    const Acc *cosine = table_.data() + (position - first_) * 2 * half_, *sine = cosine + half_;
    for (int c = 0; c < half_; ++c) {
      const Acc a = x[c], b = x[half_ + c], s = direction * sine[c];
      out[c] = a * cosine[c] - b * s;
      out[half_ + c] = b * cosine[c] + a * s;
    }
  }

  int half_;
  int64_t first_;
  std::vector<Acc> table_;
};

}  // namespace memattn::cpu
