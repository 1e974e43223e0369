// Gradients of block_attention.cu over the kept blocks:
//   P = exp(scale Q K^T - lse),   dS = P * (dO V^T - delta),   delta = rowsum(dO * O) - dlse,
//   dV = P^T dO,   dK = scale dS^T Q,   dQ = scale dS K.
//
// The key-major kernel computes dK and dV of a key block in a CTA. The query blocks that keep it
// pass through shared memory in steps of 32 rows, head by head of those that read the keys. A warp
// has 16 keys, and its part of P^T and dS^T, [16, 32], lies in the registers as the products for dV
// and dK take it. dQ needs dS of all four warps: it goes through shared memory, and what they make
// of it is added up in global memory, in any order.
//
// Where dQ is to have the same bits each time, the query-major kernel computes it instead: the same
// with queries and keys exchanged, and P and dS once more.
//
// A multiprocessor has two CTAs, three for D = 64, and one computes while another waits. Blocks of
// one CTA that shared their loads would also share its barriers: the model of the main loop has
// that slower, since loads do not hold it up.
#include "cuda/accumulators.cuh"
#include "cuda/block_attention_backward.cuh"
#include "cuda/grid.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/sm80/kept_list.cuh"
#include "cuda/sm80/tiles.cuh"
#include "cuda/union_walk.cuh"

namespace nabla::sm80 {
namespace {

constexpr int kThreads = 128;           // four warps of 16 rows
constexpr int kStep = 32;               // rows that are streamed at a time
constexpr int kSlots = 3;               // steps in shared memory
constexpr int kStepScores = kStep / 2;  // accumulators of a thread, of [16, kStep]

using List = KeptList<64>;

template <int kD>
constexpr int kCtas = kD == 64 ? 3 : 2;  // of a multiprocessor of sm_80

// ---- where a CTA is ----

// The block of a CTA. Heads are outermost, so that CTAs that run together share loads in L2.
struct Place {
    int32_t batch, head, block;

    NABLA_DEVICE Place(int32_t heads, int32_t blocks) {
        const auto cta = static_cast<int32_t>(ptx::cta_index());
        block = cta % blocks;
        head = cta / blocks % heads;
        batch = cta / blocks / heads;
    }

    // Where a row of one of B, one of H and `words` a block begins.
    NABLA_DEVICE const uint32_t* bits(const uint32_t* data, int64_t stride_b, int64_t stride_h,
                                      int32_t words) const {
        return data + batch * stride_b + head * stride_h + int64_t{block} * words;
    }
};

// The rows of a head.
template <class T>
struct Rows {
    T* data;
    int64_t stride;

    NABLA_DEVICE Rows(const View& x, int32_t batch, int32_t head)
        : data(elements<T>(x, batch, head, 0)), stride(x.stride_s) {}

    NABLA_DEVICE T* operator[](int32_t row) const { return data + row * stride; }
};

// ---- what is streamed ----

// A slot of the ring in shared memory: kStep rows of tensors X and Y, and kFloats floats of each.
template <int kD, int kFloats>
struct Slot {
    static constexpr uint32_t kTileBytes = kStep * Tile<kD>::kPitch;
    static constexpr uint32_t kBytes = 2 * kTileBytes + kFloats * kStep * 4;

    uint32_t x;  // shared address

