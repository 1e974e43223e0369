// Rows of pooled scores in shared memory, for the stage of that name and for the mask that is built
// in passing.
//
// A CTA computes whole rows, of a few query blocks of one head:
//   logits = scale * q_mean . k_mean   in float32, never TF32: a thread has 4 columns of all rows, so
//                                      that every k_mean comes from L2 once for kRows rows
//   scores = softmax over the finite logits of grid blocks; a warp a row
// What is always kept stands as kAlwaysKept in a row: below every score, and without mass.
#pragma once

#include "cuda/grid.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace nabla::cuda {

constexpr float kAlwaysKept = -1.0f;
constexpr int kColumns = 4;         // of a thread
constexpr int kChannelsAtOnce = 4;  // loads in flight: of all warps, they hide the latency of L2

template <int kRows_, int kWarps_, int kCtas_>
struct RowConfig {
    static constexpr int kRows = kRows_;
    static constexpr int kWarps = kWarps_;
    static constexpr int kCtas = kCtas_;  // of a multiprocessor
};

// Rows begin at multiples of 32 columns, so that a word of bits is one step of a warp.
NABLA_HOST_DEVICE int32_t row_pitch(int32_t blocks) { return (blocks + 31) / 32 * 32; }

// Shared addresses of a CTA's arrays, and the bytes of all.
struct RowMemory {
    uint32_t scores;      // [kRows, pitch] floats
    uint32_t words;       // [kRows, pitch / 32] words of bits
    uint32_t candidates;  // [kRows, 32] columns
    uint32_t q_mean;      // [D, kRows] floats
    uint32_t bytes;

    NABLA_HOST_DEVICE RowMemory(uint32_t base, int rows, int pitch, int head_dim)
        : scores(base),
          words(scores + rows * pitch * 4),
          candidates(words + rows * pitch / 8),
          q_mean(candidates + rows * 128),
          bytes(q_mean + rows * head_dim * 4 - base) {}
};

// Which rows a CTA computes: those of query blocks row .. row + kRows - 1 of head h.
struct RowGroup {
    int32_t b, h, row;

    template <class Config>
    static NABLA_DEVICE RowGroup of_cta(const ScoresParams& p, Config) {
        const uint32_t groups = (p.q_blocks + Config::kRows - 1) / Config::kRows;
        const uint32_t head = ptx::cta_index() / groups, group = ptx::cta_index() % groups;
        return {static_cast<int32_t>(head / p.heads), static_cast<int32_t>(head % p.heads),
                static_cast<int32_t>(group * Config::kRows)};
    }
    NABLA_DEVICE int64_t line(const ScoresParams& p, int r) const {  // of [B, Hq, Nq]
        return (static_cast<int64_t>(b) * p.heads + h) * p.q_blocks + row + r;
    }
};

// Selectable columns of a row: none in those of extra tokens, which keep everything.
NABLA_DEVICE int32_t selectable(const ScoresParams& p, int32_t row) {
    return p.q_block_offset + row < p.blocks.grid_count ? p.blocks.grid_count : 0;
}

