// out = softmax(scale q k^T) v and lse = log(sum(exp(scale q k^T))) over the kept blocks.
//
// A CTA computes a group of query blocks, one per consumer warpgroup, and walks the union of their
// rows of the mask: a producer warp loads each key block once for all, and a consumer passes on
// those that its own row does not keep. Of its blocks n = 0, 1, ... a consumer computes
//
//   on the tensor cores   q K(n)  P(n-1) V(n-1) | q K(n+1)  P(n) V(n) | ...
//   beside them                     softmax(n)  |         softmax(n+1) | ...
//
// and the three consumers fill each other's gaps; they take no turns, because their rows differ.
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

constexpr int kConsumers = 3;  // warpgroups
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536,
              "an SM has 65,536 registers");

template <class T, int kD>
struct Config {
    using Element = T;
    static constexpr int kHeadDim = kD;
    static constexpr int kPanels = kD / cuda::kPanel;
    static constexpr int kTileBytes = kPanels * kPanelBytes;
    static constexpr int kStages = kD == 64 ? 12 : 6;
    using Rings = sm90::Rings<kStages, kTileBytes>;

    // Registers hold the first panel of q, which costs no bandwidth of shared memory; there are
    // none for a second one.
    static constexpr int kRegisterChunks = 4;  // of 16 channels
    static constexpr int kQueryBytes = (kPanels - 1) * kPanelBytes;
    static constexpr int kSharedBytes = kConsumers * kQueryBytes + Rings::kBytes;
    static_assert(kSharedBytes <= 232448, "a CTA has 227 KiB of shared memory");
};

struct ForwardParams {
    AttentionParams attention;
    cuda::BoxedTensor k, v;
};

using Group = QueryRows<kConsumers>;

// ---- the producer's warpgroup ----

// Fills the rings with the blocks of the walk, and tells where it ends.
template <class Config>
NABLA_DEVICE void produce(const ForwardParams& params, const typename Config::Rings& rings) {
    const AttentionParams& p = params.attention;
    const Group group(p);
    const int kv_head = group.kv_head();
    auto walk = group.walk();
    const bool leads = ptx::elect_one();

    Position at;
    for (KeptBlock kept; walk.next(kept); at.advance<Config::kStages>()) {
        if (!leads) continue;
        ptx::mbarrier_wait(rings.k_empty(at), at.parity() ^ 1);  // the last round's K has been read
        ptx::store_shared(rings.stage(at), Stage(at, kept).bits());
        ptx::mbarrier_arrive_expect_tx(rings.k_full(at), Config::kTileBytes);
        copy_tile<Config::kPanels>(rings.k(at), params.k, rings.k_full(at), kept.run.first, kv_head,
                                   group.batch);
        const uint32_t there = kept.run.size < kBlock ? rings.v_landed(at) : rings.v_full(at);
        ptx::mbarrier_wait(rings.v_empty(at), at.parity() ^ 1);  // the last round's V has been read
        ptx::mbarrier_arrive_expect_tx(there, Config::kTileBytes);
        copy_tile<Config::kPanels>(rings.v(at), params.v, there, kept.run.first, kv_head,
                                   group.batch);
    }
    if (!leads) return;
    ptx::mbarrier_wait(rings.k_empty(at), at.parity() ^ 1);  // the last round's word has been read
    ptx::store_shared(rings.stage(at), Stage::end(at).bits());
    ptx::mbarrier_arrive(rings.k_full(at));
}