    NABLA_DEVICE uint32_t y() const { return x + kTileBytes; }
    NABLA_DEVICE uint32_t floats() const { return x + 2 * kTileBytes; }
};

// Rows first .. first + size - 1, at most kStep, and zeros behind them. No register is free to keep
// what the copies of steps have in common.
template <class T, int kD>
NABLA_DEVICE void copy_step(uint32_t tile, const Rows<const T>& rows, int32_t first, int32_t size) {
    TileCopy<T, kD, kThreads, kStep>(rows.data, rows.stride)(tile, first, size);
}

// Goes through the steps of the listed blocks: copy(slot, block, half) puts one into a slot, two
// steps ahead of compute(slot, block, half). All threads of the CTA call it.
template <class Slot, class Copy, class Compute>
NABLA_DEVICE void stream(const List& list, uint32_t ring, Copy copy, Compute compute) {
    static_assert(kBlock == 2 * kStep && kSlots == 3, "what is copied ahead is a block");
    const Slot first = {ring}, last = {ring + 2 * Slot::kBytes};
    for (int half = 0; half < 2; ++half) {
        copy(Slot{ring + half * Slot::kBytes}, list[0], half);
        ptx::copy_async_commit();
    }
    Slot slot = first;
    NABLA_NO_UNROLL
    for (int step = 0;; ++step) {
        ptx::copy_async_wait<1>();  // this thread's part of the step has landed,
        ptx::sync_cta();            // and that of all; the step before has been read
        const Listed block = list[step / 2];
        if (!block.members()) break;
        const bool is_first = slot.x == first.x, is_last = slot.x == last.x;
        copy(is_first ? last : Slot{slot.x - Slot::kBytes}, list[step / 2 + 1], step % 2);
        ptx::copy_async_commit();
        if (block.size() > step % 2 * kStep) compute(slot, block, step % 2);
        slot = is_last ? first : Slot{slot.x + Slot::kBytes};
    }
    ptx::copy_async_wait<0>();  // nothing lands later on
}

// Goes through `rows` rows of bits, `words` words each, as many blocks at a time as the list holds:
// walk(row, word) begins with a word of a row, and visit(row) streams what is listed of it.
template <class Walk, class Visit>
NABLA_DEVICE void visit_rows(int32_t rows, int32_t words, const List& list, Walk walk,
                             Visit visit) {
    for (int32_t word = 0; word < rows * words; word = list.next_word()) {
        ptx::sync_cta();  // the list has been read
        const int32_t row = word / words;
        if (ptx::warp_index() == 0) {
            UnionWalk<1> blocks = walk(row, word % words);
            list.fill(blocks, row * words);
        }
        ptx::sync_cta();  // the list is there
        visit(row);
    }
}

// ---- products of a warp ----

// The row of the block of a thread's accumulators i with row_of(i) == r, and of what it has of A.
NABLA_DEVICE int thread_row(int r) {
    return static_cast<int>(16 * ptx::warp_index() + ptx::lane_index() / 4 + 8 * r);
}

// d [16, kStep] += a x^T, of the channels from `channel` on that a [16, 16] has.
template <class T, int kD>
NABLA_DEVICE void multiply_rows(float (&d)[kStepScores], const Operands<kD>& operands,
                                const uint32_t (&a)[4], uint32_t x, int channel) {
    NABLA_UNROLL
    for (int row = 0; row < kStep; row += 16) {
        uint32_t b[4];
        operands.load_b_transposed(b, x, row, channel);
        multiply<T>(d, row, a, b);
    }
}

// d [16, D] += a [16, kStep] x
template <class T, int kD>
NABLA_DEVICE void accumulate(float (&d)[kD / 2], const Operands<kD>& operands,
                             const uint32_t (&a)[kStep / 16][4], uint32_t x) {
    NABLA_UNROLL
    for (int row = 0; row < kStep; row += 16) {
        NABLA_UNROLL
        for (int channel = 0; channel < kD; channel += 16) {
            uint32_t b[4];
            operands.load_b(b, x, row, channel);
            multiply<T>(d, channel, a[row / 16], b);
        }
    }
}

// The thread's rows of a block, as the operand A [16, D] of its warp; zeros behind the end.
template <class T, int kD>
NABLA_DEVICE void load_operand(uint32_t (&a)[kD / 16][4], const Rows<const T>& rows,
                               const BlockRun& run) {
    NABLA_UNROLL
    for (int r = 0; r < 2; ++r) {
        const int row = thread_row(r);
        const auto* pairs =
            reinterpret_cast<const uint32_t*>(rows[run.first + row]) + ptx::lane_index() % 4;
        NABLA_UNROLL
        for (int c = 0; c < kD / 8; ++c)
            a[c / 2][c % 2 * 2 + r] = row < run.size ? ptx::load_global_nc(pairs + 4 * c) : 0;
    }
}

// Accumulators times `factor` to the thread's rows of a block.
template <class T, int kCount>
NABLA_DEVICE void store_rows(const Rows<T>& rows, const BlockRun& run, const float (&d)[kCount],
                             float factor) {
    NABLA_UNROLL
    for (int r = 0; r < 2; ++r) {
        const int row = thread_row(r);
        if (row < run.size) store_row(rows[run.first + row], d, r, factor);
    }
}

// ---- key-major: dk and dv, and dq where it is summed in any order ----

// A warp, with 16 keys of the CTA's block.
template <class T, int kD, bool kAddsQueries>
class KeyWarp {
    using Slot = sm80::Slot<kD, 2>;
    static constexpr uint32_t kKeys = 0;
    static constexpr uint32_t kGradients = kKeys + Tile<kD>::kBytes;
    static constexpr uint32_t kRing = kGradients + (kAddsQueries ? Tile<kBlock>::kBytes : 0);
    static constexpr uint32_t kList = kRing + kSlots * Slot::kBytes;

