// Vector clocks: which earlier accesses a thread knows to be done.
//
// An agent is whoever accesses memory: a thread, the tensor cores working for a warp, the copies
// that report to an mbarrier, ... Its accesses carry its clock at that time, and clocks only grow.
// Knowledge holds, of every agent, the clock up to which its accesses are known to be done
// (`seen`), and up to which they are also ordered before asynchronous accesses (`fenced`).
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace nabla::emulation {

// One access: agent and clock, with flags of the access above them.
struct alignas(8) Epoch {
    uint32_t clock = 0;  // 0: no access
    uint16_t agent = 0;
    uint16_t flags = 0;

    bool operator==(const Epoch& other) const { return memcmp(this, &other, sizeof(Epoch)) == 0; }
};

class Knowledge;

// Shared by the threads that know the same, since the lanes of a warp mostly do; never changed.
class KnowledgeRef {
  public:
    KnowledgeRef() = default;
    explicit KnowledgeRef(Knowledge* adopted) : pointer_(adopted) {}
    KnowledgeRef(const KnowledgeRef& other) : pointer_(other.pointer_) { retain(); }
    KnowledgeRef(KnowledgeRef&& other) noexcept : pointer_(other.pointer_) {
        other.pointer_ = nullptr;
    }
    KnowledgeRef& operator=(KnowledgeRef other) noexcept {
        std::swap(pointer_, other.pointer_);
        return *this;
    }
    ~KnowledgeRef() { release(); }

    const Knowledge* operator->() const { return pointer_; }
    const Knowledge& operator*() const { return *pointer_; }
    const Knowledge* get() const { return pointer_; }
    explicit operator bool() const { return pointer_ != nullptr; }

  private:
    inline void retain() const;
    inline void release() const;

    Knowledge* pointer_ = nullptr;
};

class Knowledge {
  public:
    explicit Knowledge(uint32_t agents) : clocks_(2 * agents), agents_(agents) {}
    Knowledge(const Knowledge& other) : clocks_(other.clocks_), agents_(other.agents_) {}

    uint32_t seen(uint32_t agent) const { return clocks_[agent]; }
    uint32_t fenced(uint32_t agent) const { return clocks_[agents_ + agent]; }
    void see(uint32_t agent, uint32_t clock) {
        if (clock > clocks_[agent]) clocks_[agent] = clock;
    }
    void fence(uint32_t agent, uint32_t clock) {
        if (clock > clocks_[agents_ + agent]) clocks_[agents_ + agent] = clock;
    }
    // All that is seen is fenced from here on.
    void fence_all();
    void join(const Knowledge& other);
    bool includes(const Knowledge& other) const;

  private:
    friend class KnowledgeRef;

    std::vector<uint32_t> clocks_;  // seen, then fenced
    uint32_t agents_;
    uint32_t references_ = 1;
};

inline void KnowledgeRef::retain() const {
    if (pointer_) ++pointer_->references_;
}
inline void KnowledgeRef::release() const {
    if (pointer_ && --pointer_->references_ == 0) delete pointer_;
}

// What both know. Remembers the last results: lanes of a warp ask for the same one after another.
class Joiner {
  public:
    KnowledgeRef join(const KnowledgeRef& a, const KnowledgeRef& b);
    // The same, with all that is seen fenced.
    KnowledgeRef fence(const KnowledgeRef& a);

  private:
    struct Entry {
        KnowledgeRef a, b, result;
    };
    Entry entries_[4];
    Entry fenced_;
    uint32_t next_ = 0;
};

}  // namespace nabla::emulation