// Zeroes what lies behind the end of short blocks of V, because a weight of 0 does not hide a NaN
// of the next block.
template <class Config>
NABLA_DEVICE void zero_tails(const AttentionParams& p, const typename Config::Rings& rings) {
    auto walk = Group(p).walk();
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

// The rows of one query block, over all stages of the walk.
template <class Config>
class Consumer {
    using T = typename Config::Element;
    using Rings = typename Config::Rings;
    static constexpr int kD = Config::kHeadDim;
    static constexpr int kRegisterChunks = Config::kRegisterChunks;

  public:
    NABLA_DEVICE Consumer(const AttentionParams& p, const Rings& rings, uint32_t queries, int index)
        : p_(p),
          rings_(rings),
          queries_(queries),
          index_(index),
          leads_(ptx::elect_one()),
          softmax_(p.scale) {}

    NABLA_DEVICE void run() {
        const Group group(p_);
        const BlockRun rows = group.run(index_);
        load_queries(group, rows);
        while (find(Position::nowhere())) attend_run();
        group.template store<T>(rows, static_cast<int>(ptx::warp_index() % 4 * 16), out_, softmax_);
    }

  private:
    // ---- the walk ----

    // Looks for the next block of this row, at one stage and on to the slot of `end`, and passes on
    // those of others.
    NABLA_DEVICE bool find(const Position& end) {
        do {
            ptx::mbarrier_wait(rings_.k_full(look_), look_.parity());  // K and the word are there
            const auto word = ptx::load_shared<uint32_t>(rings_.stage(look_));
            ptx::sync_warp();  // all lanes have read the word: one may release it for all
            found_ = Stage(ptx::shuffle(word, 0));
            if (found_.is_end()) return false;
            look_.advance<Config::kStages>();
            if (found_.has_member(index_)) return true;
            pass_on(found_.at());
        } while (!look_.has_slot_of(end));
        return false;
    }

    // A stage is released in the phase in which it is full: a warp that ran ahead of the copies
    // would release it twice in one phase.
    NABLA_DEVICE void pass_on(const Position& at) {
        ptx::mbarrier_wait(rings_.v_full(at), at.parity());  // V is there, as K is
        ptx::sync_warp();  // all lanes have seen that: one may release V for all
        if (leads_) ptx::mbarrier_arrive(rings_.k_empty(at));
        if (leads_) ptx::mbarrier_arrive(rings_.v_empty(at));
    }

    // ---- the blocks ----

    // Attends to the block found, and to those that follow closely: as long as the values of
    // `current` are held here, the producer gets no further than to their slot, and nothing there
    // may be waited for. The stage behind `next` is before it: `next` was found before the slot of
    // an earlier block, or of the one before the first.
    NABLA_DEVICE void attend_run() {
        float scores[kScores];
        Stage current = found_;
        multiply_keys(scores, current);
        bool goes_on = find(current.at().slot_before<Config::kStages>());
        ptx::wgmma_wait<0>();  // the scores are there
        weigh(scores, current);
        while (goes_on) {
            const Stage next = found_;
            ptx::mbarrier_wait(rings_.v_full(current.at()), current.at().parity());  // V is there
            multiply_keys(scores, next);
            multiply_values(current);
            goes_on = find(current.at());
            ptx::wgmma_wait<1>();  // the next scores are there; values are still being added
            weigh(scores, next);
            if (leads_) ptx::mbarrier_arrive(rings_.v_empty(current.at()));
            current = next;
        }
        ptx::mbarrier_wait(rings_.v_full(current.at()), current.at().parity());  // V is there
        multiply_values(current);
        ptx::wgmma_wait<0>();  // all values are added
        ptx::keep_in_place(out_);
        if (leads_) ptx::mbarrier_arrive(rings_.v_empty(current.at()));
    }

    // scores = q k^T
    NABLA_DEVICE void multiply_keys(float (&scores)[kScores], const Stage& stage) {
        const uint64_t keys = ptx::matrix_descriptor(rings_.k(stage.at()), 0, 1024);
        const uint64_t queries = ptx::matrix_descriptor(queries_, 0, 1024);
        ptx::wgmma_fence();  // q has been written, and what the scores were before is read
        NABLA_UNROLL
        for (int c = 0; c < kRegisterChunks; ++c)
            ptx::wgmma_rs<T, kBlock, false>(scores, q_[c], keys + channel_chunk(c), c > 0);
        NABLA_UNROLL
        for (int c = kRegisterChunks; c < kD / 16; ++c)
            ptx::wgmma_ss<T, kBlock, false, false>(scores,
                                                   queries + channel_chunk(c - kRegisterChunks),
                                                   keys + channel_chunk(c), true);
        ptx::wgmma_commit();
    }

    // out += weights v
    NABLA_DEVICE void multiply_values(const Stage& stage) {
        const uint64_t values = ptx::matrix_descriptor(rings_.v(stage.at()), kPanelBytes, 1024);
        ptx::keep_in_place(out_);
        ptx::wgmma_fence();  // weights and out have been written
        NABLA_UNROLL
        for (int c = 0; c < kBlock / 16; ++c)  // 16 keys each
            ptx::wgmma_rs<T, kD, true>(out_, weights_[c], values + row_chunk(c), true);
        ptx::wgmma_commit();
    }

    // The scores of a stage become weights, while the values of the block before are added.
    NABLA_DEVICE void weigh(float (&scores)[kScores], const Stage& stage) {
        ptx::keep_in_place(scores);
        if (leads_) ptx::mbarrier_arrive(rings_.k_empty(stage.at()));  // K has been read
        if (stage.size() < kBlock) Softmax::mask_from(stage.size(), scores);
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
    NABLA_DEVICE void load_queries(const Group& group, const BlockRun& rows) {
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
                if (c / 2 < kRegisterChunks) q_[c / 2 % kRegisterChunks][c % 2 * 2 + r] = pair;
                else
                    ptx::store_shared(
                        piece_of_tile(queries_, row, c - 2 * kRegisterChunks) + 2 * thread_column(),
                        pair);
            }
        }
        if (Config::kQueryBytes == 0) return;
        ptx::fence_proxy_async();                   // wgmma sees q,
        ptx::barrier_sync(1 + index_, kWarpgroup);  // that of all warps
    }

    const AttentionParams& p_;
    const Rings rings_;
    const uint32_t queries_;  // shared address of the panels of q that are not in registers
    const int index_;
    const bool leads_;

    Position look_;  // where to look next
    Stage found_;    // what was found there last

    Softmax softmax_;
    uint32_t q_[kRegisterChunks][4];
    uint32_t weights_[kBlock / 16][4];
    float out_[kD / 2] = {};
};

