// Fibers: functions with stacks of their own that hand over to each other within one host thread.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(__aarch64__)
#define NABLA_UCONTEXT
#include <ucontext.h>
#endif

namespace nabla::emulation {

// Where a fiber, or the host thread, goes on.
struct Context {
#ifdef NABLA_UCONTEXT
    ucontext_t state;
#else
    void* stack_pointer = nullptr;
#endif
};

// Keep where this function stands in `from` and go on in `to`.
void switch_context(Context& from, Context& to);

// A context that calls `entry`, which never returns.
void start_context(Context& context, void* stack, size_t bytes, void (*entry)());

// Stacks of equal size, each above a page that may not be touched.
class Stacks {
  public:
    static constexpr size_t kBytes = 128 << 10;

    explicit Stacks(size_t count);
    ~Stacks();
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;

    size_t count() const { return count_; }
    void* stack(size_t index) const { return memory_ + index * (kBytes + page_) + page_; }

  private:
    size_t count_;
    size_t page_;
    uint8_t* memory_;
};

}  // namespace nabla::emulation
