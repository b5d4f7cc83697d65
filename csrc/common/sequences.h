// Where the tokens and the chunk slots of every sequence are, in a batch [B, T] or packed (B = 1 with cu_seqlens).
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace memattn {

// No position lies beyond it, and no setting that counts tokens is larger, so that sums of both do not overflow.
inline constexpr int64_t kFarthest = int64_t{1} << 48;

class SequenceLayout {
 public:
  SequenceLayout() = default;

  static SequenceLayout batch(int64_t count, int64_t tokens) {
    SequenceLayout layout;
    layout.tokens_ = tokens;
    layout.bounds_.clear();
    for (int64_t n = 0; n <= count; ++n) layout.bounds_.push_back(n * tokens);
    return layout;
  }

  static SequenceLayout packed(std::vector<int64_t> bounds) {
    SequenceLayout layout;
    layout.packed_ = true;
    layout.bounds_ = std::move(bounds);
    return layout;
  }

  int64_t count() const { return static_cast<int64_t>(bounds_.size()) - 1; }
  int64_t start(int64_t n) const { return bounds_[n]; }  // in rows of the flattened [B * T, ...] tensors
  int64_t end(int64_t n) const { return bounds_[n + 1]; }
  int64_t length(int64_t n) const { return bounds_[n + 1] - bounds_[n]; }
  int64_t chunks(int64_t n, int64_t span) const { return (length(n) + span - 1) / span; }
  bool has_unused_slots() const { return packed_; }

  // Slots of `span` tokens: a table that the host can size without reading cu_seqlens.
  int64_t slots(int64_t span) const {
    return packed_ ? bounds_.back() / span + count() : count() * ((tokens_ + span - 1) / span);
  }
  int64_t slot(int64_t n, int64_t chunk, int64_t span) const {
    return packed_ ? start(n) / span + n + chunk : n * ((tokens_ + span - 1) / span) + chunk;
  }

 private:
  bool packed_ = false;
  int64_t tokens_ = 0;
  std::vector<int64_t> bounds_{0};
};

}  // namespace memattn