  public:
    static constexpr uint32_t kSharedBytes = kList + List::kBytes;
    static_assert(kCtas<kD> * (kSharedBytes + 1024) <= 164 * 1024, "sm_80 has 164 KiB");
    static_assert(kSharedBytes <= 99 * 1024, "a CTA of sm_86 and sm_89 has 99 KiB");

    NABLA_DEVICE explicit KeyWarp(const AttentionBackwardParams& p)
        : p_(p),
          f_(p.forward),
          warp_(static_cast<int>(ptx::warp_index())),
          keys_(ptx::shared_base() + kKeys),
          gradients_(ptx::shared_base() + kGradients),
          list_(ptx::shared_base() + kList) {}

    NABLA_DEVICE void run() {
        load();
        visit_rows(
            f_.heads / f_.kv_heads, (f_.q_blocks + 31) / 32, list_,
            [&](int32_t i, int32_t word) { return column(i, word); },
            [&](int32_t i) { add_head(i); });
        store();
    }

  private:
    // Worked out anew where it is needed: no register is free to keep it.
    NABLA_DEVICE Place place() const { return {f_.kv_heads, f_.blocks.count}; }

    // The same with the i-th of the query heads that read the keys.
    NABLA_DEVICE Place query_place(int32_t i) const {
        Place at = place();
        at.head = at.head * (f_.heads / f_.kv_heads) + i;
        return at;
    }

    // Keys into shared memory, values into registers.
    NABLA_DEVICE void load() {
        const Place at = place();
        const BlockRun run = block_run(f_.blocks, at.block);
        const Rows<const T> k(f_.k, at.batch, at.head);
        TileCopy<T, kD, kThreads>(k.data, k.stride)(keys_, run.first, run.size);
        load_operand<T, kD>(v_, {f_.v, at.batch, at.head}, run);
    }

    NABLA_DEVICE void store() const {
        const Place at = place();
        const BlockRun run = block_run(f_.blocks, at.block);
        store_rows<T>({p_.dk, at.batch, at.head}, run, dk_, f_.scale);
        store_rows<T>({p_.dv, at.batch, at.head}, run, dv_, 1.0f);
    }

    // The query blocks of the i-th head that keep the keys.
    NABLA_DEVICE UnionWalk<1> column(int32_t i, int32_t word) const {
        const Place at = query_place(i);
        return {query_blocks(f_),
                {at.bits(p_.columns, p_.columns_stride_b, p_.columns_stride_h,
                         (f_.q_blocks + 31) / 32)},
                word};
    }

    // Adds those of them that are listed.
    NABLA_DEVICE void add_head(int32_t i) {
        const Place at = query_place(i);
        const Rows<const T> q(f_.q, at.batch, at.head), dout(p_.dout, at.batch, at.head);
        const int32_t first_tile = (at.batch * f_.heads + at.head) * f_.q_blocks;
        stream<Slot>(
            list_, ptx::shared_base() + kRing,
            [&](const Slot& slot, const Listed& block, int half) {
                const int32_t first = block.first + kStep * half,
                              size = block.size() - kStep * half;
                copy_step<T, kD>(slot.x, q, first, size);
                copy_step<T, kD>(slot.y(), dout, first, size);
                copy_floats(slot.floats(), first_tile + block.index(), half);
            },
            [&](const Slot& slot, const Listed& block, int half) {
                add_step(slot, half);
                if (kAddsQueries) {
                    ptx::sync_cta();  // dS^T of all warps is there
                    add_queries(first_tile + block.index(), half);
                }
            });
    }

