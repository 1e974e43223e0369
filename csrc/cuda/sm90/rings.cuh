// Rings of slots in shared memory, between a producer and its consumers.
//
//   Rings     two, of K and of V tiles, which are full and empty each by itself
//   PairRing  one of pairs of tiles, with values of their rows, full and empty together
//
// A stage is a slot: it holds the tiles of one block, and a word that tells which block.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/union_walk.cuh"

namespace nabla::sm90 {

// Where a stage is, and the parity of the phase in which it is full: in one word, because consumers
// have few registers to spare. The slot is kept as an offset into arrays of 8 bytes a slot.
class Position {
  public:
    NABLA_DEVICE explicit Position(uint32_t bits = 0) : bits_(bits) {}
    NABLA_DEVICE static Position nowhere() { return Position(kSlotMask); }

    NABLA_DEVICE uint32_t bits() const { return bits_; }
    NABLA_DEVICE uint32_t offset() const { return bits_ & kSlotMask; }
    NABLA_DEVICE uint32_t slot() const { return offset() / 8; }
    NABLA_DEVICE uint32_t parity() const { return bits_ & 1; }
    NABLA_DEVICE bool has_slot_of(const Position& other) const {
        return offset() == other.offset();
    }

    template <int kStages>
    NABLA_DEVICE void advance() {
        static_assert(kStages < 15, "a slot has 4 bits, and 15 is nowhere");
        bits_ += 8;
        if (slot() == kStages) bits_ = (bits_ - 8 * kStages) ^ 1;
    }

    // The slot before; its parity is not that of this position.
    template <int kStages>
    NABLA_DEVICE Position slot_before() const {
        return Position(slot() == 0 ? 8 * (kStages - 1) : offset() - 8);
    }

  private:
    static constexpr uint32_t kSlotMask = 15 << 3;

    uint32_t bits_;
};

// A position and what is there. It travels as one word beside the tiles, so that a shuffle makes
// all that consumers branch on uniform.
class Stage {
  public:
    NABLA_DEVICE explicit Stage(uint32_t bits = 0) : bits_(bits) {}
    NABLA_DEVICE Stage(const Position& at, const KeptBlock& kept)
        : bits_(at.bits() | static_cast<uint32_t>(kept.run.size) << 8 | kept.members << 16) {}
    NABLA_DEVICE static Stage end(const Position& at) { return Stage(at.bits()); }

    NABLA_DEVICE uint32_t bits() const { return bits_; }
    NABLA_DEVICE Position at() const { return Position(bits_ & 0xff); }
    NABLA_DEVICE int size() const { return bits_ >> 8 & 0xff; }  // tokens of the block
    NABLA_DEVICE bool has_member(int row) const { return bits_ >> (16 + row) & 1; }
    NABLA_DEVICE bool is_end() const { return size() == 0; }  // behind the last block of the walk

  private:
    uint32_t bits_;
};

// The rings, at a shared address that is a multiple of 1024.
template <int kStages, int kTileBytes>
class Rings {
  public:
    static constexpr uint32_t kBytes = kStages * (2 * kTileBytes + 6 * 8);

    NABLA_DEVICE explicit Rings(uint32_t base) : base_(base) {}

    NABLA_DEVICE uint32_t k(const Position& at) const { return base_ + at.slot() * kTileBytes; }
    NABLA_DEVICE uint32_t v(const Position& at) const {
        return base_ + kV + at.slot() * kTileBytes;
    }

    // Barriers. Full: K and the word, or V, may be read. Empty: they may be overwritten, once every
    // consumer warp has arrived. Landed: V of a short block is there, with rows behind its end.
    NABLA_DEVICE uint32_t k_full(const Position& at) const { return word(0, at); }
    NABLA_DEVICE uint32_t k_empty(const Position& at) const { return word(1, at); }
    NABLA_DEVICE uint32_t v_full(const Position& at) const { return word(2, at); }
    NABLA_DEVICE uint32_t v_empty(const Position& at) const { return word(3, at); }
    NABLA_DEVICE uint32_t v_landed(const Position& at) const { return word(4, at); }

    // The word of a stage: Stage::bits().
    NABLA_DEVICE uint32_t stage(const Position& at) const { return word(5, at); }

    NABLA_DEVICE void init_barriers(int consumer_warps) const {
        Position at;
        for (int slot = 0; slot < kStages; ++slot, at.advance<kStages>()) {
            ptx::mbarrier_init(k_full(at), 1);
            ptx::mbarrier_init(v_full(at), 1);
            ptx::mbarrier_init(v_landed(at), 1);
            ptx::mbarrier_init(k_empty(at), consumer_warps);
            ptx::mbarrier_init(v_empty(at), consumer_warps);
        }
        ptx::fence_mbarrier_init();
    }

  private:
    static constexpr uint32_t kV = kStages * kTileBytes;
    static constexpr uint32_t kWords = 2 * kV;

    NABLA_DEVICE uint32_t word(uint32_t kind, const Position& at) const {
        return base_ + kWords + kind * kStages * 8 + at.offset();
    }

    uint32_t base_;
};

// The ring, at a shared address that is a multiple of 1024. kRowBytes: of the values beside a pair.
template <int kStages, int kTileBytes, int kRowBytes>
class PairRing {
  public:
    static constexpr uint32_t kBytes = kStages * (2 * kTileBytes + kRowBytes + 4 * 8);

    NABLA_DEVICE explicit PairRing(uint32_t base) : base_(base) {}

    NABLA_DEVICE uint32_t tile(int which, const Position& at) const {
        return base_ + (2 * at.slot() + which) * kTileBytes;
    }
    NABLA_DEVICE uint32_t rows(const Position& at) const {
        return base_ + kRows + at.slot() * kRowBytes;
    }

    // Barriers. Full: all may be read. Empty: all may be overwritten, once every consumer warp has
    // arrived. Landed: tiles of a short block are there, with rows behind its end.
    NABLA_DEVICE uint32_t full(const Position& at) const { return word(0, at); }
    NABLA_DEVICE uint32_t empty(const Position& at) const { return word(1, at); }
    NABLA_DEVICE uint32_t landed(const Position& at) const { return word(2, at); }

    // Two words of a stage: Stage::bits(), and the number of the block.
    NABLA_DEVICE uint32_t stage(const Position& at) const { return word(3, at); }

    NABLA_DEVICE void init_barriers(int consumer_warps) const {
        Position at;
        for (int slot = 0; slot < kStages; ++slot, at.advance<kStages>()) {
            ptx::mbarrier_init(full(at), 1);
            ptx::mbarrier_init(landed(at), 1);
            ptx::mbarrier_init(empty(at), consumer_warps);
        }
        ptx::fence_mbarrier_init();
    }

  private:
    static constexpr uint32_t kRows = 2 * kStages * kTileBytes;
    static constexpr uint32_t kWords = kRows + kStages * kRowBytes;

    NABLA_DEVICE uint32_t word(uint32_t kind, const Position& at) const {
        return base_ + kWords + kind * kStages * 8 + at.offset();
    }

    uint32_t base_;
};

}  // namespace nabla::sm90
