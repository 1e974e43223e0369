// out = softmax(scale q k^T) v and lse = log(sum(exp(scale q k^T))) over the kept blocks.
//
// A CTA computes a group of query blocks, one per consumer warpgroup, and walks the union of their
// rows of the mask: producer warps load each key block once for all, and tell each consumer which
// of them are its own. Of those n = 0, 1, ... a consumer computes
//
//   on the tensor cores   q K(n)  P(n-1) V(n-1) | q K(n+1)  P(n) V(n) | ...
//   beside them                     softmax(n)  |         softmax(n+1) | ...
//
// and the consumers fill each other's gaps; they take no turns, because their rows differ.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/query_rows.cuh"
#include "cuda/sm90/rings.cuh"
#include "cuda/sm90/tiles.cuh"
#include "cuda/softmax.cuh"
#include "cuda/tensor_map.h"

namespace nabla::sm90 {
namespace {

template <class T, int kD>
struct Config {
    using Element = T;
    static constexpr int kHeadDim = kD;

    // Consumers are warpgroups. Few channels leave registers for a fourth one, whose products fill
    // gaps of the others.
    static constexpr int kConsumers = kD == 64 ? 4 : 3;
    static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
    static constexpr int kProducerRegisters = 32, kConsumerRegisters = kD == 64 ? 112 : 160;
    static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536,
                  "an SM has 65,536 registers");

    static constexpr int kPanels = kD / cuda::kPanel;
    static constexpr int kTileBytes = kPanels * kPanelBytes;
    static constexpr int kStages = kD == 64 ? 11 : 6;
    using Rings = sm90::Rings<kStages, kTileBytes>;
    using Queues = sm90::Queues<kConsumers, kStages>;

    // Of q, registers hold so many chunks of 16 channels, which costs no bandwidth of shared
    // memory, which has the rest.
    static constexpr int kRegisterChunks = kD == 64 ? 0 : 4;
    static constexpr int kQueryBytes = kPanels * kPanelBytes - kRegisterChunks * kBlock * 32;
    static constexpr int kSharedBytes = kConsumers * kQueryBytes + Rings::kBytes + Queues::kBytes;
    static_assert(kSharedBytes <= 232448, "a CTA has 227 KiB of shared memory");
};

struct ForwardParams {
    AttentionParams attention;
    cuda::BoxedTensor k, v;
};

template <class Config>
using Group = QueryRows<Config::kConsumers>;

// ---- the producers' warpgroup ----

// Fills the ring of K with the blocks of the walk, and tells each consumer of its own. Both rings
// are then in the round of that block, whose parity tells a consumer when K and V are there.
template <class Config>
NABLA_DEVICE void produce_keys(const ForwardParams& params, const typename Config::Rings& rings,
                               const typename Config::Queues& queues) {
    const Group<Config> group(params.attention);
    const int kv_head = group.kv_head();
    auto walk = group.walk();
    const bool leads = ptx::elect_one();
    QueueWriter<Config::kConsumers, Config::kStages, true> writer(queues);

    Position at;
    for (KeptBlock kept; walk.next(kept); at.advance<Config::kStages>()) {
        ptx::mbarrier_wait(rings.k_empty(at), at.parity() ^ 1);  // the last K has been read
        ptx::mbarrier_wait(rings.v_full(at), at.parity() ^ 1);   // and the last V is there,
        ptx::sync_warp();                                        // as all lanes have seen
        writer.put(at, kept);
        if (!leads) continue;
        ptx::mbarrier_arrive_expect_tx(rings.k_full(at), Config::kTileBytes);
        copy_tile<Config::kPanels>(rings.k(at), params.k, rings.k_full(at), kept.run.first, kv_head,
                                   group.batch);
        release_for_others<Config::kConsumers>(rings.k_empty(at), kept.members, kWarps);
    }
    writer.put_end();
}

// Fills the ring of V, behind that of K: as long as a consumer holds V, it still gets K.
template <class Config>
NABLA_DEVICE void produce_values(const ForwardParams& params, const typename Config::Rings& rings) {
    const Group<Config> group(params.attention);
    const int kv_head = group.kv_head();
    auto walk = group.walk();
    const bool leads = ptx::elect_one();

    Position at;
    for (KeptBlock kept; walk.next(kept); at.advance<Config::kStages>()) {
        if (!leads) continue;
        const uint32_t there = kept.run.size < kBlock ? rings.v_landed(at) : rings.v_full(at);
        ptx::mbarrier_wait(rings.k_full(at), at.parity());       // K is there
        ptx::mbarrier_wait(rings.v_empty(at), at.parity() ^ 1);  // the last round's V has been read
        ptx::mbarrier_arrive_expect_tx(there, Config::kTileBytes);
        copy_tile<Config::kPanels>(rings.v(at), params.v, there, kept.run.first, kv_head,
                                   group.batch);
        release_for_others<Config::kConsumers>(rings.v_empty(at), kept.members, kWarps);
    }
}

// Zeroes what lies behind the end of short blocks of V, because a weight of 0 does not hide a NaN
// of the next block.
template <class Config>
NABLA_DEVICE void zero_tails(const AttentionParams& p, const typename Config::Rings& rings) {
    auto walk = Group<Config>(p).walk();
    const bool leads = ptx::elect_one();

    uint32_t parities = 0;  // bit s: of the phase in which slot s gets its next short block
    Position at;
    for (KeptBlock kept; walk.next(kept); at.advance<Config::kStages>()) {
        if (kept.run.size == kBlock) continue;
        ptx::mbarrier_wait(rings.v_landed(at), parities >> at.slot() & 1);  // all has landed
        parities ^= 1u << at.slot();
        zero_tail<Config::kPanels>(rings.v(at), kept.run.size);
        ptx::fence_proxy_async();  // wgmma sees the zeros,
        ptx::sync_warp();          // those of all lanes
        if (leads) ptx::mbarrier_arrive(rings.v_full(at));
    }
}

// ---- consumers ----

// The rows of one query block, over all entries of its queue.
template <class Config>
class Consumer {
    using T = typename Config::Element;
    using Rings = typename Config::Rings;
    using Queues = typename Config::Queues;
    static constexpr int kD = Config::kHeadDim;
    static constexpr int kRegisterChunks = Config::kRegisterChunks;

