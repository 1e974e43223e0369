// Random numbers that are the same everywhere for a seed (xorshift64*).
#pragma once

#include <cstdint>

namespace nabla::emulation {

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {
        if (!state_) state_ = 1;
        for (int i = 0; i < 8; ++i) next();
    }

    uint64_t next() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return state_ * 0x2545f4914f6cdd1du;
    }
    uint32_t below(uint32_t bound) { return static_cast<uint32_t>((next() >> 32) * bound >> 32); }
    bool one_in(uint32_t n) { return below(n) == 0; }
    // Any of the bits that are set.
    uint32_t bit_of(uint32_t bits) {
        uint32_t skip = below(static_cast<uint32_t>(__builtin_popcount(bits)));
        while (skip--) bits &= bits - 1;
        return static_cast<uint32_t>(__builtin_ctz(bits));
    }

  private:
    uint64_t state_;
};

}  // namespace nabla::emulation
