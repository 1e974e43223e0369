// mean[n] = mean of x over the tokens of block n;  scores[i, j] = softmax_j(scale * q_mean[i] .
// k_mean[j]).
#include "cpu/scores.h"

#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace nabla::cpu::NABLA_ISA {
namespace {

constexpr int kMeanBlocks = 16;  // blocks that one task averages

// Sums of one vector of floats. In double precision equal tokens have equal means, however many of
// them a block has.
struct Sums {
    Doubles halves[2]{};

    void add(Floats x) {
        HalfFloats parts[2];
        std::memcpy(parts, &x, sizeof x);
        for (int i = 0; i < 2; ++i) halves[i] += __builtin_convertvector(parts[i], Doubles);
    }
    Floats over(double n) const {
        HalfFloats parts[2];
        for (int i = 0; i < 2; ++i) parts[i] = __builtin_convertvector(halves[i] / n, HalfFloats);
        return load_raw<Floats>(parts);
    }
};

// Mean of the rows x[0 .. n - 1] of kVectors vectors.
template <int kVectors, class T>
void mean_panel(const T* x, int64_t stride, int n, float* mean, int64_t mean_stride) {
    Sums total[kVectors];
    for (int i = 0; i < n; ++i)
        for (int v = 0; v < kVectors; ++v) total[v].add(load(x + i * stride + v * kWidth));
    for (int v = 0; v < kVectors; ++v) {
        const Floats result = total[v].over(n);
        if (mean_stride == 1) store(mean + v * kWidth, result);
        else
            for (int i = 0; i < kWidth; ++i) mean[(v * kWidth + i) * mean_stride] = result[i];
    }
}

struct RowArrays {
    float* rows;  // [kScoreRows, padded]
    RowArrays(Arena& arena, int padded) : rows(arena.take<float>(kScoreRows * padded)) {}
};

}  // namespace

void block_mean(const BlockMeanParams& p) {
    with_dtype(p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const int groups = (p.x_blocks + kMeanBlocks - 1) / kMeanBlocks;
        const int32_t* starts = p.blocks.starts + p.block_offset;
        parallel_for(
            p.threads, static_cast<int64_t>(p.batch) * p.heads * groups, [&](int64_t task, int) {
                const int64_t h = task / groups % p.heads, b = task / groups / p.heads;
                const int begin = task % groups * kMeanBlocks;
                for (int n = begin; n < p.x_blocks && n < begin + kMeanBlocks; ++n) {
                    const T* x = at<T>(p.x, b, h, starts[n] - starts[0]);
                    const int64_t head = (b * p.heads + h) * p.head_dim;
                    float* mean = p.mean_stride ? p.mean + head * p.mean_stride + n
                                                : p.mean + head * p.x_blocks + n * p.head_dim;
                    const int64_t step = p.mean_stride ? p.mean_stride : 1;
                    for_panels(p.head_dim, [&](auto vectors, int d) {
                        mean_panel<decltype(vectors)::value>(x + d, p.x.stride_s,
                                                             starts[n + 1] - starts[n],
                                                             mean + d * step, step);
                    });
                }
            });
    });
}

void pooled_scores(const ScoresParams& p) {
    const Scratch<RowArrays> scratch(p.threads, p.k_mean_stride);
    for_each_row_group(p, [&](int64_t b, int64_t h, int first, int n, int slot) {
        float* rows = scratch.slot(slot, p.k_mean_stride).rows;
        score_rows(p, b, h, first, n, rows);
        for (int i = 0; i < n; ++i)
            std::memcpy(p.scores + ((b * p.heads + h) * p.q_blocks + first + i) * p.blocks.count,
                        rows + i * p.k_mean_stride, p.blocks.count * sizeof(float));
    });
}

}  // namespace nabla::cpu::NABLA_ISA
