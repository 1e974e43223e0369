// Every hardware instruction that a CUDA kernel of this package uses, one small function each.
//
// This file is the only seam between kernels and hardware. With NABLA_EMULATED defined, the same
// functions come from csrc/emulation, and the kernels are plain C++ that runs on a CPU. Functions
// that a chip lacks fail in ptxas, when a kernel for that chip calls them; so nothing here asks for
// the architecture. From sm_80 on, unless a comment says otherwise.
//
// Shared memory is addressed by 32-bit shared addresses, thread and CTA indices are
// one-dimensional, and collective functions (shuffles, votes, wgmma, ...) take the whole warp.
#pragma once

#include "cuda/ptx_types.h"

#ifdef NABLA_EMULATED
#include "emulation/ptx.h"
#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace nabla::ptx {

using TensorMap = CUtensorMap;

// ---- where a thread is ----

NABLA_DEVICE uint32_t thread_index() { return threadIdx.x; }
// Read anew in each call, so that what is worked out from it need not stay in registers.
NABLA_DEVICE uint32_t cta_index() {
    uint32_t index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    return index;
}
NABLA_DEVICE uint32_t num_threads() { return blockDim.x; }
NABLA_DEVICE uint32_t lane_index() { return threadIdx.x % 32; }

// Broadcast, so that the compiler knows that branches on it do not diverge.
NABLA_DEVICE uint32_t warp_index() { return __shfl_sync(~0u, threadIdx.x / 32, 0); }

// Address of the dynamic shared memory, a multiple of 1024.
NABLA_DEVICE uint32_t shared_base() {
    extern __shared__ __align__(1024) uint8_t shared_memory[];
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory));
}

// ---- loads and stores: T of 1, 2, 4, 8 or 16 bytes, aligned to its size ----

template <class T>
NABLA_DEVICE T load_shared(uint32_t address) {
    if constexpr (sizeof(T) == 1) {
        uint32_t x;
        asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
        return bit_cast<T>(static_cast<uint8_t>(x));
    } else if constexpr (sizeof(T) == 2) {
        uint16_t x;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
        return bit_cast<T>(x);
    } else if constexpr (sizeof(T) == 4) {
        uint32_t x;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
        return bit_cast<T>(x);
    } else if constexpr (sizeof(T) == 8) {
        U32x2 x;
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                     : "=r"(x.v[0]), "=r"(x.v[1])
                     : "r"(address)
                     : "memory");
        return bit_cast<T>(x);
    } else {
        static_assert(sizeof(T) == 16, "a load takes 1, 2, 4, 8 or 16 bytes");
        U32x4 x;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x.v[0]), "=r"(x.v[1]), "=r"(x.v[2]), "=r"(x.v[3])
                     : "r"(address)
                     : "memory");
        return bit_cast<T>(x);
    }
}

template <class T>
NABLA_DEVICE void store_shared(uint32_t address, const T& value) {
    if constexpr (sizeof(T) == 1) {
        asm volatile("st.shared.u8 [%0], %1;" ::"r"(address),
                     "r"(uint32_t{bit_cast<uint8_t>(value)})
                     : "memory");
    } else if constexpr (sizeof(T) == 2) {
        asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(bit_cast<uint16_t>(value))
                     : "memory");
    } else if constexpr (sizeof(T) == 4) {
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(bit_cast<uint32_t>(value))
                     : "memory");
    } else if constexpr (sizeof(T) == 8) {
        const auto x = bit_cast<U32x2>(value);
        asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(x.v[0]), "r"(x.v[1])
                     : "memory");
    } else {
        static_assert(sizeof(T) == 16, "a store takes 1, 2, 4, 8 or 16 bytes");
        const auto x = bit_cast<U32x4>(value);
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.v[0]),
                     "r"(x.v[1]), "r"(x.v[2]), "r"(x.v[3])
                     : "memory");
    }
}

