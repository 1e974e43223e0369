// Gradients of block_attention.cpp over the kept blocks, one pass, five products per pair of tiles:
//   P^T = exp2(K Q^T - lse),   dP^T = V dO^T,   dS^T = P^T * (dP^T - delta) * scale,
//   dV += P^T dO,   dK += dS^T Q,   dQ^T += K^T dS^T        with delta = rowsum(dO * O) - dlse.
//
// Query and key blocks are cut into the same number of chunks. In round r, one task takes query
// chunk c with key chunk (c + r) mod chunks: no two tasks of a round share a row of dQ, dK or dV,
// and every row receives its sums in an order that depends on shape and mask alone. So nothing is
// atomic or computed twice, and the result has the same bits at every thread count.
#include "cpu/block_attention.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

#include <algorithm>

namespace nabla::cpu::NABLA_ISA {
namespace {

constexpr int kMostChunkBlocks = 64;   // more sums would leave the caches
constexpr int kFewestChunkBlocks = 8;  // fewer would pack each query block too often
constexpr int kRoundTasks = 16;        // wanted between these bounds, to feed the threads
constexpr int kFewestPairs = 4;        // kept key blocks of a query block in a chunk, on average

template <class T>
struct BackwardArrays {
    Element<T>*q_lanes, *dout_lanes;  // [D, lanes]
    Element<T>*q_steps, *dout_steps;  // [queries, D]
    Element<T>*k, *k_steps, *v;       // [keys, D]
    float *scores, *dp;               // [keys, lanes]
    Element<T>*p, *ds;           // [keys, lanes], pairs along lanes; scores and dp where floats
    Element<T>* ds_steps;        // [keys, lanes], pairs along keys; dp where floats
    float* dq;                   // [D, lanes]
    float *shift, *delta, *one;  // [lanes]: lse, delta, 1