  public:
    NABLA_DEVICE Consumer(const AttentionParams& p, const Rings& rings, const Queues& queues,
                          uint32_t queries, int index)
        : p_(p),
          rings_(rings),
          queue_(queues, index),
          queries_(queries),
          index_(index),
          leads_(ptx::elect_one()),
          softmax_(p.scale) {}

    NABLA_DEVICE void run() {
        load_queries();
        Entry found = queue_.next();
        while (found.is_block()) {
            found = attend_run(found);
            if (found.is_gap()) found = queue_.next();
        }
        const Group<Config> group(p_);
        group.template store<T>(group.run(index_), static_cast<int>(ptx::warp_index() % 4 * 16),
                                out_, softmax_);
    }

  private:
    // ---- the blocks ----

    // Attends to a block and to those that follow closely; returns the gap or the end behind them.
    // As long as the values of `current` are held here, the producer of V gets no further than to
    // their slot, and nothing there may be waited for: hence the gaps.
    NABLA_DEVICE Entry attend_run(Entry current) {
        float scores[kScores];
        multiply_keys(scores, current);
        Entry next = queue_.next();
        ptx::wgmma_wait<0>();  // the scores are there
        weigh(scores, current);
        while (next.is_block()) {
            multiply_keys(scores, next);
            multiply_values(current);
            const Entry found = queue_.next();
            ptx::wgmma_wait<1>();  // the next scores are there; values are still being added
            weigh(scores, next);
            if (leads_) ptx::mbarrier_arrive(rings_.v_empty(current.at()));
            current = next;
            next = found;
        }
        multiply_values(current);
        ptx::wgmma_wait<0>();  // all values are added
        ptx::keep_in_place(out_);
        if (leads_) ptx::mbarrier_arrive(rings_.v_empty(current.at()));
        return next;
    }

    // scores = q k^T
    NABLA_DEVICE void multiply_keys(float (&scores)[kScores], const Entry& entry) {
        const uint64_t keys = ptx::matrix_descriptor(rings_.k(entry.at()), 0, 1024);
        const uint64_t queries = ptx::matrix_descriptor(queries_, 0, 1024);
        ptx::mbarrier_wait(rings_.k_full(entry.at()), entry.at().parity());  // K is there
        ptx::wgmma_fence();  // q has been written, and what the scores were before is read
        NABLA_UNROLL
        for (int c = 0; c < kRegisterChunks; ++c)
            ptx::wgmma_rs<T, kBlock, false>(scores, q_[c], ptx::moved(keys, channel_chunk(c)),
                                            c > 0);
        NABLA_UNROLL
        for (int c = kRegisterChunks; c < kD / 16; ++c)
            ptx::wgmma_ss<T, kBlock>(scores,
                                     ptx::moved(queries, channel_chunk(c - kRegisterChunks)),
                                     ptx::moved(keys, channel_chunk(c)), c > 0);
        ptx::wgmma_commit();
    }

    // out += weights v
    NABLA_DEVICE void multiply_values(const Entry& entry) {
        const uint64_t values = ptx::matrix_descriptor(rings_.v(entry.at()), kPanelBytes, 1024);
        ptx::mbarrier_wait(rings_.v_full(entry.at()), entry.at().parity());  // V is there
        ptx::keep_in_place(out_);
        ptx::wgmma_fence();  // weights and out have been written
        NABLA_UNROLL
        for (int c = 0; c < kBlock / 16; ++c)  // 16 keys each
            ptx::wgmma_rs<T, kD, true>(out_, weights_[c], ptx::moved(values, row_chunk(c)), true);
        ptx::wgmma_commit();
    }

