// Bring rows x[i, d] of a tensor into the form that a product wants; n rows of D elements.
//
//   rows_of   A(r, k) or B with k along d           [n, D]            bfloat16 pairs lie along d
//   steps_of  the contraction runs over the rows    [n, D]            bfloat16 pairs lie along n
//   lanes_of  the rows become the lanes of B        [D, lanes]        bfloat16 pairs lie along d
//
// A tensor that already has the form is used where it lies. Rows past n are zero in lanes_of.
#pragma once

#include "cpu/gemm.h"

namespace nabla::cpu::NABLA_ISA {

template <class T>
struct DotOf {
    using type = FloatDot;
};
#if defined(__AVX512BF16__)
template <>
struct DotOf<BFloat16> {
    using type = BFloat16Dot;
};
#endif
template <class T>
using Dot = typename DotOf<T>::type;
template <class T>
using Element = typename Dot<T>::Element;

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// Elements of T in one Element<T>: 2 where products take pairs.
template <class T>
constexpr int kPair = kSame<Dot<T>, FloatDot> ? 1 : 2;

template <class T>
struct Operand {
    const Element<T>* data;
    int64_t stride;
};

template <class T>
static inline Operand<T> copied_rows(const T* x, int64_t stride, int n, int dim, Element<T>* copy) {
    for (int i = 0; i < n; ++i) {
        if constexpr (kPair<T> == 2)
            std::memcpy(copy + i * (dim / 2), x + i * stride, dim * sizeof(T));
        else
            for (int d = 0; d < dim; d += kWidth)
                store(copy + i * dim + d, load(x + i * stride + d));
    }
    return {copy, dim / kPair<T>};
}

template <class T>
static inline Operand<T> rows_of(const T* x, int64_t stride, int n, int dim, Element<T>* copy) {
    if constexpr (kSame<T, float>) return {x, stride};
    if constexpr (kPair<T> == 2)
        if (stride % 2 == 0) return {reinterpret_cast<const Element<T>*>(x), stride / 2};
    return copied_rows(x, stride, n, dim, copy);
}

template <class T>
static inline Operand<T> steps_of(const T* x, int64_t stride, int n, int dim, Element<T>* copy) {
    if constexpr (kPair<T> == 1) {
        // A product walks down the columns: rows far apart would share a few sets of the cache.
        if constexpr (kSame<T, float>)
            if (stride == dim) return {x, stride};
        return copied_rows(x, stride, n, dim, copy);
    } else {
        for (int i = 0; i < n; i += 2)
            for (int d = 0; d < dim; d += kWidth) {
                const Words low = widen(load_raw<Halves>(x + i * stride + d));
                const Words high =
                    i + 1 < n ? widen(load_raw<Halves>(x + (i + 1) * stride + d)) : Words{};
                store_raw(copy + i / 2 * dim + d, low | (high << 16));
            }
        return {copy, dim};
    }
}

template <class T>
static inline void lanes_of(const T* x, int64_t stride, int n, int dim, int lanes,
                            Element<T>* packed) {
    constexpr int kStep = kWidth * kPair<T>;  // elements of one square
    for (int lane = 0; lane < lanes; lane += kWidth) {
        int d = 0;
        for (; d + kStep <= dim; d += kStep) {
            Words square[kWidth];
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i) {
                const T* row = x + (lane + i) * stride + d;
                if (lane + i >= n) square[i] = Words{};
                else if constexpr (kPair<T> == 2) square[i] = load_raw<Words>(row);
                else square[i] = (Words)load(row);
            }
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i)
                store_raw(packed + (d / kPair<T> + i) * lanes + lane, square[i]);
        }
        for (; d < dim; d += kPair<T>)
            for (int i = lane; i < lane + kWidth; ++i) {
                uint32_t pair = 0;
                if (i < n) std::memcpy(&pair, x + i * stride + d, sizeof pair);
                std::memcpy(packed + d / kPair<T> * lanes + i, &pair, sizeof pair);
            }
    }
}

// x[i, d] = packed[d, i] * factor[i], or x[i, d] += that, for i < n.
template <bool kAdd, class T>
static inline void store_lanes(const float* packed, const float* factor, int n, int dim, int lanes,
                               T* x, int64_t stride) {
    for (int lane = 0; lane < n; lane += kWidth)
        for (int d = 0; d < dim; d += kWidth) {
            Words square[kWidth];
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i)
                square[i] = (Words)(load(packed + (d + i) * lanes + lane) * load(factor + lane));
            transpose(square);
            for (int i = 0; i < kWidth && lane + i < n; ++i) {
                T* row = x + (lane + i) * stride + d;
                if constexpr (kAdd) store(row, load(row) + (Floats)square[i]);
                else store(row, (Floats)square[i]);
            }
        }
}

}  // namespace nabla::cpu::NABLA_ISA
