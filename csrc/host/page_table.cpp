#include "page_table.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace memattn::pool {

// --- frames ----------------------------------------------------------------------------------------------------------

int32_t Frames::take(int32_t page) {
  if (free() <= 0) throw std::logic_error("page table: no free frame");
  int32_t frame;
  if (free_.empty()) {
    frame = static_cast<int32_t>(next_++);
    owner_.push_back(page);
    stale_.push_back(false);
  } else {
    frame = free_.back();
    free_.pop_back();
    owner_[frame] = page;
  }
  return frame;
}

void Frames::release(int32_t frame) {
  owner_[frame] = kNone;
  stale_[frame] = true;
  free_.push_back(frame);
}

// --- plans and pages -------------------------------------------------------------------------------------------------

PageTable::PageTable(int64_t streams, int64_t page_size, int64_t device_frames, int64_t host_frames,
                     int64_t file_frames, uint64_t seed, Grow grow_file)
    : page_size(page_size),
      random_state(seed),
      streams_(streams),
      frames_{Frames(device_frames), Frames(host_frames), Frames(0)},
      grow_file_(std::move(grow_file)),
      file_limit_(file_frames) {}

int32_t PageTable::at(int64_t stream, int64_t ordinal) const {
  const auto& list = streams_.at(stream).pages;
  if (ordinal < 0 || ordinal >= static_cast<int64_t>(list.size()))
    throw std::out_of_range("page " + std::to_string(ordinal) + " of " + std::to_string(list.size()));
  return list[ordinal];
}

Plan PageTable::begin() {
  ++epoch_;
  for (auto& list : freed_) list.clear();
  moved_summaries_.clear();
  return {};
}

// What was freed and not taken again must not keep its bytes.
Plan PageTable::finish(Plan plan) {
  for (int tier = 0; tier < kTiers; ++tier) {
    for (int32_t frame : freed_[tier]) {
      if (frames_[tier].owner(frame) != kNone || !frames_[tier].stale(frame)) continue;
      plan.erased[tier].push_back(frame);
      frames_[tier].cleaned(frame);
    }
  }
  plan.summaries = std::move(moved_summaries_);
  return plan;
}

int32_t PageTable::open_page(int64_t stream) {
  int32_t handle;
  if (free_pages_.empty()) {
    handle = static_cast<int32_t>(pages_.size());
    pages_.emplace_back();
  } else {
    handle = free_pages_.back();
    free_pages_.pop_back();
    pages_[handle] = Page();
  }
  Stream& owner = streams_[stream];
  Page& page = pages_[handle];
  page.stream = static_cast<int32_t>(stream);
  page.holders = 1;
  page.tokens.resize(page_size);
  if (owner.free_summaries.empty()) {
    page.summary = owner.summaries++;
  } else {
    page.summary = owner.free_summaries.back();
    owner.free_summaries.pop_back();
  }
  touch(page);
  ++held_;
  return handle;
}

void PageTable::close_page(int32_t handle) {
  Page& page = pages_[handle];
  for (int tier = 0; tier < kTiers; ++tier) release(tier, handle);
  moved_summaries_.push_back({page.stream, kNone, page.summary});
  streams_[page.stream].free_summaries.push_back(page.summary);
  unpin(handle);
  page = Page();
  free_pages_.push_back(handle);
  --held_;
}

void PageTable::let_go(int32_t handle) {
  if (--pages_[handle].holders == 0) close_page(handle);
}

int32_t PageTable::assign(int tier, int32_t handle) {
  return pages_[handle].frame[tier] = frames_[tier].take(handle);
}

void PageTable::release(int tier, int32_t handle) {
  int32_t& frame = pages_[handle].frame[tier];
  if (frame == kNone) return;
  frames_[tier].release(frame);
  freed_[tier].push_back(frame);
  frame = kNone;
}

void PageTable::release_lower(int32_t handle) {
  release(kHost, handle);
  release(kFile, handle);
}

void PageTable::unpin(int32_t handle) {
  pinned_ -= pages_[handle].pinned;
  pages_[handle].pinned = false;
}

void PageTable::pin(int64_t stream, int64_t ordinal, bool pinned) {
  Page& page = pages_[at(stream, ordinal)];
  pinned_ += int64_t{pinned} - int64_t{page.pinned};
  page.pinned = pinned;
}

int64_t PageTable::bytes() const {
  int64_t total = static_cast<int64_t>(pages_.capacity()) * sizeof(Page);
  for (const Page& page : pages_) total += static_cast<int64_t>(page.tokens.capacity()) * sizeof(Token);
  for (const Frames& frames : frames_) total += frames.reached() * 2 * sizeof(int32_t);
  return total;
}

