#include "emulation/clock.h"

#include <algorithm>

namespace nabla::emulation {

void Knowledge::fence_all() {
    for (uint32_t i = 0; i < agents_; ++i)
        clocks_[agents_ + i] = std::max(clocks_[agents_ + i], clocks_[i]);
}

void Knowledge::join(const Knowledge& other) {
    const uint32_t* theirs = other.clocks_.data();
    uint32_t* ours = clocks_.data();
    for (uint32_t i = 0; i < 2 * agents_; ++i) ours[i] = std::max(ours[i], theirs[i]);
}

bool Knowledge::includes(const Knowledge& other) const {
    const uint32_t* theirs = other.clocks_.data();
    const uint32_t* ours = clocks_.data();
    uint32_t more = 0;
    for (uint32_t i = 0; i < 2 * agents_; ++i) more |= theirs[i] > ours[i];
    return more == 0;
}

KnowledgeRef Joiner::join(const KnowledgeRef& a, const KnowledgeRef& b) {
    if (!b || a.get() == b.get()) return a;
    if (!a) return b;
    for (const Entry& entry : entries_)
        if (entry.a.get() == a.get() && entry.b.get() == b.get()) return entry.result;
    KnowledgeRef result;
    if (b->includes(*a)) {
        result = b;
    } else if (a->includes(*b)) {
        result = a;
    } else {
        auto* joined = new Knowledge(*a);
        joined->join(*b);
        result = KnowledgeRef(joined);
    }
    entries_[next_++ % 4] = {a, b, result};
    return result;
}

KnowledgeRef Joiner::fence(const KnowledgeRef& a) {
    if (!a) return a;
    if (fenced_.a.get() != a.get() && fenced_.result.get() != a.get()) {
        auto* fenced = new Knowledge(*a);
        fenced->fence_all();
        fenced_ = {a, {}, KnowledgeRef(fenced)};
    }
    return fenced_.result;
}

}  // namespace nabla::emulation
