// C[r, l] (+)= sum_k A(r, k) B[k, l] in registers: each A(r, k) is broadcast from memory and
// multiplies a row of B, whose lanes lie along the vectors.
//
// The sum starts at 0 and meets C at the end. A C that gathers many products is then a sum of sums,
// whose rounding error grows with the root of products + depth, not of products * depth. A product
// that is too deep is cut into parts for the same reason.
//
// A is row-major, or transposed ([k, r]); nothing has to be packed. The element of A and B is a
// float, or a pair of bfloat16 along k where the machine has their dot product; C is always float.
#pragma once

#include "cpu/simd.h"

namespace nabla::cpu::NABLA_ISA {

struct FloatDot {
    using Element = float;
    using Vector = Floats;
    static inline Vector broadcast(const float* p) { return splat(*p); }
    static inline Floats multiply_add(Vector a, Vector b, Floats c) { return a * b + c; }
};

#if defined(__AVX512BF16__)
struct BFloat16Dot {
    using Element = uint32_t;
    using Vector = Words;
    static inline Vector broadcast(const uint32_t* p) {
        return (Words)_mm512_set1_epi32(load_raw<int>(p));
    }
    static inline Floats multiply_add(Vector a, Vector b, Floats c) {
        return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
    }
};
#endif

// Rows that a product asks the caches for while it computes: those that the next product reads.
struct Prefetch {
    const void* data = nullptr;
    int64_t stride = 0;  // bytes
    int rows = 0;
    int bytes = 0;  // of each row

    // The share of the rows that belongs to `begin` .. end - 1 of `of` steps.
    void step(int begin, int end, int of) const {
        for (int r = rows * begin / of; r < rows * end / of; ++r)
            for (int i = 0; i < bytes; i += 64)
                __builtin_prefetch(static_cast<const char*>(data) + r * stride + i, 0, 2);
    }
};

enum class Layout { kRows, kColumns };          // A(r, k) is a[r * lda + k], or a[k * lda + r]
enum class Update { kStore, kAdd, kScaleAdd };  // C = sum, C + sum, or C * scale[lane] + sum

template <int kRows, int kVectors, Layout kLayout, Update kUpdate, class Dot>
static inline void multiply_tile(int depth, const typename Dot::Element* a, int64_t lda,
                                 const typename Dot::Element* b, int64_t ldb, float* c, int64_t ldc,
                                 const float* scale) {
    using Vector = typename Dot::Vector;
    Floats sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Floats{};
#pragma GCC unroll 1
    for (int k = 0; k < depth; ++k) {
        Vector row[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) row[v] = load_raw<Vector>(b + k * ldb + v * kWidth);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const Vector x =
                Dot::broadcast(kLayout == Layout::kRows ? a + r * lda + k : a + k * lda + r);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sum[r][v] = Dot::multiply_add(x, row[v], sum[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
        Floats factor{};
        if constexpr (kUpdate == Update::kScaleAdd) factor = load(scale + v * kWidth);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            float* at = c + r * ldc + v * kWidth;
            if constexpr (kUpdate == Update::kAdd) sum[r][v] += load(at);
            if constexpr (kUpdate == Update::kScaleAdd) sum[r][v] += load(at) * factor;
            store(at, sum[r][v]);
        }
    }
}

// `rows` <= kRows rows.
template <int kRows, int kVectors, Layout kLayout, Update kUpdate, class Dot, class... Args>
static inline void multiply_rest(int rows, Args... args) {
    if constexpr (kRows > 0) {
        if (rows == kRows) multiply_tile<kRows, kVectors, kLayout, kUpdate, Dot>(args...);
        else multiply_rest<kRows - 1, kVectors, kLayout, kUpdate, Dot>(rows, args...);
    }
}

template <int kVectors, Layout kLayout, Update kUpdate, class Dot>
static void multiply_panel(int rows, int depth, const typename Dot::Element* a, int64_t lda,
                           const typename Dot::Element* b, int64_t ldb, float* c, int64_t ldc,
                           const float* scale, const Prefetch& prefetch) {
    // The accumulators fill the registers.
    constexpr int kRows = kTileVectors == 4 && kVectors < 4 ? 8 : 6;
    constexpr auto row_step = [](int64_t lda) { return kLayout == Layout::kRows ? lda : 1; };
    int r = 0;
    for (; r + kRows <= rows; r += kRows) {
        prefetch.step(r, r + kRows, rows);
        multiply_tile<kRows, kVectors, kLayout, kUpdate, Dot>(depth, a + r * row_step(lda), lda, b,
                                                              ldb, c + r * ldc, ldc, scale);
    }
    prefetch.step(r, rows, rows);
    multiply_rest<kRows - 1, kVectors, kLayout, kUpdate, Dot>(
        rows - r, depth, a + r * row_step(lda), lda, b, ldb, c + r * ldc, ldc, scale);
}

// The depth of the parts of a product, of which the last may have less.
inline int part_of(int depth) { return depth <= 128 ? depth : 64; }

// `lanes` is a multiple of kLanes; `depth` counts elements, so pairs for BFloat16Dot.
template <Layout kLayout, Update kUpdate, class Dot>
static void multiply(Dot, int rows, int lanes, int depth, const typename Dot::Element* a,
                     int64_t lda, const typename Dot::Element* b, int64_t ldb, float* c,
                     int64_t ldc, const float* scale = nullptr, const Prefetch& prefetch = {}) {
    const int part = part_of(depth);
    for_panels(lanes, [&](auto vectors, int lane) {
        constexpr int kVectors = decltype(vectors)::value;
        multiply_panel<kVectors, kLayout, kUpdate, Dot>(
            rows, part, a, lda, b + lane, ldb, c + lane, ldc,
            kUpdate == Update::kScaleAdd ? scale + lane : nullptr, lane ? Prefetch{} : prefetch);
        for (int k = part; k < depth; k += part)
            multiply_panel<kVectors, kLayout, Update::kAdd, Dot>(
                rows, depth - k < part ? depth - k : part,
                a + k * (kLayout == Layout::kRows ? 1 : lda), lda, b + k * ldb + lane, ldb,
                c + lane, ldc, nullptr, {});
    });
}

}  // namespace nabla::cpu::NABLA_ISA