// --- moving between tiers --------------------------------------------------------------------------------------------

int64_t PageTable::reserve(int64_t pages) {
  const bool lower = has_lower_tier();
  const int64_t room = lower ? frames_[kHost].capacity + file_limit_ : frames_[kDevice].capacity;
  if (held_ + pages > room) return held_ + pages - room;
  const int64_t in_file = lower ? std::max<int64_t>(0, held_ + pages - frames_[kHost].capacity) : 0;
  if (in_file > frames_[kFile].capacity) {
    grow_file_(in_file);
    frames_[kFile].capacity = in_file;
  }
  return 0;
}

PageTable::Handles PageTable::coldest(int tier, int64_t count) const {
  Handles found;
  const Frames& frames = frames_[tier];
  for (int64_t f = 0; f < frames.reached(); ++f) {
    const int32_t handle = frames.owner(f);
    if (handle == kNone) continue;
    const Page& page = pages_[handle];
    if (page.guard != epoch_ && !(tier == kDevice && page.pinned)) found.push_back(handle);
  }
  if (static_cast<int64_t>(found.size()) < count) throw std::logic_error("page table: no frame can be given up");
  const auto colder = [&](int32_t a, int32_t b) { return pages_[a].last < pages_[b].last; };
  std::nth_element(found.begin(), found.begin() + std::max<int64_t>(count - 1, 0), found.end(), colder);
  found.resize(count);
  std::sort(found.begin(), found.end(), colder);
  return found;
}

void PageTable::copy_down(int from, int to, const Handles& handles, Plan& plan) {
  if (handles.empty()) return;
  Copy copy{from, to, {}, {}};
  for (int32_t handle : handles) {
    copy.sources.push_back(pages_[handle].frame[from]);
    copy.targets.push_back(assign(to, handle));
  }
  plan.copies.push_back(std::move(copy));
}

// Gives pages that lie on the device alone a second place below; the coldest of the host make room in the file.
void PageTable::settle(const Handles& handles, Plan& plan) {
  const int64_t count = handles.size(), host_free = frames_[kHost].free(), file_free = frames_[kFile].free();
  int64_t movable = 0;
  for (int64_t f = 0; f < frames_[kHost].reached(); ++f) {
    const int32_t owner = frames_[kHost].owner(f);
    movable += owner != kNone && pages_[owner].guard != epoch_;
  }
  const int64_t in_host = std::min(count, host_free + std::min(movable, file_free));
  if (in_host > host_free) {
    const Handles cold = coldest(kHost, in_host - host_free);
    copy_down(kHost, kFile, cold, plan);
    for (int32_t handle : cold) release(kHost, handle);
  }
  copy_down(kDevice, kHost, Handles(handles.begin(), handles.begin() + in_host), plan);
  copy_down(kDevice, kFile, Handles(handles.begin() + in_host, handles.end()), plan);
}

void PageTable::make_room(int64_t frames, Plan& plan) {
  const int64_t missing = frames - frames_[kDevice].free();
  if (missing <= 0) return;
  const Handles victims = coldest(kDevice, missing);
  Handles alone;
  for (int32_t handle : victims) {
    const Page& page = pages_[handle];
    if (page.frame[kHost] == kNone && page.frame[kFile] == kNone) alone.push_back(handle);
  }
  settle(alone, plan);
  for (int32_t handle : victims) release(kDevice, handle);
}

void PageTable::bring(const Handles& handles, Plan& plan) {
  Handles missing;
  for (int32_t handle : handles) {
    touch(pages_[handle]);
    if (pages_[handle].frame[kDevice] == kNone) missing.push_back(handle);
  }
  make_room(missing.size(), plan);
  for (int tier : {kHost, kFile}) {
    Copy copy{tier, kDevice, {}, {}};
    for (int32_t handle : missing) {
      if (pages_[handle].frame[tier] == kNone) continue;
      copy.sources.push_back(pages_[handle].frame[tier]);
      copy.targets.push_back(assign(kDevice, handle));
    }
    if (!copy.sources.empty()) plan.copies.push_back(std::move(copy));
  }
}

// Zeros for the rows of a new page that its tokens leave free.
void PageTable::blank(int32_t handle, Plan& plan) {
  const int32_t frame = pages_[handle].frame[kDevice];
  if (!frames_[kDevice].stale(frame) || pages_[handle].fill == page_size) return;
  plan.erased[kDevice].push_back(frame);
  frames_[kDevice].cleaned(frame);
}

