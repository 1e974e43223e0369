// Rows of pooled scores, for the stage of that name and for the mask that is built in passing.
#pragma once

#include "cpu/gemm.h"
#include "cpu/thread_pool.h"

namespace nabla::cpu::NABLA_ISA {

constexpr int kScoreRows = 12;  // query blocks whose logits are computed together

static inline Ints is_finite(Floats x) { return x - x == 0; }

// Turn the logits of one row into scores: entries `count` .. padded - 1 and those not finite become
// +inf.
static inline void softmax_row(float* row, int count, int padded, float scale) {
    for (int j = count; j < padded; ++j) row[j] = kInfinity;
    Floats top = splat(-kInfinity), total{};
    for (int j = 0; j < padded; j += kWidth) {
        const Floats x = load(row + j) * scale;
        top = max(top, is_finite(x) ? x : splat(-kInfinity));
        store(row + j, x);
    }
    for (int i = 1; i < kWidth; ++i) top[0] = top[0] > top[i] ? top[0] : top[i];
    top = splat(top[0]);
    for (int j = 0; j < padded; j += kWidth) {
        const Floats x = load(row + j);
        const Floats e = is_finite(x) ? exp2((x - top) * 1.44269504f) : splat(kInfinity);
        total += is_finite(x) ? e : Floats{};
        store(row + j, e);
    }
    const Floats sum_of_all = splat(sum(total));
    for (int j = 0; j < padded; j += kWidth) store(row + j, load(row + j) / sum_of_all);
}

// Scores of n <= kScoreRows query blocks from `first` on, into rows of k_mean_stride elements.
static inline void score_rows(const ScoresParams& p, int b, int h, int first, int n, float* rows) {
    const int kv_head = h / (p.heads / p.kv_heads), padded = p.k_mean_stride;
    const float* q =
        p.q_mean + ((static_cast<int64_t>(b) * p.heads + h) * p.q_blocks + first) * p.head_dim;
    const float* k =
        p.k_mean + (static_cast<int64_t>(b) * p.kv_heads + kv_head) * p.head_dim * padded;
    multiply<Layout::kRows, Update::kStore>(FloatDot{}, n, padded, p.head_dim, q, p.head_dim, k,
                                            padded, rows, padded);
    for (int i = 0; i < n; ++i) {
        const bool is_extra = p.q_block_offset + first + i >= p.blocks.grid_count;
        softmax_row(rows + i * padded, is_extra ? 0 : p.blocks.grid_count, padded, p.scale);
    }
}

// Call visit(b, h, first, n, slot) for groups of up to kScoreRows query blocks, in parallel.
template <class Visit>
static inline void for_each_row_group(const ScoresParams& p, Visit visit) {
    const int groups = (p.q_blocks + kScoreRows - 1) / kScoreRows;
    parallel_for(p.threads, static_cast<int64_t>(p.batch) * p.heads * groups,
                 [&](int64_t task, int slot) {
                     const int first = task % groups * kScoreRows, left = p.q_blocks - first;
                     visit(task / groups / p.heads, task / groups % p.heads, first,
                           left < kScoreRows ? left : kScoreRows, slot);
                 });
}

}  // namespace nabla::cpu::NABLA_ISA
