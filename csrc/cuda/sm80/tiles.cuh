// Tiles [64, D] of bf16 or fp16 in shared memory, and what a warp multiplies of them by mma.sync.
//
// A row has 2 D bytes, in chunks of 16 (8 channels). Chunk c of row r lies where chunk c ^ (r % 8)
// would: so the 8 rows of a matrix that ldmatrix reads are in different banks, as are the 8 chunks
// of a row that a copy writes. A tile begins at a multiple of 128 bytes.
#pragma once

#include "cuda/grid.cuh"
#include "cuda/ptx.cuh"

namespace nabla::sm80 {

template <int kD>
struct Tile {
    static constexpr int kPitch = 2 * kD;  // bytes of a row
    static constexpr int kBytes = kBlock * kPitch;

    // Bytes from the tile to a chunk of a row.
    NABLA_DEVICE static uint32_t offset(int row, int chunk) {
        return row * kPitch + (chunk ^ row % 8) * 16;
    }
};

// Copies rows of a tensor x, `stride` elements apart, into tiles of kRows rows. Threads
// 0 .. kThreads - 1 of a CTA take part, each with one chunk of every kStep-th row. Its copies
// belong to its current group: commit and wait order them, and a barrier makes them known to the
// others.
template <class T, int kD, int kThreads, int kRows = kBlock>
class TileCopy {
    static constexpr int kChunks = kD / 8, kStep = kThreads / kChunks;
    static_assert(kStep % 8 == 0 && kRows % kStep == 0, "a thread's chunks are swizzled alike");

  public:
    NABLA_DEVICE TileCopy(const T* x, int64_t stride) : stride_(stride) {
        const int thread = static_cast<int>(ptx::thread_index()), chunk = thread % kChunks;
        row_ = thread / kChunks;
        offset_ = Tile<kD>::offset(row_, chunk);
        x_ = x + row_ * stride + chunk * 8;
    }

    // Rows first .. first + size - 1 of x; zeros behind them.
    NABLA_DEVICE void operator()(uint32_t tile, int first, int size) const {
        const T* source = x_ + first * stride_;
        NABLA_UNROLL
        for (int row = 0; row < kRows; row += kStep, source += kStep * stride_)
            ptx::copy_async_16(tile + offset_ + row * Tile<kD>::kPitch, source,
                               row_ + row < size ? 16 : 0);
    }

  private:
    const T* x_;  // the thread's chunk of row 0
    int64_t stride_;
    int row_;          // the first that is the thread's
    uint32_t offset_;  // of its chunk in a tile
};

// Reads operands of products from tiles X, as a warp: of A four matrices, [16, 16], and of B as
// many, which are 16 columns of two products. `row` and `channel` are multiples of 16.
template <int kD>
class Operands {
    using Tile = sm80::Tile<kD>;

  public:
    NABLA_DEVICE Operands() {
        const int lane = static_cast<int>(ptx::lane_index());
        rows_first_ = Tile::offset(lane % 16, lane / 16);
        chunks_first_ = Tile::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    }

    // A = X[row .. row + 15, channel .. channel + 15]
    NABLA_DEVICE void load_a(uint32_t (&a)[4], uint32_t tile, int row, int channel) const {
        ptx::ldmatrix_x4(a, at(tile + rows_first_, row, channel));
    }
    // A = X[row .. row + 15, channel .. channel + 15]^T
    NABLA_DEVICE void load_a_transposed(uint32_t (&a)[4], uint32_t tile, int row,
                                        int channel) const {
        ptx::ldmatrix_x4_trans(a, at(tile + chunks_first_, row, channel));
    }
    // B = X[row .. row + 15, channel .. channel + 15]
    NABLA_DEVICE void load_b(uint32_t (&b)[4], uint32_t tile, int row, int channel) const {
        ptx::ldmatrix_x4_trans(b, at(tile + rows_first_, row, channel));
    }
    // B = X[row .. row + 15, channel .. channel + 15]^T
    NABLA_DEVICE void load_b_transposed(uint32_t (&b)[4], uint32_t tile, int row,
                                        int channel) const {
        ptx::ldmatrix_x4(b, at(tile + chunks_first_, row, channel));
    }

  private:
    // Rows in steps of 8 and chunks in steps of 2 leave the swizzle of what a lane reads as it is.
    NABLA_DEVICE static uint32_t at(uint32_t address, int row, int channel) {
        return (address ^ channel % 64 * 2) + row * Tile::kPitch + channel / 64 * 128;
    }

    uint32_t rows_first_;    // matrices: rows 0 and 8 of chunk 0, then of chunk 1
    uint32_t chunks_first_;  // matrices: chunks 0 and 1 of row 0, then of row 8
};

// Columns column .. column + 15 of d [16, N] += a [16, 16] b [16, 16]. Of accumulators:
//   d[i]: row lane / 4 + 8 ((i >> 1) & 1), column 8 (i >> 2) + 2 (lane & 3) + (i & 1)
template <class T, int kCount>
NABLA_DEVICE void multiply(float (&d)[kCount], int column, const uint32_t (&a)[4],
                           const uint32_t (&b)[4]) {
    NABLA_UNROLL
    for (int half = 0; half < 2; ++half)
        ptx::mma_m16n8k16<T>(reinterpret_cast<float(&)[4]>(d[column / 2 + 4 * half]), a,
                             reinterpret_cast<const uint32_t(&)[2]>(b[2 * half]));
}

}  // namespace nabla::sm80
