// out = softmax(scale q k^T) v and lse = log(sum(exp(scale q k^T))) over the kept blocks.
//
// A CTA computes two query blocks over the union of their rows of the mask, and each of its warps
// 16 rows of both: what a warp reads of keys and values from shared memory serves two products
// (with one, shared memory would be as slow as the tensor cores), and no warp waits for another
// where only one of the blocks keeps the keys. Tiles of K and V arrive in a ring of three slots:
//
//   computed   q K(n)  softmax(n)  | P V(n)   | q K(n+1)  softmax(n+1) | P V(n+1)
//   copied     V(n), K(n+1)        | K(n+1), V(n+1)     | V(n+1), K(n+2)        | ...
//
// Tensor cores that one CTA leaves idle, in its softmax, another one of the multiprocessor takes.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/query_rows.cuh"
#include "cuda/sm80/kept_list.cuh"
#include "cuda/sm80/tiles.cuh"
#include "cuda/softmax.cuh"

namespace nabla::sm80 {
namespace {

constexpr int kMembers = 2;  // query blocks of a CTA
constexpr int kThreads = 2 * kBlock;
constexpr int kSlots = 3;  // tiles of the ring
constexpr int kListed = 127;

template <class T, int kD, int kCtas_>
struct Config {
    using Element = T;
    static constexpr int kHeadDim = kD;
    static constexpr int kCtas = kCtas_;  // of a multiprocessor of sm_80
    static constexpr int kTileBytes = Tile<kD>::kBytes;
    static constexpr int kSharedBytes =
        (kMembers + kSlots) * kTileBytes + KeptList<kListed>::kBytes;
    static_assert(kSharedBytes <= 99 * 1024, "a CTA of sm_86 and sm_89 has 99 KiB");
    static_assert(kCtas * (kSharedBytes + 1024) <= 164 * 1024, "sm_80 has 164 KiB for all");
};

// 16 rows of each of the query blocks, over all blocks of the union.
template <class Config>
class Warp {
    using T = typename Config::Element;
    static constexpr int kD = Config::kHeadDim;
    static constexpr int kTileBytes = Config::kTileBytes;
    using Rows = QueryRows<kMembers>;
    using Copy = TileCopy<T, kD, kThreads>;

  public:
    NABLA_DEVICE explicit Warp(const AttentionParams& p)
        : p_(p),
          queries_(ptx::shared_base()),
          ring_(queries_ + kMembers * kTileBytes),
          list_(ring_ + kSlots * kTileBytes),
          first_row_(16 * static_cast<int>(ptx::warp_index())),
          copy_keys_(elements<T>(p.k, Rows(p).batch, Rows(p).kv_head(), 0), p.k.stride_s),
          copy_values_(elements<T>(p.v, Rows(p).batch, Rows(p).kv_head(), 0), p.v.stride_s),
          softmax_{Softmax<false>(p.scale), Softmax<false>(p.scale)} {}

    NABLA_DEVICE void run() {
        fill_list(0);
        if (list_[0].members()) copy_queries();
        while (list_[0].members()) {
            attend();
            const int32_t word = list_.next_word();
            ptx::sync_cta();  // the list and the ring have been read
            fill_list(word);
        }
        const Rows rows(p_);
        NABLA_UNROLL
        for (int member = 0; member < kMembers; ++member)
            rows.template store<T>(rows.run(member), first_row_, out_[member], softmax_[member]);
    }

  private:
    // Lists blocks from 32 * word on.
    NABLA_DEVICE void fill_list(int32_t word) const {
        if (ptx::warp_index() == 0) {
            auto walk = Rows(p_).walk(word);
            list_.fill(walk);
        }
        ptx::sync_cta();  // the list is there
    }

    // Copies that belong to the group of the first keys.
    NABLA_DEVICE void copy_queries() const {
        const Rows rows(p_);
        const Copy copy(elements<T>(p_.q, rows.batch, rows.head, 0), p_.q.stride_s);
        NABLA_UNROLL
        for (int member = 0; member < kMembers; ++member) {
            const BlockRun run = rows.run(member);
            copy(queries_ + member * kTileBytes, run.first, run.size);
        }
    }

    // A group of copies.
    NABLA_DEVICE void copy_block(const Copy& copy, uint32_t slot, const Listed& block) const {
        copy(slot, block.first, block.size());
        ptx::copy_async_commit();
    }

