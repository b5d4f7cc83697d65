// Memory of a page store: anonymous, or an unnamed file that no other process sees and that is gone with this one.
// Its address never changes: a file grows into a range that was set aside for it.
#pragma once

#include <cstdint>
#include <string>

namespace memattn::pool {

class Mapping {
 public:
  // Zeros that take memory only where they are written.
  explicit Mapping(int64_t bytes);
  // A file in `folder` that may grow to `limit` bytes.
  Mapping(const std::string& folder, int64_t limit);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  // Gives the file at least so many bytes, on disk too, so that no later write can run out of space. Throws
  // std::system_error and changes nothing if it cannot.
  void ensure(int64_t bytes);
  void will_need(int64_t offset, int64_t bytes) const;  // starts reading ahead
  void unmap_pages() const;                             // of the file: what was touched counts as this process's no more

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(base_); }
  int64_t bytes() const { return bytes_; }
  int64_t limit() const { return limit_; }
  int descriptor() const { return file_; }

 private:
  void* base_ = nullptr;
  int64_t bytes_ = 0, limit_ = 0;
  int file_ = -1;
};

}  // namespace memattn::pool
