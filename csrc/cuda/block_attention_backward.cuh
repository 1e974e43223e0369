// What every architecture does before and after its products of the backward.
//
//   prepare   delta = rowsum(dout * out) - dlse and lse * log2(e), of whole blocks; sums of dq = 0
//   finish    dq = scale * sums
//
// The sums of a block [64, D] lie as 128 threads hold them in accumulators of mma and wgmma: values
// 4 i to 4 i + 3 of thread t belong to columns c, c + 1, c, c + 1 of rows r, r, r + 8, r + 8, where
// c = 8 i + 2 (t % 4) and r = 16 (t / 32) + t % 32 / 4. SumOrder tells which of them lie together.
#pragma once

#include <cmath>

#include "cuda/grid.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/softmax.cuh"
#include "params.h"

namespace nabla::cuda {
namespace {  // an architecture has its own kernels

enum class SumOrder {
    kByThread,  // float4 128 i + t: the 4 values of a thread, for copies of 16 bytes
    kByValue,   // float 128 (4 i + n) + t: a value of 128 threads, for adds of one a thread
};

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

// A thread takes 8 channels of two rows, which four threads summed.
template <class T, int kD, SumOrder kOrder>
NABLA_KERNEL(kThreadsOfBlock, 6)
attention_finish_kernel(const NABLA_GRID_CONSTANT AttentionBackwardParams p) {
    const QueryBlock block(p.forward);
    const float scale = p.forward.scale;
    const auto* sums =
        reinterpret_cast<const ptx::F32x4*>(p.dq_sums + block.tile * (kBlock * kD));
    NABLA_UNROLL
    for (int first = 0; first < kBlock / 2 * kD / 8; first += kThreadsOfBlock) {
        const int unit = first + static_cast<int>(ptx::thread_index());
        const int i = unit % (kD / 8), quad = unit / (kD / 8);
        constexpr bool kByThread = kOrder == SumOrder::kByThread;
        ptx::F32x4 x[4];  // of four threads, or of each of four values
        NABLA_UNROLL
        for (int n = 0; n < 4; ++n)
            x[n] = ptx::load_global_nc(sums + (kByThread
                                                   ? i * kThreadsOfBlock + 4 * quad + n
                                                   : (4 * i + n) * (kThreadsOfBlock / 4) + quad));
        ptx::U32x4 packed[2];
        NABLA_UNROLL
        for (int lane = 0; lane < 4; ++lane) {
            const auto value = [&](int n) {
                return scale * (kByThread ? x[lane].v[n] : x[n].v[lane]);
            };
            packed[0].v[lane] = ptx::pack<T>(value(0), value(1));
            packed[1].v[lane] = ptx::pack<T>(value(2), value(3));
        }
        NABLA_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int row = quad / 8 * 16 + quad % 8 + 8 * r;
            if (row < block.run.size)
                ptx::store_global(reinterpret_cast<ptx::U32x4*>(block.row<T>(p.dq, row) + 8 * i),
                                  packed[r]);
        }
    }
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

template <class T, int kD, SumOrder kOrder>
void launch_finish(const AttentionBackwardParams& p) {
    launch_on_query_blocks(attention_finish_kernel<T, kD, kOrder>, "attention_finish", p);
}

}  // namespace
}  // namespace nabla::cuda
