// Gradients of block_attention.cpp over the kept blocks, one pass, five products per pair of tiles:
//   P^T = exp2(K Q^T - lse),   dP^T = V dO^T,   dS^T = P^T * (dP^T - delta) * scale,
//   dV += P^T dO,   dK += dS^T Q,   dQ^T += K^T dS^T        with delta = rowsum(dO * O) - dlse.
//
// Query and key blocks are cut into the same number of chunks. In round r, one task takes query chunk c
// with key chunk (c + r) mod chunks: no two tasks of a round share a row of dQ, dK or dV, and every row
// receives its sums in an order that depends on the shape alone. So nothing is atomic or computed twice,
// and the result has the same bits at every thread count.
#include "cpu/block_attention.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace nabla::cpu::NABLA_ISA {
namespace {

constexpr int kChunkBlocks = 8;  // about as many as stay in the second-level cache

template <class T>
struct BackwardArrays {
    Element<T>*q_lanes, *dout_lanes;     // [D, lanes]
    Element<T>*q_steps, *dout_steps;     // [queries, D]
    Element<T>*k, *k_steps, *v;          // [keys, D]
    float *scores, *dp;                  // [keys, lanes]
    Element<T>*p, *ds;                   // [keys, lanes], pairs along lanes; scores and dp where floats
    Element<T>* ds_steps;                // [keys, lanes], pairs along keys; dp where floats
    float* dq;                           // [D, lanes]
    float *shift, *delta, *one;          // [lanes]: lse in log2 units, delta, 1

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
    const float scale_log2 = scale * kLog2E;
    const auto gradient = [&](int j, int v, Floats& p) {
        const int at = j * lanes + lane + v * kWidth;
        p = exp2(load(a.scores + at) * scale_log2 - shift[v]);
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
                store_raw(a.ds_steps + j / 2 * lanes + lane + v * kWidth, bfloat16_pairs(low, high));
            }
    }
}

// The kept keys of blocks begin .. end - 1 for one query tile: adds to dk_sum and dv_sum, and gives dq to
// dq_sum (`first`: stores it).
template <class T>
void backward_tile(const AttentionBackwardParams& p, const BackwardArrays<T>& a, const QueryTile& tile,
                   const uint32_t* bits, int begin, int end, bool first) {
    const AttentionParams& f = p.forward;
    const int dim = f.head_dim, kv_head = tile.h / (f.heads / f.kv_heads), n = tile.n, lanes = tile.lanes;
    const int64_t stat = (static_cast<int64_t>(tile.b) * f.heads + tile.h) * query_start(f, f.q_blocks) + tile.row;
    const T* q = at<T>(f.q, tile.b, tile.h, tile.row);
    const T* dout = at<T>(p.dout, tile.b, tile.h, tile.row);
    lanes_of(q, f.q.stride_s, n, dim, lanes, a.q_lanes);
    lanes_of(dout, p.dout.stride_s, n, dim, lanes, a.dout_lanes);
    const auto q_steps = steps_of(q, f.q.stride_s, n, dim, a.q_steps);
    const auto dout_steps = steps_of(dout, p.dout.stride_s, n, dim, a.dout_steps);
    for (int i = 0; i < lanes; ++i) {
        const float lse = i < n ? f.lse[stat + i] : 0;
        a.shift[i] = lse == -kInfinity ? 0 : lse * kLog2E;
        a.delta[i] = i < n ? p.delta[stat + i] : 0;
        a.one[i] = 1;
    }
    for (int i = 0; i < dim * lanes; ++i) a.dq[i] = 0;
    const int query_steps = (n + kPair<T> - 1) / kPair<T>;

    for_each_key_tile(f, bits, begin, end, [&](int key, int keys) {
        const auto k = rows_of(at<T>(f.k, tile.b, kv_head, key), f.k.stride_s, keys, dim, a.k);
        const auto v = rows_of(at<T>(f.v, tile.b, kv_head, key), f.v.stride_s, keys, dim, a.v);
        const auto k_steps = steps_of(at<T>(f.k, tile.b, kv_head, key), f.k.stride_s, keys, dim, a.k_steps);
        const Dot<T> dot;
        multiply<Layout::kRows, Start::kZero>(dot, keys, lanes, dim / kPair<T>, k.data, k.stride, a.q_lanes,
                                              lanes, a.scores, lanes);
        multiply<Layout::kRows, Start::kZero>(dot, keys, lanes, dim / kPair<T>, v.data, v.stride,
                                              a.dout_lanes, lanes, a.dp, lanes);
        for_panels(lanes, [&](auto vectors, int lane) {
            gradient_panel<T, decltype(vectors)::value>(a, lane, lanes, keys, f.scale);
        });
        multiply<Layout::kRows, Start::kAdd>(dot, keys, dim, query_steps, a.p, lanes / kPair<T>,
                                             dout_steps.data, dout_steps.stride,
                                             at<float>(p.dv_sum, tile.b, kv_head, key), p.dv_sum.stride_s);
        multiply<Layout::kRows, Start::kAdd>(dot, keys, dim, query_steps, a.ds, lanes / kPair<T>,
                                             q_steps.data, q_steps.stride,
                                             at<float>(p.dk_sum, tile.b, kv_head, key), p.dk_sum.stride_s);
        multiply<Layout::kColumns, Start::kAdd>(dot, dim, lanes, (keys + kPair<T> - 1) / kPair<T>,
                                                k_steps.data, k_steps.stride, a.ds_steps, lanes, a.dq, lanes);
    });

    float* dq = at<float>(p.dq_sum, tile.b, tile.h, tile.row);
    if (first) store_lanes<false>(a.dq, a.one, n, dim, lanes, dq, p.dq_sum.stride_s);
    else store_lanes<true>(a.dq, a.one, n, dim, lanes, dq, p.dq_sum.stride_s);
}