    // The scores of a block become weights, while the values of the block before are added.
    NABLA_DEVICE void weigh(float (&scores)[kScores], const Entry& entry) {
        ptx::keep_in_place(scores);
        if (leads_) ptx::mbarrier_arrive(rings_.k_empty(entry.at()));  // K has been read
        if (entry.size() < kBlock) Softmax<true>::mask_from(entry.size(), scores);
        float factors[2];
        const bool rescales = softmax_.move_references(scores, factors);
        softmax_.exponentiate(scores);
        ptx::hold_until(softmax_.sum(0) + softmax_.sum(1));
        ptx::wgmma_wait<0>();  // the values are added: out and weights may be written
        ptx::keep_in_place(out_);
        if (rescales) {
            NABLA_UNROLL
            for (int i = 0; i < kD / 2; ++i) out_[i] *= factors[row_of(i)];
        }
        as_operand_a<T>(weights_, scores);
    }

    // ---- global memory ----

    // q into registers, and what these do not hold into shared memory; zeros behind the end of a
    // short block. Softmax takes the scale without its sign, which therefore goes into q.
    NABLA_DEVICE void load_queries() {
        const Group<Config> group(p_);
        const BlockRun rows = group.run(index_);
        const uint32_t signs = p_.scale < 0 ? 0x80008000u : 0;
        NABLA_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int row = thread_row(r);
            const T* q =
                elements<T>(p_.q, group.batch, group.head, rows.first + row) + thread_column();
            NABLA_UNROLL
            for (int c = 0; c < kD / 8; ++c) {  // 8 channels each
                const auto* address = reinterpret_cast<const uint32_t*>(q + 8 * c);
                const uint32_t pair =
                    row < rows.size ? ptx::load_global_nc(address) ^ signs : 0;  // 2 channels
                if (c / 2 < kRegisterChunks) q_[c / 2][c % 2 * 2 + r] = pair;
                else
                    ptx::store_shared(
                        piece_of_tile(queries_, row, c - 2 * kRegisterChunks) + 2 * thread_column(),
                        pair);
            }
        }
        ptx::fence_proxy_async();                   // wgmma sees q,
        ptx::barrier_sync(1 + index_, kWarpgroup);  // that of all warps
    }

    const AttentionParams& p_;
    const Rings rings_;
    QueueReader<Config::kConsumers, Config::kStages> queue_;
    const uint32_t queries_;  // shared address of the panels of q that are not in registers
    const int index_;
    const bool leads_;

    Softmax<true> softmax_;
    uint32_t q_[kD / 16][4];  // the first kRegisterChunks of it
    uint32_t weights_[kBlock / 16][4];
    float out_[kD / 2] = {};
};

// ---- kernel ----

template <class Config>
NABLA_KERNEL(Config::kThreads, 1)
attention_forward_kernel(const NABLA_GRID_CONSTANT ForwardParams params) {
    const uint32_t queries = ptx::shared_base();
    const uint32_t tiles = queries + Config::kConsumers * Config::kQueryBytes;
    const typename Config::Rings rings(tiles);
    const typename Config::Queues queues(tiles + Config::Rings::kBytes);
    const int warp = ptx::warp_index(), warpgroup = warp / 4;
    if (warp == 0 && ptx::elect_one()) {
        rings.init_barriers(Config::kConsumers * kWarps);
        queues.init_barriers();
        ptx::fence_mbarrier_init();
    }
    ptx::sync_cta();  // the barriers are there

    const AttentionParams& p = params.attention;
    if (warpgroup < Config::kConsumers) {
        ptx::set_max_registers_up<Config::kConsumerRegisters>();
        const uint32_t own_queries = queries + warpgroup * Config::kQueryBytes;
        Consumer<Config>(p, rings, queues, own_queries, warpgroup).run();
    } else {
        ptx::set_max_registers_down<Config::kProducerRegisters>();
        if (warp % 4 == 0) produce_keys<Config>(params, rings, queues);
        if (warp % 4 == 1) produce_values<Config>(params, rings);
        if (warp % 4 == 2 && has_short_blocks(p.blocks.grid)) zero_tails<Config>(p, rings);
    }
}

template <class Config>
void launch_forward(const AttentionParams& p) {
    const Grid& g = p.blocks.grid;
    const int64_t tokens = static_cast<int64_t>(g.frames) * g.height * g.width + g.extra;
    const cuda::Extents extents = {p.batch, p.kv_heads, tokens, p.head_dim};
    const ForwardParams params = {p, cuda::boxed_tensor(p.k, extents, kBlock),
                                  cuda::boxed_tensor(p.v, extents, kBlock)};
    const BlockGroups<Config::kConsumers> groups = {p.q_blocks, p.blocks.nh * p.blocks.nw};
    const auto ctas = static_cast<uint32_t>(p.batch * p.heads * groups.count());
    ptx::launch(attention_forward_kernel<Config>,
                {"attention_forward", ctas, Config::kThreads, Config::kSharedBytes, p.stream},
                params);
}

}  // namespace

void attention_forward(const AttentionParams& p) {
    cuda::with_type_and_head_dim(p.dtype, p.head_dim, [&](auto type, auto head_dim) {
        launch_forward<Config<decltype(type), decltype(head_dim)::value>>(p);
    });
}

}  // namespace nabla::sm90
