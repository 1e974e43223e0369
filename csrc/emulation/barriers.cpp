// Named barriers and mbarriers.
#include "emulation/cta.h"

namespace nabla::emulation {
namespace {

constexpr int64_t kMaxBytes = (1 << 20) - 1;  // PTX ISA: the range of a phase's pending bytes

std::string phase_text(const Mbarrier& barrier) {
    return "(it is in phase " + std::to_string(barrier.phase) + ", waits for " +
           std::to_string(barrier.pending) + " of " + std::to_string(barrier.count) +
           " arrivals and " + std::to_string(barrier.bytes) + " bytes)";
}

}  // namespace

void Cta::barrier(uint32_t id, uint32_t count, uint32_t site) {
    Thread& thread = self();
    if (id >= 16) fail("barrier " + std::to_string(id) + ": a CTA has barriers 0 to 15", site);
    if (count % 32 || !count || count > num_threads)
        fail("barrier of " + std::to_string(count) +
                 " threads: the number is a positive multiple of 32 within the CTA",
             site);
    Barrier& barrier = barriers[id];
    if (barrier.arrived && barrier.expected != count)
        fail("barrier " + std::to_string(id) + " of " + std::to_string(count) +
                 " threads, but others have come to it as one of " +
                 std::to_string(barrier.expected),
             site);
    barrier.expected = count;
    ++barrier.arrived;
    release(thread, barrier.gathering);
    if (barrier.arrived == count) {
        const KnowledgeRef knowledge = barrier.gathering.take();
        const std::vector<Thread*> waiting = std::move(barrier.waiting);
        barrier.waiting.clear();
        barrier.arrived = 0;
        for (Thread* other : waiting) {
            acquire(*other, knowledge);
            wake(*other);
        }
        acquire(thread, knowledge);
    } else {
        barrier.waiting.push_back(&thread);
        block(thread, site, {});
    }
}

Mbarrier& Cta::mbarrier(uint32_t address, uint32_t site) {
    const auto found = mbarrier_at.find(address);
    if (found == mbarrier_at.end())
        fail("no mbarrier has been initialised at byte " +
                 std::to_string(int64_t{address} - int64_t{kSharedBase}) + " of shared memory",
             site);
    Mbarrier& barrier = *mbarriers[found->second];
    if (!has_seen(self(), barrier.init.agent, barrier.init.clock))
        fail("race: the mbarrier at byte " + std::to_string(address - kSharedBase) +
                 " was initialised by " + describe(barrier.init.agent) +
                 ", and nothing orders this use after",
             site);
    return barrier;
}

void Cta::mbarrier_init(uint32_t address, uint32_t count, uint32_t site) {
    Thread& thread = self();
    check_shared(address, 8, 8, site);
    if (!count || count > kMaxBytes)
        fail("mbarrier of " + std::to_string(count) + " arrivals: at least 1", site);
    write_shared(thread, address, 8, site, kMbarrier);
    auto barrier = std::make_unique<Mbarrier>();
    barrier->address = address;
    barrier->agent = new_agent(site);
    barrier->count = barrier->pending = count;
    barrier->init = {thread.now, static_cast<uint16_t>(thread.index), 0};
    mbarrier_at[address] = static_cast<uint32_t>(mbarriers.size());
    mbarriers.push_back(std::move(barrier));
}

void Cta::mbarrier_arrive(Mbarrier& barrier, uint32_t count, uint32_t expected_bytes,
                          uint32_t site) {
    if (!count) fail("an arrival of 0 at an mbarrier: at least 1", site);
    if (barrier.pending < count)
        fail("one arrival too many at the mbarrier at byte " +
                 std::to_string(barrier.address - kSharedBase) + " " + phase_text(barrier),
             site);
    barrier.bytes += expected_bytes;
    if (barrier.bytes > kMaxBytes)
        fail("an mbarrier's phase waits for at most " + std::to_string(kMaxBytes) + " bytes", site);
    barrier.pending -= count;
    release(self(), barrier.gathering);
    mbarrier_complete(barrier, site);
}

// Complete the phase if it waits for nothing more.
void Cta::mbarrier_complete(Mbarrier& barrier, uint32_t site) {
    if (barrier.pending || barrier.bytes) return;
    if (barrier.copies_in_flight)
        fail("phase " + std::to_string(barrier.phase) + " of the mbarrier at byte " +
                 std::to_string(barrier.address - kSharedBase) +
                 " completes while copies to it are in flight: it expects too few bytes",
             barrier.copy_site);
    barrier.gathering.see(barrier.agent, barrier.phase + 1);
    // Whoever waited for the phase before has to be known to be past it: else it might look only
    // after this one, see the parity that it takes for incomplete, and wait for ever.
    for (const Mbarrier::Pass& pass : barrier.passes) {
        const Knowledge& known = *barrier.gathering.get();
        const bool past = known.seen(pass.thread) >= pass.clock ||
                          known.seen(position_agent(pass.thread / 32)) > pass.position;
        if (!past)
            fail("phase " + std::to_string(barrier.phase) + " of the mbarrier at byte " +
                     std::to_string(barrier.address - kSharedBase) + " can complete before " +
                     describe(pass.thread) + " has seen the phase before it complete in " +
                     sites.text(pass.site) + "; that thread would then wait for ever",
                 site);
    }
    barrier.passes.clear();
    barrier.completed = barrier.gathering.take();
    ++barrier.phase;
    barrier.pending = barrier.count;
    const std::vector<Thread*> waiting = std::move(barrier.waiting);
    barrier.waiting.clear();
    for (Thread* thread : waiting) wake(*thread);
}

bool Cta::mbarrier_test(Mbarrier& barrier, uint32_t parity, uint32_t site) {
    if (parity > 1) fail("parity " + std::to_string(parity) + ": 0 or 1", site);
    if (barrier.phase % 2 == parity) return false;
    Thread& thread = self();
    barrier.passes.push_back({thread.index, thread.now, thread.position, site});
    barrier.waited_phases = barrier.phase;
    acquire(thread, barrier.completed);
    return true;
}

}  // namespace nabla::emulation