    BackwardArrays(Arena& arena, int dim)
        : q_lanes(arena.take<Element<T>>(dim * kQueryTile)),
          dout_lanes(arena.take<Element<T>>(dim * kQueryTile)),
          q_steps(arena.take<Element<T>>(kQueryTile * dim)),
          dout_steps(arena.take<Element<T>>(kQueryTile * dim)),
          k(arena.take<Element<T>>(kKeyTile * dim)),
          k_steps(arena.take<Element<T>>(kKeyTile * dim)),
          v(arena.take<Element<T>>(kKeyTile * dim)),
          scores(arena.take<float>(kKeyTile * kQueryTile)),
          dp(arena.take<float>(kKeyTile * kQueryTile)),
          dq(arena.take<float>(dim * kQueryTile)),
          shift(arena.take<float>(kQueryTile)),
          delta(arena.take<float>(kQueryTile)),
          one(arena.take<float>(kQueryTile)) {
        if constexpr (kPair<T> == 1) {
            p = scores;
            ds = ds_steps = dp;
        } else {
            p = arena.take<Element<T>>(kKeyTile * kQueryTile / 2);
            ds = arena.take<Element<T>>(kKeyTile * kQueryTile / 2);
            ds_steps = arena.take<Element<T>>(kKeyTile * kQueryTile / 2);
        }
    }
};

// One query tile: n rows of q from `row` on.
struct QueryTile {
    int b, h;
    int64_t row;
    int n, lanes;
};

// Turn scores and dp of `keys` keys into p and ds for kVectors vectors of lanes.
template <class T, int kVectors>
void gradient_panel(const BackwardArrays<T>& a, int lane, int lanes, int keys, float scale) {
    Floats shift[kVectors], delta[kVectors];
    for (int v = 0; v < kVectors; ++v) {
        shift[v] = load(a.shift + lane + v * kWidth);
        delta[v] = load(a.delta + lane + v * kWidth);
    }
    const auto gradient = [&](int j, int v, Floats& p) {
        const int at = j * lanes + lane + v * kWidth;
        const Floats x = (load(a.scores + at) * scale - shift[v]) * kLog2E;
        p = exp2(x > 0.0f ? Floats{} : x);  // lse is rounded; p is at most 1
        return p * (load(a.dp + at) - delta[v]) * scale;
    };
    if constexpr (kPair<T> == 1) {
        for (int j = 0; j < keys; ++j)
            for (int v = 0; v < kVectors; ++v) {
                Floats p;
                const Floats ds = gradient(j, v, p);
                store(a.p + j * lanes + lane + v * kWidth, p);
                store(a.ds + j * lanes + lane + v * kWidth, ds);
            }
    } else {
        const auto store_row = [&](Element<T>* rows, int j, int v, Floats x) {
            store(reinterpret_cast<BFloat16*>(rows) + j * lanes + lane + v * kWidth, x);
        };
        for (int j = 0; j < keys; j += 2)
            for (int v = 0; v < kVectors; ++v) {
                Floats p, low, high{};
                low = gradient(j, v, p);
                store_row(a.p, j, v, p);
                store_row(a.ds, j, v, low);
                if (j + 1 < keys) {
                    high = gradient(j + 1, v, p);
                    store_row(a.p, j + 1, v, p);
                    store_row(a.ds, j + 1, v, high);
                }
                store_raw(a.ds_steps + j / 2 * lanes + lane + v * kWidth,
                          bfloat16_pairs(low, high));
            }
    }
}

// The kept keys of blocks begin .. end - 1 for one query tile: adds to dk_sum and dv_sum, and gives
// dq to dq_sum (`first`: stores it).
template <class T>
void backward_tile(const AttentionBackwardParams& p, const BackwardArrays<T>& a,
                   const QueryTile& tile, const uint32_t* bits, int begin, int end, bool first) {
    const AttentionParams& f = p.forward;
    const int dim = f.head_dim, kv_head = tile.h / (f.heads / f.kv_heads), n = tile.n,
              lanes = tile.lanes;
    const int64_t stat =
        (static_cast<int64_t>(tile.b) * f.heads + tile.h) * query_start(f, f.q_blocks) + tile.row;
    const T* q = at<T>(f.q, tile.b, tile.h, tile.row);
    const T* dout = at<T>(p.dout, tile.b, tile.h, tile.row);
    lanes_of(q, f.q.stride_s, n, dim, lanes, a.q_lanes);
    lanes_of(dout, p.dout.stride_s, n, dim, lanes, a.dout_lanes);
    const auto q_steps = steps_of(q, f.q.stride_s, n, dim, a.q_steps);
    const auto dout_steps = steps_of(dout, p.dout.stride_s, n, dim, a.dout_steps);
    for (int i = 0; i < lanes; ++i) {
        const float lse = i < n ? f.lse[stat + i] : 0;
        a.shift[i] = lse == -kInfinity ? 0 : lse;
        a.delta[i] = i < n ? p.delta[stat + i] : 0;
        a.one[i] = 1;
    }
    for (int i = 0; i < dim * lanes; ++i) a.dq[i] = 0;
    const int query_steps = (n + kPair<T> - 1) / kPair<T>;

    const Dot<T> dot;
    for_each_key_tile(f, bits, begin, end, [&](int key, int keys, int next) {
        const T* k = at<T>(f.k, tile.b, kv_head, key);
        const T* v = at<T>(f.v, tile.b, kv_head, key);
        float* dk = at<float>(p.dk_sum, tile.b, kv_head, key);
        float* dv = at<float>(p.dv_sum, tile.b, kv_head, key);
        const auto k_rows = rows_of(k, f.k.stride_s, keys, dim, a.k);
        multiply<Layout::kRows, Start::kZero>(dot, keys, lanes, dim / kPair<T>, k_rows.data,
                                              k_rows.stride, a.q_lanes, lanes, a.scores, lanes,
                                              nullptr, prefetch_rows(v, f.v.stride_s, keys, dim));
        const auto v_rows = rows_of(v, f.v.stride_s, keys, dim, a.v);
        multiply<Layout::kRows, Start::kZero>(
            dot, keys, lanes, dim / kPair<T>, v_rows.data, v_rows.stride, a.dout_lanes, lanes, a.dp,
            lanes, nullptr, prefetch_rows(dv, p.dv_sum.stride_s, keys, dim));
        for_panels(lanes, [&](auto vectors, int lane) {
            gradient_panel<T, decltype(vectors)::value>(a, lane, lanes, keys, f.scale);
        });
        multiply<Layout::kRows, Start::kAdd>(
            dot, keys, dim, query_steps, a.p, lanes / kPair<T>, dout_steps.data, dout_steps.stride,
            dv, p.dv_sum.stride_s, nullptr, prefetch_rows(dk, p.dk_sum.stride_s, keys, dim));
        multiply<Layout::kRows, Start::kAdd>(dot, keys, dim, query_steps, a.ds, lanes / kPair<T>,
                                             q_steps.data, q_steps.stride, dk, p.dk_sum.stride_s);
        const auto k_steps = steps_of(k, f.k.stride_s, keys, dim, a.k_steps);
        multiply<Layout::kColumns, Start::kAdd>(
            dot, dim, lanes, (keys + kPair<T> - 1) / kPair<T>, k_steps.data, k_steps.stride,
            a.ds_steps, lanes, a.dq, lanes, nullptr,
            prefetch_rows(at<T>(f.k, tile.b, kv_head, next), f.k.stride_s, keys, dim));
    });

    float* dq = at<float>(p.dq_sum, tile.b, tile.h, tile.row);
    if (first) store_lanes<false>(a.dq, a.one, n, dim, lanes, dq, p.dq_sum.stride_s);
    else store_lanes<true>(a.dq, a.one, n, dim, lanes, dq, p.dq_sum.stride_s);
}

void zero_rows(const View& view, int b, int h, int64_t begin, int64_t end, int dim) {
    for (int64_t s = begin; s < end; ++s)
        std::memset(at<float>(view, b, h, s), 0, dim * sizeof(float));
}

// Round the finished sums to the element type; in float32 they are the result.
template <class T>
void round_rows(const View& sums, const View& out, int b, int h, int64_t begin, int64_t end,
                int dim) {
    if constexpr (!kSame<T, float>)
        for (int64_t s = begin; s < end; ++s)
            for (int d = 0; d < dim; d += kWidth)
                store(at<T>(out, b, h, s) + d, load(at<float>(sums, b, h, s) + d));
}

template <class T>
void compute_delta(const AttentionBackwardParams& p) {
    const AttentionParams& f = p.forward;
    const int64_t rows = query_start(f, f.q_blocks);
    const int64_t tasks = static_cast<int64_t>(f.batch) * f.heads * f.q_blocks;
    parallel_for(f.threads, tasks, [&](int64_t task, int) {
        const int64_t block = task % f.q_blocks, h = task / f.q_blocks % f.heads,
                      b = task / f.q_blocks / f.heads;
        for (int64_t s = query_start(f, block); s < query_start(f, block + 1); ++s) {
            const T *dout = at<T>(p.dout, b, h, s), *out = at<T>(f.out, b, h, s);
            Floats total{};
            for (int d = 0; d < f.head_dim; d += kWidth) total += load(dout + d) * load(out + d);
            const int64_t i = (b * f.heads + h) * rows + s;
            p.delta[i] = sum(total) - (p.dlse ? p.dlse[i] : 0);
        }
    });
}

// Kept key blocks of a query block, on average.
int64_t mean_kept(const AttentionParams& f) {
    const int words = (f.blocks.count + 31) / 32, rest = f.blocks.count % 32;
    const uint32_t last = rest ? (1u << rest) - 1 : ~0u;  // the bits after it are anything
    int64_t kept = 0;
    for (int b = 0; b < f.batch; ++b)
        for (int h = 0; h < f.heads; ++h)
            for (int i = 0; i < f.q_blocks; ++i) {
                const uint32_t* bits = bits_row(f, b, h, i);
                for (int w = 0; w < words; ++w)
                    kept += __builtin_popcount(w + 1 < words ? bits[w] : bits[w] & last);
            }
    return kept / (static_cast<int64_t>(f.batch) * f.heads * f.q_blocks);
}

// How many chunks the query blocks and the key blocks are cut into: by the mask alone, so that
// sums have one order. A query block is packed once for each chunk of which it keeps a part.
int count_chunks(const AttentionParams& f) {
    const auto divide_up = [](int n, int by) { return (n + by - 1) / by; };
    const int fewer = f.q_blocks < f.blocks.count ? f.q_blocks : f.blocks.count;
    const int for_cache = divide_up(fewer, kMostChunkBlocks),
              most = divide_up(fewer, kFewestChunkBlocks);
    const int for_threads = divide_up(kRoundTasks, f.batch * f.kv_heads);
    const int for_pairs = std::max(2, static_cast<int>(mean_kept(f) / kFewestPairs));
    const int wanted = std::max(for_cache, std::min(for_threads, for_pairs));
    return wanted < most ? wanted : most;
}

// One task of one round: the kept pairs of blocks of a query chunk and a key chunk.
template <class T>
void backward_chunks(const AttentionBackwardParams& p, const BackwardArrays<T>& a, int b,
                     int kv_head, int q_begin, int q_end, int k_begin, int k_end, bool first,
                     bool last) {
    const AttentionParams& f = p.forward;
    const int group = f.heads / f.kv_heads, dim = f.head_dim;
    const int64_t key = f.blocks.starts[k_begin], key_end = f.blocks.starts[k_end];
    if (first) {
        zero_rows(p.dk_sum, b, kv_head, key, key_end, dim);
        zero_rows(p.dv_sum, b, kv_head, key, key_end, dim);
    }
    for (int h = kv_head * group; h < (kv_head + 1) * group; ++h) {
        for (int i = q_begin; i < q_end; ++i) {
            const uint32_t* bits = bits_row(f, b, h, i);
            if (find_bit<true>(bits, k_begin, k_end) < k_end)
                for_each_query_tile(f, i, [&](int64_t row, int n, int lanes) {
                    backward_tile<T>(p, a, {b, h, row, n, lanes}, bits, k_begin, k_end, first);
                });
            else if (first)
                zero_rows(p.dq_sum, b, h, query_start(f, i), query_start(f, i + 1), dim);
        }
        if (last)
            round_rows<T>(p.dq_sum, p.dq, b, h, query_start(f, q_begin), query_start(f, q_end),
                          dim);
    }
    if (last) {
        round_rows<T>(p.dk_sum, p.dk, b, kv_head, key, key_end, dim);
        round_rows<T>(p.dv_sum, p.dv, b, kv_head, key, key_end, dim);
    }
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p) {
    const AttentionParams& f = p.forward;
    const int chunks = count_chunks(f);
    const auto cut = [&](int64_t blocks, int chunk) {
        return static_cast<int>(blocks * chunk / chunks);
    };
    with_dtype(f.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        compute_delta<T>(p);
        const Scratch<BackwardArrays<T>> scratch(f.threads, f.head_dim);
        for (int round = 0; round < chunks; ++round) {
            const int64_t tasks = static_cast<int64_t>(f.batch) * f.kv_heads * chunks;
            parallel_for(f.threads, tasks, [&](int64_t task, int slot) {
                const int head = task / chunks, chunk = task % chunks,
                          other = (chunk + round) % chunks;
                backward_chunks<T>(p, scratch.slot(slot, f.head_dim), head / f.kv_heads,
                                   head % f.kv_heads, cut(f.q_blocks, chunk),
                                   cut(f.q_blocks, chunk + 1), cut(f.blocks.count, other),
                                   cut(f.blocks.count, other + 1), round == 0, round == chunks - 1);
            });
        }
    });
}

}  // namespace nabla::cpu::NABLA_ISA
