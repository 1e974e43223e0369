// Gradients of block_attention.cu over the kept blocks:
//
//   P = exp(scale q k^T - lse)   dP = dout v^T   dS = P * (dP - delta)
//   dv = P^T dout                dk = scale dS^T q                       dq = scale dS k
//
// A CTA owns two blocks, one per consumer warpgroup, and walks the union of the blocks that meet
// them, which a producer warp loads once for both. Passes over the mask:
//
//   kKeys            owns k and v, walks the columns of the mask with q and dout: dk and dv
//   kKeysAndQueries  and dq, added to sums in global memory in the order in which CTAs get there
//   kQueries         owns q and dout, walks the rows of the mask with k and v: dq
//
// The second alone is fast, the first and the last are deterministic. A pass over keys takes the
// query heads of a key head one after the other, so that dk and dv are sums of one order always.
// It computes P^T and dS^T, rows of which are keys: they stay in registers for dv and dk, and dS^T
// passes through shared memory for dq only.
#include "cuda/block_attention_backward.cuh"

#include "cuda/block_groups.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/sm90/rings.cuh"
#include "cuda/sm90/tiles.cuh"
#include "cuda/tensor_map.h"
#include "cuda/union_walk.cuh"

namespace nabla::sm90 {
namespace {

constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536,
              "an SM has 65,536 registers");

enum class Pass { kKeys, kKeysAndQueries, kQueries };

template <class T, int kD, Pass kPass>
struct Config {
    using Element = T;
    static constexpr int kHeadDim = kD;
    static constexpr bool kByKey = kPass != Pass::kQueries;
    static constexpr bool kAddsQueries = kPass == Pass::kKeysAndQueries;
    static constexpr int kPanels = kD / cuda::kPanel;
    static constexpr int kTileBytes = kPanels * kPanelBytes;
    static constexpr int kRowBytes = kByKey ? 2 * kBlock * 4 : 0;  // lse and delta of q
    static constexpr int kStages = kD == 64 ? 8 : 3;
    using Ring = PairRing<kStages, kTileBytes, kRowBytes>;

    // Of a consumer: its two tiles, and what it adds to dq, which begins with dS^T.
    static constexpr int kSumBytes = kAddsQueries ? kBlock * kD * 4 : 0;
    static constexpr int kOwnBytes = 2 * kTileBytes + kSumBytes;
    static constexpr int kSharedBytes = kConsumers * kOwnBytes + Ring::kBytes;
    static_assert(kSharedBytes <= 232448, "a CTA has 227 KiB of shared memory");
};

struct BackwardParams {
    AttentionBackwardParams backward;
    cuda::BoxedTensor walked[2];  // q and dout, or k and v
};

// What a CTA owns: blocks of a key head, or of a query head. Heads are outermost, so that CTAs that
// run together share in L2 what they walk.
template <bool kByKey>
struct Group {
    BlockGroups<kConsumers> groups;
    int32_t batch, head, group;

    NABLA_DEVICE explicit Group(const AttentionParams& p)
        : groups{owned_count(p), p.blocks.nh * p.blocks.nw} {
        const int32_t count = groups.count(), cta = static_cast<int32_t>(ptx::cta_index());
        const int32_t heads = kByKey ? p.kv_heads : p.heads;
        group = cta % count;
        head = cta / count % heads;
        batch = cta / count / heads;
    }

    NABLA_HOST_DEVICE static int32_t owned_count(const AttentionParams& p) {
        return kByKey ? p.blocks.count : p.q_blocks;
    }
    NABLA_HOST_DEVICE static BlockSlice owned(const AttentionParams& p) {
        return kByKey ? BlockSlice(p.blocks) : query_blocks(p);
    }
    NABLA_HOST_DEVICE static BlockSlice walked(const AttentionParams& p) {
        return kByKey ? query_blocks(p) : BlockSlice(p.blocks);
    }

