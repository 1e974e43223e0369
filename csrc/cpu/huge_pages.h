// Ask for huge pages under memory that a launch is the first to write: the faults of small ones
// would take a tenth of its time.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace nabla::cpu {

// A wish: a system without huge pages keeps the small ones.
static inline void prefer_huge_pages(uintptr_t address, uintptr_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
    const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)address, (void)bytes;
#endif
}

}  // namespace nabla::cpu
