// Rings of slots in shared memory, between producers and their consumers, and queues beside them.
//
//   Rings     two, of K and of V tiles, which are full and empty each by itself
//   PairRing  one of pairs of tiles, with values of their rows, full and empty together
//   Queues    tell each consumer where in a ring the blocks are that it computes
//
// A stage is a slot in one round: it holds the tiles of one block. A consumer that does not compute
// the block never looks at its stage, and a producer, which knows that, releases it in its place.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/union_walk.cuh"

namespace nabla::sm90 {

// Where a stage is, and the parity of the phase in which it is full: in one word, because consumers
// have few registers to spare. The slot is kept as an offset into arrays of 8 bytes a slot.
class Position {
  public:
    NABLA_DEVICE explicit Position(uint32_t bits = 0) : bits_(bits) {}

    NABLA_DEVICE uint32_t bits() const { return bits_; }
    NABLA_DEVICE uint32_t offset() const { return bits_ & kSlotMask; }
    NABLA_DEVICE uint32_t slot() const { return offset() / 8; }
    NABLA_DEVICE uint32_t parity() const { return bits_ & 1; }

    template <int kSlots>
    NABLA_DEVICE void advance() {
        static_assert(kSlots < 16, "a slot has 4 bits");
        bits_ += 8;
        if (slot() == kSlots) bits_ = (bits_ - 8 * kSlots) ^ 1;
    }

  private:
    static constexpr uint32_t kSlotMask = 15 << 3;

    uint32_t bits_;
};

// What a consumer finds in its queue: a block that it computes, and at which stage; a gap, where no
// such block comes before the slot of the last one is needed again; or the end of the walk. One
// word, so that a shuffle makes all that consumers branch on uniform.
class Entry {
  public:
    NABLA_DEVICE explicit Entry(uint32_t bits = 0) : bits_(bits) {}
    NABLA_DEVICE static Entry block(const Position& at, int size) {
        return Entry(at.bits() | static_cast<uint32_t>(size) << 8);
    }
    NABLA_DEVICE static Entry gap() { return Entry(1); }
    NABLA_DEVICE static Entry end() { return Entry(0); }

    NABLA_DEVICE uint32_t bits() const { return bits_; }
    NABLA_DEVICE Position at() const { return Position(bits_ & 0xff); }
    NABLA_DEVICE int size() const { return bits_ >> 8; }  // tokens of the block
    NABLA_DEVICE bool is_block() const { return bits_ > 1; }
    NABLA_DEVICE bool is_gap() const { return bits_ == 1; }

  private:
    uint32_t bits_;
};

// A queue for each consumer, beside a ring of kStages slots, with a slot more. So an entry, and the
// end, takes the place of one of a stage that is free by then, which has been read; or that of a
// gap, which consumers read before they release the stage of the block before it.
template <int kConsumers, int kStages>
class Queues {
  public:
    static constexpr int kSlots = kStages + 1;
    static constexpr uint32_t kBytes = kConsumers * kSlots * 16;

    NABLA_DEVICE explicit Queues(uint32_t base) : base_(base) {}

    // A barrier, complete when an entry is there, and the entry.
    NABLA_DEVICE uint32_t full(int consumer, const Position& at) const {
        return base_ + consumer * (2 * kSlots * 8) + at.offset();
    }
    NABLA_DEVICE uint32_t entry(int consumer, const Position& at) const {
        return full(consumer, at) + kSlots * 8;
    }

    NABLA_DEVICE void init_barriers() const {
        for (int consumer = 0; consumer < kConsumers; ++consumer) {
            Position at;
            for (int slot = 0; slot < kSlots; ++slot, at.advance<kSlots>())
                ptx::mbarrier_init(full(consumer, at), 1);
        }
    }

  private:
    uint32_t base_;
};

// A producer warp's end of the queues: lane c writes that of consumer c, the other lanes nothing.
// kTellsGaps: to consumers who look for a block before they release the last one.
template <int kConsumers, int kStages, bool kTellsGaps>
class QueueWriter {
  public:
    using Queues = sm90::Queues<kConsumers, kStages>;

    NABLA_DEVICE explicit QueueWriter(const Queues& queues)
        : queues_(queues), lane_(ptx::lane_index()) {}

    // The block of a stage to those who compute it; a gap to those to whom it is the last stage
    // before the slot of their last block comes again.
    NABLA_DEVICE void put(const Position& at, const KeptBlock& kept) {
        if (kept.members >> lane_ & 1) {
            push(Entry::block(at, kept.run.size));
            since_ = 0;
        } else if (kTellsGaps && ++since_ == kStages - 1) {
            push(Entry::gap());
        }
    }
    NABLA_DEVICE void put_end() {
        if (lane_ < kConsumers) push(Entry::end());
    }

  private:
    NABLA_DEVICE void push(const Entry& entry) {
        ptx::store_shared(queues_.entry(lane_, at_), entry.bits());
        ptx::mbarrier_arrive(queues_.full(lane_, at_));
        at_.advance<Queues::kSlots>();
    }

