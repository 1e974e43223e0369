// The rows that a CTA of the attention forward computes: those of a group of query blocks.
#pragma once

#include "cuda/block_groups.cuh"
#include "cuda/softmax.cuh"
#include "cuda/union_walk.cuh"

namespace nabla {

// The query blocks of a CTA. Heads are outermost, so that CTAs that run together share keys in L2.
template <int kSize>
struct QueryRows {
    const AttentionParams& p;
    BlockGroups<kSize> groups;
    int32_t batch, head, group;

    NABLA_DEVICE explicit QueryRows(const AttentionParams& params)
        : p(params), groups{p.q_blocks, p.blocks.nh * p.blocks.nw} {
        const int32_t count = groups.count(), cta = static_cast<int32_t>(ptx::cta_index());
        group = cta % count;
        head = cta / count % p.heads;
        batch = cta / count / p.heads;
    }

    // Where a member's rows lie in q and out; none where the group has fewer members.
    NABLA_DEVICE BlockRun run(int member) const {
        const int32_t block = groups.block(group, member);
        return block < 0 ? BlockRun{0, 0} : query_blocks(p).run(block);
    }

    // The key blocks that at least one member keeps, from block 32 * word on.
    NABLA_DEVICE UnionWalk<kSize> walk(int32_t word = 0) const {
        const uint32_t* rows[kSize];
        const int32_t words = (p.blocks.count + 31) / 32;
        const uint32_t* bits = p.bits + batch * p.bits_stride_b + head * p.bits_stride_h;
        NABLA_UNROLL
        for (int r = 0; r < kSize; ++r) {
            const int32_t block = groups.block(group, r);
            rows[r] = block < 0 ? nullptr : bits + static_cast<int64_t>(block) * words;
        }
        return {p.blocks, rows, word};
    }

    NABLA_DEVICE int32_t kv_head() const { return head / (p.heads / p.kv_heads); }

    // out and lse of rows first .. first + 15 of a member, as far as it has them; 0 and -inf of one
    // that has kept nothing. A warp calls it; `out` are unscaled sums in accumulators.
    template <class T, int kCount, bool kKeepsBounds>
    NABLA_DEVICE void store(const BlockRun& run, int first, const float (&out)[kCount],
                            Softmax<kKeepsBounds>& softmax) const {
        softmax.gather_sums();
        float* lse =
            p.lse + (static_cast<int64_t>(batch) * p.heads + head) * query_blocks(p).tokens();
        NABLA_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int in_block = first + static_cast<int>(ptx::lane_index()) / 4 + 8 * r;
            if (in_block >= run.size) continue;
            const int64_t index = run.first + in_block;
            const float sum = softmax.sum(r), factor = sum == 0 ? 0 : ptx::reciprocal(sum);
            store_row(elements<T>(p.out, batch, head, index), out, r, factor);
            if (thread_column() == 0) ptx::store_global(lse + index, softmax.lse(r));
        }
    }
};

}  // namespace nabla
