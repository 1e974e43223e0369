// Rows of a bitmask: bit j % 32 of word j / 32 stands for key block j.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace nabla::cpu::NABLA_ISA {

// The first j >= begin whose bit is `value`, or `end`. No word past (end - 1) / 32 is read.
template <bool value>
static inline int find_bit(const uint32_t* bits, int begin, int end) {
    while (begin < end) {
        const uint32_t word = (value ? bits[begin / 32] : ~bits[begin / 32]) >> (begin % 32);
        if (word) {
            const int found = begin + __builtin_ctz(word);
            return found < end ? found : end;
        }
        begin = (begin / 32 + 1) * 32;
    }
    return end;
}

// Call visit(first, last) for every maximal run first .. last - 1 of set bits within begin .. end
// - 1.
template <class Visit>
static inline void for_each_run(const uint32_t* bits, int begin, int end, Visit visit) {
    while ((begin = find_bit<true>(bits, begin, end)) < end) {
        const int last = find_bit<false>(bits, begin, end);
        visit(begin, last);
        begin = last;
    }
}

// Set the bits begin .. end - 1.
static inline void set_run(uint32_t* bits, int begin, int end) {
    for (int word = begin / 32; word * 32 < end; ++word) {
        const int low = begin > word * 32 ? begin - word * 32 : 0;
        const int high = end < word * 32 + 32 ? end - word * 32 : 32;
        bits[word] |= (~0u >> (32 - (high - low))) << low;
    }
}

}  // namespace nabla::cpu::NABLA_ISA
