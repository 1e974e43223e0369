// What every architecture does before its products of the backward, in whole blocks:
// delta = rowsum(dout * out) - dlse, and lse * log2(e); sums of dq = 0, if there are any.
#pragma once

#include <cmath>

#include "cuda/grid.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/softmax.cuh"
#include "params.h"

namespace nabla::cuda {
namespace {  // an architecture has its own kernels

constexpr int kThreadsOfBlock = 128;

// The weight of a score; lse is in units of log2. It is at most 1, though a score may be rounded to
// more than lse, and NaN for NaN.
NABLA_DEVICE float weight(float score, float scale_log2, float lse) {
    return ptx::exp2(ptx::minimum(score * scale_log2 - lse, 0.0f));
}

// A CTA has one query block.
struct QueryBlock {
    int32_t batch, head;
    BlockRun run;
    int64_t tile;       // among those of all heads
    int64_t first_row;  // of the block in [B, Hq, Sq]

    NABLA_DEVICE explicit QueryBlock(const AttentionParams& p) {
        const int32_t cta = static_cast<int32_t>(ptx::cta_index());
        const int32_t of_all = cta / p.q_blocks;
        head = of_all % p.heads;
        batch = of_all / p.heads;
        const BlockSlice blocks = query_blocks(p);
        run = blocks.run(cta % p.q_blocks);
        tile = cta;
        first_row = static_cast<int64_t>(of_all) * blocks.tokens() + run.first;
    }

    template <class T>
    NABLA_DEVICE T* row(const View& x, int row) const {
        return elements<T>(x, batch, head, run.first + row);
    }
};

template <class T, int kD>
NABLA_KERNEL(kThreadsOfBlock, 8)
attention_prepare_kernel(const NABLA_GRID_CONSTANT AttentionBackwardParams p) {
    constexpr int kLanes = kD / 8;  // that share a row
    const QueryBlock block(p.forward);
    const int thread = static_cast<int>(ptx::thread_index());
    float* rows = p.delta + block.tile * (2 * kBlock);
    NABLA_UNROLL
    for (int first = 0; first < kBlock; first += kThreadsOfBlock / kLanes) {
        const int row = first + thread / kLanes, channel = thread % kLanes * 8;
        float sum = 0;
        if (row < block.run.size) {
            const auto load = [&](const View& x) {
                return ptx::load_global_nc(
                    reinterpret_cast<const ptx::U32x4*>(block.row<const T>(x, row) + channel));
            };
            const ptx::U32x4 dout = load(p.dout), out = load(p.forward.out);
            NABLA_UNROLL
            for (int i = 0; i < 4; ++i) {
                const ptx::F32x2 a = ptx::unpack<T>(dout.v[i]), b = ptx::unpack<T>(out.v[i]);
                sum += a.v[0] * b.v[0] + a.v[1] * b.v[1];
            }
        }
        NABLA_UNROLL
        for (int mask = 1; mask < kLanes; mask *= 2) sum += ptx::shuffle_xor(sum, mask);
        if (channel != 0) continue;
        float lse = INFINITY;
        if (row < block.run.size) {
            lse = ptx::load_global_nc(p.forward.lse + block.first_row + row) * kLog2E;
            if (p.dlse) sum -= ptx::load_global_nc(p.dlse + block.first_row + row);
        }
        ptx::store_global(rows + row, lse);
        ptx::store_global(rows + kBlock + row, sum);
    }
    if (!p.dq_sums) return;
    auto* sums = reinterpret_cast<ptx::F32x4*>(p.dq_sums + block.tile * (kBlock * kD));
    NABLA_UNROLL
    for (int i = 0; i < kBlock * kD / 4 / kThreadsOfBlock; ++i)
        ptx::store_global(sums + i * kThreadsOfBlock + thread, ptx::F32x4{});
}

inline void launch_on_query_blocks(void (*kernel)(AttentionBackwardParams), const char* name,
                                   const AttentionBackwardParams& p) {
    const AttentionParams& f = p.forward;
    const auto blocks = static_cast<uint32_t>(f.batch * f.heads * f.q_blocks);
    ptx::launch(kernel, {name, blocks, kThreadsOfBlock, 0, f.stream}, p);
}

template <class T, int kD>
void launch_prepare(const AttentionBackwardParams& p) {
    launch_on_query_blocks(attention_prepare_kernel<T, kD>, "attention_prepare", p);
}

}  // namespace
}  // namespace nabla::cuda
