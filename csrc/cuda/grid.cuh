// Where the blocks of a token grid lie, by arithmetic: no table in device memory.
#pragma once

#include "cuda/ptx.cuh"
#include "params.h"

namespace nabla {

constexpr int kBlock = 64;  // tokens of a block that the attention kernels take

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

NABLA_HOST_DEVICE bool has_short_blocks(const Grid& g) {
    return g.frames % g.block_frames || g.height % g.block_height || g.width % g.block_width ||
           g.extra % (g.block_frames * g.block_height * g.block_width);
}

// Blocks first .. first + count - 1 of a grid. Blocks and tokens count from the first of them.
class BlockSlice {
  public:
    NABLA_HOST_DEVICE BlockSlice(const Blocks& blocks) : BlockSlice(blocks, 0, blocks.count) {}
    NABLA_HOST_DEVICE BlockSlice(const Blocks& blocks, int32_t first, int32_t count)
        : blocks_(blocks), first_(first), count_(count), start_(block_run(blocks, first).first) {}

    NABLA_HOST_DEVICE int32_t count() const { return count_; }
    NABLA_HOST_DEVICE BlockRun run(int32_t block) const {
        const BlockRun run = block_run(blocks_, first_ + block);
        return {run.first - start_, run.size};
    }
    NABLA_HOST_DEVICE int32_t tokens() const {
        const BlockRun last = run(count_ - 1);
        return last.first + last.size;
    }

  private:
    const Blocks& blocks_;
    int32_t first_, count_;
    int32_t start_;  // of the first, tokens
};

// The elements of a token of x.
template <class T>
NABLA_DEVICE T* elements(const View& x, int32_t batch, int32_t head, int64_t token) {
    return static_cast<T*>(x.data) + batch * x.stride_b + head * x.stride_h + token * x.stride_s;
}

// The blocks of q.
NABLA_HOST_DEVICE BlockSlice query_blocks(const AttentionParams& p) {
    return {p.blocks, p.q_block_offset, p.q_blocks};
}

}  // namespace nabla
