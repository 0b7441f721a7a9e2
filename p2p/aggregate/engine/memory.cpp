#include "memory.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>

#include "module_api.h"

namespace engine::memory {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kLarge = size_t{1} << 20;
constexpr size_t kLargeStep = size_t{1} << 18;  // large blocks are multiples of it, to be reused
constexpr size_t kHugePage = size_t{1} << 21;

Limits limits{};
std::atomic<size_t> used{0};

// Stands in the bytes before a block.
struct Header {
  void* origin;
  size_t size;
};
static_assert(sizeof(Header) <= kAlignment);

Header* header_of(void* data) {
  return reinterpret_cast<Header*>(static_cast<char*>(data) - sizeof(Header));
}

// Freed blocks, oldest first.
class Kept {
 public:
  void* take(size_t size) {
    const std::lock_guard lock(mutex_);
    for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) {
      if (header_of(*block)->size == size) {
        void* found = *block;
        blocks_.erase(std::next(block).base());
        bytes_ -= size;
        return found;
      }
    }
    return nullptr;
  }

  void put(void* data) {
    const std::lock_guard lock(mutex_);
    blocks_.push_back(data);
    bytes_ += header_of(data)->size;
    while (bytes_ > limits.kept_bytes) release_oldest();
  }

  void release_all() {
    const std::lock_guard lock(mutex_);
    while (!blocks_.empty()) release_oldest();
  }

  size_t bytes() {
    const std::lock_guard lock(mutex_);
    return bytes_;
  }

 private:
  void release_oldest() {
    Header* header = header_of(blocks_.front());
    blocks_.pop_front();
    bytes_ -= header->size;
    server::Free(header->origin);
  }

  std::mutex mutex_;
  std::deque<void*> blocks_;
  size_t bytes_ = 0;
};

Kept& kept() {
  static Kept instance;
  return instance;
}

// Tensors are read and written from end to end, for which small pages cost a tenth of the time.
void ask_for_huge_pages(void* data, size_t size) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + size) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

void* new_block(size_t size) {
  const size_t whole = size + 2 * kAlignment;
  void* origin = server::TryAlloc != nullptr ? server::TryAlloc(whole) : server::Alloc(whole);
  if (origin == nullptr) return nullptr;
  const auto start = reinterpret_cast<uintptr_t>(origin) + kAlignment;
  void* data = reinterpret_cast<void*>((start + kAlignment - 1) / kAlignment * kAlignment);
  *header_of(data) = {origin, size};
  ask_for_huge_pages(data, size);
  return data;
}

void* allocate_block(size_t bytes) {
  TORCH_CHECK(
      bytes <= limits.all_bytes && used + bytes <= limits.all_bytes,
      "out of memory: ", bytes, " bytes more than the ", used.load(),
      " in use go beyond the store's limit of ", limits.all_bytes);
  const size_t size = bytes < kLarge ? bytes : (bytes + kLargeStep - 1) / kLargeStep * kLargeStep;
  void* data = size < kLarge ? nullptr : kept().take(size);
  if (data == nullptr) data = new_block(size);
  if (data == nullptr) {
    kept().release_all();
    data = new_block(size);
  }
  TORCH_CHECK(data != nullptr, "out of memory: the system has no ", bytes, " bytes");
  used += size;
  return data;
}

void free_block(void* data) {
  if (data == nullptr) return;
  Header* header = header_of(data);
  used -= header->size;
  if (header->size < kLarge) {
    server::Free(header->origin);
  } else {
    kept().put(data);
  }
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes == 0 ? nullptr : allocate_block(bytes);
    return {data, data, &free_block, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

size_t resident_bytes() {
  size_t pages = 0;
  size_t resident = 0;
  if (FILE* file = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(file, "%zu %zu", &pages, &resident) != 2) resident = 0;
    std::fclose(file);
  }
  return resident * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

void install(Limits chosen) {
  limits = chosen;
  static Allocator allocator;
  c10::SetCPUAllocator(&allocator, /*priority=*/255);
}

size_t used_bytes() { return used; }
size_t kept_bytes() { return kept().bytes(); }

void check_process() {
  const size_t resident = resident_bytes();
  TORCH_CHECK(
      resident <= limits.all_bytes,
      "out of memory: the store uses ", resident, " bytes, its limit is ", limits.all_bytes);
}

}  // namespace engine::memory