int32_t PageTable::unshare(int64_t stream, int64_t ordinal, Plan& plan) {
  const int32_t shared = streams_[stream].pages[ordinal];
  bring({shared}, plan);
  const int32_t handle = open_page(stream);
  Page &page = pages_[handle], &old = pages_[shared];
  const int32_t summary = page.summary;
  page = old;
  page.summary = summary;
  page.frame = {kNone, kNone, kNone};
  page.holders = 1;
  --old.holders;
  old.pinned = false;
  streams_[stream].pages[ordinal] = handle;
  touch(page);
  moved_summaries_.push_back({stream, old.summary, summary});
  // With a tier below, the snapshot's page goes there and leaves its device frame to the new one.
  if (has_lower_tier()) {
    if (old.frame[kHost] == kNone && old.frame[kFile] == kNone) settle({shared}, plan);
    page.frame[kDevice] = old.frame[kDevice];
    frames_[kDevice].hand_over(page.frame[kDevice], handle);
    old.frame[kDevice] = kNone;
    return handle;
  }
  make_room(1, plan);
  plan.copies.push_back({kDevice, kDevice, {old.frame[kDevice]}, {assign(kDevice, handle)}});
  return handle;
}

int32_t PageTable::writable(int64_t stream, int64_t ordinal, Plan& plan) {
  int32_t handle = at(stream, ordinal);
  if (pages_[handle].holders > 1) return unshare(stream, ordinal, plan);
  bring({handle}, plan);
  release_lower(handle);
  return handle;
}

Plan PageTable::make_writable(int64_t stream, const int64_t* ordinals, int64_t count) {
  Plan plan = begin();
  Handles alone;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t handle = at(stream, ordinals[i]);
    if (pages_[handle].holders == 1) alone.push_back(handle);
  }
  bring(alone, plan);
  for (int64_t i = 0; i < count; ++i) writable(stream, ordinals[i], plan);
  return finish(std::move(plan));
}

Plan PageTable::load(const int64_t* streams, const int64_t* ordinals, int64_t count, bool used) {
  Handles handles;
  for (int64_t i = 0; i < count; ++i) handles.push_back(at(streams[i], ordinals[i]));
  std::sort(handles.begin(), handles.end());
  handles.erase(std::unique(handles.begin(), handles.end()), handles.end());
  const auto pinned = [&](int32_t handle) { return pages_[handle].pinned; };
  const int64_t needed = handles.size() + pages_pinned() - std::count_if(handles.begin(), handles.end(), pinned);
  if (needed > frames_[kDevice].capacity) {
    throw std::length_error(std::to_string(handles.size()) + " pages are needed at once, and " +
                            std::to_string(pages_pinned()) + " are pinned; the device tier has " +
                            std::to_string(frames_[kDevice].capacity));
  }
  Plan plan = begin();
  if (used) {
    for (int32_t handle : handles) {
      ++pages_[handle].hits;
      ++(pages_[handle].frame[kDevice] == kNone ? misses : hits);
    }
  }
  bring(handles, plan);
  return finish(std::move(plan));
}

// --- writing ---------------------------------------------------------------------------------------------------------

std::pair<Plan, int64_t> PageTable::place(int64_t stream, int64_t after, const NewTokens& tokens, int64_t* rows) {
  Plan plan = begin();
  Stream& to = streams_.at(stream);
  const bool opened = after >= 0 && page(stream, after).fill < page_size && tokens.count > 0;
  int32_t handle = opened ? writable(stream, after, plan) : kNone;
  const int64_t here = opened ? page_size - pages_[handle].fill : 0;
  make_room((std::max<int64_t>(0, tokens.count - here) + page_size - 1) / page_size, plan);
  int64_t ordinal = after;
  Handles fresh;
  for (int64_t i = 0; i < tokens.count; ++i) {
    if (handle == kNone || pages_[handle].fill == page_size) {
      handle = open_page(stream);
      assign(kDevice, handle);
      fresh.push_back(handle);
      to.pages.insert(to.pages.begin() + ++ordinal, handle);
    }
    Page& page = pages_[handle];
    const int64_t id = tokens.ids ? tokens.ids[i] : to.next_id++;
    rows[i] = page.frame[kDevice] * page_size + page.fill;
    page.tokens[page.fill] = {id, tokens.positions ? tokens.positions[i] : id, tokens.tags ? tokens.tags[i] : 0};
    page.oldest = page.count ? std::min(page.oldest, id) : id;
    page.newest = std::max(page.newest, id);
    ++page.fill;
    ++page.count;
  }
  for (int32_t opened_page : fresh) blank(opened_page, plan);
  to.tokens += tokens.count;
  return {finish(std::move(plan)), ordinal};
}

