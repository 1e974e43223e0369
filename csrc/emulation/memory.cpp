#include "emulation/memory.h"

#include <algorithm>
#include <stdexcept>

#include "emulation/global.h"

namespace nabla::emulation {

uint64_t Touch::word() const {
    return uint64_t{launch & 0xfff} << 52 | uint64_t{cta & 0xfffff} << 32 |
           uint64_t{thread & 0x7ff} << 21 | uint64_t{std::min(clock, 0xfffffu)} << 1 |
           uint64_t{atomic};
}

Touch Touch::of(uint64_t word) {
    return {static_cast<uint32_t>(word >> 52), static_cast<uint32_t>(word >> 32) & 0xfffff,
            static_cast<uint32_t>(word >> 21) & 0x7ff, static_cast<uint32_t>(word >> 1) & 0xfffff,
            (word & 1) != 0};
}

void Memory::add(const void* data, uint64_t bytes, bool writable, const std::string& name) {
    if (!bytes) return;
    auto region = std::make_unique<Region>();
    region->begin = reinterpret_cast<uintptr_t>(data);
    region->end = region->begin + bytes;
    region->writable = writable;
    region->name = name;
    if (writable) {
        region->writes = std::make_unique<std::atomic<uint64_t>[]>(region->granules());
        region->reads = std::make_unique<std::atomic<uint64_t>[]>(region->granules());
    }
    const auto after =
        std::upper_bound(regions_.begin(), regions_.end(), region,
                         [](const auto& a, const auto& b) { return a->begin < b->begin; });
    regions_.insert(after, std::move(region));
}

const Region* Memory::find(const void* data, uint64_t bytes) const {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    auto after = std::upper_bound(
        regions_.begin(), regions_.end(), begin,
        [](uintptr_t address, const auto& region) { return address < region->begin; });
    // Views of one tensor may overlap: the last that begins before need not be the one. A region
    // that may be written comes before one that may not.
    const Region* found = nullptr;
    while (after != regions_.begin()) {
        const Region* region = (--after)->get();
        if (begin + bytes > region->end) continue;
        if (region->writable) return region;
        if (!found) found = region;
    }
    return found;
}

std::string Memory::describe(const void* data) const {
    if (regions_.empty()) return "no global memory is registered";
    const auto address = reinterpret_cast<uintptr_t>(data);
    const Region* nearest = nullptr;
    uintptr_t distance = ~uintptr_t{0};
    for (const auto& region : regions_) {
        const uintptr_t away = address < region->begin ? region->begin - address
                               : address < region->end ? 0
                                                       : address - region->end;
        if (nearest && away >= distance) continue;
        nearest = region.get();
        distance = away;
    }
    if (address < nearest->begin)
        return std::to_string(distance) + " bytes before '" + nearest->name + "'";
    if (address >= nearest->end)
        return std::to_string(distance) + " bytes past the end of '" + nearest->name + "'";
    return "across the end of '" + nearest->name + "'";
}

void touch_global(Cta& cta, const void* address, uint32_t bytes, Touching touching, uint32_t site) {
    Memory& memory = cta.launch.memory;
    const Region* region = memory.find(address, bytes);
    const char* verb = touching == Touching::kRead ? "read" : "write";
    if (!region)
        cta.fail(std::string("global memory out of bounds: ") + verb + " of " +
                     std::to_string(bytes) + " bytes, " + memory.describe(address),
                 site);
    if (!region->writable) {
        if (touching == Touching::kRead) return;
        cta.fail("write to '" + region->name + "', which the kernel may only read", site);
    }
    const Thread& thread = Cta::self();
    const Touch mine{memory.launch, cta.index, thread.index, thread.now,
                     touching == Touching::kAdd};
    const auto describe = [&](const Touch& touch) {
        const std::string who = touch.thread == Touch::kSeveral
                                    ? "several threads"
                                    : "thread " + std::to_string(touch.thread);
        return who + " of CTA " + std::to_string(touch.cta);
    };
    const auto fail = [&](uintptr_t granule, const char* done, const Touch& by) {
        cta.fail("race: byte " + std::to_string(2 * granule) + " of '" + region->name + "' " +
                     done + " by " + describe(by) + ", and nothing orders this " + verb + " after",
                 site);
    };
    const auto ordered = [&](const Touch& other) {
        if (other.launch != mine.launch) return true;
        if (other.atomic && mine.atomic) return true;
        if (other.cta != mine.cta) return false;
        return other.thread == Touch::kSeveral || cta.has_seen(thread, other.thread, other.clock);
    };
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address) - region->begin;
    for (uintptr_t i = begin / 2; i <= (begin + bytes - 1) / 2; ++i) {
        if (touching == Touching::kRead) {
            const uint64_t old = region->reads[i].load();
            const Touch last = Touch::of(old);
            Touch now = mine;
            if (last.launch == mine.launch && last.cta != mine.cta)
                now = {mine.launch, mine.cta, Touch::kSeveral, 0, true};
            else if (last.launch == mine.launch && last.thread != mine.thread)
                now.thread = Touch::kSeveral;
            region->reads[i].store(now.word());
            const Touch write = Touch::of(region->writes[i].load());
            if (!ordered(write)) fail(i, "was written", write);
        } else {
            const Touch write = Touch::of(region->writes[i].exchange(mine.word()));
            if (!ordered(write)) fail(i, "was written", write);
            Touch read = Touch::of(region->reads[i].load());
            const bool by_ctas = read.thread == Touch::kSeveral && read.atomic;
            read.atomic = false;
            if ((by_ctas && read.launch == mine.launch) || !ordered(read)) fail(i, "is read", read);
        }
    }
}

}  // namespace nabla::emulation