    NABLA_DEVICE int32_t block(int member) const { return groups.block(group, member); }
};

// ---- the producer's warpgroup ----

// Calls visit(at, kept, query head) for the blocks of the CTA's walk, in the order of the stages;
// returns the stage behind them.
template <class Config, class Visit>
NABLA_DEVICE Position walk_blocks(const AttentionBackwardParams& p,
                                  const Group<Config::kByKey>& group, Visit visit) {
    const AttentionParams& f = p.forward;
    const auto blocks = Group<Config::kByKey>::walked(f);
    const int32_t words = (blocks.count() + 31) / 32;
    const int32_t heads = Config::kByKey ? f.heads / f.kv_heads : 1;
    Position at;
    for (int32_t h = group.head * heads; h < (group.head + 1) * heads; ++h) {
        const uint32_t* head =
            Config::kByKey ? p.columns + group.batch * p.columns_stride_b + h * p.columns_stride_h
                           : f.bits + group.batch * f.bits_stride_b + h * f.bits_stride_h;
        const uint32_t* rows[kConsumers];
        NABLA_UNROLL
        for (int r = 0; r < kConsumers; ++r) {
            const int32_t block = group.block(r);
            rows[r] = block < 0 ? nullptr : head + static_cast<int64_t>(block) * words;
        }
        UnionWalk<kConsumers> walk(blocks, rows);
        for (KeptBlock kept; walk.next(kept); at.advance<Config::kStages>()) visit(at, kept, h);
    }
    return at;
}

// Fills the ring with the blocks of the walk, and tells where it ends.
template <class Config>
NABLA_DEVICE void produce(const BackwardParams& params, const typename Config::Ring& ring) {
    const AttentionBackwardParams& p = params.backward;
    const Group<Config::kByKey> group(p.forward);
    const bool leads = ptx::elect_one();
    const auto fill = [&](const Position& at, const KeptBlock& kept, int32_t q_head) {
        if (!leads) return;
        const int32_t head =
            Config::kByKey ? q_head : q_head / (p.forward.heads / p.forward.kv_heads);
        const uint32_t tile = static_cast<uint32_t>(
            (group.batch * p.forward.heads + q_head) * p.forward.q_blocks + kept.index);
        ptx::mbarrier_wait(ring.empty(at),
                           at.parity() ^ 1);  // the last round's tiles have been read
        ptx::store_shared(ring.stage(at), ptx::U32x2{{Stage(at, kept).bits(), tile}});
        const uint32_t barrier = kept.run.size < kBlock ? ring.landed(at) : ring.full(at);
        ptx::mbarrier_arrive_expect_tx(barrier, 2 * Config::kTileBytes + Config::kRowBytes);
        NABLA_UNROLL
        for (int which = 0; which < 2; ++which)
            copy_tile<Config::kPanels>(ring.tile(which, at), params.walked[which], barrier,
                                       kept.run.first, head, group.batch);
        if constexpr (Config::kByKey)
            ptx::copy_bulk(ring.rows(at), p.delta + static_cast<int64_t>(tile) * (2 * kBlock),
                           Config::kRowBytes, barrier);
    };
    const Position end = walk_blocks<Config>(p, group, fill);
    if (!leads) return;
    ptx::mbarrier_wait(ring.empty(end), end.parity() ^ 1);  // the last round's words have been read
    ptx::store_shared(ring.stage(end), ptx::U32x2{{Stage::end(end).bits(), 0}});
    ptx::mbarrier_arrive(ring.full(end));
}

// Zeroes what lies behind the end of short blocks, because a weight of 0 does not hide a NaN of the
// next block.
template <class Config>
NABLA_DEVICE void zero_tails(const AttentionBackwardParams& p, const typename Config::Ring& ring) {
    const Group<Config::kByKey> group(p.forward);
    const bool leads = ptx::elect_one();
    uint32_t parities = 0;  // bit s: of the phase in which slot s gets its next short block
    walk_blocks<Config>(p, group, [&](const Position& at, const KeptBlock& kept, int32_t) {
        if (kept.run.size == kBlock) return;
        ptx::mbarrier_wait(ring.landed(at), parities >> at.slot() & 1);  // all has landed
        parities ^= 1u << at.slot();
        NABLA_UNROLL
        for (int which = 0; which < 2; ++which)
            zero_tail<Config::kPanels>(ring.tile(which, at), kept.run.size);
        ptx::fence_proxy_async();  // wgmma sees the zeros,
        ptx::sync_warp();          // those of all lanes
        if (leads) ptx::mbarrier_arrive(ring.full(at));
    });
}

// ---- consumers ----

// The gradients of one block, over all stages of the walk.
template <class Config>
class Consumer {
    using T = typename Config::Element;
    using Ring = typename Config::Ring;
    static constexpr int kD = Config::kHeadDim;
    static constexpr bool kByKey = Config::kByKey;

