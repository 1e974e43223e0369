// out = a (b_0 + b_1 + ...)^T, and what happens to it with a fault.
//
// Warp 4 copies the tiles b_i [64, 64] into a ring of stages; warps 0 to 3, a warpgroup, multiply a
// with each as it arrives. It has one of everything that the kernels of this package have.
#include "emulation/probes/probes.h"

namespace nabla::emulation::probes {
namespace {

enum class Fault : int32_t {
    kNone,
    kNoInitBarrier,
    kNoInitFence,
    kNoFullWait,
    kNoEmptyWait,
    kNoWgmmaFence,
    kNoWgmmaCommit,
    kNoWgmmaWait,
    kNoProxyFence,
    kNoBarrier,
    kNoArrive,
    kEarlyRelease,
    kReleaseByOneWarp,
    kReleaseByOneLane,
    kDoubleArrival,
    kShortExpect,
    kExpectOneOfTwo,
    kLongExpect,
    kWrongFullParity,
    kWrongEmptyParity,
    kSwappedDescriptor,
    kMisalignedDescriptor,
    kUnswizzledDescriptor,
    kReadPastShared,
    kReadPastGlobal,
    kWritePastGlobal,
    kWriteReadOnly,
    kSharedRace,
    kGlobalRace,
    kCopyInFlight,
    kWgmmaInFlight,
    kScaledInFlight,
    kReadInFlight,
    kOperandInFlight,
    kDivergedLanes,
    kWrongBarrierCount,
    kMissingThread,
    kUninitialised,
    kMisalignedStore,
    kThreadCopyNoWait,
    kThreadCopyNoCommit,
    kThreadCopyNoBarrier,
    kThreadCopyInFlight,
    kMatrixNoBarrier,
    kMixedWarps,
    kEndlessLoop,
    kCount,
};

const char* const kFaultNames[] = {
    "none",
    "no barrier after mbarrier_init",
    "no fence_mbarrier_init",
    "no wait for a full stage",
    "no wait for an empty stage",
    "no wgmma_fence",
    "no wgmma_commit",
    "no wgmma_wait",
    "no fence_proxy_async",
    "no barrier between writes and reads",
    "no arrival at an empty stage",
    "stage released before its wgmma is done",
    "stage released by one warp for four",
    "stage released by one lane before its warp has waited",
    "two arrivals of one warp",
    "expect_tx too small",
    "expect_tx of one copy of two",
    "expect_tx too large",
    "wrong parity of the full stage",
    "wrong parity of the empty stage",
    "leading and stride bytes swapped",
    "descriptor of a misaligned tile",
    "descriptor without swizzle",
    "read past the end of shared memory",
    "read past the end of a tensor",
    "write past the end of a tensor",
    "write to an input",
    "race in shared memory",
    "race between CTAs",
    "copy in flight at exit",
    "wgmma in flight at exit",
    "accumulators scaled in flight",
    "accumulators read in flight",
    "registers of a changed in flight",
    "lanes at different collectives",
    "barrier with two counts",
    "thread missing at a barrier",
    "operand that nobody has written",
    "misaligned store",
    "copy_async without wait",
    "copy_async without commit",
    "copy_async without barrier",
    "copy_async in flight at exit",
    "ldmatrix without barrier",
    "warps of a warpgroup at different wgmma",
    "endless loop",
};
static_assert(sizeof(kFaultNames) / sizeof(*kFaultNames) == static_cast<size_t>(Fault::kCount),
              "every fault has a name");

constexpr uint32_t kTile = 64;                // rows and columns of a tile
constexpr uint32_t kTileBytes = 64 * 64 * 2;  // of a tile in bf16
constexpr uint32_t kStages = 2;
constexpr uint32_t kThreads = 160;
constexpr uint32_t kConsumers = 128;

// Shared memory, from its start.
constexpr uint32_t kA = 0;
constexpr uint32_t kB = kTileBytes;
constexpr uint32_t kValues = kB + kStages * kTileBytes;  // [128] float
constexpr uint32_t kCopies = kValues + 512;              // [128] of 16 bytes
constexpr uint32_t kFull = kCopies + 2048;               // mbarriers: b_i is here
constexpr uint32_t kEmpty = kFull + 8 * kStages;         // mbarriers: b_i has been read
constexpr uint32_t kSharedBytes = kEmpty + 8 * kStages;

// Byte of element (row, column) of a tile with the 128-byte swizzle.
NABLA_DEVICE uint32_t swizzled(uint32_t row, uint32_t column) {
    return row * 128 + ((column / 8 ^ row % 8) * 16 + column % 8 * 2);
}

NABLA_DEVICE void produce(const PipelineParams& p, uint32_t shared, Fault fault) {
    for (int32_t i = 0; i < p.steps; ++i) {
        const uint32_t stage = static_cast<uint32_t>(i) % kStages;
        const uint32_t parity = static_cast<uint32_t>(i) / kStages % 2;
        const uint32_t full = shared + kFull + 8 * stage;
        const uint32_t empty = shared + kEmpty + 8 * stage;
        if (fault != Fault::kNoEmptyWait)
            ptx::mbarrier_wait(empty, fault == Fault::kWrongEmptyParity ? parity : parity ^ 1);
        uint32_t bytes = kTileBytes;
        if (fault == Fault::kShortExpect) bytes /= 2;
        if (fault == Fault::kLongExpect) bytes *= 2;
        ptx::mbarrier_arrive_expect_tx(full, bytes);
        ptx::copy_tensor_4d(shared + kB + stage * kTileBytes, &p.b_map, full, 0,
                            i * static_cast<int32_t>(kTile), 0, 0);
        if (fault == Fault::kExpectOneOfTwo) ptx::copy_bulk(shared + kCopies, p.a, 2048, full);
    }
    if (fault == Fault::kCopyInFlight) {
        const uint32_t stage = static_cast<uint32_t>(p.steps) % kStages;
        const uint32_t full = shared + kFull + 8 * stage;
        ptx::mbarrier_wait(shared + kEmpty + 8 * stage,
                           static_cast<uint32_t>(p.steps) / kStages % 2 ^ 1);
        ptx::mbarrier_arrive_expect_tx(full, kTileBytes);
        ptx::copy_tensor_4d(shared + kB + stage * kTileBytes, &p.b_map, full, 0, 0, 0, 0);
    }
}

// Instructions of sm_80, atomics, and faults that have nothing to do with the pipeline.
NABLA_DEVICE void other_faults(const PipelineParams& p, uint32_t shared, Fault fault) {
    const uint32_t thread = ptx::thread_index();
    const uint32_t warp = ptx::warp_index();
    const uint32_t copies = shared + kCopies;
    const auto* source = reinterpret_cast<const uint8_t*>(p.a);
    const auto any_of = [&](auto... faults) { return ((fault == faults) || ...); };

    if (any_of(Fault::kNone, Fault::kThreadCopyNoWait, Fault::kThreadCopyNoCommit,
               Fault::kThreadCopyNoBarrier, Fault::kThreadCopyInFlight)) {
        ptx::copy_async_16(copies + 16 * thread, source + 16 * thread);
        if (fault != Fault::kThreadCopyNoCommit) ptx::copy_async_commit();
        if (fault == Fault::kThreadCopyInFlight) return;
        if (fault != Fault::kThreadCopyNoWait) ptx::copy_async_wait<0>();
        if (fault != Fault::kThreadCopyNoBarrier) ptx::barrier_sync(1, kConsumers);
        uint32_t registers[4];
        ptx::ldmatrix_x4(registers, copies + 16 * ((thread + 32) % kConsumers));
        if (registers[0] !=
            ptx::load_global(reinterpret_cast<const uint32_t*>(source) +
                             4 * ((warp * 32 + 32) % kConsumers + ptx::lane_index() / 4) +
                             ptx::lane_index() % 4))
            ptx::store_global(p.out, 1e30f);
    }
    if (fault == Fault::kMatrixNoBarrier) {
        ptx::store_shared(copies + 16 * thread, ptx::U32x4{{1, 2, 3, 4}});
        uint32_t registers[4];
        ptx::ldmatrix_x4(registers, copies + 16 * thread);
    }
    if (any_of(Fault::kSharedRace, Fault::kNoBarrier)) {
        ptx::store_shared(shared + kValues + 4 * (fault == Fault::kSharedRace ? 0 : thread),
                          static_cast<float>(thread));
        if (fault != Fault::kNoBarrier) ptx::barrier_sync(1, kConsumers);
        (void)ptx::load_shared<float>(shared + kValues + 4 * ((thread + 32) % kConsumers));
    }
    if (fault == Fault::kReadPastShared) (void)ptx::load_shared<float>(shared + kSharedBytes);
    if (fault == Fault::kEndlessLoop)
        while (ptx::load_shared<uint32_t>(shared + kValues + 4 * thread) != 1) {
        }
    if (fault == Fault::kMisalignedStore) ptx::store_shared(shared + kValues + 2, 1.0f);
    if (fault == Fault::kReadPastGlobal)
        (void)ptx::load_global(p.b + p.steps * static_cast<int32_t>(kTile * kTile));
    if (fault == Fault::kWritePastGlobal)
        ptx::store_global(p.out + static_cast<uint32_t>(p.ctas) * kTile * kTile, 1.0f);
    if (fault == Fault::kWriteReadOnly) ptx::store_global(const_cast<uint16_t*>(p.a), uint16_t{1});
    if (fault == Fault::kGlobalRace && thread == 0) ptx::store_global(p.counter, 1.0f);
    if (fault == Fault::kNone && thread == 0) ptx::reduce_add_global(p.counter, 1.0f);
    if (fault == Fault::kDivergedLanes) {
        if (ptx::lane_index() < 16) (void)ptx::ballot(true);
        else ptx::sync_warp();
    }
    if (fault == Fault::kWrongBarrierCount) ptx::barrier_sync(1, warp ? 128 : 96);
    if (fault == Fault::kMissingThread && thread != 77) ptx::barrier_sync(1, kConsumers);
}

NABLA_DEVICE void consume(const PipelineParams& p, uint32_t shared, Fault fault) {
    const uint32_t thread = ptx::thread_index();
    const uint32_t warp = ptx::warp_index();
    const uint32_t lane = ptx::lane_index();

    // Half of a from shared memory, half from registers.
    for (uint32_t i = thread; i < kTile * kTile / 2; i += kConsumers) {
        const uint32_t row = i / (kTile / 2), column = i % (kTile / 2) * 2;
        if (fault == Fault::kUninitialised && row == 63) continue;
        ptx::store_shared(shared + kA + swizzled(row, column),
                          ptx::load_global(reinterpret_cast<const uint32_t*>(p.a) + i));
    }
    if (fault != Fault::kNoProxyFence) ptx::fence_proxy_async();
    ptx::barrier_sync(1, kConsumers);

    uint32_t a[2][4];
    for (uint32_t chunk = 0; chunk < 2; ++chunk)
        for (uint32_t r = 0; r < 4; ++r) {
            const uint32_t row = 16 * warp + lane / 4 + 8 * (r & 1);
            const uint32_t column = 32 + 16 * chunk + 8 * (r >> 1) + 2 * (lane & 3);
            a[chunk][r] =
                ptx::load_global(reinterpret_cast<const uint32_t*>(p.a + row * kTile + column));
        }

    float d[kTile / 2];
    for (float& x : d) x = 0.0f;
    for (int32_t i = 0; i < p.steps; ++i) {
        const uint32_t stage = static_cast<uint32_t>(i) % kStages;
        const uint32_t parity = static_cast<uint32_t>(i) / kStages % 2;
        const uint32_t empty = shared + kEmpty + 8 * stage;
        if (fault != Fault::kNoFullWait)
            ptx::mbarrier_wait(shared + kFull + 8 * stage,
                               fault == Fault::kWrongFullParity ? parity ^ 1 : parity);
        if (fault == Fault::kReleaseByOneLane) {  // this tile is of no use
            if (lane == 7) ptx::mbarrier_arrive(empty);
            continue;
        }
        const uint32_t tile = shared + kB + stage * kTileBytes;
        if (fault != Fault::kNoWgmmaFence) ptx::wgmma_fence();
        for (uint32_t k = 0; k < 4; ++k) {
            uint32_t at = tile + 32 * k;
            uint32_t stride = 1024;
            if (fault == Fault::kMisalignedDescriptor) at += 512;
            if (fault == Fault::kSwappedDescriptor) stride = 16;
            uint64_t b =
                ptx::matrix_descriptor(at, fault == Fault::kSwappedDescriptor ? 1024 : 16, stride);
            if (fault == Fault::kUnswizzledDescriptor) b &= ~(uint64_t{3} << 62);
            if (k < 2) {
                const uint64_t left = ptx::matrix_descriptor(shared + kA + 32 * k, 16, 1024);
                if (fault == Fault::kMixedWarps && warp == 2)
                    ptx::wgmma_ss<ptx::BFloat16, 64>(d, left, b, true);
                else ptx::wgmma_ss<ptx::BFloat16, 64>(d, left, b, true);
            } else {
                ptx::wgmma_rs<ptx::BFloat16, 64, false>(d, a[k - 2], b, true);
            }
        }
        if (fault != Fault::kNoWgmmaCommit) ptx::wgmma_commit();
        if (fault == Fault::kScaledInFlight) d[5] *= 2.0f;
        if (fault == Fault::kReadInFlight) ptx::store_global(p.out + thread, d[3] + 1.0f);
        if (fault == Fault::kOperandInFlight) a[1][2] ^= 1;
        if (fault == Fault::kEarlyRelease) {
            ptx::sync_warp();
            if (ptx::elect_one()) ptx::mbarrier_arrive(empty);
        }
        const bool is_last = i + 1 == p.steps;
        if (fault == Fault::kWgmmaInFlight && is_last) return;
        if (fault != Fault::kNoWgmmaWait) ptx::wgmma_wait<0>();
        ptx::keep_in_place(d);
        if (fault == Fault::kEarlyRelease) continue;
        ptx::sync_warp();
        if (fault == Fault::kNoArrive) continue;
        if (fault == Fault::kReleaseByOneWarp && warp != 1) continue;
        if (ptx::elect_one()) {
            ptx::mbarrier_arrive(empty);
            if (fault == Fault::kDoubleArrival && warp == 0) ptx::mbarrier_arrive(empty);
        }
    }

    for (uint32_t i = 0; i < kTile / 2; ++i) {
        const uint32_t row = 16 * warp + lane / 4 + 8 * (i >> 1 & 1);
        const uint32_t column = 8 * (i >> 2) + 2 * (lane & 3) + (i & 1);
        ptx::store_global(p.out + (ptx::cta_index() * kTile + row) * kTile + column, d[i]);
    }
    other_faults(p, shared, fault);
}

NABLA_KERNEL(kThreads, 1) pipeline_kernel(const NABLA_GRID_CONSTANT PipelineParams p) {
    const uint32_t shared = ptx::shared_base();
    const auto fault = static_cast<Fault>(p.fault);
    const uint32_t releases = fault == Fault::kReleaseByOneWarp ? 1 : 4;
    if (ptx::thread_index() == 0) {
        for (uint32_t stage = 0; stage < kStages; ++stage) {
            ptx::mbarrier_init(shared + kFull + 8 * stage, 1);
            ptx::mbarrier_init(shared + kEmpty + 8 * stage, releases);
        }
        if (fault != Fault::kNoInitFence) ptx::fence_mbarrier_init();
    }
    if (fault != Fault::kNoInitBarrier) ptx::sync_cta();
    if (ptx::warp_index() < 4) consume(p, shared, fault);
    else if (ptx::elect_one()) produce(p, shared, fault);
}

}  // namespace

int faults() { return static_cast<int>(Fault::kCount); }

const char* fault_name(int fault) { return kFaultNames[fault]; }

void pipeline(const PipelineParams& p) {
    ptx::launch(pipeline_kernel,
                {"pipeline", static_cast<uint32_t>(p.ctas), kThreads, kSharedBytes, nullptr}, p);
}

}  // namespace nabla::emulation::probes
