// One struct per launch. Nothing here is owned: the caller keeps every tensor alive meanwhile.
//
//   B, Hq, Hk, D   batch, query heads, key heads, head dimension; query head h reads key head
//                  h / (Hq / Hk)
//   N, Nq          blocks of the grid, and query blocks: those from q_block_offset on
//   W              ceil(N / 32), words of bits in a row
//
// Strides are in elements. Every launch ends with where it runs: `threads` of a CPU, at least 1, or
// the `stream` of a CUDA device; each has no use for the other.
#pragma once

#include <cstdint>

namespace nabla {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A tensor [B, H, S, D] whose last dimension is contiguous.
struct View {
    void* data;        // never null
    int64_t stride_b;  // elements
    int64_t stride_h;  // elements
    int64_t stride_s;  // elements
};

// frames * height * width tokens, cut into blocks of at most block_frames * block_height *
// block_width, and the `extra` tokens after them, cut into runs of as many.
struct Grid {
    int32_t frames, height, width;
    int32_t block_frames, block_height, block_width;
    int32_t extra;
};

// Blocks of a token grid: nt * nh * nw grid blocks in raster order, then those of extra tokens.
struct Blocks {
    Grid grid;
    const int32_t* starts;  // [N + 1], tokens: block j holds tokens starts[j] .. starts[j + 1] - 1;
                            // null on CUDA, where kernels compute them from the grid
    int32_t count;          // N
    int32_t grid_count;     // blocks that selection ranks: the first nt * nh * nw
    int32_t nt, nh, nw;     // extents of the grid in blocks
};

// Odd extents in blocks of the neighbourhood that every query block keeps; 0 for no window.
struct Window {
    int32_t frames, height, width;
};

// Means over the tokens of each block.
struct BlockMeanParams {
    DType dtype;           // of x
    int32_t batch;         // B
    int32_t heads;         // H
    int32_t head_dim;      // D
    int32_t x_blocks;      // Nx, blocks of x
    int32_t block_offset;  // the block with which x begins
    Blocks blocks;
    View x;               // [B, H, S, D]
    float* mean;          // [B, H, Nx, D], or [B, H, D, mean_stride] where transposed
    int32_t mean_stride;  // elements; 0 for the row-major layout
    int32_t threads;
    void* stream;
};

// Softmax over the grid blocks of scale * q_mean . k_mean; +inf marks a block that is always kept.
struct ScoresParams {
    int32_t batch;           // B
    int32_t heads;           // Hq
    int32_t kv_heads;        // Hk
    int32_t head_dim;        // D
    int32_t q_blocks;        // Nq
    int32_t q_block_offset;  // blocks
    Blocks blocks;
    float scale;            // multiplies q_mean . k_mean
    const float* q_mean;    // [B, Hq, Nq, D]
    const float* k_mean;    // [B, Hk, D, k_mean_stride], zero past column N
    int32_t k_mean_stride;  // elements: N rounded up to a multiple of 32
    float* scores;          // [B, Hq, Nq, N]; null where they are not wanted
    int32_t threads;
    void* stream;
};

// The fewest blocks of each row that hold top_p of its scores, and the window.
struct BlockMaskParams {
    ScoresParams scores;  // q_mean is null where scores.scores is the input; k_mean is then unread
    Window window;
    const float* top_p;  // [Hq]
    uint32_t* bits;      // [B, Hq, Nq, W]
};

// The bits of every column: which query blocks attend to each key block.
struct TransposeParams {
    int32_t batch;     // B
    int32_t heads;     // H
    int32_t q_blocks;  // Nq
    Blocks blocks;
    const uint32_t* bits;   // [B, H, Nq, W]
    int64_t bits_stride_b;  // words
    int64_t bits_stride_h;  // words
    uint32_t* columns;      // [B, H, N, ceil(Nq / 32)]
    int32_t threads;
    void* stream;
};

// Softmax attention over the kept blocks.
struct AttentionParams {
    DType dtype;             // of q, k, v, out and of their gradients
    int32_t batch;           // B
    int32_t heads;           // Hq
    int32_t kv_heads;        // Hk
    int32_t head_dim;        // D, a multiple of 16
    int32_t q_blocks;        // Nq
    int32_t q_block_offset;  // blocks
    Blocks blocks;
    float scale;            // multiplies q . k
    View q, k, v;           // [B, Hq, Sq, D], [B, Hk, Sk, D], [B, Hk, Sk, D]
    View out;               // [B, Hq, Sq, D]
    float* lse;             // [B, Hq, Sq], natural log
    const uint32_t* bits;   // [B, Hq, Nq, W]; bit j of row i: query block i attends key block j
    int64_t bits_stride_b;  // words, may be 0
    int64_t bits_stride_h;  // words, may be 0
    int32_t threads;
    void* stream;
};

struct AttentionBackwardParams {
    AttentionParams forward;      // out and lse are inputs
    View dout;                    // [B, Hq, Sq, D]
    const float* dlse;            // [B, Hq, Sq]; null for zero
    View dq, dk, dv;              // like q, k, v
    // Workspace: delta = rowsum(dout * out) - dlse. On a CPU, [B, Hq, Sq]. On CUDA, [B, Hq, Nq, 2, 64]:
    // lse * log2(e) and delta of each query block; +inf and 0 past the end of a short one.
    float* delta;
    // Of CUDA only.
    const uint32_t* columns;   // [B, Hq, N, ceil(Nq / 32)], transposed bits, zero past Nq
    int64_t columns_stride_b;  // words, may be 0
    int64_t columns_stride_h;  // words, may be 0
    // Of sm_80 to sm_89: workspace [B, Hq, Nq, 64, D], to which dq is added, in an order that the
    // kernels choose. Null, as it always is on sm_90: dq is summed in one order, and has the same
    // bits each time.
    float* dq_sums;
};

}  // namespace nabla
