// The instructions that act at once: loads and stores, barriers, votes, conversions.
#include <algorithm>
#include <cstring>

#include "emulation/cta.h"
#include "emulation/global.h"

namespace nabla::emulation {
namespace {

const char* const kNames[] = {
    "load_shared",
    "store_shared",
    "atomic_or_shared",
    "load_global",
    "store_global",
    "reduce_add_global",
    "sync_cta",
    "barrier_sync",
    "sync_warp",
    "shuffle",
    "vote",
    "reduce",
    "elect_one",
    "mbarrier_init",
    "fence_mbarrier_init",
    "mbarrier_arrive",
    "mbarrier_arrive_expect_tx",
    "mbarrier_wait",
    "copy_tensor_4d",
    "copy_bulk",
    "fence_proxy_async",
    "copy_async_16",
    "copy_async_commit",
    "copy_async_wait",
    "wgmma_fence",
    "wgmma_commit",
    "wgmma_wait",
    "wgmma",
    "ldmatrix",
    "mma",
    "set_max_registers",
    "convert",
};
static_assert(std::size(kNames) == static_cast<size_t>(Instruction::kConvert) + 1,
              "every instruction has a name");

}  // namespace

const char* name(Instruction instruction) { return kNames[static_cast<size_t>(instruction)]; }

bool synchronises(Instruction instruction) {
    switch (instruction) {
        case Instruction::kSyncCta:
        case Instruction::kBarrierSync:
        case Instruction::kSyncWarp:
        case Instruction::kFenceMbarrierInit:
        case Instruction::kMbarrierArrive:
        case Instruction::kMbarrierArriveExpectTx:
        case Instruction::kMbarrierWait:
        case Instruction::kFenceProxyAsync:
        case Instruction::kCopyAsyncCommit:
        case Instruction::kCopyAsyncWait:
        case Instruction::kWgmmaFence:
        case Instruction::kWgmmaCommit:
        case Instruction::kWgmmaWait: return true;
        default: return false;
    }
}

std::string Sites::file(Site site) {
    const std::string path = site.file;
    const size_t sources = path.rfind("csrc/");
    return sources == std::string::npos ? path : path.substr(sources + 5);
}

uint32_t Sites::find(Instruction instruction, Site site) {
    const auto path = reinterpret_cast<uintptr_t>(site.file);
    uint64_t hash =
        (path ^ static_cast<uint64_t>(site.line) << 20 ^ static_cast<uint64_t>(instruction) << 40) *
        0x9e3779b97f4a7c15u;
    for (uint32_t slot = static_cast<uint32_t>(hash >> 40);; ++slot) {
        uint32_t& id = slots_[slot % kSlots];
        if (!id) {
            entries_.push_back({site, instruction, 0, false});
            id = static_cast<uint32_t>(entries_.size());
            if (!ignored_.empty())
                entries_.back().ignored = ignored_ == file(site) + ":" + std::to_string(site.line) +
                                                          ":" + name(instruction);
            return id - 1;
        }
        const Entry& entry = entries_[id - 1];
        if (entry.site.file == site.file && entry.site.line == site.line &&
            entry.instruction == instruction)
            return id - 1;
    }
}

std::string Sites::text(uint32_t id) const {
    const Entry& entry = entries_[id];
    if (!entry.site.line) return entry.site.file;
    return std::string(name(entry.instruction)) + " at " + file(entry.site) + ":" +
           std::to_string(entry.site.line);
}

// ---- loads and stores ----

void load_shared(void* value, uint32_t address, uint32_t bytes, Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    cta.enter(Instruction::kLoadShared, where, site);
    cta.check_shared(address, bytes, bytes, site);
    cta.read_shared(Cta::self(), address, bytes, site);
    memcpy(value, cta.shared(address), bytes);
}

void store_shared(uint32_t address, const void* value, uint32_t bytes, Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    cta.enter(Instruction::kStoreShared, where, site);
    cta.check_shared(address, bytes, bytes, site);
    cta.write_shared(Cta::self(), address, bytes, site);
    memcpy(cta.shared(address), value, bytes);
}

void load_global(void* value, const void* address, uint32_t bytes, Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    cta.enter(Instruction::kLoadGlobal, where, site);
    if (reinterpret_cast<uintptr_t>(address) % bytes)
        cta.fail("global address that is no multiple of " + std::to_string(bytes), site);
    touch_global(cta, address, bytes, Touching::kRead, site);
    memcpy(value, address, bytes);
}

void store_global(void* address, const void* value, uint32_t bytes, Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    cta.enter(Instruction::kStoreGlobal, where, site);
    if (reinterpret_cast<uintptr_t>(address) % bytes)
        cta.fail("global address that is no multiple of " + std::to_string(bytes), site);
    touch_global(cta, address, bytes, Touching::kWrite, site);
    memcpy(address, value, bytes);
}

// ---- within a warp ----

uint32_t shuffle(Shuffle kind, uint32_t value, uint32_t argument, Site where) {
    struct Lane {
        uint32_t value, argument, result;
    } mine{value, argument, 0};
    Cta& cta = Cta::current();
    uint32_t site;
    cta.enter(Instruction::kShuffle, where, site);
    cta.collective(Cta::self(), site, mine, [&](Lane* const* lanes) {
        for (uint32_t lane = 0; lane < 32; ++lane) {
            const uint32_t by = lanes[lane]->argument;
            uint32_t source = lane;
            switch (kind) {
                case Shuffle::kIndex: source = by % 32; break;
                case Shuffle::kXor: source = lane ^ by; break;
            }
            lanes[lane]->result = lanes[source < 32 ? source : lane]->value;
        }
    });
    return mine.result;
}

uint32_t vote(bool predicate, Site where) {
    struct Lane {
        bool predicate;
        uint32_t ballot;
    } mine{predicate, 0};
    Cta& cta = Cta::current();
    uint32_t site;
    cta.enter(Instruction::kVote, where, site);
    cta.collective(Cta::self(), site, mine, [](Lane* const* lanes) {
        uint32_t ballot = 0;
        for (uint32_t lane = 0; lane < 32; ++lane)
            ballot |= uint32_t{lanes[lane]->predicate} << lane;
        for (uint32_t lane = 0; lane < 32; ++lane) lanes[lane]->ballot = ballot;
    });
    return mine.ballot;
}

uint32_t reduce(Reduce kind, uint32_t value, Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    cta.enter(Instruction::kReduce, where, site);
    cta.collective(Cta::self(), site, value, [&](uint32_t* const* lanes) {
        uint32_t result = *lanes[0];
        for (uint32_t lane = 1; lane < 32; ++lane) {
            const uint32_t x = *lanes[lane];
            switch (kind) {
                case Reduce::kAdd: result += x; break;
                case Reduce::kMax: result = std::max(result, x); break;
                case Reduce::kMin: result = std::min(result, x); break;
            }
        }
        for (uint32_t lane = 0; lane < 32; ++lane) *lanes[lane] = result;
    });
    return value;
}

void set_max_registers(int registers, bool up, Site where) {
    Cta& cta = Cta::current();
    Thread& thread = Cta::self();
    uint32_t site;
    cta.enter(Instruction::kSetMaxRegisters, where, site);
    Warp& warp = cta.warps[thread.warp];
    if (registers % 8 || registers < 24 || registers > 256)
        cta.fail(std::to_string(registers) + " registers: a multiple of 8 from 24 to 256", site);
    const int before = warp.registers;
    if (up ? registers < before : registers > before)
        cta.fail("from " + std::to_string(before) + " registers " + (up ? "up" : "down") + " to " +
                     std::to_string(registers),
                 site);
    int nothing = 0;
    cta.collective(thread, site, nothing, [&](int* const*) {
        while (32 * (registers - before) > cta.free_registers) {
            cta.waiting_for_registers.push_back(&thread);
            cta.block(thread, site, {"registers that other warps hold"});
        }
        cta.free_registers -= 32 * (registers - before);
        warp.registers = registers;
        cta.grants.push_back({cta.launch.shape.name, thread.warp, registers});
        for (Thread* other : cta.waiting_for_registers) cta.wake(*other);
        cta.waiting_for_registers.clear();
    });
}

// ---- the tensor cores of a warp ----

void ldmatrix_x4(uint32_t* registers, uint32_t row_address, bool transpose, Site where) {
    struct Lane {
        uint32_t address;
        uint32_t* registers;
    } mine{row_address, registers};
    Cta& cta = Cta::current();
    Thread& thread = Cta::self();
    uint32_t site;
    cta.enter(Instruction::kLdmatrix, where, site);
    cta.check_shared(row_address, 16, 16, site);
    cta.collective(thread, site, mine, [&](Lane* const* lanes) {
        // The warp reads, not a lane: its lanes have to know of what was written, all of them, and
        // who writes there later that one of them has passed this call.
        const WarpObserver observer(cta, thread.warp);
        const auto agent = static_cast<uint16_t>(cta.position_agent(thread.warp));
        const Access access{{thread.position + 1, agent, 0}, site};
        Shadow::Memo memo;
        uint16_t rows[32][8];  // of the four matrices
        for (uint32_t row = 0; row < 32; ++row) {
            const uint32_t address = lanes[row]->address;
            cta.report_conflict(
                cta.shadow.read(observer, access, address - Cta::kSharedBase, 16, memo), site);
            memcpy(rows[row], cta.shared(address), 16);
        }
        for (uint32_t lane = 0; lane < 32; ++lane)
            for (uint32_t i = 0; i < 4; ++i) {
                const uint32_t line = lane / 4, pair = 2 * (lane % 4);
                const uint16_t(*matrix)[8] = rows + 8 * i;
                const uint16_t low = transpose ? matrix[pair][line] : matrix[line][pair];
                const uint16_t high = transpose ? matrix[pair + 1][line] : matrix[line][pair + 1];
                lanes[lane]->registers[i] = low | uint32_t{high} << 16;
            }
    });
}

namespace {

// What a lane passes to mma_m16n8k16.
struct MmaLane {
    float* d;
    const uint32_t *a, *b;
};

template <Type kType>
void multiply(MmaLane* const* lanes) {
    float left[16][16], right[16][8];
    for (uint32_t lane = 0; lane < 32; ++lane) {
        const uint32_t line = lane / 4, pair = 2 * (lane % 4);
        for (uint32_t r = 0; r < 4; ++r)
            for (uint32_t e = 0; e < 2; ++e)
                left[line + 8 * (r & 1)][8 * (r >> 1) + pair + e] =
                    from_bits(kType, static_cast<uint16_t>(lanes[lane]->a[r] >> 16 * e));
        for (uint32_t r = 0; r < 2; ++r)
            for (uint32_t e = 0; e < 2; ++e)
                right[8 * r + pair + e][line] =
                    from_bits(kType, static_cast<uint16_t>(lanes[lane]->b[r] >> 16 * e));
    }
    for (uint32_t row = 0; row < 16; ++row) {
        float sums[8] = {};
        for (uint32_t k = 0; k < 16; ++k)
            for (uint32_t column = 0; column < 8; ++column)
                sums[column] += left[row][k] * right[k][column];
        for (uint32_t column = 0; column < 8; ++column)
            lanes[row % 8 * 4 + column / 2]->d[row / 8 * 2 + column % 2] += sums[column];
    }
}

}  // namespace

void mma_m16n8k16(Type type, float* d, const uint32_t* a, const uint32_t* b, Site where) {
    MmaLane mine{d, a, b};
    Cta& cta = Cta::current();
    uint32_t site;
    cta.enter(Instruction::kMma, where, site);
    cta.collective(Cta::self(), site, mine,
                   type == Type::kBFloat16 ? multiply<Type::kBFloat16> : multiply<Type::kFloat16>);
}

}  // namespace nabla::emulation