    // lse and delta of half a query block.
    NABLA_DEVICE void copy_floats(uint32_t floats, int32_t tile, int half) const {
        const auto thread = static_cast<int>(ptx::thread_index());
        if (thread >= 2 * kStep / 4) return;  // 4 floats each
        const int row = kStep * half + thread % (kStep / 4) * 4;
        ptx::copy_async_16(floats + 16 * thread,
                           p_.delta + (int64_t{tile} * 2 + thread / (kStep / 4)) * kBlock + row);
    }

    // dV += P^T dO, dK += dS^T Q over the queries of a step.
    NABLA_DEVICE void add_step(const Slot& slot, int half) {
        float p[kStepScores] = {}, ds[kStepScores] = {};
        NABLA_UNROLL
        for (int channel = 0; channel < kD; channel += 16) {
            uint32_t k[4];
            operands_.load_a(k, keys_, 16 * warp_, channel);
            multiply_rows<T>(p, operands_, k, slot.x, channel);
        }
        NABLA_UNROLL
        for (int channel = 0; channel < kD; channel += 16)
            multiply_rows<T>(ds, operands_, v_[channel / 16], slot.y(), channel);
        NABLA_UNROLL
        for (int i = 0; i < kStepScores; i += 4) {
            const uint32_t floats = slot.floats() + 4 * (2 * i + thread_column());
            const auto lse = ptx::load_shared<ptx::F32x2>(floats);
            const auto delta = ptx::load_shared<ptx::F32x2>(floats + 4 * kStep);
            NABLA_UNROLL
            for (int j = i; j < i + 4; ++j) {
                p[j] = cuda::weight(p[j], f_.scale * kLog2E, lse.v[j % 2]);
                ds[j] = p[j] * (ds[j] - delta.v[j % 2]);
            }
        }
        uint32_t weights[kStep / 16][4], gradients[kStep / 16][4];
        as_operand_a<T>(weights, p);
        as_operand_a<T>(gradients, ds);
        if (kAddsQueries) share(gradients, half);
        accumulate<T, kD>(dv_, operands_, weights, slot.y());
        accumulate<T, kD>(dk_, operands_, gradients, slot.x);
    }

    // dS^T of a step into shared memory, [keys, queries of the block].
    NABLA_DEVICE void share(const uint32_t (&gradients)[kStep / 16][4], int half) const {
        NABLA_UNROLL
        for (int i = 0; i < kStep / 4; ++i) {
            const int row = 16 * warp_ + static_cast<int>(ptx::lane_index() / 4) + 8 * (i % 2);
            const int chunk = kStep / 8 * half + i / 2;
            ptx::store_shared(gradients_ + Tile<kBlock>::offset(row, chunk) + 2 * thread_column(),
                              gradients[i / 4][i % 4]);
        }
    }

    // Adds dS K of a step, of which a warp has a quarter of the channels, to the sums of dQ.
    NABLA_DEVICE void add_queries(int32_t tile, int half) const {
        constexpr int kChannels = kD / 4;
        float dq[kStep / 16][kChannels / 2] = {};
        NABLA_UNROLL
        for (int key = 0; key < kBlock; key += 16) {
            uint32_t ds[kStep / 16][4];
            NABLA_UNROLL
            for (int part = 0; part < kStep / 16; ++part)
                gradient_operands_.load_a_transposed(ds[part], gradients_, key,
                                                     kStep * half + 16 * part);
            NABLA_UNROLL
            for (int channel = 0; channel < kChannels; channel += 16) {
                uint32_t k[4];
                operands_.load_b(k, keys_, key, kChannels * warp_ + channel);
                NABLA_UNROLL
                for (int part = 0; part < kStep / 16; ++part)
                    multiply<T>(dq[part], channel, ds[part], k);
            }
        }
        // A value of all threads of a part is a run of memory.
        float* sums = p_.dq_sums + int64_t{tile} * (kBlock * kD) +
                      warp_ * (kChannels / 2 * kThreads) + half * 64 + ptx::lane_index();
        NABLA_UNROLL
        for (int part = 0; part < kStep / 16; ++part) {
            NABLA_UNROLL
            for (int i = 0; i < kChannels / 2; ++i)
                ptx::reduce_add_global(sums + i * kThreads + 32 * part, dq[part][i]);
        }
    }

    const AttentionBackwardParams& p_;
    const AttentionParams& f_;
    const int warp_;
    const uint32_t keys_, gradients_;  // shared addresses of K and dS^T
    const List list_;
    const Operands<kD> operands_;
    const Operands<kBlock> gradient_operands_;

