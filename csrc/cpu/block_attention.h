// What the forward and the backward pass share: the tokens of query tiles and the kept key tokens.
#pragma once

#include "cpu/bits.h"
#include "cpu/pack.h"

namespace nabla::cpu::NABLA_ISA {

constexpr int kQueryTile = 64;  // most query rows computed together; they lie along the lanes
constexpr int kKeyTile = 64;    // most keys computed together; a multiple of 2

constexpr float kLog2E = 1.44269504f;

// Offset of block i's first token within q, which starts at block q_block_offset.
static inline int64_t query_start(const AttentionParams& p, int block) {
    return p.blocks.starts[p.q_block_offset + block] - p.blocks.starts[p.q_block_offset];
}

static inline const uint32_t* bits_row(const AttentionParams& p, int b, int h, int block) {
    const int words = (p.blocks.count + 31) / 32;
    return p.bits + b * p.bits_stride_b + h * p.bits_stride_h + static_cast<int64_t>(block) * words;
}

// Call visit(first token, tokens, first token of the next tile) for tiles of the kept keys of one
// row within the blocks begin .. end - 1; the last tile is its own next. Neighbouring kept blocks
// are joined: their tokens are contiguous.
template <class Visit>
static inline void for_each_key_tile(const AttentionParams& p, const uint32_t* bits, int begin,
                                     int end, Visit visit) {
    int key = 0, keys = 0;  // the tile that waits for its next
    for_each_run(bits, begin, end, [&](int first, int last) {
        const int stop = p.blocks.starts[last];
        for (int next = p.blocks.starts[first]; next < stop; next += kKeyTile) {
            if (keys) visit(key, keys, next);
            key = next;
            keys = stop - next < kKeyTile ? stop - next : kKeyTile;
        }
    });
    if (keys) visit(key, keys, key);
}

template <class T>
static inline Prefetch prefetch_rows(const T* x, int64_t stride, int n, int dim) {
    const int64_t size = sizeof(T);
    return {x, stride * size, n, static_cast<int>(dim * size)};
}

// Call visit(first token within q, tokens, lanes) for the tiles of query block i.
template <class Visit>
static inline void for_each_query_tile(const AttentionParams& p, int block, Visit visit) {
    const int64_t stop = query_start(p, block + 1);
    for (int64_t row = query_start(p, block); row < stop; row += kQueryTile) {
        const int n = stop - row < kQueryTile ? static_cast<int>(stop - row) : kQueryTile;
        visit(row, n, round_up(n, kLanes));
    }
}

}  // namespace nabla::cpu::NABLA_ISA