namespace nabla::ptx {

using emulation::Cta;
using emulation::Instruction;
using emulation::Mbarrier;
using emulation::Thread;

uint32_t thread_index() { return Cta::self().index; }
uint32_t cta_index() { return Cta::current().index; }
uint32_t num_threads() { return Cta::current().num_threads; }
uint32_t lane_index() { return Cta::self().lane; }
uint32_t warp_index() { return Cta::self().warp; }
uint32_t shared_base() { return Cta::kSharedBase; }

uint32_t atomic_or_shared(uint32_t address, uint32_t value, Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    cta.enter(Instruction::kAtomicOrShared, where, site);
    cta.check_shared(address, 4, 4, site);
    cta.maybe_yield(Cta::self());
    cta.write_shared(Cta::self(), address, 4, site, emulation::kAtomic);
    uint32_t old;
    memcpy(&old, cta.shared(address), 4);
    const uint32_t result = old | value;
    memcpy(cta.shared(address), &result, 4);
    return old;
}

void reduce_add_global(float* address, float value, Site where) {
    emulation::check_not_in_flight(value, where);
    Cta& cta = Cta::current();
    uint32_t site;
    cta.enter(Instruction::kReduceAddGlobal, where, site);
    emulation::touch_global(cta, address, 4, emulation::Touching::kAdd, site);
    cta.maybe_yield(Cta::self());
    cta.launch.wait_for_earlier_ctas();
    *address += value;
}

void sync_cta(Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    if (!cta.enter(Instruction::kSyncCta, where, site)) cta.barrier(0, cta.num_threads, site);
}

void barrier_sync(uint32_t id, uint32_t threads, Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    if (!cta.enter(Instruction::kBarrierSync, where, site)) cta.barrier(id, threads, site);
}

void sync_warp(Site where) {
    Cta& cta = Cta::current();
    Thread& thread = Cta::self();
    uint32_t site;
    if (cta.enter(Instruction::kSyncWarp, where, site)) return;
    int nothing = 0;
    cta.collective(thread, site, nothing, [&](int* const*) {
        emulation::Gathering gathering;
        Thread* lanes = &cta.threads[thread.warp * 32];
        for (int lane = 0; lane < 32; ++lane) cta.release(lanes[lane], gathering);
        const emulation::KnowledgeRef knowledge = gathering.take();
        for (int lane = 0; lane < 32; ++lane) cta.acquire(lanes[lane], knowledge);
    });
}

bool elect_one(Site where) {
    Cta& cta = Cta::current();
    Thread& thread = Cta::self();
    uint32_t site;
    cta.enter(Instruction::kElectOne, where, site);
    int nothing = 0;
    cta.collective(thread, site, nothing, [](int* const*) {});
    return thread.lane == cta.launch.elected_lane;
}

void mbarrier_init(uint32_t mbarrier, uint32_t count, Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    cta.enter(Instruction::kMbarrierInit, where, site);
    cta.mbarrier_init(mbarrier, count, site);
}

void fence_mbarrier_init(Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    if (cta.enter(Instruction::kFenceMbarrierInit, where, site)) return;
    for (const auto& barrier : cta.mbarriers)
        if (barrier->init.agent == Cta::self().index) barrier->init_fenced = true;
}

void mbarrier_arrive(uint32_t mbarrier, uint32_t count, Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    if (cta.enter(Instruction::kMbarrierArrive, where, site)) return;
    cta.maybe_yield(Cta::self());
    cta.mbarrier_arrive(cta.mbarrier(mbarrier, site), count, 0, site);
}

void mbarrier_arrive_expect_tx(uint32_t mbarrier, uint32_t bytes, Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    if (cta.enter(Instruction::kMbarrierArriveExpectTx, where, site)) return;
    cta.maybe_yield(Cta::self());
    cta.mbarrier_arrive(cta.mbarrier(mbarrier, site), 1, bytes, site);
}

void mbarrier_wait(uint32_t mbarrier, uint32_t parity, Site where) {
    Cta& cta = Cta::current();
    Thread& thread = Cta::self();
    uint32_t site;
    if (cta.enter(Instruction::kMbarrierWait, where, site)) return;
    cta.maybe_yield(thread);
    Mbarrier& barrier = cta.mbarrier(mbarrier, site);
    while (!cta.mbarrier_test(barrier, parity, site)) {
        barrier.waiting.push_back(&thread);
        cta.block(thread, site, {nullptr, mbarrier, parity});
    }
}

void fence_proxy_async(Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    if (!cta.enter(Instruction::kFenceProxyAsync, where, site)) cta.fence(Cta::self());
}

}  // namespace nabla::ptx
