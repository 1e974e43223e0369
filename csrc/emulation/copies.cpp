// Bulk copies into shared memory, and the copies of a thread.
#include <algorithm>
#include <cstring>

#include "emulation/cta.h"
#include "emulation/global.h"

namespace nabla::emulation {
namespace {

// Bytes of a row of 128 that the 128-byte swizzle moves among each other: address bits 4 to 6 are
// combined with bits 7 to 9.
uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

uint32_t box_bytes(const TensorMap& map) {
    return map.element_bytes * map.box[0] * map.box[1] * map.box[2] * map.box[3];
}

// Call copy(offset in the box, source or null where the element row is outside, bytes) for the
// runs of contiguous elements of the box.
template <class Copy>
void for_each_run(const TensorMap& map, const int32_t (&at)[4], Copy copy) {
    uint32_t offset = 0;
    const uint32_t row_bytes = map.box[0] * map.element_bytes;
    for (uint32_t i3 = 0; i3 < map.box[3]; ++i3)
        for (uint32_t i2 = 0; i2 < map.box[2]; ++i2)
            for (uint32_t i1 = 0; i1 < map.box[1]; ++i1) {
                const int64_t c[4] = {at[0], int64_t{at[1]} + i1, int64_t{at[2]} + i2,
                                      int64_t{at[3]} + i3};
                bool inside = true;
                int64_t source = 0;
                for (int d = 1; d < 4; ++d) {
                    inside = inside && c[d] >= 0 && c[d] < static_cast<int64_t>(map.extents[d]);
                    source += c[d] * static_cast<int64_t>(map.strides[d]);
                }
                // Elements of the row inside of the tensor: first to last - 1.
                int64_t first = c[0] < 0 ? -c[0] : 0;
                int64_t last = static_cast<int64_t>(map.extents[0]) - c[0];
                last = std::min<int64_t>(last, map.box[0]);
                if (!inside || last <= first) {
                    copy(offset, nullptr, row_bytes);
                } else {
                    const auto* row = static_cast<const uint8_t*>(map.data) + source +
                                      (c[0] + first) * map.element_bytes;
                    const auto before = static_cast<uint32_t>(first) * map.element_bytes;
                    const auto bytes = static_cast<uint32_t>(last - first) * map.element_bytes;
                    if (before) copy(offset, nullptr, before);
                    copy(offset + before, row, bytes);
                    if (before + bytes < row_bytes)
                        copy(offset + before + bytes, nullptr, row_bytes - before - bytes);
                }
                offset += row_bytes;
            }
}

}  // namespace

void check_tensor_map(Cta& cta, const TensorMap& map, uint32_t site) {
    const auto require = [&](bool holds, const char* what) {
        if (!holds) cta.fail(std::string("wrong tensor map: ") + what, site);
    };
    require(map.data && reinterpret_cast<uintptr_t>(map.data) % 16 == 0,
            "the tensor's address is no multiple of 16");
    require(map.strides[0] == map.element_bytes, "the innermost dimension is not contiguous");
    for (int d = 0; d < 4; ++d) {
        require(map.box[d] >= 1 && map.box[d] <= 256, "a box extent is not in 1 .. 256");
        require(map.extents[d] >= 1 && map.extents[d] <= uint64_t{1} << 32,
                "an extent is not in 1 .. 2^32");
        require(d == 0 || (map.strides[d] % 16 == 0 && map.strides[d] < uint64_t{1} << 40),
                "a stride is no multiple of 16 bytes below 2^40");
    }
    const uint32_t row_bytes = map.box[0] * map.element_bytes;
    require(row_bytes % 16 == 0, "a row of the box is no multiple of 16 bytes");
    require(!map.swizzle_128 || row_bytes == 128,
            "a row of a box with 128-byte swizzle has not 128 bytes");
}

void Cta::issue_bulk_copy(BulkCopy copy, uint32_t mbarrier_address) {
    Thread& thread = self();
    Mbarrier& barrier = mbarrier(mbarrier_address, copy.site);
    if (!barrier.init_fenced && !has_fenced(thread, barrier.init.agent, barrier.init.clock))
        fail("race between proxies: no fence_mbarrier_init follows the mbarrier's initialisation",
             copy.site);
    if (copy.source) {
        if (copy.bytes % 16 || !copy.bytes)
            fail("bulk copy of " + std::to_string(copy.bytes) + " bytes: a positive multiple of 16",
                 copy.site);
        check_shared(copy.destination, copy.bytes, 16, copy.site);
        if (reinterpret_cast<uintptr_t>(copy.source) % 16)
            fail("bulk copy from an address that is no multiple of 16", copy.site);
        touch_global(*this, copy.source, copy.bytes, Touching::kRead, copy.site);
    } else {
        check_tensor_map(*this, copy.map, copy.site);
        copy.bytes = box_bytes(copy.map);
        check_shared(copy.destination, copy.bytes, copy.map.swizzle_128 ? 1024 : 128, copy.site);
        for_each_run(copy.map, copy.coordinates, [&](uint32_t, const uint8_t* row, uint32_t bytes) {
            if (row) touch_global(*this, row, bytes, Touching::kRead, copy.site);
        });
    }
    copy.mbarrier = mbarrier_at[mbarrier_address];
    const Access access{{barrier.phase + 1, static_cast<uint16_t>(barrier.agent), kAsync},
                        copy.site};
    Shadow::Memo memo;
    report_conflict(shadow.write(ThreadObserver(*this, thread), access,
                                 copy.destination - kSharedBase, copy.bytes, memo),
                    copy.site);
    memset(shared(copy.destination), 0xff, copy.bytes);
    ++barrier.copies_in_flight;
    barrier.copied_phases = barrier.phase + 1;
    barrier.copy_site = copy.site;
    if (launch.settings.schedule == Schedule::kEager) deliver(copy);
    else copies_in_flight.push_back(copy);
}

void Cta::deliver(const BulkCopy& copy) {
    if (copy.source) {
        memcpy(shared(copy.destination), copy.source, copy.bytes);
    } else {
        const auto place = [&](uint32_t offset) {
            const uint32_t address = copy.destination + offset;
            return shared(copy.map.swizzle_128 ? swizzle_128(address) : address);
        };
        for_each_run(copy.map, copy.coordinates,
                     [&](uint32_t offset, const uint8_t* row, uint32_t bytes) {
                         // The swizzle keeps 16 aligned bytes together.
                         for (uint32_t i = 0; i < bytes;) {
                             const uint32_t run = std::min(16 - (offset + i) % 16, bytes - i);
                             if (row) memcpy(place(offset + i), row + i, run);
                             else memset(place(offset + i), 0, run);
                             i += run;
                         }
                     });
    }
    Mbarrier& barrier = *mbarriers[copy.mbarrier];
    --barrier.copies_in_flight;
    barrier.bytes -= copy.bytes;
    mbarrier_complete(barrier, copy.site);
}

void Cta::finish(const ThreadCopy& copy) {
    uint8_t* memory = shared(copy.destination);
    if (copy.valid_bytes) memcpy(memory, copy.source, copy.valid_bytes);
    memset(memory + copy.valid_bytes, 0, 16 - copy.valid_bytes);
}

void copy_async_wait(uint32_t pending, Site where) {
    Cta& cta = Cta::current();
    Thread& thread = Cta::self();
    uint32_t site;
    if (cta.enter(Instruction::kCopyAsyncWait, where, site)) return;
    const uint32_t done = thread.copies_committed > pending ? thread.copies_committed - pending : 0;
    size_t landed = 0;
    for (; landed < thread.copies.size() && thread.copies[landed].group <= done; ++landed) {
        const ThreadCopy& copy = thread.copies[landed];
        cta.finish(copy);
        cta.shadow.land(copy.destination - Cta::kSharedBase, 16,
                        {thread.now, static_cast<uint16_t>(thread.index), 0});
    }
    thread.copies.erase(thread.copies.begin(),
                        thread.copies.begin() + static_cast<ptrdiff_t>(landed));
    cta.maybe_yield(thread);
}

}  // namespace nabla::emulation