template <class T>
NABLA_DEVICE T load_global(const T* address) {
    if constexpr (sizeof(T) == 1) {
        uint32_t x;
        asm volatile("ld.global.u8 %0, [%1];" : "=r"(x) : "l"(address) : "memory");
        return bit_cast<T>(static_cast<uint8_t>(x));
    } else if constexpr (sizeof(T) == 2) {
        uint16_t x;
        asm volatile("ld.global.u16 %0, [%1];" : "=h"(x) : "l"(address) : "memory");
        return bit_cast<T>(x);
    } else if constexpr (sizeof(T) == 4) {
        uint32_t x;
        asm volatile("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(address) : "memory");
        return bit_cast<T>(x);
    } else if constexpr (sizeof(T) == 8) {
        U32x2 x;
        asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                     : "=r"(x.v[0]), "=r"(x.v[1])
                     : "l"(address)
                     : "memory");
        return bit_cast<T>(x);
    } else {
        static_assert(sizeof(T) == 16, "a load takes 1, 2, 4, 8 or 16 bytes");
        U32x4 x;
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x.v[0]), "=r"(x.v[1]), "=r"(x.v[2]), "=r"(x.v[3])
                     : "l"(address)
                     : "memory");
        return bit_cast<T>(x);
    }
}

// Of memory that nothing writes while the kernel runs; may be moved and merged by the compiler.
template <class T>
NABLA_DEVICE T load_global_nc(const T* address) {
    if constexpr (sizeof(T) == 1) {
        uint32_t x;
        asm("ld.global.nc.u8 %0, [%1];" : "=r"(x) : "l"(address));
        return bit_cast<T>(static_cast<uint8_t>(x));
    } else if constexpr (sizeof(T) == 2) {
        uint16_t x;
        asm("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(address));
        return bit_cast<T>(x);
    } else if constexpr (sizeof(T) == 4) {
        uint32_t x;
        asm("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(address));
        return bit_cast<T>(x);
    } else if constexpr (sizeof(T) == 8) {
        U32x2 x;
        asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(x.v[0]), "=r"(x.v[1]) : "l"(address));
        return bit_cast<T>(x);
    } else {
        static_assert(sizeof(T) == 16, "a load takes 1, 2, 4, 8 or 16 bytes");
        U32x4 x;
        asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(x.v[0]), "=r"(x.v[1]), "=r"(x.v[2]), "=r"(x.v[3])
            : "l"(address));
        return bit_cast<T>(x);
    }
}

template <class T>
NABLA_DEVICE void store_global(T* address, const std::common_type_t<T>& value) {
    if constexpr (sizeof(T) == 1) {
        asm volatile("st.global.u8 [%0], %1;" ::"l"(address),
                     "r"(uint32_t{bit_cast<uint8_t>(value)})
                     : "memory");
    } else if constexpr (sizeof(T) == 2) {
        asm volatile("st.global.u16 [%0], %1;" ::"l"(address), "h"(bit_cast<uint16_t>(value))
                     : "memory");
    } else if constexpr (sizeof(T) == 4) {
        asm volatile("st.global.u32 [%0], %1;" ::"l"(address), "r"(bit_cast<uint32_t>(value))
                     : "memory");
    } else if constexpr (sizeof(T) == 8) {
        const auto x = bit_cast<U32x2>(value);
        asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(x.v[0]), "r"(x.v[1])
                     : "memory");
    } else {
        static_assert(sizeof(T) == 16, "a store takes 1, 2, 4, 8 or 16 bytes");
        const auto x = bit_cast<U32x4>(value);
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(x.v[0]),
                     "r"(x.v[1]), "r"(x.v[2]), "r"(x.v[3])
                     : "memory");
    }
}

// Returns the old value; orders nothing else.
NABLA_DEVICE uint32_t atomic_or_shared(uint32_t address, uint32_t value) {
    uint32_t old;
    asm volatile("atom.relaxed.cta.shared.or.b32 %0, [%1], %2;"
                 : "=r"(old)
                 : "r"(address), "r"(value)
                 : "memory");
    return old;
}

// *address += value, in any order: not deterministic.
NABLA_DEVICE void reduce_add_global(float* address, float value) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}

// ---- barriers of a CTA ----

NABLA_DEVICE void sync_cta() { asm volatile("barrier.cta.sync 0;" ::: "memory"); }

