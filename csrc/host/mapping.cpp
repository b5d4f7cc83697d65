#include "mapping.h"

#include <cerrno>
#include <cstdlib>
#include <system_error>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace memattn::pool {
namespace {

constexpr int64_t kStep = int64_t{1} << 22;  // a file grows by multiples of this

[[noreturn]] void fail(int error, const char* what) { throw std::system_error(error, std::generic_category(), what); }

int64_t round_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

void* map(void* at, int64_t bytes, int protection, int flags, int file, int64_t offset) {
  void* base = mmap(at, bytes, protection, flags, file, offset);
  if (base == MAP_FAILED) fail(errno, "mmap");
  return base;
}

int open_unnamed(const std::string& folder) {
#ifdef O_TMPFILE
  const int file = open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (file >= 0) return file;
#endif
  std::string name = folder + "/memattn-XXXXXX";
  const int named = mkstemp(name.data());
  if (named < 0) fail(errno, ("a file in " + folder).c_str());
  unlink(name.c_str());
  return named;
}

}  // namespace

Mapping::Mapping(int64_t bytes) : bytes_(round_up(bytes, 4096)), limit_(bytes_) {
  if (limit_ > 0) {
    base_ = map(nullptr, limit_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
}

Mapping::Mapping(const std::string& folder, int64_t limit) : limit_(round_up(limit, kStep)), file_(open_unnamed(folder)) {
  base_ = mmap(nullptr, limit_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base_ == MAP_FAILED) {
    const int error = errno;
    close(file_);
    fail(error, "mmap");
  }
}

Mapping::~Mapping() {
  if (base_ != nullptr) munmap(base_, limit_);
  if (file_ >= 0) close(file_);
}

void Mapping::ensure(int64_t bytes) {
  const int64_t wanted = round_up(bytes, kStep);
  if (wanted <= bytes_) return;
  if (wanted > limit_) fail(ENOSPC, "the file tier");
  if (const int error = posix_fallocate(file_, bytes_, wanted - bytes_)) {
    if (ftruncate(file_, bytes_) != 0) fail(errno, "the file tier");  // gives back what was already had
    fail(error, "the file tier cannot grow");
  }
  map(static_cast<char*>(base_) + bytes_, wanted - bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file_,
      bytes_);
  bytes_ = wanted;
}

void Mapping::will_need(int64_t offset, int64_t bytes) const {
  const int64_t begin = offset / 4096 * 4096;
  madvise(static_cast<char*>(base_) + begin, offset + bytes - begin, MADV_WILLNEED);
}

void Mapping::unmap_pages() const {
  if (file_ >= 0 && bytes_ > 0) madvise(base_, bytes_, MADV_DONTNEED);
}

}  // namespace memattn::pool
