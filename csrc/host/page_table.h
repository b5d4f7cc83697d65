// Where every page of a K/V memory lies and which tokens it holds. No tensor is touched: each change returns a Plan of
// copies and erasures of page bytes, which the caller carries out before anything else.
//
// A page has at most one frame in each tier; all its copies are equal. The device tier is what attention reads. With a
// host or a file tier the device tier is a cache of them: together they have room for every page, at most one of them
// holds a copy of a page, and a page that is written keeps its device copy alone.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <vector>

namespace memattn::pool {

enum Tier { kDevice, kHost, kFile, kTiers };
inline constexpr int32_t kNone = -1;

struct Token {
  int64_t id = kNone, position = kNone, tag = 0;
};

struct Page {
  std::array<int32_t, kTiers> frame{kNone, kNone, kNone};
  int32_t stream = kNone;
  int32_t summary = kNone;  // its row among the summaries of its stream
  int32_t holders = 0;      // page lists that name it: the stream's, and those of snapshots
  int32_t fill = 0;         // rows behind the last token are free
  int32_t count = 0;        // rows that hold a token
  bool pinned = false;
  int64_t guard = 0;  // of the last plan that needs it where it is
  int64_t last = 0;   // clock of the last use
  int64_t hits = 0;
  double mass = 0;
  int64_t oldest = kNone, newest = kNone;  // ids
  std::vector<Token> tokens;
};

struct Copy {
  int from, to;
  std::vector<int64_t> sources, targets;  // frames
};

struct SummaryMove {
  int64_t stream, from, to;  // rows; from -1: zeros
};

// The copies in order, then the erasures: whole frames, then single rows (frame * page_size + row).
struct Plan {
  std::vector<Copy> copies;
  std::array<std::vector<int64_t>, kTiers> erased, erased_rows;
  std::vector<SummaryMove> summaries;
};

class Frames {
 public:
  explicit Frames(int64_t capacity) : capacity(capacity) {}
  int64_t free() const { return static_cast<int64_t>(free_.size()) + capacity - next_; }
  int64_t reached() const { return next_; }  // frames that were ever in use
  int32_t take(int32_t page);
  void release(int32_t frame);
  int32_t owner(int64_t frame) const { return owner_[frame]; }
  void hand_over(int32_t frame, int32_t page) { owner_[frame] = page; }
  bool stale(int32_t frame) const { return stale_[frame]; }  // whether it may hold bytes of an earlier page
  void cleaned(int32_t frame) { stale_[frame] = false; }

  int64_t capacity;

 private:
  int64_t next_ = 0;
  std::vector<int32_t> free_, owner_;
  std::vector<bool> stale_;
};

struct Stream {
  std::vector<int32_t> pages;
  int64_t next_id = 0;
  int64_t tokens = 0;
  int32_t summaries = 0;  // rows ever in use
  std::vector<int32_t> free_summaries;
};

struct NewTokens {
  int64_t count;
  const int64_t *ids, *positions, *tags;  // ids null: the next ones; positions null: the ids; tags null: 0
};

class PageTable {
 public:
  using Grow = std::function<void(int64_t)>;  // makes the file hold so many frames, or throws

  PageTable(int64_t streams, int64_t page_size, int64_t device_frames, int64_t host_frames, int64_t file_frames,
            uint64_t seed, Grow grow_file);

  // Makes sure that so many more pages have a place; returns how many have none. Nothing changes if it throws.
  int64_t reserve(int64_t pages);

  // Puts tokens behind those of page `after` (-1: in front), opening pages as needed; rows[i] is the device row of
  // token i. Returns the plan and the page of the last token.
  std::pair<Plan, int64_t> place(int64_t stream, int64_t after, const NewTokens& tokens, int64_t* rows);
  // Opens a page behind all others with these rows, holes included (id -1); returns the plan and its device frame, which
  // the caller overwrites as a whole.
  std::pair<Plan, int64_t> adopt(int64_t stream, const int64_t* ids, const int64_t* positions, const int64_t* tags);
  // Makes pages resident and theirs alone, ready to be written.
  Plan make_writable(int64_t stream, const int64_t* ordinals, int64_t count);
  // Makes pages resident, counting hits and misses if `used`.
  Plan load(const int64_t* streams, const int64_t* ordinals, int64_t count, bool used);

