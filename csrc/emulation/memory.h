// Global memory that kernels may touch, and which threads of a launch touched it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace nabla::emulation {

struct Region {
    uintptr_t begin, end;
    bool writable;
    std::string name;
    // Of a writable region, per two bytes: the last write and the last read, as Touch::word; 0 for
    // none.
    std::unique_ptr<std::atomic<uint64_t>[]> writes, reads;

    uint64_t granules() const { return (end - begin + 1) / 2 + 1; }
};

// An access of a thread of a CTA in a launch.
struct Touch {
    static constexpr uint32_t kSeveral = 0x7ff;  // thread of a read by more than one

    uint32_t launch;  // 12 bits
    uint32_t cta;     // 20 bits
    uint32_t thread;  // 11 bits
    uint32_t clock;   // 20 bits
    bool atomic;

    uint64_t word() const;
    static Touch of(uint64_t word);
};

class Memory {
  public:
    void add(const void* data, uint64_t bytes, bool writable, const std::string& name);
    void clear() { regions_.clear(); }
    // The region that holds all bytes, or null.
    const Region* find(const void* data, uint64_t bytes) const;
    bool empty() const { return regions_.empty(); }
    // "12 bytes past the end of 'k'", or the like.
    std::string describe(const void* data) const;

    uint32_t launch = 0;  // serial number, never 0 while one runs

  private:
    std::vector<std::unique_ptr<Region>> regions_;  // by begin
};

}  // namespace nabla::emulation