  public:
    NABLA_DEVICE Consumer(const AttentionBackwardParams& p, const Ring& ring, uint32_t own,
                          int index)
        : p_(p),
          ring_(ring),
          own_(own),
          index_(index),
          barrier_(1 + index),
          leads_(ptx::elect_one()),
          scale_log2_(p.forward.scale * kLog2E) {}

    NABLA_DEVICE void run() {
        const AttentionParams& f = p_.forward;
        const Group<kByKey> group(f);
        const int32_t block = group.block(index_);
        const BlockRun rows = block < 0 ? BlockRun{0, 0} : Group<kByKey>::owned(f).run(block);
        size_ = rows.size;
        load_tile(own_, kByKey ? f.k : f.q, group, rows);
        load_tile(own_ + Config::kTileBytes, kByKey ? f.v : p_.dout, group, rows);
        if constexpr (!kByKey) load_rows(group, block);
        ptx::fence_proxy_async();                 // wgmma sees the tiles,
        ptx::barrier_sync(barrier_, kWarpgroup);  // those of all warps
        while (find()) differentiate();
        if (Config::kAddsQueries && adds()) ptx::bulk_wait_read<0>();  // shared memory is left
        store(kByKey ? p_.dk : p_.dq, first_, f.scale, group, rows);
        if constexpr (kByKey) store(p_.dv, second_, 1.0f, group, rows);
    }

  private:
    // One thread of the warpgroup adds to dq, and knows what has been read for that.
    NABLA_DEVICE bool adds() const { return ptx::warp_index() % 4 == 0 && leads_; }

    // ---- the walk ----

    // Looks for the next block that meets this one, and passes on those of others.
    NABLA_DEVICE bool find() {
        while (true) {
            ptx::mbarrier_wait(ring_.full(look_), look_.parity());  // the stage is there
            const auto words = ptx::load_shared<ptx::U32x2>(ring_.stage(look_));
            ptx::sync_warp();  // all lanes have read the words: one may release the stage for all
            found_ = Stage(ptx::shuffle(words.v[0], 0));
            found_tile_ = ptx::shuffle(words.v[1], 0);
            if (found_.is_end()) return false;
            look_.advance<Config::kStages>();
            if (found_.has_member(index_)) return true;
            if (leads_) ptx::mbarrier_arrive(ring_.empty(found_.at()));
        }
    }

    // ---- the blocks ----

    // product = own tile * tile of the walk^T
    NABLA_DEVICE void multiply(float (&product)[kScores], int which) {
        const uint64_t a = ptx::matrix_descriptor(own_ + which * Config::kTileBytes, 0, 1024);
        const uint64_t b = ptx::matrix_descriptor(ring_.tile(which, found_.at()), 0, 1024);
        ptx::wgmma_fence();  // what the product was before is read
        NABLA_UNROLL
        for (int c = 0; c < kD / 16; ++c)
            ptx::wgmma_ss<T, kBlock, false, false>(product, a + channel_chunk(c),
                                                   b + channel_chunk(c), c > 0);
        ptx::wgmma_commit();
    }