    uint32_t v_[kD / 16][4];
    float dk_[kD / 2] = {}, dv_[kD / 2] = {};
};

template <class T, int kD, bool kAddsQueries>
NABLA_KERNEL(kThreads, kCtas<kD>)
attention_backward_keys_kernel(const NABLA_GRID_CONSTANT AttentionBackwardParams p) {
    KeyWarp<T, kD, kAddsQueries>(p).run();
}

// ---- query-major: dq, summed in one order ----

// A warp, with 16 queries of the CTA's block.
template <class T, int kD>
class QueryWarp {
    using Slot = sm80::Slot<kD, 0>;
    static constexpr uint32_t kRing = 0;
    static constexpr uint32_t kList = kRing + kSlots * Slot::kBytes;

  public:
    static constexpr uint32_t kSharedBytes = kList + List::kBytes;
    static_assert(kCtas<kD> * (kSharedBytes + 1024) <= 100 * 1024, "sm_86 and sm_89 have 100 KiB");

    NABLA_DEVICE explicit QueryWarp(const AttentionBackwardParams& p)
        : p_(p), f_(p.forward), at_(f_.heads, f_.q_blocks), list_(ptx::shared_base() + kList) {}

    NABLA_DEVICE void run() {
        const BlockRun run = query_blocks(f_).run(at_.block);
        load(run);
        visit_rows(
            1, (f_.blocks.count + 31) / 32, list_, [&](int32_t, int32_t word) { return row(word); },
            [&](int32_t) { add_keys(); });
        store_rows<T>({p_.dq, at_.batch, at_.head}, run, dq_, f_.scale);
    }

  private:
    NABLA_DEVICE void load(const BlockRun& run) {
        load_operand<T, kD>(q_, {f_.q, at_.batch, at_.head}, run);
        load_operand<T, kD>(dout_, {p_.dout, at_.batch, at_.head}, run);
        const auto tile = static_cast<int64_t>(ptx::cta_index());
        NABLA_UNROLL
        for (int r = 0; r < 2; ++r) {
            const float* floats = p_.delta + tile * (2 * kBlock) + thread_row(r);
            lse_[r] = ptx::load_global_nc(floats);
            delta_[r] = ptx::load_global_nc(floats + kBlock);
        }
    }

    // The key blocks that the queries keep.
    NABLA_DEVICE UnionWalk<1> row(int32_t word) const {
        return {
            f_.blocks,
            {at_.bits(f_.bits, f_.bits_stride_b, f_.bits_stride_h, (f_.blocks.count + 31) / 32)},
            word};
    }

    // Adds those of them that are listed.
    NABLA_DEVICE void add_keys() {
        const int32_t kv_head = at_.head / (f_.heads / f_.kv_heads);
        const Rows<const T> k(f_.k, at_.batch, kv_head), v(f_.v, at_.batch, kv_head);
        stream<Slot>(
            list_, ptx::shared_base() + kRing,
            [&](const Slot& slot, const Listed& block, int half) {
                const int32_t first = block.first + kStep * half,
                              size = block.size() - kStep * half;
                copy_step<T, kD>(slot.x, k, first, size);
                copy_step<T, kD>(slot.y(), v, first, size);
            },
            [&](const Slot& slot, const Listed&, int) { add_step(slot); });
    }

    // dQ += dS K over the keys of a step.
    NABLA_DEVICE void add_step(const Slot& slot) {
        float p[kStepScores] = {}, ds[kStepScores] = {};
        NABLA_UNROLL
        for (int channel = 0; channel < kD; channel += 16)
            multiply_rows<T>(p, operands_, q_[channel / 16], slot.x, channel);
        NABLA_UNROLL
        for (int channel = 0; channel < kD; channel += 16)
            multiply_rows<T>(ds, operands_, dout_[channel / 16], slot.y(), channel);
        NABLA_UNROLL
        for (int i = 0; i < kStepScores; ++i)
            ds[i] = cuda::weight(p[i], f_.scale * kLog2E, lse_[i / 2 % 2]) *
                    (ds[i] - delta_[i / 2 % 2]);
        uint32_t gradients[kStep / 16][4];
        as_operand_a<T>(gradients, ds);
        accumulate<T, kD>(dq_, operands_, gradients, slot.x);
    }