// Named barrier `id` (1 to 15) of `threads` threads, a multiple of 32.
NABLA_DEVICE void barrier_sync(uint32_t id, uint32_t threads) {
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

NABLA_DEVICE void sync_warp() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

// ---- within a warp ----

// T of 4 bytes.
template <class T>
NABLA_DEVICE T shuffle(T value, uint32_t source_lane) {
    return bit_cast<T>(__shfl_sync(~0u, bit_cast<uint32_t>(value), source_lane));
}
template <class T>
NABLA_DEVICE T shuffle_xor(T value, uint32_t mask) {
    return bit_cast<T>(__shfl_xor_sync(~0u, bit_cast<uint32_t>(value), mask));
}

// Bit i: the predicate of lane i.
NABLA_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(~0u, predicate); }
NABLA_DEVICE bool any(bool predicate) { return __any_sync(~0u, predicate); }

// Over the lanes of the warp; every lane gets the result.
NABLA_DEVICE uint32_t reduce_add(uint32_t value) { return __reduce_add_sync(~0u, value); }
NABLA_DEVICE uint32_t reduce_max(uint32_t value) { return __reduce_max_sync(~0u, value); }
NABLA_DEVICE uint32_t reduce_min(uint32_t value) { return __reduce_min_sync(~0u, value); }

// True in one lane of the warp, always the same one, but nobody promises which. sm_90
NABLA_DEVICE bool elect_one() {
    uint32_t elected;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(elected));
    return elected != 0;
}

// ---- mbarriers: 8 bytes of shared memory, aligned to 8 ----

// The phase completes after `count` arrivals, and when all expected bytes have landed.
NABLA_DEVICE void mbarrier_init(uint32_t mbarrier, uint32_t count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(mbarrier), "r"(count) : "memory");
}

// Makes inits visible to asynchronous copies; a barrier makes them visible to the CTA. sm_90
NABLA_DEVICE void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// As often as so many threads would.
NABLA_DEVICE void mbarrier_arrive(uint32_t mbarrier, uint32_t count = 1) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0], %1;\n}" ::"r"(
                     mbarrier),
                 "r"(count)
                 : "memory");
}

// Arrives, and has the current phase wait for `bytes` more of asynchronous copies. sm_90
NABLA_DEVICE void mbarrier_arrive_expect_tx(uint32_t mbarrier, uint32_t bytes) {
    asm volatile(
        "{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}" ::"r"(
            mbarrier),
        "r"(bytes)
        : "memory");
}

// Until the phase of this parity (0 for the first, 1 for the second, ...) is complete. The hardware
// suspends the thread, but only for a while. sm_90
NABLA_DEVICE void mbarrier_wait(uint32_t mbarrier, uint32_t parity) {
    uint32_t complete;
    do {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}"
            : "=r"(complete)
            : "r"(mbarrier), "r"(parity)
            : "memory");
    } while (!complete);
}

// ---- asynchronous bulk copies, sm_90 ----

// The box of `map` at coordinates (c0, c1, c2, c3), c0 innermost, into shared memory; elements
// outside the tensor arrive as zero. Adds the bytes of the whole box to the mbarrier's phase.
NABLA_DEVICE void copy_tensor_4d(uint32_t destination, const TensorMap* map, uint32_t mbarrier,
                                 int32_t c0, int32_t c1, int32_t c2, int32_t c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(destination),
        "l"(map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// `bytes` (a multiple of 16) of global memory into shared memory, both aligned to 16.
NABLA_DEVICE void copy_bulk(uint32_t destination, const void* source, uint32_t bytes,
                            uint32_t mbarrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1], %2, [%3];" ::"r"(destination),
        "l"(source), "r"(bytes), "r"(mbarrier)
        : "memory");
}

// Orders this thread's earlier accesses to shared memory, and those it has learnt of by barriers,
// before later asynchronous ones (wgmma, bulk copies).
NABLA_DEVICE void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- asynchronous copies of a thread ----

// 16 bytes of global memory into shared memory; those from `valid_bytes` on become zero.
NABLA_DEVICE void copy_async_16(uint32_t destination, const void* source,
                                uint32_t valid_bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
                 "r"(valid_bytes)
                 : "memory");
}
NABLA_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kPending groups of this thread are not yet done; other threads need a barrier too.
template <int kPending>
NABLA_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- wgmma: the matrix product of a warpgroup, sm_90a ----

// Before the first wgmma, and after registers of an operand or accumulator have been written.
NABLA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