    // sum += factors * tile of the walk
    NABLA_DEVICE void accumulate(float (&sum)[kD / 2], const uint32_t (&factors)[kBlock / 16][4],
                                 int which) {
        const uint64_t tile =
            ptx::matrix_descriptor(ring_.tile(which, found_.at()), kPanelBytes, 1024);
        ptx::keep_in_place(sum);
        ptx::wgmma_fence();  // factors and sum have been written
        NABLA_UNROLL
        for (int c = 0; c < kBlock / 16; ++c)  // 16 rows each
            ptx::wgmma_rs<T, kD, true>(sum, factors[c], tile + row_chunk(c), true);
        ptx::wgmma_commit();
    }

    // Adds what the block found contributes.
    NABLA_DEVICE void differentiate() {
        float weights[kScores], ds[kScores];
        uint32_t factors[2][kBlock / 16][4];
        multiply(weights, 0);
        multiply(ds, 1);
        if (Config::kAddsQueries && adds())
            ptx::bulk_wait_read<0>();  // the last sums are on their way
        ptx::wgmma_wait<1>();          // the scores are there
        weigh(weights);
        if constexpr (kByKey) {
            as_operand_a<T>(factors[1], weights);
            accumulate(second_, factors[1], 1);
            ptx::wgmma_wait<1>();  // dP is there
        } else {
            ptx::wgmma_wait<0>();  // dP is there
        }
        ptx::keep_in_place(ds);
        for_each_value(1, [&](int i, float delta) { ds[i] = weights[i] * (ds[i] - delta); });
        as_operand_a<T>(factors[0], ds);
        accumulate(first_, factors[0], 0);
        if constexpr (Config::kAddsQueries) {
            add_queries(factors[0]);
        } else {
            ptx::sync_warp();  // all lanes have read the values of rows
            release();
        }
    }

    // Products become weights.
    NABLA_DEVICE void weigh(float (&weights)[kScores]) {
        ptx::keep_in_place(weights);
        for_each_value(0, [&](int i, float lse) {
            weights[i] = cuda::weight(weights[i], scale_log2_, lse);
        });
        if constexpr (kByKey) {
            if (size_ == kBlock) return;
            NABLA_UNROLL
            for (int i = 0; i < kScores; ++i)
                if (thread_row(row_of(i)) >= size_) weights[i] = 0;
        } else {
            if (found_.size() == kBlock) return;
            NABLA_UNROLL
            for (int i = 0; i < kScores; ++i)
                if (8 * (i / 4) + thread_column() + i % 2 >= found_.size()) weights[i] = 0;
        }
    }

    // Calls visit(i, lse * log2(e) or delta of its query) for accumulators i.
    template <class Visit>
    NABLA_DEVICE void for_each_value(int which, Visit visit) const {
        const uint32_t rows = ring_.rows(found_.at()) + (which * kBlock + thread_column()) * 4;
        NABLA_UNROLL
        for (int first = 0; first < kScores; first += 4) {
            ptx::F32x2 values;  // of two queries: columns of dS^T, or rows of dS
            if constexpr (kByKey) values = ptx::load_shared<ptx::F32x2>(rows + 2 * 4 * first);
            else values = rows_[which];
            NABLA_UNROLL
            for (int i = first; i < first + 4; ++i) visit(i, values.v[kByKey ? i % 2 : row_of(i)]);
        }
    }

    // Waits for the products with tiles of the stage, which may then be overwritten.
    NABLA_DEVICE void release() {
        ptx::wgmma_wait<0>();  // dk and dv, or dq, have been added
        ptx::keep_in_place(first_);
        if constexpr (kByKey) ptx::keep_in_place(second_);
        if (leads_) ptx::mbarrier_arrive(ring_.empty(found_.at()));
    }