void zero_rows(const View& view, int b, int h, int64_t begin, int64_t end, int dim) {
    for (int64_t s = begin; s < end; ++s) std::memset(at<float>(view, b, h, s), 0, dim * sizeof(float));
}

// Call visit(b, h, first row, last row) in parallel for pieces of `rows` rows of each head.
template <class Visit>
void for_each_piece(int threads, int batch, int heads, int64_t rows, Visit visit) {
    constexpr int64_t kPiece = 256;
    const int64_t pieces = (rows + kPiece - 1) / kPiece;
    parallel_for(threads, batch * heads * pieces, [&](int64_t task, int) {
        const int64_t begin = task % pieces * kPiece, end = begin + kPiece < rows ? begin + kPiece : rows;
        visit(task / pieces / heads, task / pieces % heads, begin, end);
    });
}

template <class T>
void compute_delta(const AttentionBackwardParams& p) {
    const AttentionParams& f = p.forward;
    const int64_t rows = query_start(f, f.q_blocks);
    for_each_piece(f.threads, f.batch, f.heads, rows, [&](int64_t b, int64_t h, int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
            const T *dout = at<T>(p.dout, b, h, s), *out = at<T>(f.out, b, h, s);
            Floats total{};
            for (int d = 0; d < f.head_dim; d += kWidth) total += load(dout + d) * load(out + d);
            const int64_t i = (b * f.heads + h) * rows + s;
            p.delta[i] = sum(total) - (p.dlse ? p.dlse[i] : 0);
        }
    });
}

template <class T>
void round_sums(int threads, int batch, int heads, int64_t rows, int dim, const View& sums, const View& out) {
    for_each_piece(threads, batch, heads, rows, [&](int64_t b, int64_t h, int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
            const float* x = at<float>(sums, b, h, s);
            T* y = at<T>(out, b, h, s);
            for (int d = 0; d < dim; d += kWidth) store(y + d, load(x + d));
        }
    });
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p) {
    const AttentionParams& f = p.forward;
    const int group = f.heads / f.kv_heads;
    const int fewer = f.q_blocks < f.blocks.count ? f.q_blocks : f.blocks.count;
    const int chunks = (fewer + kChunkBlocks - 1) / kChunkBlocks;
    const auto cut = [&](int64_t blocks, int chunk) { return static_cast<int>(blocks * chunk / chunks); };
    with_dtype(f.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        compute_delta<T>(p);
        const Scratch<BackwardArrays<T>> scratch(f.threads, f.head_dim);
        for (int round = 0; round < chunks; ++round) {
            const int64_t tasks = static_cast<int64_t>(f.batch) * f.kv_heads * chunks;
            parallel_for(f.threads, tasks, [&](int64_t task, int slot) {
                const int chunk = task % chunks, kv_head = task / chunks % f.kv_heads,
                          b = task / chunks / f.kv_heads;
                const int other = (chunk + round) % chunks;
                const int key_begin = cut(f.blocks.count, other), key_end = cut(f.blocks.count, other + 1);
                const auto arrays = scratch.slot(slot, f.head_dim);
                if (round == 0) {
                    const int64_t begin = f.blocks.starts[key_begin], end = f.blocks.starts[key_end];
                    zero_rows(p.dk_sum, b, kv_head, begin, end, f.head_dim);
                    zero_rows(p.dv_sum, b, kv_head, begin, end, f.head_dim);
                }
                for (int h = kv_head * group; h < (kv_head + 1) * group; ++h)
                    for (int i = cut(f.q_blocks, chunk); i < cut(f.q_blocks, chunk + 1); ++i) {
                        const uint32_t* bits = bits_row(f, b, h, i);
                        if (find_bit<true>(bits, key_begin, key_end) == key_end) {
                            if (round == 0)
                                zero_rows(p.dq_sum, b, h, query_start(f, i), query_start(f, i + 1), f.head_dim);
                            continue;
                        }
                        for_each_query_tile(f, i, [&](int64_t row, int n, int lanes) {
                            backward_tile<T>(p, arrays, {b, h, row, n, lanes}, bits, key_begin, key_end,
                                             round == 0);
                        });
                    }
            });
        }
        if constexpr (!kSame<T, float>) {
            const int64_t q_rows = query_start(f, f.q_blocks);
            const int64_t k_rows = f.blocks.starts[f.blocks.count];
            round_sums<T>(f.threads, f.batch, f.heads, q_rows, f.head_dim, p.dq_sum, p.dq);
            round_sums<T>(f.threads, f.batch, f.kv_heads, k_rows, f.head_dim, p.dk_sum, p.dk);
            round_sums<T>(f.threads, f.batch, f.kv_heads, k_rows, f.head_dim, p.dv_sum, p.dv);
        }
    });
}

}  // namespace nabla::cpu::NABLA_ISA