    const Queues queues_;
    const int lane_;
    Position at_;          // in the queue
    int since_ = kStages;  // stages since the last block; so many if there was none
};

// A consumer warp's end of its queue.
template <int kConsumers, int kStages>
class QueueReader {
  public:
    using Queues = sm90::Queues<kConsumers, kStages>;

    NABLA_DEVICE QueueReader(const Queues& queues, int consumer)
        : first_(queues.full(consumer, Position())) {}

    // The next entry, as soon as it is there.
    NABLA_DEVICE Entry next() {
        const uint32_t full = first_ + at_.offset();
        ptx::mbarrier_wait(full, at_.parity());  // the entry is there
        const auto bits = ptx::load_shared<uint32_t>(full + Queues::kSlots * 8);
        ptx::sync_warp();  // all lanes have read it: one may release its stage for all
        at_.advance<Queues::kSlots>();
        return Entry(ptx::shuffle(bits, 0));
    }

  private:
    const uint32_t first_;  // shared address of the queue
    Position at_;
};

// The rings, at a shared address that is a multiple of 1024.
template <int kStages, int kTileBytes>
class Rings {
  public:
    static constexpr uint32_t kBytes = kStages * (2 * kTileBytes + 5 * 8);

    NABLA_DEVICE explicit Rings(uint32_t base) : base_(base) {}

    NABLA_DEVICE uint32_t k(const Position& at) const { return base_ + at.slot() * kTileBytes; }
    NABLA_DEVICE uint32_t v(const Position& at) const {
        return base_ + kV + at.slot() * kTileBytes;
    }

    // Barriers. Full: K, or V, may be read. Empty: it may be overwritten, once all consumer warps
    // have arrived or a producer in their place. Landed: V of a short block is there, with rows
    // behind its end.
    NABLA_DEVICE uint32_t k_full(const Position& at) const { return word(0, at); }
    NABLA_DEVICE uint32_t k_empty(const Position& at) const { return word(1, at); }
    NABLA_DEVICE uint32_t v_full(const Position& at) const { return word(2, at); }
    NABLA_DEVICE uint32_t v_empty(const Position& at) const { return word(3, at); }
    NABLA_DEVICE uint32_t v_landed(const Position& at) const { return word(4, at); }

    NABLA_DEVICE void init_barriers(int consumer_warps) const {
        Position at;
        for (int slot = 0; slot < kStages; ++slot, at.advance<kStages>()) {
            ptx::mbarrier_init(k_full(at), 1);
            ptx::mbarrier_init(v_full(at), 1);
            ptx::mbarrier_init(v_landed(at), 1);
            ptx::mbarrier_init(k_empty(at), consumer_warps);
            ptx::mbarrier_init(v_empty(at), consumer_warps);
        }
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
    static constexpr uint32_t kBytes = kStages * (2 * kTileBytes + kRowBytes + 3 * 8);

    NABLA_DEVICE explicit PairRing(uint32_t base) : base_(base) {}

    NABLA_DEVICE uint32_t tile(int which, const Position& at) const {
        return base_ + (2 * at.slot() + which) * kTileBytes;
    }
    NABLA_DEVICE uint32_t rows(const Position& at) const {
        return base_ + kRows + at.slot() * kRowBytes;
    }

    // Barriers. Full: all may be read. Empty: all may be overwritten, once all consumer warps have
    // arrived or a producer in their place. Landed: tiles of a short block are there, with rows
    // behind its end.
    NABLA_DEVICE uint32_t full(const Position& at) const { return word(0, at); }
    NABLA_DEVICE uint32_t empty(const Position& at) const { return word(1, at); }
    NABLA_DEVICE uint32_t landed(const Position& at) const { return word(2, at); }

    NABLA_DEVICE void init_barriers(int consumer_warps) const {
        Position at;
        for (int slot = 0; slot < kStages; ++slot, at.advance<kStages>()) {
            ptx::mbarrier_init(full(at), 1);
            ptx::mbarrier_init(landed(at), 1);
            ptx::mbarrier_init(empty(at), consumer_warps);
        }
    }

  private:
    static constexpr uint32_t kRows = 2 * kStages * kTileBytes;
    static constexpr uint32_t kWords = kRows + kStages * kRowBytes;

    NABLA_DEVICE uint32_t word(uint32_t kind, const Position& at) const {
        return base_ + kWords + kind * kStages * 8 + at.offset();
    }

    uint32_t base_;
};

// A producer's thread releases a stage for the consumers that do not compute its block.
template <int kConsumers>
NABLA_DEVICE void release_for_others(uint32_t empty, uint32_t members, uint32_t warps) {
    const uint32_t others = kConsumers - ptx::popcount(members);
    if (others) ptx::mbarrier_arrive(empty, others * warps);
}

}  // namespace nabla::sm90