    // dq += dS k of the block found. dS^T goes through shared memory, and so do the sums.
    NABLA_DEVICE void add_queries(const uint32_t (&ds)[kBlock / 16][4]) {
        const uint32_t sums_smem = own_ + 2 * Config::kTileBytes;
        ptx::barrier_sync(barrier_, kWarpgroup);  // the last sums have been read
        const int lane = static_cast<int>(ptx::lane_index());
        const int row = static_cast<int>(ptx::warp_index() % 4 * 16) + lane % 16;
        NABLA_UNROLL
        for (int c = 0; c < kBlock / 16; ++c)
            ptx::stmatrix_x4(piece_of_tile(sums_smem, row, 2 * c + lane / 16), ds[c]);
        ptx::fence_proxy_async();                 // wgmma sees dS^T,
        ptx::barrier_sync(barrier_, kWarpgroup);  // that of all warps
        release();                                // and leaves registers for the sums

        float sums[kD / 2];
        const uint64_t a = ptx::matrix_descriptor(sums_smem, kPanelBytes, 1024);
        const uint64_t b = ptx::matrix_descriptor(own_, kPanelBytes, 1024);
        ptx::wgmma_fence();  // what the sums were before is read
        NABLA_UNROLL
        for (int c = 0; c < kBlock / 16; ++c)  // 16 keys each
            ptx::wgmma_ss<T, kD, true, true>(sums, a + row_chunk(c), b + row_chunk(c), c > 0);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();  // the sums are there
        ptx::keep_in_place(sums);
        ptx::barrier_sync(barrier_, kWarpgroup);  // all warps have read dS^T
        const uint32_t thread = ptx::thread_index() % kWarpgroup;
        NABLA_UNROLL
        for (int i = 0; i < kD / 2; i += 4)
            ptx::store_shared(sums_smem + (i / 4 * kWarpgroup + thread) * 16,
                              ptx::F32x4{{sums[i], sums[i + 1], sums[i + 2], sums[i + 3]}});
        ptx::fence_proxy_async();                 // the copy sees the sums,
        ptx::barrier_sync(barrier_, kWarpgroup);  // those of all threads
        if (!adds()) return;
        ptx::bulk_reduce_add_f32(p_.dq_sums + static_cast<int64_t>(found_tile_) * (kBlock * kD),
                                 sums_smem, Config::kSumBytes);
        ptx::bulk_commit();
    }

    // ---- global memory ----

    // A tile of the block into shared memory; zeros behind the end of a short one.
    NABLA_DEVICE void load_tile(uint32_t tile, const View& x, const Group<kByKey>& group,
                                const BlockRun& rows) const {
        constexpr int kPieces = kD / 8;  // of a row, 16 bytes each
        const int thread = static_cast<int>(ptx::thread_index() % kWarpgroup);
        NABLA_UNROLL
        for (int i = thread; i < kBlock * kPieces; i += kWarpgroup) {
            const int row = i / kPieces, piece = i % kPieces;
            ptx::U32x4 loaded{};
            if (row < rows.size)
                loaded = ptx::load_global_nc(reinterpret_cast<const ptx::U32x4*>(
                    elements<const T>(x, group.batch, group.head, rows.first + row) + 8 * piece));
            ptx::store_shared(piece_of_tile(tile, row, piece), loaded);
        }
    }

    // lse and delta of the thread's two rows of a query block.
    NABLA_DEVICE void load_rows(const Group<kByKey>& group, int32_t block) {
        if (block < 0) return;
        const AttentionParams& f = p_.forward;
        const int64_t head = static_cast<int64_t>(group.batch) * f.heads + group.head;
        const float* rows = p_.delta + (head * f.q_blocks + block) * (2 * kBlock);
        NABLA_UNROLL
        for (int r = 0; r < 2; ++r) {
            rows_[0].v[r] = ptx::load_global_nc(rows + thread_row(r));
            rows_[1].v[r] = ptx::load_global_nc(rows + kBlock + thread_row(r));
        }
    }

