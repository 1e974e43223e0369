// The functions of cuda/ptx.cuh, which documents them, on a CPU.
//
// A thread of a CTA is a fiber; what blocks on the hardware blocks here. Each function takes the
// place of its call last: for messages, and so that a test can have one call ignored at run time.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <type_traits>

#include "cuda/ptx_types.h"

namespace nabla::emulation {

// A call in a kernel's source.
struct Site {
    const char* file;
    int line;

    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// A tensor of up to four dimensions in global memory and the box that one copy takes from it.
struct TensorMap {
    const void* data;
    uint32_t element_bytes;
    uint64_t extents[4];  // elements, innermost first; 1 where there are fewer dimensions
    uint64_t strides[4];  // bytes; that of the innermost is element_bytes
    uint32_t box[4];      // elements
    bool swizzle_128;     // 128-byte swizzle; rows of the box are then at most 128 bytes
};

using ptx::bit_cast;
using ptx::LaunchShape;

enum class Type : uint8_t { kBFloat16, kFloat16 };
template <class T>
constexpr Type type_of() {
    constexpr bool kIsBFloat16 = std::is_same_v<T, ptx::BFloat16>;
    static_assert(kIsBFloat16 || std::is_same_v<T, ptx::Float16>, "values are bf16 or fp16");
    return kIsBFloat16 ? Type::kBFloat16 : Type::kFloat16;
}

enum class Shuffle : uint8_t { kIndex, kXor };
enum class Reduce : uint8_t { kAdd, kMax, kMin };

// What does not depend on types, of the instructions below.
void load_shared(void* value, uint32_t address, uint32_t bytes, Site site);
void store_shared(uint32_t address, const void* value, uint32_t bytes, Site site);
void load_global(void* value, const void* address, uint32_t bytes, Site site);
void store_global(void* address, const void* value, uint32_t bytes, Site site);
uint32_t shuffle(Shuffle kind, uint32_t value, uint32_t argument, Site site);
uint32_t vote(bool predicate, Site site);
uint32_t reduce(Reduce kind, uint32_t value, Site site);
void copy_async_wait(uint32_t pending, Site site);
void wgmma_wait(uint32_t pending, Site site);
// One of `a` and `a_descriptor` is used: `a` where it is not null.
void wgmma(Type type, int n, float* d, const uint32_t* a, uint64_t a_descriptor,
           uint64_t b_descriptor, bool accumulate, bool transpose_b, Site site);
void ldmatrix_x4(uint32_t* registers, uint32_t row_address, bool transpose, Site site);
void mma_m16n8k16(Type type, float* d, const uint32_t* a, const uint32_t* b, Site site);
void set_max_registers(int registers, bool up, Site site);
// Reports a value that was computed from an accumulator which wgmma had not finished.
[[noreturn]] void report_in_flight(Site site);
uint32_t max_shared_bytes();
void run(const LaunchShape& shape, const std::function<void()>& kernel);

// What accumulators hold while wgmma works on them: a signalling NaN. Arithmetic makes it quiet and
// keeps the payload.
constexpr uint32_t kInFlightBits = 0x7fa5a5a5;

inline void check_not_in_flight(float value, Site site) {
    constexpr uint32_t kPayload = 0x7fbfffff;  // without the sign and the quiet bit
    if ((bit_cast<uint32_t>(value) & kPayload) == kInFlightBits) report_in_flight(site);
}

// Rounds to nearest even.
inline uint16_t to_bits(Type type, float value) {
    const auto bits = bit_cast<uint32_t>(value);
    if (value != value) return 0x7fff;
    if (type == Type::kBFloat16)
        return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const float magnitude = std::fabs(value);
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    if (magnitude < 0x1p-14f)  // denormal: multiples of 2^-24, rounded by the addition
        return static_cast<uint16_t>(
            sign | (bit_cast<uint32_t>(magnitude + 0.5f) - bit_cast<uint32_t>(0.5f)));
    const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
    return static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13);
}

inline float from_bits(Type type, uint16_t bits) {
    if (type == Type::kBFloat16) return bit_cast<float>(uint32_t{bits} << 16);
    const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00)
        return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // The exponent is 112 too small; the product with 2^112 is exact, for denormals too.
    const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
    return bit_cast<float>(sign | bit_cast<uint32_t>(scaled));
}

}  // namespace nabla::emulation

