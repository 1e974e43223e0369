// Memory that the tasks of one launch work in: a piece, aligned to cache lines, for each slot.
#pragma once

#include <cstdint>
#include <new>

#include "cpu/huge_pages.h"
#include "params.h"

namespace nabla::cpu::NABLA_ISA {

// Hands out aligned arrays from a piece of memory; only counts their bytes if the piece is null.
class Arena {
  public:
    explicit Arena(char* memory) : memory_(memory) {}

    template <class T>
    T* take(int64_t count) {
        T* array = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
        bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return array;
    }
    int64_t bytes() const { return bytes_; }

  private:
    char* memory_;
    int64_t bytes_ = 0;
};

// `slots` copies of a struct that takes its arrays from an Arena in its constructor (Arena&,
// args...).
template <class Arrays>
class Scratch {
  public:
    template <class... Args>
    explicit Scratch(int slots, Args... args) {
        Arena count(nullptr);
        Arrays(count, args...);
        stride_ = count.bytes();
        memory_ = static_cast<char*>(::operator new(slots * stride_, std::align_val_t{64}));
        prefer_huge_pages(reinterpret_cast<uintptr_t>(memory_), slots * stride_);
    }
    ~Scratch() { ::operator delete(memory_, std::align_val_t{64}); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    template <class... Args>
    Arrays slot(int index, Args... args) const {
        Arena arena(memory_ + index * stride_);
        return Arrays(arena, args...);
    }

  private:
    char* memory_;
    int64_t stride_;
};

}  // namespace nabla::cpu::NABLA_ISA