// ---- kernel ----

template <class Config>
NABLA_KERNEL(kThreads, 1)
attention_forward_kernel(const NABLA_GRID_CONSTANT ForwardParams params) {
    const uint32_t queries = ptx::shared_base();
    const typename Config::Rings rings(queries + kConsumers * Config::kQueryBytes);
    const int warp = ptx::warp_index(), warpgroup = warp / 4;
    if (warp == 0 && ptx::elect_one()) rings.init_barriers(kConsumers * kWarpgroup / 32);
    ptx::sync_cta();  // the barriers are there

    const AttentionParams& p = params.attention;
    if (warpgroup < kConsumers) {
        ptx::set_max_registers_up<kConsumerRegisters>();
        const uint32_t own_queries = queries + warpgroup * Config::kQueryBytes;
        Consumer<Config>(p, rings, own_queries, warpgroup).run();
    } else {
        ptx::set_max_registers_down<kProducerRegisters>();
        if (warp % 4 == 0) produce<Config>(params, rings);
        if (warp % 4 == 1 && has_short_blocks(p.blocks.grid)) zero_tails<Config>(p, rings);
    }
}

template <class Config>
void launch_forward(const AttentionParams& p) {
    const Grid& g = p.blocks.grid;
    const int64_t tokens = static_cast<int64_t>(g.frames) * g.height * g.width + g.extra;
    const cuda::Extents extents = {p.batch, p.kv_heads, tokens, p.head_dim};
    const ForwardParams params = {p, cuda::boxed_tensor(p.k, extents, kBlock),
                                  cuda::boxed_tensor(p.v, extents, kBlock)};
    const BlockGroups<kConsumers> groups = {p.q_blocks, p.blocks.nh * p.blocks.nw};
    const auto ctas = static_cast<uint32_t>(p.batch * p.heads * groups.count());
    ptx::launch(attention_forward_kernel<Config>,
                {"attention_forward", ctas, kThreads, Config::kSharedBytes, p.stream}, params);
}

}  // namespace

void attention_forward(const AttentionParams& p) {
    cuda::with_type_and_head_dim(p.dtype, p.head_dim, [&](auto type, auto head_dim) {
        launch_forward<Config<decltype(type), decltype(head_dim)::value>>(p);
    });
}

}  // namespace nabla::sm90
