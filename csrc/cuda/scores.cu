// mean[n] = mean of x over the tokens of block n: one pass over the tokens, a warp a block.
// scores[i, j] = softmax_j(scale * q_mean[i] . k_mean[j]).
#include "cuda/scores.cuh"

#include "cuda/kernels.h"

namespace nabla::cuda {
namespace {

constexpr int kMeanWarps = 8;
constexpr int kLoadsInFlight = 8;  // of a lane, 16 bytes each: what the memory's latency asks for
constexpr int kChannels = 8;       // of a load

// Sums are of x * kPart, so that those of large tokens do not overflow; a power of 2 rounds nothing.
constexpr float kPart = 1.0f / 128;

template <class T, int kD>
NABLA_KERNEL(32 * kMeanWarps, 4) block_mean_kernel(const NABLA_GRID_CONSTANT BlockMeanParams p) {
    constexpr int kLanes = kD / kChannels;  // that share a token
    constexpr int kTokens = 32 / kLanes;    // of a step
    const uint32_t task = ptx::cta_index() * kMeanWarps + ptx::warp_index();
    const uint32_t head = task / p.x_blocks, n = task % p.x_blocks;
    if (head >= static_cast<uint32_t>(p.batch * p.heads)) return;
    const int lane = ptx::lane_index(), token = lane / kLanes, channel = lane % kLanes * kChannels;

    const BlockRun run = block_run(p.blocks, p.block_offset + n);
    const int64_t first = run.first - block_run(p.blocks, p.block_offset).first;
    const T* x = static_cast<const T*>(p.x.data) + head / p.heads * p.x.stride_b +
                 head % p.heads * p.x.stride_h + (first + token) * p.x.stride_s + channel;
    float sum[kChannels] = {};
    for (int done = 0; done < run.size; done += kLoadsInFlight * kTokens) {
        ptx::U32x4 loaded[kLoadsInFlight];
        NABLA_UNROLL
        for (int i = 0; i < kLoadsInFlight; ++i) {
            const int t = done + i * kTokens;
            loaded[i] = {};
            if (t + token < run.size)
                loaded[i] = ptx::load_global_nc(
                    reinterpret_cast<const ptx::U32x4*>(x + t * p.x.stride_s));
        }
        NABLA_UNROLL
        for (int i = 0; i < kLoadsInFlight; ++i) {
            NABLA_UNROLL
            for (int j = 0; j < kChannels / 2; ++j) {
                const ptx::F32x2 pair = ptx::unpack<T>(loaded[i].v[j]);
                sum[2 * j] += pair.v[0] * kPart;
                sum[2 * j + 1] += pair.v[1] * kPart;
            }
        }
    }
    NABLA_UNROLL
    for (int i = 0; i < kChannels; ++i) {
        NABLA_UNROLL
        for (int mask = kLanes; mask < 32; mask *= 2) sum[i] += ptx::shuffle_xor(sum[i], mask);
    }
    // The lanes of every token have the sum; each stores its part of the channels.
    NABLA_UNROLL
    for (int i = 0; i < kChannels; ++i) {
        if (i / (kChannels / kTokens) != token) continue;
        const float mean = sum[i] / (run.size * kPart);
        const int64_t row = static_cast<int64_t>(head) * kD;
        if (p.mean_stride) ptx::store_global(p.mean + (row + channel + i) * p.mean_stride + n, mean);
        else ptx::store_global(p.mean + row * p.x_blocks + n * kD + channel + i, mean);
    }
}

template <class Config>
NABLA_KERNEL(32 * Config::kWarps, Config::kCtas)
pooled_scores_kernel(const NABLA_GRID_CONSTANT ScoresParams p) {
    const int pitch = row_pitch(p.blocks.count), columns = p.blocks.count;
    const RowMemory memory(ptx::shared_base(), Config::kRows, pitch, p.head_dim);
    compute_logits<Config>(p, RowGroup::of_cta(p, Config{}), memory);
    const auto at = RowGroup::of_cta(p, Config{});  // anew, because logits take all registers
    for (int r = ptx::warp_index(); r < Config::kRows; r += Config::kWarps) {
        if (at.row + r >= p.q_blocks) break;
        const uint32_t smem = memory.scores + r * pitch * 4;
        softmax_row(smem, columns, selectable(p, at.row + r));
        for (int j = ptx::lane_index(); j < columns; j += 32) {
            const float score = ptx::load_shared<float>(smem + j * 4);
            ptx::store_global(p.scores + at.line(p, r) * columns + j,
                              score < 0.0f ? INFINITY : score);
        }
    }
}

}  // namespace

void block_mean(const BlockMeanParams& p) {
    with_type_and_head_dim(p.dtype, p.head_dim, [&](auto type, auto head_dim) {
        const uint32_t warps = static_cast<uint32_t>(p.batch) * p.heads * p.x_blocks;
        const ptx::LaunchShape shape{"block_mean", ceil_div<uint32_t>(warps, kMeanWarps),
                                     32 * kMeanWarps, 0, p.stream};
        ptx::launch(block_mean_kernel<decltype(type), decltype(head_dim)::value>, shape, p);
    });
}

void pooled_scores(const ScoresParams& p) {
    with_row_config("pooled_scores", p, [&](auto config, const ptx::LaunchShape& shape) {
        ptx::launch(pooled_scores_kernel<decltype(config)>, shape, p);
    });
}

}  // namespace nabla::cuda
