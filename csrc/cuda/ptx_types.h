// Types of ptx.cuh that are the same on the device and in emulation.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef NABLA_EMULATED
#define NABLA_KERNEL(threads, min_ctas) void
#define NABLA_DEVICE inline
#define NABLA_HOST_DEVICE inline
#define NABLA_GRID_CONSTANT
#define NABLA_UNROLL
#define NABLA_NO_UNROLL
#else
#define NABLA_KERNEL(threads, min_ctas) __global__ void __launch_bounds__(threads, min_ctas)
#define NABLA_DEVICE __device__ __forceinline__
#define NABLA_HOST_DEVICE __host__ __device__ __forceinline__
#define NABLA_GRID_CONSTANT __grid_constant__
#define NABLA_UNROLL _Pragma("unroll")
#define NABLA_NO_UNROLL _Pragma("unroll 1")
#endif

namespace nabla::ptx {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

struct alignas(8) U32x2 {
    uint32_t v[2];
};
struct alignas(16) U32x4 {
    uint32_t v[4];
};
struct alignas(8) F32x2 {
    float v[2];
};
struct alignas(16) F32x4 {
    float v[4];
};

template <class To, class From>
NABLA_HOST_DEVICE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "a cast keeps the bits, so the sizes are equal");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

// Descriptor of a matrix in shared memory with 128-byte swizzle, whose tiles are aligned to 1024.
//   K contiguous: stride_bytes between groups of 8 rows; leading_bytes is not read
//   M or N contiguous (transposed): leading_bytes between panels of 64 columns, stride_bytes
//   between groups of 8 rows of K
NABLA_HOST_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes,
                                             uint32_t stride_bytes) {
    return uint64_t{(address >> 4) & 0x3fffu} | uint64_t{(leading_bytes >> 4) & 0x3fffu} << 16 |
           uint64_t{(stride_bytes >> 4) & 0x3fffu} << 32 | uint64_t{1} << 62;
}

// The descriptor of a matrix that lies so many units of 16 bytes further on.
NABLA_HOST_DEVICE uint64_t moved(uint64_t descriptor, uint32_t units) {
    return (descriptor & ~uint64_t{0xffffffff}) | (static_cast<uint32_t>(descriptor) + units);
}

// A launch on a one-dimensional grid.
struct LaunchShape {
    const char* name;       // of the kernel, for errors
    uint32_t ctas;          // nothing is launched for 0
    uint32_t threads;       // of a CTA
    uint32_t shared_bytes;  // dynamic shared memory of a CTA
    void* stream;           // cudaStream_t
};

}  // namespace nabla::ptx