std::pair<Plan, int64_t> PageTable::adopt(int64_t stream, const int64_t* ids, const int64_t* positions,
                                          const int64_t* tags) {
  Plan plan = begin();
  make_room(1, plan);
  const int32_t handle = open_page(stream);
  assign(kDevice, handle);
  streams_.at(stream).pages.push_back(handle);
  Page& page = pages_[handle];
  for (int64_t i = 0; i < page_size; ++i) {
    if (ids[i] != kNone) page.tokens[i] = {ids[i], positions[i], tags[i]};
  }
  recount(page);
  recount(streams_[stream]);
  return {finish(std::move(plan)), page.frame[kDevice]};
}

// --- finding and taking away -----------------------------------------------------------------------------------------

void PageTable::find(int64_t stream, const int64_t* ids, int64_t count, int64_t* ordinals, int64_t* rows) const {
  std::vector<std::pair<int64_t, int64_t>> wanted;
  for (int64_t i = 0; i < count; ++i) {
    wanted.emplace_back(ids[i], i);
    ordinals[i] = rows[i] = kNone;
  }
  std::sort(wanted.begin(), wanted.end());
  const auto& list = streams_.at(stream).pages;
  for (size_t o = 0; o < list.size(); ++o) {
    const Page& page = pages_[list[o]];
    const auto first = std::lower_bound(wanted.begin(), wanted.end(), std::pair(page.oldest, int64_t{0}));
    if (page.count == 0 || first == wanted.end() || first->first > page.newest) continue;
    for (int64_t r = 0; r < page.fill; ++r) {
      const int64_t id = page.tokens[r].id;
      if (id == kNone) continue;
      auto it = std::lower_bound(first, wanted.end(), std::pair(id, int64_t{0}));
      for (; it != wanted.end() && it->first == id; ++it) {
        ordinals[it->second] = static_cast<int64_t>(o);
        rows[it->second] = r;
      }
    }
  }
}

void PageTable::recount(Page& page) {
  page.fill = page.count = 0;
  page.oldest = page.newest = kNone;
  for (int32_t r = 0; r < page_size; ++r) {
    const int64_t id = page.tokens[r].id;
    if (id == kNone) continue;
    page.oldest = page.count++ ? std::min(page.oldest, id) : id;
    page.newest = std::max(page.newest, id);
    page.fill = r + 1;
  }
}

void PageTable::recount(Stream& stream) {
  stream.tokens = 0;
  for (int32_t handle : stream.pages) stream.tokens += pages_[handle].count;
}

void PageTable::clear_rows(int32_t handle, const std::vector<int64_t>& sorted, Plan& plan, Handles& touched) {
  Page& page = pages_[handle];
  const auto first = std::lower_bound(sorted.begin(), sorted.end(), page.oldest);
  if (page.count == 0 || first == sorted.end() || *first > page.newest) return;
  bool changed = false;
  for (int64_t r = 0; r < page.fill; ++r) {
    Token& token = page.tokens[r];
    if (token.id == kNone || !std::binary_search(first, sorted.end(), token.id)) continue;
    token = Token();
    changed = true;
    for (int tier = 0; tier < kTiers; ++tier) {
      if (page.frame[tier] != kNone) plan.erased_rows[tier].push_back(page.frame[tier] * page_size + r);
    }
  }
  if (!changed) return;
  recount(page);
  touched.push_back(handle);
}

// Takes pages without tokens out of every list of the stream.
void PageTable::forget_empty(int64_t stream, const Handles& touched) {
  const auto strip = [&](Handles& list) {
    const auto empty = [&](int32_t handle) { return pages_[handle].count == 0; };
    Handles gone;
    std::copy_if(list.begin(), list.end(), std::back_inserter(gone), empty);
    list.erase(std::remove_if(list.begin(), list.end(), empty), list.end());
    for (int32_t handle : gone) let_go(handle);
  };
  const bool any = std::any_of(touched.begin(), touched.end(), [&](int32_t h) { return pages_[h].count == 0; });
  if (any) {
    for (auto& [id, lists] : snapshots_) strip(lists[stream]);
    strip(streams_[stream].pages);
  }
  recount(streams_[stream]);
}

std::pair<Plan, std::vector<int32_t>> PageTable::erase(int64_t stream, const int64_t* ids, int64_t count) {
  Plan plan = begin();
  std::vector<int64_t> sorted(ids, ids + count);
  std::sort(sorted.begin(), sorted.end());
  Handles touched;
  for (size_t handle = 0; handle < pages_.size(); ++handle) {
    if (pages_[handle].stream == stream) clear_rows(static_cast<int32_t>(handle), sorted, plan, touched);
  }
  forget_empty(stream, touched);
  std::erase_if(touched, [&](int32_t handle) { return pages_[handle].count == 0; });
  return {finish(std::move(plan)), touched};
}