NABLA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kPending groups of this warp are not yet done.
template <int kPending>
NABLA_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// What follows stays behind the computation of x >= 0: ptxas moves wgmma_wait ahead of arithmetic,
// which then overlaps with nothing, and only a branch that needs the result stops it.
NABLA_DEVICE void hold_until(float x) {
    if (__any_sync(~0u, x < 0)) __nanosleep(0);
}

// The compiler moves no use of these registers across: it does not know that wgmma works on them
// until wgmma_wait.
template <int kCount>
NABLA_DEVICE void keep_in_place(float (&registers)[kCount]) {
    NABLA_UNROLL
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
NABLA_DEVICE void keep_in_place(uint32_t (&registers)[kCount]) {
    NABLA_UNROLL
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// d [64, N] = a [64, 16] b [16, N] (+ d where `accumulate`), T in, fp32 out.
//   d[i]: row 16 warp + lane / 4 + 8 ((i >> 1) & 1), column 8 (i >> 2) + 2 (lane & 3) + (i & 1)
//   a[r]: row 16 warp + lane / 4 + 8 (r & 1), columns 8 (r >> 1) + 2 (lane & 3) and the next
// kTransposeB: not K but N is contiguous in shared memory.
template <class T, int kN, bool kTransposeB>
NABLA_DEVICE void wgmma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate);
template <class T, int kN>
NABLA_DEVICE void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate);

#define NABLA_D8(i)                                                                             \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define NABLA_D32(i) NABLA_D8(i), NABLA_D8(i + 8), NABLA_D8(i + 16), NABLA_D8(i + 24)
#define NABLA_R32                                                                      \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
    "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NABLA_R64                                                                        \
    NABLA_R32                                                                            \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// a0 .. : numbers of the operands that follow the accumulators.
#define NABLA_WGMMA_RS(n, type, registers, constraints, a0, a1, a2, a3, b0, acc, trans)          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" acc                                        \
                 ", 0;\n"                                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers   \
                 "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b0 ", p, 1, 1, %" trans ";\n}"     \
                 : constraints                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int32_t{accumulate}), \
                   "n"(int32_t{kTransposeB}))
#define NABLA_WGMMA_SS(n, type, registers, constraints, a0, b0, acc)                           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" acc                                      \
                 ", 0;\n"                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers \
                 "}, %" a0 ", %" b0 ", p, 1, 1, 0, 0;\n}"                                      \
                 : constraints                                                                 \
                 : "l"(a), "l"(b), "r"(int32_t{accumulate}))
#define NABLA_D64 NABLA_D32(0), NABLA_D32(32)

template <class T, int kN, bool kTransposeB>
NABLA_DEVICE void wgmma_rs(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b,
                           bool accumulate) {
    static_assert(kN == 64 || kN == 128, "products of 64 or 128 columns are written out here");
    if constexpr (std::is_same_v<T, BFloat16>) {
        if constexpr (kN == 64)
            NABLA_WGMMA_RS("64", "bf16", NABLA_R32, NABLA_D32(0), "32", "33", "34", "35", "36",
                           "37", "38");
        else
            NABLA_WGMMA_RS("128", "bf16", NABLA_R64, NABLA_D64, "64", "65", "66", "67", "68", "69",
                           "70");
    } else {
        static_assert(std::is_same_v<T, Float16>, "the inputs are bf16 or fp16");
        if constexpr (kN == 64)
            NABLA_WGMMA_RS("64", "f16", NABLA_R32, NABLA_D32(0), "32", "33", "34", "35", "36", "37",
                           "38");
        else
            NABLA_WGMMA_RS("128", "f16", NABLA_R64, NABLA_D64, "64", "65", "66", "67", "68", "69",
                           "70");
    }
}

template <class T, int kN>
NABLA_DEVICE void wgmma_ss(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(kN == 64 || kN == 128, "products of 64 or 128 columns are written out here");
    if constexpr (std::is_same_v<T, BFloat16>) {
        if constexpr (kN == 64)
            NABLA_WGMMA_SS("64", "bf16", NABLA_R32, NABLA_D32(0), "32", "33", "34");
        else NABLA_WGMMA_SS("128", "bf16", NABLA_R64, NABLA_D64, "64", "65", "66");
    } else {
        static_assert(std::is_same_v<T, Float16>, "the inputs are bf16 or fp16");
        if constexpr (kN == 64)
            NABLA_WGMMA_SS("64", "f16", NABLA_R32, NABLA_D32(0), "32", "33", "34");
        else NABLA_WGMMA_SS("128", "f16", NABLA_R64, NABLA_D64, "64", "65", "66");
    }
}