  // Page and row of each id, -1 where there is none.
  void find(int64_t stream, const int64_t* ids, int64_t count, int64_t* ordinals, int64_t* rows) const;
  // Erases tokens from every page that has them, those of snapshots too; returns the plan and the pages that changed.
  std::pair<Plan, std::vector<int32_t>> erase(int64_t stream, const int64_t* ids, int64_t count);
  // Takes tokens out of pages that no snapshot shares; returns the plan and the pages that changed.
  std::pair<Plan, std::vector<int32_t>> remove(int64_t stream, const int64_t* ids, int64_t count);
  Plan drop_pages(int64_t stream, const int64_t* ordinals, int64_t count);
  bool shared(int64_t stream, int64_t ordinal) const { return page(stream, ordinal).holders > 1; }

  int64_t snapshot();
  Plan roll_back(int64_t snapshot);
  Plan discard(int64_t snapshot);

  // Which to forget: ids of the oldest tokens, of random ones; never of pinned pages.
  std::vector<int64_t> oldest_tokens(int64_t stream, int64_t count) const;
  std::vector<int64_t> random_tokens(int64_t stream, int64_t count);

  const Page& page(int64_t stream, int64_t ordinal) const { return pages_[at(stream, ordinal)]; }
  const Page& page(int32_t handle) const { return pages_.at(handle); }
  Page& page(int64_t stream, int64_t ordinal) { return pages_[at(stream, ordinal)]; }
  const Stream& stream(int64_t s) const { return streams_.at(s); }
  Stream& stream(int64_t s) { return streams_.at(s); }
  const Frames& frames(int tier) const { return frames_.at(tier); }
  int64_t pages_held() const { return held_; }
  int64_t pages_pinned() const { return pinned_; }
  void pin(int64_t stream, int64_t ordinal, bool pinned);
  int64_t bytes() const;

  const int64_t page_size;
  int64_t clock = 0, hits = 0, misses = 0;
  uint64_t random_state;

 private:
  using Handles = std::vector<int32_t>;

  int32_t at(int64_t stream, int64_t ordinal) const;
  bool has_lower_tier() const { return frames_[kHost].capacity + file_limit_ > 0; }
  Plan begin();
  Plan finish(Plan plan);
  void touch(Page& page) { page.guard = epoch_, page.last = ++clock; }
  int32_t open_page(int64_t stream);
  void close_page(int32_t handle);
  void let_go(int32_t handle);
  void unpin(int32_t handle);
  int32_t assign(int tier, int32_t handle);
  void release(int tier, int32_t handle);
  void release_lower(int32_t handle);
  Handles coldest(int tier, int64_t count) const;
  void make_room(int64_t frames, Plan& plan);
  void settle(const Handles& handles, Plan& plan);
  void copy_down(int from, int to, const Handles& handles, Plan& plan);
  void bring(const Handles& handles, Plan& plan);
  void blank(int32_t handle, Plan& plan);
  int32_t writable(int64_t stream, int64_t ordinal, Plan& plan);
  int32_t unshare(int64_t stream, int64_t ordinal, Plan& plan);
  void clear_rows(int32_t handle, const std::vector<int64_t>& sorted, Plan& plan, Handles& touched);
  void forget_empty(int64_t stream, const Handles& touched);
  void recount(Page& page);
  void recount(Stream& stream);

  std::vector<Page> pages_;
  Handles free_pages_;
  std::vector<Stream> streams_;
  std::array<Frames, kTiers> frames_;
  std::array<Handles, kTiers> freed_;           // by the plan in the making
  std::vector<SummaryMove> moved_summaries_;  // likewise
  std::map<int64_t, std::vector<Handles>> snapshots_;
  Grow grow_file_;
  int64_t file_limit_;
  int64_t held_ = 0, pinned_ = 0, epoch_ = 0, next_snapshot_ = 0;
};

}  // namespace memattn::pool
