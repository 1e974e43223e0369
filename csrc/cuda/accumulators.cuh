// Accumulators of the matrix products of wgmma and of mma.sync, which lie alike in a warp: rows
// lane / 4 and lane / 4 + 8 of its 16, in columns 2 (lane % 4), the next one, and so on in steps
// of 8.
#pragma once

#include "cuda/ptx.cuh"

namespace nabla {

constexpr int kScores = 32;  // accumulators of a thread in a product of 64 columns

// The row of accumulator i, 0 or 1, of the two that a thread has.
NABLA_DEVICE constexpr int row_of(int i) { return i >> 1 & 1; }

// The first column of a thread's accumulators; the others follow in steps of 8, with the next ones.
NABLA_DEVICE int thread_column() { return 2 * (ptx::lane_index() % 4); }

// Accumulators [16, N] as the operand A of a next product, in N / 16 parts [16, 16].
template <class T, int kCount>
NABLA_DEVICE void as_operand_a(uint32_t (&a)[kCount / 8][4], const float (&d)[kCount]) {
    NABLA_UNROLL
    for (int i = 0; i < kCount; i += 2) a[i / 8][i / 2 % 4] = ptx::pack<T>(d[i], d[i + 1]);
}

// factor * accumulators i with row_of(i) == r, to their columns of a row in global memory.
template <class T, int kCount>
NABLA_DEVICE void store_row(T* row, const float (&accumulators)[kCount], int r, float factor) {
    NABLA_UNROLL
    for (int i = 2 * r; i < kCount; i += 4)
        ptx::store_global(reinterpret_cast<uint32_t*>(row + thread_column() + 2 * (i - 2 * r)),
                          ptx::pack<T>(accumulators[i] * factor, accumulators[i + 1] * factor));
}

}  // namespace nabla
