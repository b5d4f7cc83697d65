// The lists of sparse attention inverted: for every cell of memory the query rows that name it, in ascending order.
#pragma once

#include "sparse_attention.h"

#include <numeric>

namespace memattn::cpu {

// A query row that names a cell: by which entry, and how many of its tokens it sees.
struct Named {
  int32_t row, entry, tokens;
};

// Cells of memory that are inverted together: those of one sequence, or all pages.
struct CellGroup {
  int64_t first_row, last_row;  // queries
  int64_t row, tokens, count;   // of memory: first row, how many, in so many cells
};

// The lists of one key head, inverted: cell c is named by named[begin[c] .. begin[c + 1]].
struct Inverted {
  int64_t* begin;
  Named* named;

  Inverted(Arena& arena, int64_t cells, int64_t entries)
      : begin(arena.take<int64_t>(cells + 2)), named(arena.take<Named>(entries)) {}
};

class Cells {
 public:
  explicit Cells(const SparseAttention& a) : a_(a), size_(a.unit) {
    const TokenMemory& memory = a.memory;
    if (memory.paged) {
      size_ = std::gcd(a.unit, memory.page_size);
      const int64_t tokens = memory.pages * memory.page_size;
      groups_ = {{0, a.rows(), 0, tokens, tokens / size_}};
      return;
    }
    for (int64_t n = 0; n < a.queries.count(); ++n) {
      const int64_t tokens = memory.length(n);
      groups_.push_back({a.queries.start(n), a.queries.end(n), memory.rows.start(n), tokens,
                         (tokens + size_ - 1) / size_});
    }
  }

  int64_t size() const { return size_; }  // tokens of a cell
  const std::vector<CellGroup>& groups() const { return groups_; }
  // The most that the lists of a group name.
  int64_t entries(const CellGroup& group) const {
    const int64_t parts = a_.memory.paged ? a_.unit / size_ : 1;
    return (group.last_row - group.first_row) * a_.entries * parts;
  }

  void invert(const CellGroup& group, int64_t key_head, Inverted& lists) const {
    std::fill_n(lists.begin, group.count + 2, int64_t{0});
    visit(group, key_head, [&](int64_t cell, Named) { ++lists.begin[cell + 2]; });
    std::partial_sum(lists.begin, lists.begin + group.count + 2, lists.begin);
    visit(group, key_head, [&](int64_t cell, Named named) { lists.named[lists.begin[cell + 1]++] = named; });
  }

 private:
  template <class Visit>
  void visit(const CellGroup& group, int64_t key_head, const Visit& each) const {
    for (int64_t row = group.first_row; row < group.last_row; ++row) {
      const int32_t* list = a_.indices + a_.list(row, key_head) * a_.entries;
      const int64_t used = a_.used(row, key_head);
      for (int64_t e = 0; e < used; ++e) {
        const TokenRange tokens = a_.tokens(row, list[e]);
        for (int64_t at = tokens.begin; at < tokens.end; at += size_) {
          const int64_t seen = std::min(size_, tokens.end - at);
          const TokenRun run = a_.memory.run(a_.sequence[row], at, at + 1);
          if (run.row < 0) continue;
          each((run.row - group.row) / size_,
               Named{static_cast<int32_t>(row), static_cast<int32_t>(e), static_cast<int32_t>(seen)});
        }
      }
    }
  }

  const SparseAttention& a_;
  int64_t size_;
  std::vector<CellGroup> groups_;
};

}  // namespace memattn::cpu