    const AttentionBackwardParams& p_;
    const AttentionParams& f_;
    const Place at_;
    const List list_;
    const Operands<kD> operands_;

    uint32_t q_[kD / 16][4], dout_[kD / 16][4];
    float lse_[2], delta_[2];  // of the thread's rows
    float dq_[kD / 2] = {};
};

template <class T, int kD>
NABLA_KERNEL(kThreads, kCtas<kD>)
attention_backward_queries_kernel(const NABLA_GRID_CONSTANT AttentionBackwardParams p) {
    QueryWarp<T, kD>(p).run();
}

// ---- sums of dQ ----

// dQ = scale * sums. Those of a block [64, D] lie as 128 threads hold them in accumulators of mma:
// float 128 (4 i + n) + t is value n of thread t, in column c + n % 2 of row r + 8 (n / 2), where
// c = 8 i + 2 (t % 4) and r = 16 (t / 32) + t % 32 / 4. A thread takes 8 channels of two rows,
// which four threads summed.
template <class T, int kD>
NABLA_KERNEL(kThreads, 6)
attention_finish_kernel(const NABLA_GRID_CONSTANT AttentionBackwardParams p) {
    const cuda::QueryBlock block(p.forward);
    const float scale = p.forward.scale;
    const auto* sums =
        reinterpret_cast<const ptx::F32x4*>(p.dq_sums + block.tile * (kBlock * kD));
    NABLA_UNROLL
    for (int first = 0; first < kBlock / 2 * kD / 8; first += kThreads) {
        const int unit = first + static_cast<int>(ptx::thread_index());
        const int i = unit % (kD / 8), quad = unit / (kD / 8);
        ptx::F32x4 x[4];  // each of four values, of four threads
        NABLA_UNROLL
        for (int n = 0; n < 4; ++n)
            x[n] = ptx::load_global_nc(sums + (4 * i + n) * (kThreads / 4) + quad);
        ptx::U32x4 packed[2];
        NABLA_UNROLL
        for (int lane = 0; lane < 4; ++lane) {
            const auto value = [&](int n) { return scale * x[n].v[lane]; };
            packed[0].v[lane] = ptx::pack<T>(value(0), value(1));
            packed[1].v[lane] = ptx::pack<T>(value(2), value(3));
        }
        NABLA_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int row = quad / 8 * 16 + quad % 8 + 8 * r;
            if (row < block.run.size)
                ptx::store_global(reinterpret_cast<ptx::U32x4*>(block.row<T>(p.dq, row) + 8 * i),
                                  packed[r]);
        }
    }
}

// ---- launches ----

template <class T, int kD, bool kAddsQueries>
void launch_keys(const AttentionBackwardParams& p) {
    const AttentionParams& f = p.forward;
    ptx::launch(
        attention_backward_keys_kernel<T, kD, kAddsQueries>,
        {"attention_backward_keys", static_cast<uint32_t>(f.batch * f.kv_heads * f.blocks.count),
         kThreads, KeyWarp<T, kD, kAddsQueries>::kSharedBytes, f.stream},
        p);
}

template <class T, int kD>
void launch_queries(const AttentionBackwardParams& p) {
    const AttentionParams& f = p.forward;
    ptx::launch(
        attention_backward_queries_kernel<T, kD>,
        {"attention_backward_queries", static_cast<uint32_t>(f.batch * f.heads * f.q_blocks),
         kThreads, QueryWarp<T, kD>::kSharedBytes, f.stream},
        p);
}

template <class T, int kD>
void launch_finish(const AttentionBackwardParams& p) {
    cuda::launch_on_query_blocks(attention_finish_kernel<T, kD>, "attention_finish", p);
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p) {
    cuda::with_type_and_head_dim(p.forward.dtype, p.forward.head_dim, [&](auto type, auto dim) {
        using T = decltype(type);
        constexpr int kD = decltype(dim)::value;
        cuda::launch_prepare<T, kD>(p);
        if (p.dq_sums) {
            launch_keys<T, kD, true>(p);
            launch_finish<T, kD>(p);
        } else {
            launch_keys<T, kD, false>(p);
            launch_queries<T, kD>(p);
        }
    });
}

}  // namespace nabla::sm80