    // A gradient, of the rows there are.
    NABLA_DEVICE void store(const View& x, const float (&sum)[kD / 2], float factor,
                            const Group<kByKey>& group, const BlockRun& rows) const {
        NABLA_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int row = thread_row(r);
            if (row >= rows.size) continue;
            store_row(elements<T>(x, group.batch, group.head, rows.first + row), sum, r, factor);
        }
    }

    const AttentionBackwardParams& p_;
    const Ring ring_;
    const uint32_t own_;  // shared address of the tiles of the block, and of the sums of dq
    const int index_;
    const int barrier_;  // of the warpgroup
    const bool leads_;
    const float scale_log2_;
    int size_;  // tokens of the block

    Position look_;        // where to look next
    Stage found_;          // what was found there last
    uint32_t found_tile_;  // of q

    ptx::F32x2 rows_[2];                      // lse and delta of a query block
    float first_[kD / 2] = {};                // dk or dq, without the scale
    float second_[kByKey ? kD / 2 : 1] = {};  // dv
};

// ---- kernel ----

template <class Config>
NABLA_KERNEL(kThreads, 1)
attention_backward_kernel(const NABLA_GRID_CONSTANT BackwardParams params) {
    const uint32_t own = ptx::shared_base();
    const typename Config::Ring ring(own + kConsumers * Config::kOwnBytes);
    const int warp = ptx::warp_index(), warpgroup = warp / 4;
    if (warp == 0 && ptx::elect_one()) ring.init_barriers(kConsumers * kWarpgroup / 32);
    ptx::sync_cta();  // the barriers are there

    const AttentionBackwardParams& p = params.backward;
    if (warpgroup < kConsumers) {
        ptx::set_max_registers_up<kConsumerRegisters>();
        Consumer<Config>(p, ring, own + warpgroup * Config::kOwnBytes, warpgroup).run();
    } else {
        ptx::set_max_registers_down<kProducerRegisters>();
        if (warp % 4 == 0) produce<Config>(params, ring);
        if (warp % 4 == 1 && has_short_blocks(p.forward.blocks.grid)) zero_tails<Config>(p, ring);
    }
}

template <class Config>
void launch_backward(const AttentionBackwardParams& p) {
    constexpr bool kByKey = Config::kByKey;
    const AttentionParams& f = p.forward;
    const cuda::Extents extents = {f.batch, kByKey ? f.heads : f.kv_heads,
                                   Group<kByKey>::walked(f).tokens(), f.head_dim};
    const BackwardParams params = {p,
                                   {cuda::boxed_tensor(kByKey ? f.q : f.k, extents, kBlock),
                                    cuda::boxed_tensor(kByKey ? p.dout : f.v, extents, kBlock)}};
    const BlockGroups<kConsumers> groups = {Group<kByKey>::owned_count(f),
                                            f.blocks.nh * f.blocks.nw};
    const auto ctas =
        static_cast<uint32_t>(f.batch * (kByKey ? f.kv_heads : f.heads) * groups.count());
    const char* name = kByKey ? "attention_backward of keys" : "attention_backward of queries";
    ptx::launch(attention_backward_kernel<Config>,
                {name, ctas, kThreads, Config::kSharedBytes, f.stream}, params);
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p) {
    cuda::with_type_and_head_dim(p.forward.dtype, p.forward.head_dim, [&](auto type, auto dim) {
        using T = decltype(type);
        constexpr int kD = decltype(dim)::value;
        cuda::launch_prepare<T, kD>(p);
        if (p.dq_sums) {
            launch_backward<Config<T, kD, Pass::kKeysAndQueries>>(p);
            cuda::launch_finish<T, kD, cuda::SumOrder::kByThread>(p);
        } else {
            launch_backward<Config<T, kD, Pass::kKeys>>(p);
            launch_backward<Config<T, kD, Pass::kQueries>>(p);
        }
    });
}

}  // namespace nabla::sm90