namespace nabla::ptx {

using emulation::Site;
using emulation::TensorMap;

template <class T>
constexpr bool is_access() {
    return sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16;
}

uint32_t thread_index();
uint32_t cta_index();
uint32_t num_threads();
uint32_t lane_index();
uint32_t warp_index();
uint32_t shared_base();

template <class T>
T load_shared(uint32_t address, Site site = Site::here()) {
    static_assert(is_access<T>(), "a load takes 1, 2, 4, 8 or 16 bytes");
    T value;
    emulation::load_shared(&value, address, sizeof(T), site);
    return value;
}
template <class T>
void store_shared(uint32_t address, const T& value, Site site = Site::here()) {
    static_assert(is_access<T>(), "a store takes 1, 2, 4, 8 or 16 bytes");
    emulation::store_shared(address, &value, sizeof(T), site);
}
template <class T>
T load_global(const T* address, Site site = Site::here()) {
    static_assert(is_access<T>(), "a load takes 1, 2, 4, 8 or 16 bytes");
    T value;
    emulation::load_global(&value, address, sizeof(T), site);
    return value;
}
template <class T>
T load_global_nc(const T* address, Site site = Site::here()) {
    return load_global(address, site);
}
template <class T>
void store_global(T* address, const std::common_type_t<T>& value, Site site = Site::here()) {
    static_assert(is_access<T>(), "a store takes 1, 2, 4, 8 or 16 bytes");
    if constexpr (std::is_same_v<T, float>) emulation::check_not_in_flight(value, site);
    emulation::store_global(address, &value, sizeof(T), site);
}

uint32_t atomic_or_shared(uint32_t address, uint32_t value, Site site = Site::here());
void reduce_add_global(float* address, float value, Site site = Site::here());

void sync_cta(Site site = Site::here());
void barrier_sync(uint32_t id, uint32_t threads, Site site = Site::here());
void sync_warp(Site site = Site::here());

template <class T>
T shuffle(T value, uint32_t source_lane, Site site = Site::here()) {
    return bit_cast<T>(emulation::shuffle(emulation::Shuffle::kIndex, bit_cast<uint32_t>(value),
                                          source_lane, site));
}
template <class T>
T shuffle_xor(T value, uint32_t mask, Site site = Site::here()) {
    return bit_cast<T>(
        emulation::shuffle(emulation::Shuffle::kXor, bit_cast<uint32_t>(value), mask, site));
}

inline uint32_t ballot(bool predicate, Site site = Site::here()) {
    return emulation::vote(predicate, site);
}
inline bool any(bool predicate, Site site = Site::here()) {
    return emulation::vote(predicate, site) != 0;
}

inline uint32_t reduce_add(uint32_t value, Site site = Site::here()) {
    return emulation::reduce(emulation::Reduce::kAdd, value, site);
}
inline uint32_t reduce_max(uint32_t value, Site site = Site::here()) {
    return emulation::reduce(emulation::Reduce::kMax, value, site);
}
inline uint32_t reduce_min(uint32_t value, Site site = Site::here()) {
    return emulation::reduce(emulation::Reduce::kMin, value, site);
}

bool elect_one(Site site = Site::here());

void mbarrier_init(uint32_t mbarrier, uint32_t count, Site site = Site::here());
void fence_mbarrier_init(Site site = Site::here());
void mbarrier_arrive(uint32_t mbarrier, uint32_t count = 1, Site site = Site::here());
void mbarrier_arrive_expect_tx(uint32_t mbarrier, uint32_t bytes, Site site = Site::here());
void mbarrier_wait(uint32_t mbarrier, uint32_t parity, Site site = Site::here());

void copy_tensor_4d(uint32_t destination, const TensorMap* map, uint32_t mbarrier, int32_t c0,
                    int32_t c1, int32_t c2, int32_t c3, Site site = Site::here());
void copy_bulk(uint32_t destination, const void* source, uint32_t bytes, uint32_t mbarrier,
               Site site = Site::here());
void fence_proxy_async(Site site = Site::here());

void copy_async_16(uint32_t destination, const void* source, uint32_t valid_bytes = 16,
                   Site site = Site::here());
void copy_async_commit(Site site = Site::here());
template <int kPending>
void copy_async_wait(Site site = Site::here()) {
    emulation::copy_async_wait(kPending, site);
}

void wgmma_fence(Site site = Site::here());
void wgmma_commit(Site site = Site::here());
template <int kPending>
void wgmma_wait(Site site = Site::here()) {
    emulation::wgmma_wait(kPending, site);
}
inline void hold_until(float) {}
template <class T, int kCount>
void keep_in_place(T (&)[kCount]) {}

template <class T, int kN, bool kTransposeB>
void wgmma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
              Site site = Site::here()) {
    static_assert(kN == 64 || kN == 128, "products of 64 or 128 columns are written out here");
    emulation::wgmma(emulation::type_of<T>(), kN, d, a, 0, b, accumulate, kTransposeB, site);
}
template <class T, int kN>
void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate,
              Site site = Site::here()) {
    static_assert(kN == 64 || kN == 128, "products of 64 or 128 columns are written out here");
    emulation::wgmma(emulation::type_of<T>(), kN, d, nullptr, a, b, accumulate, false, site);
}

