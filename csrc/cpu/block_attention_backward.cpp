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

namespace nabla::cpu::NABLA_ISA {
namespace {

constexpr int kMostChunkBlocks = 64;   // more sums would leave the caches
constexpr int kFewestChunkBlocks = 8;  // fewer would pack each query block too often
constexpr int kRoundTasks = 16;        // wanted between these bounds, to feed the threads
constexpr int kFewestPairs = 4;        // kept key blocks of a query block in a chunk, on average
constexpr int kTasksPerThread = 2;     // in a round, where there are heads enough

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

// Memory for the running sums of one key head and the query heads that read it.
template <class T>
struct SumArrays {
    bool* started;        // [N]: the sums of this key block are set
    float *dq, *dk, *dv;  // [query heads, Sq, D], [Sk, D], [Sk, D]; none where T is float

    SumArrays(Arena& arena, int blocks, int64_t q_elements, int64_t k_elements)
        : started(arena.take<bool>(blocks)),
          dq(arena.take<float>(kSame<T, float> ? 0 : q_elements)),
          dk(arena.take<float>(kSame<T, float> ? 0 : k_elements)),
          dv(arena.take<float>(kSame<T, float> ? 0 : k_elements)) {}
};

// The running sums, float32: in float32 they are the results themselves.
struct Sums {
    bool* started;    // [N]
    View dq, dk, dv;  // [1, query heads, Sq, D], [1, 1, Sk, D], [1, 1, Sk, D]
};

template <class T>
Sums sums_of(const AttentionBackwardParams& p, const SumArrays<T>& arrays, int b, int kv_head) {
    const AttentionParams& f = p.forward;
    if constexpr (kSame<T, float>) {
        const auto from_head = [&](const View& x, int h) {
            return View{at<float>(x, b, h, 0), 0, x.stride_h, x.stride_s};
        };
        return {arrays.started, from_head(p.dq, kv_head * (f.heads / f.kv_heads)),
                from_head(p.dk, kv_head), from_head(p.dv, kv_head)};
    } else {
        const int64_t dim = f.head_dim;
        return {arrays.started,
                {arrays.dq, 0, query_start(f, f.q_blocks) * dim, dim},
                {arrays.dk, 0, 0, dim},
                {arrays.dv, 0, 0, dim}};
    }
}

// One query tile: n rows of q from `row` on.
struct QueryTile {
    int b, h;
    int64_t row;
    int n, lanes;
};

// Where the lse and delta of a tile begin.
int64_t stat_of(const AttentionParams& f, const QueryTile& tile) {
    return (static_cast<int64_t>(tile.b) * f.heads + tile.h) * query_start(f, f.q_blocks) +
           tile.row;
}

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

// The kept keys of blocks begin .. end - 1 for one query tile: adds to the sums of dk, dv and dq
// (`first`: stores that of dq).
template <class T>
void backward_tile(const AttentionBackwardParams& p, const BackwardArrays<T>& a, const Sums& sums,
                   const QueryTile& tile, const uint32_t* bits, int begin, int end, bool first) {
    const AttentionParams& f = p.forward;
    const int dim = f.head_dim, group = f.heads / f.kv_heads, kv_head = tile.h / group, n = tile.n,
              lanes = tile.lanes;
    const int64_t stat = stat_of(f, tile);
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
        float* dk = at<float>(sums.dk, 0, 0, key);
        float* dv = at<float>(sums.dv, 0, 0, key);
        const auto k_rows = rows_of(k, f.k.stride_s, keys, dim, a.k);
        multiply<Layout::kRows, Update::kStore>(dot, keys, lanes, dim / kPair<T>, k_rows.data,
                                                k_rows.stride, a.q_lanes, lanes, a.scores, lanes,
                                                nullptr, prefetch_rows(v, f.v.stride_s, keys, dim));
        const auto v_rows = rows_of(v, f.v.stride_s, keys, dim, a.v);
        multiply<Layout::kRows, Update::kStore>(
            dot, keys, lanes, dim / kPair<T>, v_rows.data, v_rows.stride, a.dout_lanes, lanes, a.dp,
            lanes, nullptr, prefetch_rows(dv, sums.dv.stride_s, keys, dim));
        for_panels(lanes, [&](auto vectors, int lane) {
            gradient_panel<T, decltype(vectors)::value>(a, lane, lanes, keys, f.scale);
        });
        multiply<Layout::kRows, Update::kAdd>(
            dot, keys, dim, query_steps, a.p, lanes / kPair<T>, dout_steps.data, dout_steps.stride,
            dv, sums.dv.stride_s, nullptr, prefetch_rows(dk, sums.dk.stride_s, keys, dim));
        multiply<Layout::kRows, Update::kAdd>(dot, keys, dim, query_steps, a.ds, lanes / kPair<T>,
                                              q_steps.data, q_steps.stride, dk, sums.dk.stride_s);
        const auto k_steps = kPair<T> == 1 && k_rows.stride == dim
                                 ? k_rows
                                 : steps_of(k, f.k.stride_s, keys, dim, a.k_steps);
        multiply<Layout::kColumns, Update::kAdd>(
            dot, dim, lanes, (keys + kPair<T> - 1) / kPair<T>, k_steps.data, k_steps.stride,
            a.ds_steps, lanes, a.dq, lanes, nullptr,
            prefetch_rows(at<T>(f.k, tile.b, kv_head, next), f.k.stride_s, keys, dim));
    });

