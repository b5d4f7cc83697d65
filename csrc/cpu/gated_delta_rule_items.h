// How the forward and the backward of the gated delta rule are divided over threads. An item is a sequence and a key
// head with (some of) its value heads. It is one task on one thread, chunk after chunk in cache; or, when there are too
// few items for the threads, it is shared: its chunks are prepared in parallel, then scanned in parallel over value
// heads and column blocks of V. Every element is summed in the same order in both, so the bits are the same.
#pragma once

#include "gated_delta_rule.h"

namespace memattn::cpu {

struct Item {
  int64_t sequence, head, first_value_head;
  int value_heads;
  int64_t chunks;
};

inline std::vector<Item> make_items(const DeltaRule& rule, int64_t heads_per_item) {
  std::vector<Item> items;
  for (int64_t n = 0; n < rule.sequences.count(); ++n) {
    for (int64_t head = 0; head < rule.heads; ++head) {
      for (int64_t first = 0; first < rule.group(); first += heads_per_item) {
        const int count = static_cast<int>(std::min(heads_per_item, rule.group() - first));
        items.push_back({n, head, head * rule.group() + first, count, rule.sequences.chunks(n, rule.chunk_size)});
      }
    }
  }
  return items;
}

inline int64_t most_chunks(const Item* items, int64_t count) {
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, items[i].chunks);
  return most;
}

// Columns of V that one task of a scan takes.
struct ColumnBlocks {
  int64_t count;
  int width, total;

  // Two tasks per thread, of at least 32 columns; one per value head where rows are divided by their last column.
  ColumnBlocks(const DeltaRule& rule, const BlockSizes& s, int64_t value_heads, int64_t threads) : total(s.value_dim) {
    const int64_t wanted = threads == 1 || rule.divides() ? 1 : (2 * threads + value_heads - 1) / value_heads;
    const int64_t blocks = std::clamp<int64_t>(wanted, 1, std::max(1, total / 32));
    width = round_up(static_cast<int>((total + blocks - 1) / blocks), std::max(32, s.unit));
    width = std::min(width, total);
    count = (total + width - 1) / width;
  }
  int begin(int64_t block) const { return static_cast<int>(block) * width; }
  int end(int64_t block) const { return std::min(begin(block) + width, total); }
};

// Work: Workspace workspace(arena, items, chunks, workers, shared);
//       chunks_alone(), chunks_shared(items, most, threads): chunks in flight per item;
//       process(items, count, workspace, chunks, threads, each), where each(n, task) runs task(i, worker) for all i <
//       n.
template <class Work, class Isa>
void run_whole(Work& work, const std::vector<Item>& items, int64_t threads, const Isa& isa) {
  const int64_t count = static_cast<int64_t>(items.size()), workers = std::min(threads, count);
  if (count == 0) return;
  const int64_t chunks = work.chunks_alone();
  const size_t bytes = bytes_of([&](Arena& arena) { work.workspace(arena, 1, chunks, 1, false); });
  Scratch scratch(bytes * workers);
  std::vector<typename Work::Workspace> workspaces;
  for (int64_t worker = 0; worker < workers; ++worker) {
    Arena arena(scratch.data() + bytes * worker);
    workspaces.push_back(work.workspace(arena, 1, chunks, 1, false));
  }
  const auto serial = [](int64_t tasks, const auto& task) {
    for (int64_t i = 0; i < tasks; ++i) task(i, 0);
  };
  parallel_tasks(count, workers, isa,
                 [&](int64_t i, int64_t worker) { work.process(&items[i], 1, workspaces[worker], chunks, 1, serial); });
}

template <class Work, class Isa>
void run_shared(Work& work, const std::vector<Item>& items, int64_t threads, const Isa& isa) {
  const auto parallel = [&](int64_t tasks, const auto& task) { parallel_tasks(tasks, threads, isa, task); };
  const int64_t count = static_cast<int64_t>(items.size());
  for (int64_t first = 0; first < count; first += threads) {
    const int64_t batch = std::min(threads, count - first);
    const int64_t chunks = work.chunks_shared(batch, most_chunks(&items[first], batch), threads);
    Scratch scratch(bytes_of([&](Arena& arena) { work.workspace(arena, batch, chunks, threads, true); }));
    Arena arena(scratch.data());
    auto workspace = work.workspace(arena, batch, chunks, threads, true);
    work.process(&items[first], batch, workspace, chunks, threads, parallel);
  }
}

template <class Work, class Isa>
void run_items(Work& work, const std::vector<Item>& items, int64_t threads, const Isa& isa) {
  std::vector<int64_t> cost;
  for (const Item& item : items) cost.push_back((item.chunks + 1) * item.value_heads);
  const WorkPlan plan = plan_work(cost, threads);
  const auto pick = [&](const std::vector<int64_t>& indices) {
    std::vector<Item> picked;
    for (int64_t i : indices) picked.push_back(items[i]);
    return picked;
  };
  run_shared(work, pick(plan.shared), threads, isa);
  run_whole(work, pick(plan.whole), threads, isa);
}

}  // namespace memattn::cpu