template <int kRegisters>
void set_max_registers_up(Site site = Site::here()) {
    emulation::set_max_registers(kRegisters, true, site);
}
template <int kRegisters>
void set_max_registers_down(Site site = Site::here()) {
    emulation::set_max_registers(kRegisters, false, site);
}

inline void ldmatrix_x4(uint32_t (&registers)[4], uint32_t row_address, Site site = Site::here()) {
    emulation::ldmatrix_x4(registers, row_address, false, site);
}
inline void ldmatrix_x4_trans(uint32_t (&registers)[4], uint32_t row_address,
                              Site site = Site::here()) {
    emulation::ldmatrix_x4(registers, row_address, true, site);
}
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Site site = Site::here()) {
    emulation::mma_m16n8k16(emulation::type_of<T>(), d, a, b, site);
}

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float exp2(float x) { return flush(::exp2f(flush(x))); }
inline float log2(float x) { return ::log2f(flush(x)); }
inline float reciprocal(float x) { return flush(1.0f / flush(x)); }
inline float minimum(float x, float y) { return x != x || x < y ? x : y; }

template <class T>
uint32_t pack(float low, float high, Site site = Site::here()) {
    emulation::check_not_in_flight(low, site);
    emulation::check_not_in_flight(high, site);
    return emulation::to_bits(emulation::type_of<T>(), low) |
           uint32_t{emulation::to_bits(emulation::type_of<T>(), high)} << 16;
}
template <class T>
F32x2 unpack(uint32_t x) {
    return {emulation::from_bits(emulation::type_of<T>(), static_cast<uint16_t>(x)),
            emulation::from_bits(emulation::type_of<T>(), static_cast<uint16_t>(x >> 16))};
}

inline uint32_t popcount(uint32_t x) { return static_cast<uint32_t>(__builtin_popcount(x)); }
inline uint32_t trailing_zeros(uint32_t x) {
    return x ? static_cast<uint32_t>(__builtin_ctz(x)) : 32;
}

// What a CTA of the emulated device has at most.
inline uint32_t max_shared_bytes() { return emulation::max_shared_bytes(); }

// Run kernel(arguments...) on a grid; returns when it is done.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape,
            const Arguments&... arguments) {
    emulation::run(shape, [&] { kernel(arguments...); });
}

}  // namespace nabla::ptx