// The logits of all rows of a CTA, into its scores. Every thread of the CTA calls it.
template <class Config>
NABLA_DEVICE void compute_logits(const ScoresParams& p, const RowGroup& at, const RowMemory& memory) {
    constexpr int kRows = Config::kRows, kThreads = 32 * Config::kWarps;
    const float* q_mean = p.q_mean + at.line(p, 0) * p.head_dim;
    for (int i = ptx::thread_index(); i < kRows * p.head_dim; i += kThreads) {
        const int r = i / p.head_dim, d = i % p.head_dim;
        const float q = at.row + r < p.q_blocks ? ptx::load_global_nc(q_mean + i) : 0.0f;
        ptx::store_shared(memory.q_mean + (d * kRows + r) * 4, q);
    }
    ptx::sync_cta();  // q_mean is there

    const int pitch = row_pitch(p.blocks.count), kv_head = at.h / (p.heads / p.kv_heads);
    const float* k_mean = p.k_mean + (static_cast<int64_t>(at.b) * p.kv_heads + kv_head) *
                                         p.head_dim * p.k_mean_stride;
    for (int column = ptx::thread_index() * kColumns; column < pitch; column += kThreads * kColumns) {
        float sum[kRows][kColumns] = {};
        NABLA_NO_UNROLL
        for (int first = 0; first < p.head_dim; first += kChannelsAtOnce) {
            ptx::F32x4 k[kChannelsAtOnce];
            NABLA_UNROLL
            for (int i = 0; i < kChannelsAtOnce; ++i)
                k[i] = ptx::load_global_nc(reinterpret_cast<const ptx::F32x4*>(
                    k_mean + static_cast<int64_t>(first + i) * p.k_mean_stride + column));
            NABLA_UNROLL
            for (int i = 0; i < kChannelsAtOnce; ++i) {
                const uint32_t q_smem = memory.q_mean + (first + i) * kRows * 4;
                constexpr int kAtOnce = kRows % 4 == 0 ? 4 : 1;
                NABLA_UNROLL
                for (int r = 0; r < kRows; r += kAtOnce) {
                    float q[kAtOnce];
                    if constexpr (kAtOnce == 4) {
                        const auto q4 = ptx::load_shared<ptx::F32x4>(q_smem + r * 4);
                        NABLA_UNROLL
                        for (int j = 0; j < 4; ++j) q[j] = q4.v[j];
                    } else {
                        q[0] = ptx::load_shared<float>(q_smem + r * 4);
                    }
                    NABLA_UNROLL
                    for (int j = 0; j < kAtOnce; ++j) {
                        NABLA_UNROLL
                        for (int c = 0; c < kColumns; ++c) sum[r + j][c] += q[j] * k[i].v[c];
                    }
                }
            }
        }
        NABLA_UNROLL
        for (int r = 0; r < kRows; ++r) {
            ptx::F32x4 logits;
            NABLA_UNROLL
            for (int c = 0; c < kColumns; ++c) logits.v[c] = sum[r][c] * p.scale;
            ptx::store_shared(memory.scores + (r * pitch + column) * 4, logits);
        }
    }
    ptx::sync_cta();  // the logits of all columns are there
}

NABLA_DEVICE bool is_finite(float x) { return x - x == 0.0f; }

NABLA_DEVICE float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x += ptx::shuffle_xor(x, mask);
    return x;
}
NABLA_DEVICE float warp_max(float x) {
    for (int mask = 16; mask > 0; mask /= 2) {
        const float other = ptx::shuffle_xor(x, mask);
        x = other > x ? other : x;
    }
    return x;
}

// Turn the logits of one row into scores. A warp calls it; a lane touches its own columns only.
NABLA_DEVICE void softmax_row(uint32_t row_smem, int32_t columns, int32_t selectable) {
    const int lane = ptx::lane_index();
    float top = -INFINITY;
    for (int j = lane; j < selectable; j += 32) {
        const float x = ptx::load_shared<float>(row_smem + j * 4);
        if (is_finite(x) && x > top) top = x;
    }
    top = warp_max(top);
    float sum = 0.0f;
    for (int j = lane; j < columns; j += 32) {
        const float x = ptx::load_shared<float>(row_smem + j * 4);
        float score = kAlwaysKept;
        if (j < selectable && is_finite(x)) {
            score = ptx::exp2((x - top) * 1.44269504f);
            sum += score;
        }
        ptx::store_shared(row_smem + j * 4, score);
    }
    const float factor = 1.0f / warp_sum(sum);
    for (int j = lane; j < selectable; j += 32) {
        const float score = ptx::load_shared<float>(row_smem + j * 4);
        if (score >= 0.0f) ptx::store_shared(row_smem + j * 4, score * factor);
    }
}

// Launch with(Config{}), the one that holds as many rows as fit: more rows read k_mean less often.
template <class With>
void with_row_config(const char* name, const ScoresParams& p, With with) {
    const uint32_t shared = ptx::max_shared_bytes(), shared_of_two = shared / 2 - 1024;
    const auto bytes = [&](int rows) {
        return RowMemory(0, rows, row_pitch(p.blocks.count), p.head_dim).bytes;
    };
    const auto launch = [&](auto config) {
        using Config = decltype(config);
        const uint32_t groups = ceil_div(p.q_blocks, Config::kRows);
        with(config, ptx::LaunchShape{name, p.batch * p.heads * groups, 32 * Config::kWarps,
                                      bytes(Config::kRows), p.stream});
    };
    if (bytes(16) <= shared_of_two) return launch(RowConfig<16, 8, 2>{});
    if (bytes(16) <= shared) return launch(RowConfig<16, 16, 1>{});
    if (bytes(12) <= shared) return launch(RowConfig<12, 16, 1>{});
    if (bytes(8) <= shared) return launch(RowConfig<8, 16, 1>{});
    if (bytes(4) <= shared) return launch(RowConfig<4, 16, 1>{});
    if (bytes(1) <= shared) return launch(RowConfig<1, 16, 1>{});
    throw std::invalid_argument("a row of " + std::to_string(p.blocks.count) +
                                " blocks does not fit into shared memory: the triton backend takes it");
}

}  // namespace nabla::cuda
