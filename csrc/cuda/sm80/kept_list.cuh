// The next blocks of a union walk, listed in shared memory: the walk itself would take registers
// that accumulators need.
#pragma once

#include "cuda/union_walk.cuh"

namespace nabla::sm80 {

// An entry of the list; one without members is behind the last.
struct alignas(8) Listed {
    int32_t first;   // token
    uint32_t bits;  // members of KeptBlock, from bit 3 on tokens, from bit 10 on the block

    NABLA_DEVICE uint32_t members() const { return bits & 7; }
    NABLA_DEVICE int size() const { return static_cast<int>(bits >> 3 & 0x7f); }
    NABLA_DEVICE int32_t index() const { return static_cast<int32_t>(bits >> 10); }
};

template <int kCapacity>
class KeptList {
  public:
    static constexpr int kBytes = (kCapacity + 1) * sizeof(Listed);

    NABLA_DEVICE explicit KeptList(uint32_t address) : address_(address) {}

    NABLA_DEVICE Listed operator[](int i) const {
        return ptx::load_shared<Listed>(address_ + i * sizeof(Listed));
    }

    // With which word the walk goes on, where the words of rows are counted from the first row on.
    NABLA_DEVICE int32_t next_word() const {
        return ptx::load_shared<int32_t>(address_ + kCapacity * sizeof(Listed));
    }

    // Lists the blocks that follow in the walk, as many as there is room for, and an entry of no
    // tokens and no members behind them; `words` are those of rows before. A warp calls it.
    template <int kRows>
    NABLA_DEVICE void fill(UnionWalk<kRows>& walk, int32_t words = 0) const {
        const uint32_t lane = ptx::lane_index();
        int count = 0;
        for (KeptBlock kept; count + 32 < kCapacity && walk.next_word(kept);) {
            const uint32_t all = ptx::ballot(kept.members != 0);
            if (kept.members) store(count + ptx::popcount(all & ((1u << lane) - 1)), kept);
            count += ptx::popcount(all);
        }
        if (lane != 0) return;
        store(count, {0, {0, 0}, 0});
        ptx::store_shared(address_ + kCapacity * sizeof(Listed), words + walk.continues_at());
    }

  private:
    NABLA_DEVICE void store(int i, const KeptBlock& kept) const {
        const Listed listed = {kept.run.first, kept.members |
                                                   static_cast<uint32_t>(kept.run.size) << 3 |
                                                   static_cast<uint32_t>(kept.index) << 10};
        ptx::store_shared(address_ + i * sizeof(Listed), listed);
    }

    uint32_t address_;
};

}  // namespace nabla::sm80
