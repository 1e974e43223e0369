// The blocks that at least one of several rows of bits keeps, in ascending order: key blocks by the
// rows of a mask, query blocks by its columns.
#pragma once

#include "cuda/grid.cuh"
#include "cuda/ptx.cuh"
#include "params.h"

namespace nabla {

// A block of the walk.
struct KeptBlock {
    int32_t index;
    BlockRun run;
    uint32_t members;  // bit r: row r keeps it
};

// A warp walks together: lane l holds word l of 32 words of each row, and of the block of bit l of
// the current word where it lies and which rows keep it.
template <int kRows>
class UnionWalk {
  public:
    // Begins with block 32 * word. rows: the words of each row, a bit for each block; null for a row
    // that keeps nothing.
    NABLA_DEVICE UnionWalk(const BlockSlice& blocks, const uint32_t* const (&rows)[kRows],
                           int32_t word = 0)
        : blocks_(blocks), words_((blocks.count() + 31) / 32), first_(word), at_(word - 1) {
        NABLA_UNROLL
        for (int r = 0; r < kRows; ++r) rows_[r] = rows[r];
    }

    // Steps to the next block; false behind the last.
    NABLA_DEVICE bool next(KeptBlock& kept) {
        while (left_ == 0)
            if (!next_word()) return false;
        const uint32_t bit = ptx::trailing_zeros(left_);
        left_ &= left_ - 1;
        kept.index = 32 * at_ + static_cast<int32_t>(bit);
        const auto packed = ptx::shuffle(run_.size << kRows | static_cast<int32_t>(members_), bit);
        kept.run = {ptx::shuffle(run_.first, bit), packed >> kRows};
        kept.members = packed & ((1 << kRows) - 1);
        return true;
    }

    // Steps to the next word with a block; false behind the last. Each lane gets the block of its
    // bit, without members where no row keeps it. For walks that do not call next().
    NABLA_DEVICE bool next_word(KeptBlock& kept) {
        for (left_ = 0; left_ == 0;)
            if (!next_word()) return false;
        kept.index = 32 * at_ + static_cast<int32_t>(ptx::lane_index());
        kept.run = run_;
        kept.members = members_;
        return true;
    }
    // With which word it goes on; behind the last, that is their number.
    NABLA_DEVICE int32_t continues_at() const { return at_ + 1 < words_ ? at_ + 1 : words_; }

  private:
    NABLA_DEVICE bool next_word() {
        if (++at_ >= words_) return false;
        if ((at_ - first_) % 32 == 0) load_words();
        members_ = 0;
        NABLA_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const uint32_t word = ptx::shuffle(loaded_[r], (at_ - first_) % 32);
            members_ |= (word >> ptx::lane_index() & 1) << r;
        }
        left_ = ptx::ballot(members_ != 0);
        run_ = blocks_.run(32 * at_ + static_cast<int32_t>(ptx::lane_index()));
        return true;
    }

    NABLA_DEVICE void load_words() {
        const int32_t word = at_ + static_cast<int32_t>(ptx::lane_index());
        const int32_t bits = blocks_.count() - 32 * word;  // from this word on; the rest is garbage
        const uint32_t valid = bits >= 32 ? ~0u : (1u << (bits > 0 ? bits : 0)) - 1;
        NABLA_UNROLL
        for (int r = 0; r < kRows; ++r)
            loaded_[r] = rows_[r] && valid ? ptx::load_global_nc(rows_[r] + word) & valid : 0;
    }

    const BlockSlice blocks_;
    const uint32_t* rows_[kRows];
    int32_t words_;           // of a row
    int32_t first_;           // the first word
    int32_t at_;              // the current word
    uint32_t loaded_[kRows];  // of 32 words, that of the lane
    uint32_t left_ = 0;       // bits of the current word, of any row, that are still to come
    BlockRun run_;            // of block 32 * at_ + lane
    uint32_t members_;        // of that block
};

}  // namespace nabla
