// Gradients of block_attention.cu over the kept blocks:
//
//   P = exp(scale q k^T - lse)   dP = dout v^T   dS = P * (dP - delta)
//   dv = P^T dout                dk = scale dS^T q                       dq = scale dS k
//
// Two passes over the mask, in each of which a CTA owns blocks, one per consumer warpgroup, and
// walks the union of the blocks that meet them. A producer warp loads those once for all, and tells
// each consumer which of them are its own:
//
//   kKeys     owns k and v, walks the columns of the mask with q and dout: dk and dv
//   kQueries  owns q and dout, walks the rows of the mask with k and v: dq
//
// Products are computed twice where one pass would compute them once, but nothing is added in
// global memory: that costs more (L2 takes 1.5 to 2 TB/s of fp32 sums), and would be added in another
// order each time. A pass over keys takes the query heads of a key head one after the other, so
// that dk and dv are sums of one order, too. It computes P^T and dS^T, rows of which are keys: they
// stay in registers.
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

enum class Pass { kKeys, kQueries };

template <class T, int kD, Pass kPass>
struct Config {
    using Element = T;
    static constexpr int kHeadDim = kD;
    static constexpr bool kByKey = kPass == Pass::kKeys;
    static constexpr int kPanels = kD / cuda::kPanel;
    static constexpr int kTileBytes = kPanels * kPanelBytes;

    // Consumers are warpgroups; dq alone leaves registers for a third one.
    static constexpr int kConsumers = kByKey ? 2 : 3;
    static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
    static constexpr int kProducerRegisters = kByKey ? 40 : 32;
    static constexpr int kConsumerRegisters = kByKey ? 232 : 160;
    static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536,
                  "an SM has 65,536 registers");

    // Whether there are registers for a product of the next block beside all of the last one.
    static constexpr bool kIsAhead = kD == 64 || !kByKey;

    static constexpr int kRowBytes = kByKey ? 2 * kBlock * 4 : 0;  // lse and delta of q
    static constexpr int kStages = kD == 64 ? 8 : kByKey ? 3 : 4;
    using Ring = PairRing<kStages, kTileBytes, kRowBytes>;
    using Queues = sm90::Queues<kConsumers, kStages>;

    static constexpr int kOwnBytes = 2 * kTileBytes;  // of a consumer
    static constexpr int kSharedBytes = kConsumers * kOwnBytes + Ring::kBytes + Queues::kBytes;
    static_assert(kSharedBytes <= 232448, "a CTA has 227 KiB of shared memory");
};

struct BackwardParams {
    AttentionBackwardParams backward;
    cuda::BoxedTensor walked[2];  // q and dout, or k and v
};