    float* dq = at<float>(sums.dq, 0, tile.h % group, tile.row);
    if (first) store_lanes<false>(a.dq, a.one, n, dim, lanes, dq, sums.dq.stride_s);
    else store_lanes<true>(a.dq, a.one, n, dim, lanes, dq, sums.dq.stride_s);
}

void zero_rows(const View& sums, int g, int64_t begin, int64_t end, int dim) {
    for (int64_t s = begin; s < end; ++s)
        std::memset(at<float>(sums, 0, g, s), 0, dim * sizeof(float));
}

// The sums of a key block become zero when a row first keeps it, so that they are in the caches.
void start_sums(const AttentionParams& f, const Sums& sums, int block) {
    if (sums.started[block]) return;
    sums.started[block] = true;
    const int64_t key = f.blocks.starts[block], key_end = f.blocks.starts[block + 1];
    zero_rows(sums.dk, 0, key, key_end, f.head_dim);
    zero_rows(sums.dv, 0, key, key_end, f.head_dim);
}

// Round finished sums of head g to head h of the result; in float32 they are the result.
template <class T>
void round_rows(const View& sums, int g, const View& out, int b, int h, int64_t begin, int64_t end,
                int dim) {
    if constexpr (!kSame<T, float>)
        for (int64_t s = begin; s < end; ++s)
            for (int d = 0; d < dim; d += kWidth)
                store(at<T>(out, b, h, s) + d, load(at<float>(sums, 0, g, s) + d));
}