    // Attends to the blocks of the list. Behind the last one, tiles of no rows are copied.
    NABLA_DEVICE void attend() {
        uint32_t keys = ring_, values = slot_after(keys);
        copy_block(copy_keys_, keys, list_[0]);
        copy_block(copy_values_, values, list_[0]);
        for (int i = 0; list_[i].members(); ++i) {
            const Listed block = list_[i];
            uint32_t weights[kMembers][kBlock / 16][4];
            ptx::copy_async_wait<1>();  // this thread's part of K has landed,
            ptx::sync_cta();            // and that of all; V of the block before has been read
            copy_block(copy_keys_, slot_after(values), list_[i + 1]);
            if (block.members() == 3) weigh<3>(weights, keys, block.size());
            else if (block.members() == 1) weigh<1>(weights, keys, block.size());
            else weigh<2>(weights, keys, block.size());
            ptx::copy_async_wait<1>();  // this thread's part of V has landed,
            ptx::sync_cta();            // and that of all; K has been read
            copy_block(copy_values_, keys, list_[i + 1]);
            if (block.members() == 3) add_values<3>(weights, values);
            else if (block.members() == 1) add_values<1>(weights, values);
            else add_values<2>(weights, values);
            const uint32_t next_keys = slot_after(values);
            values = keys;
            keys = next_keys;
        }
        ptx::copy_async_wait<0>();  // nothing lands later on
    }

    NABLA_DEVICE uint32_t slot_after(uint32_t slot) const {
        return slot == ring_ + (kSlots - 1) * kTileBytes ? ring_ : slot + kTileBytes;
    }

    // weights = exp(scale q k^T), relative to the references of softmax, for the members (bits)
    // that keep the block
    template <uint32_t kKept>
    NABLA_DEVICE void weigh(uint32_t (&weights)[kMembers][kBlock / 16][4], uint32_t keys,
                            int size) {
        float scores[kMembers][kScores] = {};
        NABLA_UNROLL
        for (int c = 0; c < kD; c += 16) {
            uint32_t q[kMembers][4];
            for_each<kKept>([&](int member) {
                operands_.load_a(q[member], queries_ + member * kTileBytes + row_bytes(), 0, c);
            });
            NABLA_UNROLL
            for (int column = 0; column < kBlock; column += 16) {
                uint32_t k[4];
                operands_.load_b_transposed(k, keys, column, c);
                for_each<kKept>(
                    [&](int member) { multiply<T>(scores[member], column, q[member], k); });
            }
        }
        for_each<kKept>([&](int member) {
            if (p_.scale < 0) negate(scores[member]);
            if (size < kBlock) Softmax<false>::mask_from(size, scores[member]);
            float factors[2];
            if (softmax_[member].move_references(scores[member], factors)) {
                NABLA_UNROLL
                for (int i = 0; i < kD / 2; ++i) out_[member][i] *= factors[row_of(i)];
            }
        });
        for_each<kKept>([&](int member) {
            softmax_[member].exponentiate(scores[member]);
            as_operand_a<T>(weights[member], scores[member]);
        });
    }

    // out += weights v
    template <uint32_t kKept>
    NABLA_DEVICE void add_values(const uint32_t (&weights)[kMembers][kBlock / 16][4],
                                 uint32_t values) {
        NABLA_UNROLL
        for (int key = 0; key < kBlock; key += 16) {
            NABLA_UNROLL
            for (int channel = 0; channel < kD; channel += 16) {
                uint32_t v[4];
                operands_.load_b(v, values, key, channel);
                for_each<kKept>([&](int member) {
                    multiply<T>(out_[member], channel, weights[member][key / 16], v);
                });
            }
        }
    }

    template <uint32_t kKept, class Visit>
    NABLA_DEVICE static void for_each(Visit visit) {
        NABLA_UNROLL
        for (int member = 0; member < kMembers; ++member)
            if (kKept >> member & 1) visit(member);
    }

    // Softmax takes the scale without its sign.
    NABLA_DEVICE static void negate(float (&scores)[kScores]) {
        NABLA_UNROLL
        for (int i = 0; i < kScores; ++i) scores[i] = -scores[i];
    }

    NABLA_DEVICE uint32_t row_bytes() const { return first_row_ * Tile<kD>::kPitch; }

    const AttentionParams& p_;
    const uint32_t queries_, ring_;  // shared addresses
    const KeptList<kListed> list_;
    const Operands<kD> operands_;
    const int first_row_;  // of the 16 in a block
    const Copy copy_keys_, copy_values_;

    Softmax<false> softmax_[kMembers];
    float out_[kMembers][kD / 2] = {};
};

template <class Config>
NABLA_KERNEL(kThreads, Config::kCtas)
attention_forward_kernel(const NABLA_GRID_CONSTANT AttentionParams p) {
    Warp<Config>(p).run();
}

template <class Config>
void launch_forward(const AttentionParams& p) {
    const BlockGroups<kMembers> groups = {p.q_blocks, p.blocks.nh * p.blocks.nw};
    const auto ctas = static_cast<uint32_t>(p.batch * p.heads * groups.count());
    ptx::launch(attention_forward_kernel<Config>,
                {"attention_forward", ctas, kThreads, Config::kSharedBytes, p.stream}, p);
}

}  // namespace

void attention_forward(const AttentionParams& p) {
    cuda::with_type_and_head_dim(p.dtype, p.head_dim, [&](auto type, auto head_dim) {
        constexpr int kD = decltype(head_dim)::value;
        launch_forward<Config<decltype(type), kD, 2>>(p);
    });
}

}  // namespace nabla::sm80