// What a CTA owns: blocks of a key head, or of a query head. Heads are outermost, so that CTAs that
// run together share in L2 what they walk.
template <class Config>
struct Group {
    static constexpr bool kByKey = Config::kByKey;
    static constexpr int kConsumers = Config::kConsumers;

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

// Calls visit(at, kept, query head) for the blocks of the CTA's walk, in the order of the stages.
template <class Config, class Visit>
NABLA_DEVICE void walk_blocks(const AttentionBackwardParams& p, const Group<Config>& group,
                              Visit visit) {
    const AttentionParams& f = p.forward;
    const auto blocks = Group<Config>::walked(f);
    const int32_t words = (blocks.count() + 31) / 32;
    const int32_t heads = Config::kByKey ? f.heads / f.kv_heads : 1;
    Position at;
    for (int32_t h = group.head * heads; h < (group.head + 1) * heads; ++h) {
        const uint32_t* bits =
            Config::kByKey ? p.columns + group.batch * p.columns_stride_b + h * p.columns_stride_h
                           : f.bits + group.batch * f.bits_stride_b + h * f.bits_stride_h;
        const uint32_t* rows[Config::kConsumers];
        NABLA_UNROLL
        for (int r = 0; r < Config::kConsumers; ++r) {
            const int32_t block = group.block(r);
            rows[r] = block < 0 ? nullptr : bits + static_cast<int64_t>(block) * words;
        }
        UnionWalk<Config::kConsumers> walk(blocks, rows);
        for (KeptBlock kept; walk.next(kept); at.advance<Config::kStages>()) visit(at, kept, h);
    }
}

// Fills the ring with the blocks of the walk, and tells each consumer of its own.
template <class Config>
NABLA_DEVICE void produce(const BackwardParams& params, const typename Config::Ring& ring,
                          const typename Config::Queues& queues) {
    const AttentionBackwardParams& p = params.backward;
    const Group<Config> group(p.forward);
    const bool leads = ptx::elect_one();
    QueueWriter<Config::kConsumers, Config::kStages, Config::kIsAhead> writer(queues);
    const auto fill = [&](const Position& at, const KeptBlock& kept, int32_t q_head) {
        const int32_t head =
            Config::kByKey ? q_head : q_head / (p.forward.heads / p.forward.kv_heads);
        const uint32_t tile = static_cast<uint32_t>(
            (group.batch * p.forward.heads + q_head) * p.forward.q_blocks + kept.index);
        ptx::mbarrier_wait(ring.empty(at), at.parity() ^ 1);  // the last round has been read,
        ptx::sync_warp();                                     // as all lanes have seen
        writer.put(at, kept);
        if (!leads) return;
        const uint32_t barrier = kept.run.size < kBlock ? ring.landed(at) : ring.full(at);
        ptx::mbarrier_arrive_expect_tx(barrier, 2 * Config::kTileBytes + Config::kRowBytes);
        NABLA_UNROLL
        for (int which = 0; which < 2; ++which)
            copy_tile<Config::kPanels>(ring.tile(which, at), params.walked[which], barrier,
                                       kept.run.first, head, group.batch);
        if constexpr (Config::kByKey)
            ptx::copy_bulk(ring.rows(at), p.delta + static_cast<int64_t>(tile) * (2 * kBlock),
                           Config::kRowBytes, barrier);
        release_for_others<Config::kConsumers>(ring.empty(at), kept.members, kWarps);
    };
    walk_blocks<Config>(p, group, fill);
    writer.put_end();
}

// Zeroes what lies behind the end of short blocks, because a weight of 0 does not hide a NaN of the
// next block.
template <class Config>
NABLA_DEVICE void zero_tails(const AttentionBackwardParams& p, const typename Config::Ring& ring) {
    const Group<Config> group(p.forward);
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

// The gradients of one block, over all entries of its queue.
template <class Config>
class Consumer {
    using T = typename Config::Element;
    using Ring = typename Config::Ring;
    using Queues = typename Config::Queues;
    static constexpr int kD = Config::kHeadDim;
    static constexpr bool kByKey = Config::kByKey;
    static constexpr bool kIsAhead = Config::kIsAhead;

  public:
    NABLA_DEVICE Consumer(const AttentionBackwardParams& p, const Ring& ring, const Queues& queues,
                          uint32_t own, int index)
        : p_(p),
          ring_(ring),
          queue_(queues, index),
          own_(own),
          index_(index),
          barrier_(1 + index),
          leads_(ptx::elect_one()),
          scale_log2_(p.forward.scale * kLog2E) {}

    NABLA_DEVICE void run() {
        const AttentionParams& f = p_.forward;
        const Group<Config> group(f);
        const int32_t block = group.block(index_);
        const BlockRun rows = block < 0 ? BlockRun{0, 0} : Group<Config>::owned(f).run(block);
        size_ = rows.size;
        load_tile(own_, kByKey ? f.k : f.q, group, rows);
        load_tile(own_ + Config::kTileBytes, kByKey ? f.v : p_.dout, group, rows);
        if constexpr (!kByKey) load_rows(group, block);
        ptx::fence_proxy_async();                 // wgmma sees the tiles,
        ptx::barrier_sync(barrier_, kWarpgroup);  // those of all warps
        Entry found = queue_.next();
        if constexpr (kIsAhead) {
            while (found.is_block()) {
                found = differentiate_run(found);
                if (found.is_gap()) found = queue_.next();
            }
        } else {
            for (; found.is_block(); found = queue_.next()) {
                differentiate(found, Entry::end());
                finish<0>(found);
            }
        }
        store(kByKey ? p_.dk : p_.dq, first_, f.scale, group, rows);
        if constexpr (kByKey) store(p_.dv, second_, 1.0f, group, rows);
    }

  private:
    // ---- the blocks ----

    // product = own tile * tile of the walk^T
    NABLA_DEVICE void multiply(float (&product)[kScores], int which, const Entry& entry) {
        const uint64_t a = ptx::matrix_descriptor(own_ + which * Config::kTileBytes, 0, 1024);
        const uint64_t b = ptx::matrix_descriptor(ring_.tile(which, entry.at()), 0, 1024);
        ptx::wgmma_fence();  // what the product was before is read
        NABLA_UNROLL
        for (int c = 0; c < kD / 16; ++c)
            ptx::wgmma_ss<T, kBlock>(product, ptx::moved(a, channel_chunk(c)),
                                     ptx::moved(b, channel_chunk(c)), c > 0);
        ptx::wgmma_commit();
    }

    // sum += factors * tile of the walk
    NABLA_DEVICE void accumulate(float (&sum)[kD / 2], const uint32_t (&factors)[kBlock / 16][4],
                                 int which, const Entry& entry) {
        const uint64_t tile =
            ptx::matrix_descriptor(ring_.tile(which, entry.at()), kPanelBytes, 1024);
        ptx::keep_in_place(sum);
        ptx::wgmma_fence();  // factors and sum have been written
        NABLA_UNROLL
        for (int c = 0; c < kBlock / 16; ++c)  // 16 rows each
            ptx::wgmma_rs<T, kD, true>(sum, factors[c], ptx::moved(tile, row_chunk(c)), true);
        ptx::wgmma_commit();
    }

    // Adds what a block contributes, and those that follow closely; returns the gap or the end
    // behind them. The first product of a block is issued behind those that use the last one, so
    // that the tensor cores need not wait; as long as that is held the producer gets no further
    // than to its slot, hence the gaps.
    NABLA_DEVICE Entry differentiate_run(Entry next) {
        Entry last = Entry::end();
        do {
            differentiate(next, last);
            last = next;
            next = queue_.next();
        } while (next.is_block());
        finish<0>(last);
        return next;
    }

    // Issues all that a block contributes, and finishes the last one meanwhile.
    NABLA_DEVICE void differentiate(const Entry& entry, const Entry& last) {
        float weights[kScores], ds[kScores];
        ptx::mbarrier_wait(ring_.full(entry.at()), entry.at().parity());  // the stage is there
        multiply(weights, 0, entry);
        if constexpr (kIsAhead) finish<1>(last);
        multiply(ds, 1, entry);
        ptx::wgmma_wait<1>();  // the scores are there
        weigh(weights, entry);
        if constexpr (kByKey) {
            as_operand_a<T>(factors_[1], weights);
            accumulate(second_, factors_[1], 1, entry);
            ptx::wgmma_wait<1>();  // dP is there
        } else {
            ptx::wgmma_wait<0>();  // dP is there
        }
        ptx::keep_in_place(ds);
        for_each_value(1, entry,
                       [&](int i, float delta) { ds[i] = weights[i] * (ds[i] - delta); });
        as_operand_a<T>(factors_[0], ds);
        accumulate(first_, factors_[0], 0, entry);
        ptx::sync_warp();  // all lanes have read the values of rows
    }

    // Products become weights.
    NABLA_DEVICE void weigh(float (&weights)[kScores], const Entry& entry) {
        ptx::keep_in_place(weights);
        for_each_value(0, entry, [&](int i, float lse) {
            weights[i] = cuda::weight(weights[i], scale_log2_, lse);
        });
        if constexpr (kByKey) {
            if (size_ == kBlock) return;
            NABLA_UNROLL
            for (int i = 0; i < kScores; ++i)
                if (thread_row(row_of(i)) >= size_) weights[i] = 0;
        } else {
            if (entry.size() == kBlock) return;
            NABLA_UNROLL
            for (int i = 0; i < kScores; ++i)
                if (8 * (i / 4) + thread_column() + i % 2 >= entry.size()) weights[i] = 0;
        }
    }

    // Calls visit(i, lse * log2(e) or delta of its query) for accumulators i.
    template <class Visit>
    NABLA_DEVICE void for_each_value(int which, const Entry& entry, Visit visit) const {
        const uint32_t rows = ring_.rows(entry.at()) + (which * kBlock + thread_column()) * 4;
        NABLA_UNROLL
        for (int first = 0; first < kScores; first += 4) {
            ptx::F32x2 values;  // of two queries: columns of dS^T, or rows of dS
            if constexpr (kByKey) values = ptx::load_shared<ptx::F32x2>(rows + 2 * 4 * first);
            else values = rows_[which];
            NABLA_UNROLL
            for (int i = first; i < first + 4; ++i) visit(i, values.v[kByKey ? i % 2 : row_of(i)]);
        }
    }

    // Waits for the products with tiles of the last block, if any, which may then be overwritten.
    template <int kPending>
    NABLA_DEVICE void finish(const Entry& entry) {
        ptx::wgmma_wait<kPending>();  // dk and dv, or dq, have been added
        ptx::keep_in_place(first_);
        if constexpr (kByKey) ptx::keep_in_place(second_);
        if (leads_ && entry.is_block()) ptx::mbarrier_arrive(ring_.empty(entry.at()));
    }

    // ---- global memory ----

    // A tile of the block into shared memory; zeros behind the end of a short one.
    NABLA_DEVICE void load_tile(uint32_t tile, const View& x, const Group<Config>& group,
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
    NABLA_DEVICE void load_rows(const Group<Config>& group, int32_t block) {
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
                            const Group<Config>& group, const BlockRun& rows) const {
        NABLA_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int row = thread_row(r);
            if (row >= rows.size) continue;
            store_row(elements<T>(x, group.batch, group.head, rows.first + row), sum, r, factor);
        }
    }

    const AttentionBackwardParams& p_;
    const Ring ring_;
    QueueReader<Config::kConsumers, Config::kStages> queue_;
    const uint32_t own_;  // shared address of the tiles of the block
    const int index_;
    const int barrier_;  // of the warpgroup
    const bool leads_;
    const float scale_log2_;
    int size_;  // tokens of the block

    ptx::F32x2 rows_[2];                            // lse and delta of a query block
    uint32_t factors_[1 + kByKey][kBlock / 16][4];  // dS^T and P^T, or dS
    float first_[kD / 2] = {};                      // dk or dq, without the scale
    float second_[kByKey ? kD / 2 : 1] = {};        // dv
};

// ---- kernel ----

template <class Config>
NABLA_KERNEL(Config::kThreads, 1)
attention_backward_kernel(const NABLA_GRID_CONSTANT BackwardParams params) {
    const uint32_t own = ptx::shared_base();
    const uint32_t tiles = own + Config::kConsumers * Config::kOwnBytes;
    const typename Config::Ring ring(tiles);
    const typename Config::Queues queues(tiles + Config::Ring::kBytes);
    const int warp = ptx::warp_index(), warpgroup = warp / 4;
    if (warp == 0 && ptx::elect_one()) {
        ring.init_barriers(Config::kConsumers * kWarps);
        queues.init_barriers();
        ptx::fence_mbarrier_init();
    }
    ptx::sync_cta();  // the barriers are there

    const AttentionBackwardParams& p = params.backward;
    if (warpgroup < Config::kConsumers) {
        ptx::set_max_registers_up<Config::kConsumerRegisters>();
        Consumer<Config>(p, ring, queues, own + warpgroup * Config::kOwnBytes, warpgroup).run();
    } else {
        ptx::set_max_registers_down<Config::kProducerRegisters>();
        if (warp % 4 == 0) produce<Config>(params, ring, queues);
        if (warp % 4 == 1 && has_short_blocks(p.forward.blocks.grid)) zero_tails<Config>(p, ring);
    }
}

template <class Config>
void launch_backward(const AttentionBackwardParams& p) {
    constexpr bool kByKey = Config::kByKey;
    const AttentionParams& f = p.forward;
    const cuda::Extents extents = {f.batch, kByKey ? f.heads : f.kv_heads,
                                   Group<Config>::walked(f).tokens(), f.head_dim};
    const BackwardParams params = {p,
                                   {cuda::boxed_tensor(kByKey ? f.q : f.k, extents, kBlock),
                                    cuda::boxed_tensor(kByKey ? p.dout : f.v, extents, kBlock)}};
    const BlockGroups<Config::kConsumers> groups = {Group<Config>::owned_count(f),
                                                    f.blocks.nh * f.blocks.nw};
    const auto ctas =
        static_cast<uint32_t>(f.batch * (kByKey ? f.kv_heads : f.heads) * groups.count());
    const char* name = kByKey ? "attention_backward of keys" : "attention_backward of queries";
    ptx::launch(attention_backward_kernel<Config>,
                {name, ctas, Config::kThreads, Config::kSharedBytes, f.stream}, params);
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p) {
    cuda::with_type_and_head_dim(p.forward.dtype, p.forward.head_dim, [&](auto type, auto dim) {
        using T = decltype(type);
        constexpr int kD = decltype(dim)::value;
        cuda::launch_prepare<T, kD>(p);
        launch_backward<Config<T, kD, Pass::kKeys>>(p);
        launch_backward<Config<T, kD, Pass::kQueries>>(p);
    });
}

}  // namespace nabla::sm90