// delta of one query tile: products in the order of those of dP, so that dP - delta is exactly 0 in
// a row of one key, whose out is v.
template <class T>
void compute_delta(const AttentionBackwardParams& p, const BackwardArrays<T>& a,
                   const QueryTile& tile) {
    const AttentionParams& f = p.forward;
    const int dim = f.head_dim, n = tile.n, lanes = tile.lanes;
    using Vector = typename Dot<T>::Vector;
    const Element<T>* out = a.q_lanes;
    lanes_of(at<T>(f.out, tile.b, tile.h, tile.row), f.out.stride_s, n, dim, lanes, a.q_lanes);
    lanes_of(at<T>(p.dout, tile.b, tile.h, tile.row), p.dout.stride_s, n, dim, lanes, a.dout_lanes);
    const int depth = dim / kPair<T>, part = part_of(depth);
    for (int lane = 0; lane < lanes; lane += kWidth) {
        Floats total{};
        for (int begin = 0; begin < depth; begin += part) {
            Floats sum{};
            for (int k = begin; k < depth && k < begin + part; ++k)
                sum = Dot<T>::multiply_add(load_raw<Vector>(out + k * lanes + lane),
                                           load_raw<Vector>(a.dout_lanes + k * lanes + lane), sum);
            total += sum;
        }
        store(a.delta + lane, total);
    }
    const int64_t stat = stat_of(f, tile);
    for (int i = 0; i < n; ++i) p.delta[stat + i] = a.delta[i] - (p.dlse ? p.dlse[stat + i] : 0);
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

int divide_up(int n, int by) { return (n + by - 1) / by; }

// Not of std: an inline function there, compiled for AVX-512, could be linked for all.
int smaller(int a, int b) { return a < b ? a : b; }
int larger(int a, int b) { return a < b ? b : a; }

// How many chunks the query blocks and the key blocks are cut into: by the mask alone, so that
// sums have one order. A query block is packed once for each chunk of which it keeps a part.
int count_chunks(const AttentionParams& f) {
    const int fewer = smaller(f.q_blocks, f.blocks.count);
    const int for_cache = divide_up(fewer, kMostChunkBlocks),
              most = divide_up(fewer, kFewestChunkBlocks);
    const int for_threads = divide_up(kRoundTasks, f.batch * f.kv_heads);
    const int for_pairs = larger(2, mean_kept(f) / kFewestPairs);
    const int wanted = larger(for_cache, smaller(for_threads, for_pairs));
    return smaller(wanted, most);
}

// One task of one round: a query chunk with a key chunk.
struct Chunks {
    int b, kv_head;
    int q_begin, q_end, k_begin, k_end;  // blocks
    bool first, last;                    // round
};

template <class T>
void backward_chunks(const AttentionBackwardParams& p, const BackwardArrays<T>& a, const Sums& sums,
                     const Chunks& c) {
    const AttentionParams& f = p.forward;
    const int group = f.heads / f.kv_heads, dim = f.head_dim;
    if (c.first) std::memset(sums.started + c.k_begin, false, c.k_end - c.k_begin);
    for (int g = 0; g < group; ++g)
        for (int i = c.q_begin; i < c.q_end; ++i) {
            const int h = c.kv_head * group + g;
            const int64_t begin = query_start(f, i), end = query_start(f, i + 1);
            const uint32_t* bits = bits_row(f, c.b, h, i);
            if (c.first)
                for_each_query_tile(f, i, [&](int64_t row, int n, int lanes) {
                    compute_delta<T>(p, a, {c.b, h, row, n, lanes});
                });
            for_each_run(bits, c.k_begin, c.k_end, [&](int run_begin, int run_end) {
                for (int j = run_begin; j < run_end; ++j) start_sums(f, sums, j);
            });
            if (find_bit<true>(bits, c.k_begin, c.k_end) < c.k_end)
                for_each_query_tile(f, i, [&](int64_t row, int n, int lanes) {
                    backward_tile<T>(p, a, sums, {c.b, h, row, n, lanes}, bits, c.k_begin, c.k_end,
                                     c.first);
                });
            else if (c.first) zero_rows(sums.dq, g, begin, end, dim);
            if (c.last) round_rows<T>(sums.dq, g, p.dq, c.b, h, begin, end, dim);
        }
    if (c.last) {
        const int64_t begin = f.blocks.starts[c.k_begin], end = f.blocks.starts[c.k_end];
        for (int j = c.k_begin; j < c.k_end; ++j) start_sums(f, sums, j);
        round_rows<T>(sums.dk, 0, p.dk, c.b, c.kv_head, begin, end, dim);
        round_rows<T>(sums.dv, 0, p.dv, c.b, c.kv_head, begin, end, dim);
    }
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p) {
    const AttentionParams& f = p.forward;
    const int chunks = count_chunks(f), heads = f.batch * f.kv_heads;
    const auto cut = [&](int64_t blocks, int chunk) {
        return static_cast<int>(blocks * chunk / chunks);
    };
    with_dtype(f.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        // The fewer heads at once, the less memory their sums take; no sum reads another head.
        const int needed = divide_up(kTasksPerThread * f.threads, chunks);
        const int at_once = kSame<T, float> ? heads : smaller(heads, needed);
        const int64_t group = f.heads / f.kv_heads, dim = f.head_dim;
        const int64_t q_elements = group * query_start(f, f.q_blocks) * dim,
                      k_elements = f.blocks.starts[f.blocks.count] * dim;
        const Scratch<SumArrays<T>> memory(at_once, f.blocks.count, q_elements, k_elements);
        const Scratch<BackwardArrays<T>> scratch(f.threads, f.head_dim);
        for (int head = 0; head < heads; head += at_once)
            for (int round = 0; round < chunks; ++round) {
                const int64_t tasks = int64_t{smaller(at_once, heads - head)} * chunks;
                parallel_for(f.threads, tasks, [&](int64_t task, int slot) {
                    const int index = task / chunks, q_chunk = task % chunks,
                              k_chunk = (q_chunk + round) % chunks;
                    const int b = (head + index) / f.kv_heads,
                              kv_head = (head + index) % f.kv_heads;
                    const auto sums = memory.slot(index, f.blocks.count, q_elements, k_elements);
                    backward_chunks<T>(
                        p, scratch.slot(slot, f.head_dim), sums_of<T>(p, sums, b, kv_head),
                        {b, kv_head, cut(f.q_blocks, q_chunk), cut(f.q_blocks, q_chunk + 1),
                         cut(f.blocks.count, k_chunk), cut(f.blocks.count, k_chunk + 1), round == 0,
                         round == chunks - 1});
                });
            }
    });
}

}  // namespace nabla::cpu::NABLA_ISA
