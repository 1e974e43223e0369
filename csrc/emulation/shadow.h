// Who accessed each word of shared memory last, and whether two accesses are ordered.
#pragma once

#include <array>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "emulation/clock.h"

namespace nabla::emulation {

// Flags of an access.
constexpr uint16_t kAsync = 1;     // by the asynchronous proxy
constexpr uint16_t kAtomic = 2;    // atomics need no order among themselves
constexpr uint16_t kInFlight = 4;  // a copy_async that its thread has not waited for
constexpr uint16_t kMbarrier = 8;  // the word belongs to an mbarrier

struct Access {
    Epoch epoch;
    uint32_t site = 0;
};

// What an access that is about to happen knows of earlier ones.
class Observer {
  public:
    virtual ~Observer() = default;
    virtual bool has_seen(Epoch epoch) const = 0;
    virtual bool has_fenced(Epoch epoch) const = 0;
};

enum class Conflict : uint8_t { kNone, kWrite, kRead, kFence, kUnwritten, kInFlight, kMbarrier };

struct Finding {
    Conflict conflict = Conflict::kNone;
    Access earlier;
    uint32_t offset = 0;  // of the word or byte
};

class Shadow {
  public:
    void reset(uint32_t bytes);

    // What was found of one word; words that were accessed alike need no second look. Holds for one
    // observer and access.
    struct Memo {
        Epoch write;
        uint32_t reads = 0;
        uint32_t reads_after = 0;
        bool valid = false;
    };

    // `offset` and `bytes` lie within the memory; the first conflict is returned.
    Finding read(const Observer& observer, const Access& access, uint32_t offset, uint32_t bytes,
                 Memo& memo);
    Finding write(const Observer& observer, const Access& access, uint32_t offset, uint32_t bytes,
                  Memo& memo);
    // A copy in flight has landed: from here on it is an access of `epoch`.
    void land(uint32_t offset, uint32_t bytes, Epoch epoch);

  private:
    struct Cell {
        Epoch write;
        uint32_t site = 0;
        uint32_t reads = 0;  // node of the last read since that write; 0 for none
    };
    // Reads since a write, newest first. Words that were read alike share their nodes.
    struct Node {
        Access access;
        uint32_t earlier = 0;
    };
    struct Successor {
        uint32_t node = 0, result = 0;
        Epoch epoch;
    };
    template <class Known, class Visit>
    Finding visit(uint32_t offset, uint32_t bytes, const Memo& memo, Known known, Visit visit);
    Finding read_cell(const Observer& observer, const Access& access, Cell& cell, Memo& memo);
    Finding write_cell(const Observer& observer, const Access& access, Cell& cell, Memo& memo);
    Conflict order(const Observer& observer, const Access& access, const Epoch& write) const;
    uint32_t append(uint32_t node, const Access& access);

    std::vector<Cell> words_;
    std::unordered_map<uint32_t, std::array<Cell, 4>> bytes_;  // of words accessed in parts
    std::vector<Node> nodes_;
    std::vector<Successor> successors_;
};

}  // namespace nabla::emulation