std::pair<Plan, std::vector<int32_t>> PageTable::remove(int64_t stream, const int64_t* ids, int64_t count) {
  Plan plan = begin();
  std::vector<int64_t> sorted(ids, ids + count);
  std::sort(sorted.begin(), sorted.end());
  Handles touched;
  for (int32_t handle : streams_.at(stream).pages) {
    if (pages_[handle].holders == 1) clear_rows(handle, sorted, plan, touched);
  }
  forget_empty(stream, touched);
  std::erase_if(touched, [&](int32_t handle) { return pages_[handle].count == 0; });
  return {finish(std::move(plan)), touched};
}

Plan PageTable::drop_pages(int64_t stream, const int64_t* ordinals, int64_t count) {
  Plan plan = begin();
  Stream& from = streams_.at(stream);
  Handles gone;
  for (int64_t i = 0; i < count; ++i) gone.push_back(at(stream, ordinals[i]));
  std::sort(gone.begin(), gone.end());
  gone.erase(std::unique(gone.begin(), gone.end()), gone.end());
  std::erase_if(from.pages, [&](int32_t handle) { return std::binary_search(gone.begin(), gone.end(), handle); });
  for (int32_t handle : gone) let_go(handle);
  recount(from);
  return finish(std::move(plan));
}

// --- snapshots -------------------------------------------------------------------------------------------------------

int64_t PageTable::snapshot() {
  auto& lists = snapshots_[next_snapshot_];
  for (const Stream& stream : streams_) {
    lists.push_back(stream.pages);
    for (int32_t handle : stream.pages) ++pages_[handle].holders;
  }
  return next_snapshot_++;
}

Plan PageTable::roll_back(int64_t snapshot) {
  Plan plan = begin();
  const auto& lists = snapshots_.at(snapshot);
  for (size_t s = 0; s < streams_.size(); ++s) {
    for (int32_t handle : lists[s]) ++pages_[handle].holders;
    const Handles before = std::exchange(streams_[s].pages, lists[s]);
    Handles kept = lists[s];
    std::sort(kept.begin(), kept.end());
    for (int32_t handle : before) {
      // Another snapshot may hold a page that leaves, but nobody could name it to unpin it.
      if (!std::binary_search(kept.begin(), kept.end(), handle)) unpin(handle);
      let_go(handle);
    }
    recount(streams_[s]);
  }
  return finish(std::move(plan));
}

Plan PageTable::discard(int64_t snapshot) {
  Plan plan = begin();
  for (const Handles& list : snapshots_.at(snapshot)) {
    for (int32_t handle : list) let_go(handle);
  }
  snapshots_.erase(snapshot);
  return finish(std::move(plan));
}

// --- what to forget --------------------------------------------------------------------------------------------------

std::vector<int64_t> PageTable::oldest_tokens(int64_t stream, int64_t count) const {
  Handles by_age;
  for (int32_t handle : streams_.at(stream).pages) {
    if (!pages_[handle].pinned) by_age.push_back(handle);
  }
  std::sort(by_age.begin(), by_age.end(), [&](int32_t a, int32_t b) { return pages_[a].oldest < pages_[b].oldest; });
  // Pages in order of their oldest token, until every one of the others is younger than all that are wanted.
  std::vector<int64_t> ids;
  for (int32_t handle : by_age) {
    if (static_cast<int64_t>(ids.size()) >= count) {
      std::nth_element(ids.begin(), ids.begin() + count - 1, ids.end());
      if (ids[count - 1] < pages_[handle].oldest) break;
    }
    for (const Token& token : pages_[handle].tokens) {
      if (token.id != kNone) ids.push_back(token.id);
    }
  }
  std::sort(ids.begin(), ids.end());
  if (static_cast<int64_t>(ids.size()) > count) ids.resize(count);
  return ids;
}

std::vector<int64_t> PageTable::random_tokens(int64_t stream, int64_t count) {
  std::vector<int64_t> ids;
  for (int32_t handle : streams_.at(stream).pages) {
    for (const Token& token : pages_[handle].tokens) {
      if (token.id != kNone && !pages_[handle].pinned) ids.push_back(token.id);
    }
  }
  count = std::min(count, static_cast<int64_t>(ids.size()));
  for (int64_t i = 0; i < count; ++i) {
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;  // splitmix64
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    std::swap(ids[i], ids[i + (z ^ (z >> 31)) % (ids.size() - i)]);
  }
  ids.resize(count);
  return ids;
}

}  // namespace memattn::pool