#undef NABLA_D8
#undef NABLA_D32
#undef NABLA_D64
#undef NABLA_R32
#undef NABLA_R64
#undef NABLA_WGMMA_RS
#undef NABLA_WGMMA_SS

// Registers per thread of the calling warpgroup from here on: a multiple of 8 from 24 to 256.
template <int kRegisters>
NABLA_DEVICE void set_max_registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
NABLA_DEVICE void set_max_registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- mma: the matrix product of a warp ----

// Four 8 x 8 matrices of 2-byte elements: lane l gives the address of row l % 8 of matrix l / 8 and
// gets, of matrix i, row l / 4, columns 2 (l % 4) and the next in registers[i]; transposed: of
// column l / 4, rows 2 (l % 4) and the next.
NABLA_DEVICE void ldmatrix_x4(uint32_t (&registers)[4], uint32_t row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(row_address)
                 : "memory");
}
NABLA_DEVICE void ldmatrix_x4_trans(uint32_t (&registers)[4], uint32_t row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(row_address)
                 : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8], T in, fp32 out.
//   d[i]: row lane / 4 + 8 (i >> 1), column 2 (lane & 3) + (i & 1)
//   a[r]: row lane / 4 + 8 (r & 1), columns 8 (r >> 1) + 2 (lane & 3) and the next
//   b[r]: column lane / 4, rows 8 r + 2 (lane & 3) and the next
template <class T>
NABLA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3},"
            " {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        static_assert(std::is_same_v<T, Float16>, "the inputs are bf16 or fp16");
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3},"
            " {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// ---- arithmetic ----

// 2^x and log2(x): about 2 units in the last place, denormals become zero.
NABLA_DEVICE float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
NABLA_DEVICE float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 1 / x, about 1 unit in the last place.
NABLA_DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The lesser of two; NaN if one is.
NABLA_DEVICE float minimum(float x, float y) {
    float z;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

// Two values rounded to nearest even, the first in the low half.
template <class T>
NABLA_DEVICE uint32_t pack(float low, float high) {
    uint32_t x;
    if constexpr (std::is_same_v<T, BFloat16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    } else {
        static_assert(std::is_same_v<T, Float16>, "values are packed to bf16 or fp16");
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    }
    return x;
}
template <class T>
NABLA_DEVICE F32x2 unpack(uint32_t x) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        return {bit_cast<float>(x << 16), bit_cast<float>(x & 0xffff0000u)};
    } else {
        static_assert(std::is_same_v<T, Float16>, "values are unpacked from bf16 or fp16");
        const float2 y = __half22float2(bit_cast<__half2>(x));
        return {y.x, y.y};
    }
}

NABLA_DEVICE uint32_t popcount(uint32_t x) { return __popc(x); }
NABLA_DEVICE uint32_t trailing_zeros(uint32_t x) { return x ? __ffs(x) - 1 : 32; }

// ---- launch, on the host ----

// What a CTA of the current device has at most.
inline uint32_t max_shared_bytes() {
    int device = 0, bytes = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status != cudaSuccess)
        throw std::runtime_error(std::string("the current device: ") + cudaGetErrorName(status) +
                                 ", " + cudaGetErrorString(status));
    return static_cast<uint32_t>(bytes);
}

inline void check(cudaError_t status, const LaunchShape& shape) {
    if (status == cudaSuccess) return;
    throw std::runtime_error(
        std::string("kernel '") + shape.name + "' (" + std::to_string(shape.ctas) + " CTAs of " +
        std::to_string(shape.threads) + " threads and " + std::to_string(shape.shared_bytes) +
        " bytes of shared memory): " + cudaGetErrorName(status) + ", " +
        cudaGetErrorString(status));
}

// Run kernel(arguments...) on a grid; returns when it is queued.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape,
            const Arguments&... arguments) {
    if (shape.ctas == 0) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          shape);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(shape.ctas);
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(shape.stream);
    check(cudaLaunchKernelEx(&config, kernel, arguments...), shape);
}

}  // namespace nabla::ptx

#endif  // NABLA_EMULATED
