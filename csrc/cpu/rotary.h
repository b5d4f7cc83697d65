// Rotary positions, half-split: channel c of the first half turns with channel c of the second by position base^(-2c/dim).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace memattn::cpu {

template <class Acc>
class Rotary {
 public:
  struct Span {
    int64_t first, last;
  };

  // For the positions of `spans`; base 0 turns nothing. Angles are summed up in double.
  Rotary(double base, int dim, std::vector<Span> spans) : half_(base > 0 ? dim / 2 : 0) {
    if (half_ == 0) return;
    std::sort(spans.begin(), spans.end(), [](Span a, Span b) { return a.first < b.first; });
    for (const Span& span : spans) {
      if (spans_.empty() || span.first > spans_.back().last + 1) {
        row_.push_back(rows());
        spans_.push_back(span);
      }
      spans_.back().last = std::max(spans_.back().last, span.last);
    }
    table_.resize(rows() * 2 * half_);
    std::vector<double> rate(half_);
    for (int c = 0; c < half_; ++c) rate[c] = std::pow(base, -static_cast<double>(c) / half_);
    for (size_t i = 0; i < spans_.size(); ++i) {
      torch::stable::parallel_for(spans_[i].first, spans_[i].last + 1, 256, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          Acc* cosine = table_.data() + (row_[i] + p - spans_[i].first) * 2 * half_;
          for (int c = 0; c < half_; ++c) {
            cosine[c] = static_cast<Acc>(std::cos(p * rate[c]));
            cosine[half_ + c] = static_cast<Acc>(std::sin(p * rate[c]));
          }
        }
      });
    }
  }

  // out = x turned to `position`; out may be x.
  void turn(Acc* out, const Acc* x, int64_t position) const { turn_by(out, x, position, Acc(1)); }
  // The transpose, which is the gradient.
  void turn_back(Acc* out, const Acc* x, int64_t position) const { turn_by(out, x, position, Acc(-1)); }

 private:
  void turn_by(Acc* out, const Acc* x, int64_t position, Acc direction) const {
    if (half_ == 0) return;
    const auto after = std::upper_bound(spans_.begin(), spans_.end(), position,
                                        [](int64_t p, const Span& span) { return p < span.first; });
    const auto i = after - spans_.begin() - 1;
    const Acc *cosine = table_.data() + (row_[i] + position - spans_[i].first) * 2 * half_, *sine = cosine + half_;
    for (int c = 0; c < half_; ++c) {
      const Acc a = x[c], b = x[half_ + c], s = direction * sine[c];
      out[c] = a * cosine[c] - b * s;
      out[half_ + c] = b * cosine[c] + a * s;
    }
  }

  int64_t rows() const {
    return spans_.empty() ? 0 : row_.back() + spans_.back().last - spans_.back().first + 1;
  }

  int half_;
  std::vector<Span> spans_;    // ascending, apart
  std::vector<int64_t> row_;   // of the table, of each span's first position
  std::vector<Acc> table_;
};

}  // namespace memattn::cpu
