// Vectors of kWidth floats in GCC's vector extension: the same code for every instruction set.
//
// This header is compiled once per instruction set, in the namespace NABLA_ISA, so that no function
// built for one machine can be linked into the code of another. For the same reason the kernels use
// no templates of the standard library. exp2 is accurate to 2e-7, is 0 at -127 and below, and keeps
// NaN.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "params.h"

namespace nabla::cpu::NABLA_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kTileVectors = 4;  // vectors that a row of a register tile may have
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kTileVectors = 2;
#else
constexpr int kWidth = 4;
#if defined(__aarch64__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
#endif
constexpr int kLanes = 16;  // every row of scratch memory is a multiple of this many elements

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
// Doubles fill a register with half as many lanes.
typedef double Doubles __attribute__((vector_size(4 * kWidth)));
typedef float HalfFloats __attribute__((vector_size(2 * kWidth)));
typedef int32_t HalfInts __attribute__((vector_size(2 * kWidth)));

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

constexpr float kInfinity = __builtin_inff();

// Loads, stores and conversions.

template <class V, class T>
static inline V load_raw(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V, class T>
static inline void store_raw(T* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

static inline Floats splat(float x) { return x - Floats{}; }
static inline Words splat(uint32_t x) { return x - Words{}; }

static inline Words widen(Halves h) { return __builtin_convertvector(h, Words); }
static inline Halves narrow(Words w) { return __builtin_convertvector(w, Halves); }

static inline Floats load(const float* p) { return load_raw<Floats>(p); }
static inline Floats load(const BFloat16* p) { return (Floats)(widen(load_raw<Halves>(p)) << 16); }

static inline Floats load(const Float16* p) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(load_raw<__m256i>(p));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(load_raw<__m128i>(p));
#else
    const Words h = widen(load_raw<Halves>(p));
    const Words sign = (h & 0x8000u) << 16;
    const Words rest = (h & 0x7fffu) << 13;
    // Read as a float, the exponent is 112 too small; the product also corrects subnormals.
    const Words finite = (Words)((Floats)rest * 0x1p112f);
    const Words special = rest | 0x7f800000u;
    return (Floats)(sign | (rest >= (0x7c00u << 13) ? special : finite));
#endif
}

static inline void store(float* p, Floats v) { store_raw(p, v); }

// Round to nearest even; a NaN stays one.
static inline Words bfloat16_bits(Floats v) {
    const Words w = (Words)v;
    const Words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
    return v == v ? rounded : ((w >> 16) | 0x40u);
}

// Lane i holds low[i] and high[i] as bfloat16.
static inline Words bfloat16_pairs(Floats low, Floats high) {
#if defined(__AVX512BF16__)
    const __m512i order = (__m512i)(Words){
        0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007,
        0x180008, 0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    return (Words)_mm512_permutexvar_epi16(order, both);
#else
    return bfloat16_bits(low) | (bfloat16_bits(high) << 16);
#endif
}

static inline void store(BFloat16* p, Floats v) { store_raw(p, narrow(bfloat16_bits(v))); }

static inline void store(Float16* p, Floats v) {
#if defined(__AVX512F__)
    store_raw(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    store_raw(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    const Words sign = ((Words)v >> 16) & 0x8000u;
    const Words w = (Words)v & 0x7fffffffu;
    const Words normal = (w - (112u << 23) + 0xfffu + ((w >> 13) & 1u)) >> 13;
    // Adding 0.5 leaves the 10 bits of a subnormal half at the low end, rounded to nearest even.
    const Words subnormal = (Words)((Floats)w + 0.5f) - 0x3f000000u;
    const Words special = w > 0x7f800000u ? splat(uint32_t{0x7e00}) : splat(uint32_t{0x7c00});
    const Words finite = w < (113u << 23) ? subnormal : normal;
    store_raw(p, narrow(sign | (w >= (143u << 23) ? special : finite)));
#endif
}

// Arithmetic.

// `other` where it is larger than x, else x: max(NaN, y) is NaN and max(x, NaN) is x.
static inline Floats max(Floats x, Floats other) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)other, (__m512)x);
#elif defined(__AVX2__)
    return (Floats)_mm256_max_ps((__m256)other, (__m256)x);
#else
    return other > x ? other : x;
#endif
}

static inline Floats exp2(Floats x) {
    x = max(x, splat(-127.0f));
    // Adding 1.5 * 2^23 rounds to an integer, which the 127 turns into the exponent bits of 2^n.
    constexpr float kRound = 12582912.0f + 127.0f;
    const Floats t = x + kRound;
    const Floats power = (Floats)((Words)t << 23);
    const Floats f = x - (t - kRound);
    Floats p = splat(1.32647273e-3f);
    p = p * f + 9.67151299e-3f;
    p = p * f + 5.55073358e-2f;
    p = p * f + 2.40222424e-1f;
    p = p * f + 6.93147004e-1f;
    p = p * f + 1.0f;
    return p * power;
}

static inline float sum(Floats v) {
    for (int half = kWidth / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) v[i] += v[i + half];
    return v[0];
}

// Bit i is set where lane i of the comparison holds.
static inline uint32_t mask_bits(Ints mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask);
#else
    uint32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= (mask[i] & 1u) << i;
    return bits;
#endif
}

// Transposition.

// Exchange the off-diagonal kStep x kStep squares of rows a and b.
template <int kStep>
static inline void exchange(Words& a, Words& b) {
    Ints low, high;
    for (int i = 0; i < kWidth; ++i) {
        low[i] = i & kStep ? kWidth + i - kStep : i;
        high[i] = i & kStep ? kWidth + i : i + kStep;
    }
#if defined(__clang__)
    Words x = a, y = b;
    for (int i = 0; i < kWidth; ++i) {
        a[i] = i & kStep ? y[i - kStep] : x[i];
        b[i] = i & kStep ? y[i] : x[i + kStep];
    }
#else
    const Words x = a;
    a = __builtin_shuffle(x, b, low);
    b = __builtin_shuffle(x, b, high);
#endif
}

template <int kStep>
static inline void transpose_step(Words* rows) {
    if constexpr (kStep < kWidth) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
            if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep]);
        transpose_step<2 * kStep>(rows);
    }
}

// Transpose a kWidth x kWidth square in place.
static inline void transpose(Words* rows) { transpose_step<1>(rows); }

// Loops.

template <int kValue>
struct Constant {
    static constexpr int value = kValue;
};

// Call visit(Constant<vectors>, lane) for panels of up to kTileVectors vectors that cover all
// lanes.
template <int kVectors = kTileVectors, class Visit>
static inline void for_panels(int lanes, Visit visit, int lane = 0) {
    for (; lane + kVectors * kWidth <= lanes; lane += kVectors * kWidth)
        visit(Constant<kVectors>{}, lane);
    if constexpr (kVectors * kWidth > kLanes) for_panels<kVectors - 1>(lanes, visit, lane);
}

static inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Element types of a launch.

template <class T>
struct Type {
    using type = T;
};

// Call visit(Type<T>) for the element type T of a launch.
template <class Visit>
static inline void with_dtype(DType dtype, Visit visit) {
    switch (dtype) {
        case DType::kFloat32: return visit(Type<float>{});
        case DType::kBFloat16: return visit(Type<BFloat16>{});
        case DType::kFloat16: return visit(Type<Float16>{});
    }
}

template <class T>
static inline T* at(const View& view, int64_t b, int64_t h, int64_t s) {
    return static_cast<T*>(view.data) + b * view.stride_b + h * view.stride_h + s * view.stride_s;
}

}  // namespace nabla::cpu::NABLA_ISA