namespace nabla::ptx {

using emulation::BulkCopy;
using emulation::Cta;
using emulation::Instruction;
using emulation::Thread;
using emulation::Touching;

void copy_tensor_4d(uint32_t destination, const TensorMap* map, uint32_t mbarrier, int32_t c0,
                    int32_t c1, int32_t c2, int32_t c3, Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    cta.enter(Instruction::kCopyTensor4d, where, site);
    BulkCopy copy{destination, 0, 0, site, nullptr, *map, {c0, c1, c2, c3}};
    cta.issue_bulk_copy(copy, mbarrier);
    cta.maybe_yield(Cta::self());
}

void copy_bulk(uint32_t destination, const void* source, uint32_t bytes, uint32_t mbarrier,
               Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    cta.enter(Instruction::kCopyBulk, where, site);
    cta.issue_bulk_copy({destination, bytes, 0, site, source, {}, {}}, mbarrier);
    cta.maybe_yield(Cta::self());
}

void copy_async_16(uint32_t destination, const void* source, uint32_t valid_bytes, Site where) {
    Cta& cta = Cta::current();
    Thread& thread = Cta::self();
    uint32_t site;
    cta.enter(Instruction::kCopyAsync16, where, site);
    if (valid_bytes > 16)
        cta.fail("copy of " + std::to_string(valid_bytes) + " bytes: at most 16", site);
    if (reinterpret_cast<uintptr_t>(source) % 16)
        cta.fail("copy from an address that is no multiple of 16", site);
    cta.check_shared(destination, 16, 16, site);
    if (valid_bytes) emulation::touch_global(cta, source, valid_bytes, Touching::kRead, site);
    cta.write_shared(thread, destination, 16, site, emulation::kInFlight);
    memset(cta.shared(destination), 0xff, 16);
    thread.copies.push_back({destination, source, valid_bytes, thread.copies_committed + 1, site});
    const auto schedule = cta.launch.settings.schedule;
    if (schedule == emulation::Schedule::kEager ||
        (schedule == emulation::Schedule::kRandom && cta.random.one_in(2)))
        cta.finish(thread.copies.back());
}

void copy_async_commit(Site where) {
    Cta& cta = Cta::current();
    uint32_t site;
    if (!cta.enter(Instruction::kCopyAsyncCommit, where, site)) ++Cta::self().copies_committed;
}

}  // namespace nabla::ptx
