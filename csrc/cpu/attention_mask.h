// Which keys a query sees: the mask of attention as arithmetic on positions. Query row t of a sequence has position
// t + q_offset, key row t position t. The rules in Python: reference/attention_mask.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace memattn {

enum class Causal : int64_t { no, tokens, blocks };

// A size of 0 stands for "no such term".
struct AttentionMask {
  Causal causal;
  int64_t window, prefix_len, block_size, summary, dilation, dilated_window, dilated_prefix, q_offset;
  bool causal_prefix = false;  // whether the prefix, too, is seen up to the query only
  int64_t first = 0;           // keys before it, beyond the prefix, are not seen

  // The same mask for so many keys: a dilated grid beyond them leaves its window and its prefix, whose tiles can be
  // skipped.
  AttentionMask for_keys(int64_t keys) const {
    AttentionMask mask = *this;
    if (dilation <= keys || dilation == 1 || dilated_window == 0 || prefix_len > 0) return mask;
    mask.dilation = 0;
    mask.window = window > 0 ? std::min(window, dilated_window) : dilated_window;
    if (window == 0 && block_size == 0) {
      mask.prefix_len = dilated_prefix;
      mask.causal_prefix = true;
    } else if (dilated_prefix > 0) {
      return *this;  // a prefix that the other terms cut has no short form
    }
    return mask;
  }

  // The range of keys beyond the prefix that position i may see. Both ends never fall as i grows; dilation thins it.
  struct Range {
    int64_t begin, end;
  };
  Range keys(int64_t i, int64_t length) const {
    Range range{first, length};
    if (summary > 0) {
      range.end = std::max<int64_t>(i, 0) / summary;
    } else if (causal == Causal::tokens) {
      range.end = i + 1;
    }
    if (block_size > 0) {
      const int64_t block = i / block_size * block_size;
      if (causal != Causal::blocks) range.begin = std::max(range.begin, block);
      range.end = std::min(range.end, block + block_size);
    }
    if (window > 0) range.begin = std::max(range.begin, i - window + 1);
    range.end = std::min(range.end, length);
    range.begin = std::min(range.begin, range.end);
    return range;
  }

  // Whether dilation hides key j, of the range of position i, from it.
  bool thinned(int64_t i, int64_t j) const {
    return dilation > 1 && (j + 1) % dilation != 0 && i - j >= dilated_window && j >= dilated_prefix;
  }
  // Whether it may hide any of the keys begin..end from positions up to i.
  bool may_thin(int64_t i, int64_t begin, int64_t end) const {
    return dilation > 1 && i - begin >= dilated_window && end > dilated_prefix;
  }
};

// The ranges of all query rows of one sequence, and what tiles of keys are to them.
class SeenKeys {
 public:
  SeenKeys(const AttentionMask& mask, int64_t queries, int64_t keys)
      : mask_(mask.for_keys(keys)), queries_(queries), keys_(keys) {}

  int64_t queries() const { return queries_; }
  int64_t keys() const { return keys_; }
  int64_t prefix() const { return std::min(mask_.prefix_len, keys_); }
  int64_t prefix(int64_t row) const {  // what this row sees of it
    return mask_.causal_prefix ? std::min(prefix(), row + mask_.q_offset + 1) : prefix();
  }
  AttentionMask::Range range(int64_t row) const { return mask_.keys(row + mask_.q_offset, keys_); }

  // Rows of first..last that see any of keys begin..end.
  AttentionMask::Range rows(int64_t first, int64_t last, int64_t begin, int64_t end) const {
    if (begin < prefix()) return {first, last};
    const auto before = [&](auto&& reached) {  // rows first..last start with those that have not reached a point
      int64_t low = first, high = last;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (reached(range(middle)))
          high = middle;
        else
          low = middle + 1;
      }
      return low;
    };
    const int64_t from = before([&](AttentionMask::Range r) { return r.end > begin; });
    const int64_t to = before([&](AttentionMask::Range r) { return r.begin >= end; });
    return {from, std::max(from, to)};
  }

  // Whether rows first..last see every one of keys begin..end, padding beyond the last key included.
  bool all(int64_t first, int64_t last, int64_t begin, int64_t end) const {
    if (end <= prefix(first)) return true;
    return range(last - 1).begin <= std::max(begin, prefix(first)) && end <= range(first).end &&
           !mask_.may_thin(last - 1 + mask_.q_offset, begin, end);
  }

  // Scores [last - first, width] of keys from `begin` become -inf where they are not seen.
  template <class Acc>
  void hide(Acc* s, int ld, int64_t first, int64_t last, int64_t begin, int width) const {
    constexpr Acc hidden = -std::numeric_limits<Acc>::infinity();
    for (int64_t row = first; row < last; ++row) {
      Acc* scores = s + (row - first) * ld;
      const int64_t counted = std::min(row, queries_ - 1);
      const int open = static_cast<int>(std::clamp<int64_t>(prefix(counted) - begin, 0, width));
      const AttentionMask::Range seen = range(counted);
      const int from = static_cast<int>(std::clamp<int64_t>(seen.begin - begin, open, width));
      const int to = static_cast<int>(std::clamp<int64_t>(seen.end - begin, from, width));
      std::fill(scores + open, scores + from, hidden);
      std::fill(scores + to, scores + width, hidden);
      const int64_t i = row + mask_.q_offset;
      if (!mask_.may_thin(i, begin + from, begin + to)) continue;
      for (int j = from; j < to; ++j) {
        if (mask_.thinned(i, begin + j)) scores[j] = hidden;
      }
    }
  }

 private:
  AttentionMask mask_;
  int64_t queries_, keys_;
};

}  // namespace memattn
