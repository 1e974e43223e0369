// Where the blocks of a token grid lie, by arithmetic: no table in device memory.
#pragma once

#include "cuda/ptx.cuh"
#include "params.h"

namespace nabla {

// Tokens first .. first + size - 1 of the sequence in block order.
struct BlockRun {
    int32_t first, size;
};

// The run of block 0 .. count - 1; TokenGrid.block_start of Python.
NABLA_HOST_DEVICE BlockRun block_run(const Blocks& blocks, int32_t block) {
    const Grid& g = blocks.grid;
    const auto least = [](int32_t x, int32_t y) { return x < y ? x : y; };
    const int32_t past = block - blocks.grid_count;
    if (past >= 0) {
        const int32_t size = g.block_frames * g.block_height * g.block_width;
        return {g.frames * g.height * g.width + past * size, least(size, g.extra - past * size)};
    }
    const int32_t line = block / blocks.nw, w = block % blocks.nw * g.block_width;
    const int32_t t = line / blocks.nh * g.block_frames, h = line % blocks.nh * g.block_height;
    const int32_t frames = least(g.block_frames, g.frames - t);
    const int32_t height = least(g.block_height, g.height - h);
    const int32_t width = least(g.block_width, g.width - w);
    return {t * g.height * g.width + frames * (h * g.width + height * w), frames * height * width};
}

}  // namespace nabla
