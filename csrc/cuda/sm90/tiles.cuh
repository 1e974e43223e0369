// Tiles [64, D] of blocks in shared memory, as bulk tensor copies write them and wgmma reads them,
// and accumulators of wgmma.
//
// A tile is panels of 64 channels, whose rows of 128 bytes are swizzled: the pieces of 16 bytes of
// row r lie in the order of their numbers xor r % 8.
#pragma once

#include "cuda/accumulators.cuh"
#include "cuda/grid.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tensor_map.h"
#include "params.h"

namespace nabla::sm90 {

constexpr int kPanelBytes = kBlock * 128;
constexpr int kWarpgroup = 128, kWarps = 4;  // threads and warps of a warpgroup

// ---- tiles ----

// The address of piece 0 .. D / 8 - 1 of a row: 8 channels.
NABLA_DEVICE uint32_t piece_of_tile(uint32_t tile, int row, int piece) {
    return tile + piece / 8 * kPanelBytes + row * 128 + (piece % 8 ^ row % 8) * 16;
}

// From the descriptor of a tile whose channels are summed over to that of its 16 channels c.
NABLA_DEVICE constexpr uint32_t channel_chunk(int c) {
    return (c / 4 * kPanelBytes + c % 4 * 32) / 16;
}

// From the descriptor of a tile whose rows are summed over to that of its 16 rows c.
NABLA_DEVICE constexpr uint32_t row_chunk(int c) { return c * 16 * 128 / 16; }

// Copies the tile that begins with `token`; its bytes are added to the phase of the barrier.
template <int kPanels>
NABLA_DEVICE void copy_tile(uint32_t tile, const cuda::BoxedTensor& x, uint32_t barrier, int token,
                            int head, int batch) {
    NABLA_UNROLL
    for (int panel = 0; panel < kPanels; ++panel)
        ptx::copy_tensor_4d(tile + panel * kPanelBytes, &x.map, barrier, panel * cuda::kPanel,
                            token, head * x.head_step, batch * x.batch_step);
}

// A warp zeroes the rows of a tile from `size` on.
template <int kPanels>
NABLA_DEVICE void zero_tail(uint32_t tile, int size) {
    NABLA_UNROLL
    for (int panel = 0; panel < kPanels; ++panel)
        for (int byte = size * 128 + ptx::lane_index() * 16; byte < kPanelBytes; byte += 32 * 16)
            ptx::store_shared(tile + panel * kPanelBytes + byte, ptx::U32x4{});
}

// ---- accumulators ----

// The row of the tile of accumulators i with row_of(i) == r.
NABLA_DEVICE int thread_row(int r) {
    return static_cast<int>(ptx::warp_index() % 4 * 16 + ptx::lane_index() / 4 + 8 * r);
}

}  // namespace nabla::sm90
