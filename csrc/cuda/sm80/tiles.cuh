// Tiles [64, D] of bf16 or fp16 in shared memory, and what a warp multiplies of them by mma.sync.
//
// A row has 2 D bytes, in chunks of 16 (8 channels). Chunk c of row r lies where chunk c ^ (r % 8)
// would: so the 8 rows of a matrix that ldmatrix reads are in different banks, as are the 8 chunks
// of a row that a copy writes. A tile begins at a multiple of 1024 bytes.
#pragma once

#include "cuda/ptx.cuh"

namespace nabla::sm80 {

constexpr int kBlock = 64;  // tokens of a block, rows of a tile

template <int kD>
struct Tile {
    static constexpr int kPitch = 2 * kD;  // bytes of a row
    static constexpr int kBytes = kBlock * kPitch;

    // Bytes from the tile to a chunk of a row.
    NABLA_DEVICE static uint32_t offset(int row, int chunk) {
        return row * kPitch + (chunk ^ row % 8) * 16;
    }
};

// Copies rows 0 .. size - 1 of x, `stride` elements apart, into a tile, and zeroes the rows behind.
// Threads 0 .. kThreads - 1 of a CTA take part. The copies of each belong to its current group:
// commit and wait order them, and a barrier makes them known to the others.
template <int kD, int kThreads, class T>
NABLA_DEVICE void copy_tile(uint32_t tile, const T* x, int64_t stride, int size) {
    constexpr int kChunks = kD / 8, kRows = kThreads / kChunks;  // of a row; of a step
    static_assert(kRows % 8 == 0 && kBlock % kRows == 0, "a thread's chunks are swizzled alike");
    const int thread = static_cast<int>(ptx::thread_index());
    const int row = thread / kChunks, chunk = thread % kChunks;
    const uint32_t destination = tile + Tile<kD>::offset(row, chunk);
    const T* source = x + row * stride + chunk * 8;
    NABLA_UNROLL
    for (int step = 0; step < kBlock; step += kRows)
        ptx::copy_async_16(destination + step * Tile<kD>::kPitch, source + step * stride,
                           row + step < size ? 16 : 0);
}

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

// Accumulators [16, 64] as the operand A of a next product, in 4 parts [16, 16].
template <class T>
NABLA_DEVICE void as_operand_a(uint32_t (&a)[4][4], const float (&d)[32]) {
    NABLA_UNROLL
    for (int i = 0; i < 32; i += 2) a[i / 8][i / 2 % 4] = ptx::pack<T>(d[i], d[i + 1]);
}

}  // namespace nabla::sm80
