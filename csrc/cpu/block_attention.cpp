// out[i] = sum_j softmax_j(scale * q_i . k_j) v_j over the keys j of the blocks that i's row keeps.
//
// Computed transposed, so that queries lie along the lanes and neither K nor a row sum crosses
// lanes:
//   S^T [keys, queries] = K Q^T,   P^T = exp2(S^T - max),   O^T [D, queries] = O^T * correction +
//   V^T P^T.
// One task computes one query block; no other task touches its rows.
#include "cpu/block_attention.h"

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace nabla::cpu::NABLA_ISA {
namespace {

template <class T>
struct ForwardArrays {
    Element<T>* q;       // [D, lanes]
    Element<T>* k;       // [keys, D]
    Element<T>* v;       // [keys, D]
    float* scores;       // [keys, lanes]
    Element<T>* p;       // [keys, lanes]; the scores themselves where elements are floats
    float* out;          // [D, lanes]
    float *top, *total;  // [lanes]: running maximum (of sign * q . k), sum of p
    float* correction;   // [lanes]: what a new maximum multiplies out and total by

    ForwardArrays(Arena& arena, int dim)
        : q(arena.take<Element<T>>(dim * kQueryTile)),
          k(arena.take<Element<T>>(kKeyTile * dim)),
          v(arena.take<Element<T>>(kKeyTile * dim)),
          scores(arena.take<float>(kKeyTile * kQueryTile)),
          p(take_p(arena)),
          out(arena.take<float>(dim * kQueryTile)),
          top(arena.take<float>(kQueryTile)),
          total(arena.take<float>(kQueryTile)),
          correction(arena.take<float>(kQueryTile)) {}

    Element<T>* take_p(Arena& arena) {
        if constexpr (kPair<T> == 1) return scores;
        else return arena.take<Element<T>>(kKeyTile / 2 * kQueryTile);
    }
};

// The factor of q . k in two parts. The maximum is taken of sign * q . k, which is exact, so the
// difference from it is never positive and is as accurate for large scores as for small ones.
struct Scale {
    float sign;  // 1 or -1
    float
        magnitude;  // never 0: where nothing has been seen the maximum is -inf, and -inf * 0 is NaN

    explicit Scale(float scale)
        : sign(scale < 0 ? -1 : 1), magnitude(scale == 0 ? 0x1p-126f : scale * sign) {}
};

// Turn the scores of `keys` more keys into p, with the running maximum and sum of kVectors vectors
// of lanes.
template <class T, int kVectors>
void softmax_panel(const ForwardArrays<T>& a, int lane, int lanes, int keys, Scale scale) {
    const float scale_log2 = scale.magnitude * kLog2E;
    Floats top[kVectors], shift[kVectors], total[kVectors];
    for (int v = 0; v < kVectors; ++v) top[v] = load(a.top + lane + v * kWidth);
    for (int j = 0; j < keys; ++j)
        for (int v = 0; v < kVectors; ++v)
            top[v] = max(top[v], load(a.scores + j * lanes + lane + v * kWidth) * scale.sign);
    for (int v = 0; v < kVectors; ++v) {
        const int at = lane + v * kWidth;
        shift[v] = top[v] == -kInfinity ? Floats{}
                                        : top[v];  // no score above -inf yet: p and total stay 0
        total[v] = Floats{};
        store(a.correction + at, exp2((load(a.top + at) - shift[v]) * scale_log2));
        store(a.top + at, top[v]);
    }
    const auto probability = [&](int j, int v) {
        const Floats score = load(a.scores + j * lanes + lane + v * kWidth);
        const Floats p = exp2((score * scale.sign - shift[v]) * scale_log2);
        total[v] += p;
        return p;
    };
    if constexpr (kPair<T> == 1) {
        for (int j = 0; j < keys; ++j)
            for (int v = 0; v < kVectors; ++v)
                store(a.p + j * lanes + lane + v * kWidth, probability(j, v));
    } else {
        for (int j = 0; j < keys; j += 2)
            for (int v = 0; v < kVectors; ++v) {
                const Floats low = probability(j, v);
                const Floats high = j + 1 < keys ? probability(j + 1, v) : Floats{};
                store_raw(a.p + j / 2 * lanes + lane + v * kWidth, bfloat16_pairs(low, high));
            }
    }
    // Like out, a sum of sums of tiles: one chain over all keys would round far more.
    for (int v = 0; v < kVectors; ++v) {
        const int at = lane + v * kWidth;
        store(a.total + at, load(a.total + at) * load(a.correction + at) + total[v]);
    }
}

template <class T>
void forward_tile(const AttentionParams& p, const ForwardArrays<T>& a, int b, int h, int block,
                  int64_t row, int n, int lanes) {
    const int dim = p.head_dim, kv_head = h / (p.heads / p.kv_heads);
    const Scale scale(p.scale);
    // Where this thread is likely to go on when the others have each taken one tile.
    const int64_t later = row + kQueryTile * p.threads;
    Prefetch later_q;
    if (later + n <= query_start(p, p.q_blocks))
        later_q = prefetch_rows(at<T>(p.q, b, h, later), p.q.stride_s, n, dim);
    lanes_of(at<T>(p.q, b, h, row), p.q.stride_s, n, dim, lanes, a.q);
    for (int i = 0; i < dim * lanes; ++i) a.out[i] = 0;
    for (int i = 0; i < lanes; ++i) a.top[i] = -kInfinity, a.total[i] = 0;

    for_each_key_tile(
        p, bits_row(p, b, h, block), 0, p.blocks.count, [&](int key, int keys, int next) {
            const T* keys_v = at<T>(p.v, b, kv_head, key);
            const auto k = rows_of(at<T>(p.k, b, kv_head, key), p.k.stride_s, keys, dim, a.k);
            multiply<Layout::kRows, Update::kStore>(Dot<T>{}, keys, lanes, dim / kPair<T>, k.data,
                                                    k.stride, a.q, lanes, a.scores, lanes, nullptr,
                                                    prefetch_rows(keys_v, p.v.stride_s, keys, dim));
            for_panels(lanes, [&](auto vectors, int lane) {
                softmax_panel<T, decltype(vectors)::value>(a, lane, lanes, keys, scale);
            });
            const auto v = steps_of(keys_v, p.v.stride_s, keys, dim, a.v);
            const T* next_k = at<T>(p.k, b, kv_head, next);
            multiply<Layout::kColumns, Update::kScaleAdd>(
                Dot<T>{}, dim, lanes, (keys + kPair<T> - 1) / kPair<T>, v.data, v.stride, a.p,
                lanes, a.out, lanes, a.correction,
                next == key ? later_q : prefetch_rows(next_k, p.k.stride_s, keys, dim));
        });

    float* lse = p.lse + (static_cast<int64_t>(b) * p.heads + h) * query_start(p, p.q_blocks) + row;
    for (int i = 0; i < n; ++i) lse[i] = a.top[i] * scale.magnitude + __builtin_logf(a.total[i]);
    float* inverse = a.correction;
    for (int i = 0; i < lanes; ++i) inverse[i] = a.total[i] == 0 ? 0 : 1 / a.total[i];
    store_lanes<false>(a.out, inverse, n, dim, lanes, at<T>(p.out, b, h, row), p.out.stride_s);
}

}  // namespace

void attention_forward(const AttentionParams& p) {
    with_dtype(p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const Scratch<ForwardArrays<T>> scratch(p.threads, p.head_dim);
        const int64_t tasks = static_cast<int64_t>(p.batch) * p.heads * p.q_blocks;
        parallel_for(p.threads, tasks, [&](int64_t task, int slot) {
            const int block = task % p.q_blocks, h = task / p.q_blocks % p.heads,
                      b = task / p.q_blocks / p.heads;
            const auto arrays = scratch.slot(slot, p.head_dim);
            for_each_query_tile(p, block, [&](int64_t row, int n, int lanes) {
                forward_tile<T>(p, arrays, b, h, block, row, n, lanes);
            });
        });
    });
}

}  // namespace nabla::cpu::NABLA_ISA
