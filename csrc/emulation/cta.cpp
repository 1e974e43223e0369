#include "emulation/cta.h"

#include <algorithm>
#include <cstring>
#include <sstream>

namespace nabla::emulation {
namespace {

thread_local Cta* current_cta = nullptr;
thread_local Thread* current_thread = nullptr;

// Agents are the threads, two of each warp, and mbarriers.
constexpr uint32_t kMaxMbarriers = 192;

constexpr int kRegisterFile = 64 << 10;

constexpr uint64_t kMaxCallsInARow = 10'000'000;

std::string lanes_text(uint32_t lanes) {
    if (lanes == ~0u) return "all lanes";
    std::ostringstream text;
    text << (__builtin_popcount(lanes) == 1 ? "lane " : "lanes ");
    const char* separator = "";
    for (int i = 0; i < 32; ++i) {
        if (!(lanes >> i & 1)) continue;
        int last = i;
        while (last < 31 && lanes >> (last + 1) & 1) ++last;
        text << separator << i;
        if (last > i) text << "-" << last;
        separator = ", ";
        i = last;
    }
    return text.str();
}

}  // namespace

Cta& Cta::current() { return *current_cta; }
Thread& Cta::self() { return *current_thread; }

// A host thread runs one CTA at a time, so they can share what is slow to allocate.
static Shadow& shadow_of_host_thread() {
    static thread_local Shadow shadow;
    return shadow;
}

Cta::Cta(const Launch& launch, uint32_t index, Stacks& stacks)
    : launch(launch),
      index(index),
      sites(launch.settings.ignored),
      num_threads(launch.shape.threads),
      num_warps((num_threads + 31) / 32),
      num_agents(num_threads + 2 * num_warps + kMaxMbarriers),
      next_agent(num_threads + 2 * num_warps),
      shared_bytes(launch.shape.shared_bytes),
      shadow(shadow_of_host_thread()),
      random(launch.settings.seed * 1000003 + index),
      threads(num_threads),
      warps(num_warps),
      wgmma_keys((num_warps + 3) / 4),
      shared_storage_(launch.shape.shared_bytes + 1024, 0xff) {  // NaN in every type
    const auto storage = reinterpret_cast<uintptr_t>(shared_storage_.data());
    shared_memory = shared_storage_.data() + (1024 - storage % 1024) % 1024;
    shadow.reset(shared_bytes);
    sites.find(Instruction::kLoadShared, {"the start of the kernel", 0});  // site 0
    const int registers = std::min(kRegisterFile / static_cast<int>(num_threads) / 8 * 8, 248);
    free_registers = kRegisterFile - registers * 32 * static_cast<int>(num_warps);
    for (uint32_t i = 0; i < num_threads; ++i) {
        Thread& thread = threads[i];
        thread.index = i;
        thread.warp = i / 32;
        thread.lane = i % 32;
        Warp& warp = warps[thread.warp];
        warp.registers = registers;
        warp.alive |= 1u << thread.lane;
        start_context(thread.context, stacks.stack(i), Stacks::kBytes, &Cta::enter_thread);
        wake(thread);
    }
    alive_ = num_threads;
    if (launch.settings.schedule == Schedule::kStarving) {
        starved_warp_ = static_cast<int>(random.below(num_warps));
        if (random.one_in(2)) starved_lane_ = static_cast<int>(random.below(32));
    }
}

void Cta::enter_thread() {
    Cta& cta = *current_cta;
    Thread& thread = *current_thread;
    cta.launch.kernel();
    cta.check_exit(thread);
    thread.state = State::kExited;
    cta.warps[thread.warp].alive &= ~(1u << thread.lane);
    --cta.alive_;
    switch_context(thread.context, cta.scheduler_);
    __builtin_unreachable();
}

void Cta::run() {
    current_cta = this;
    while (alive_ && !has_failed_) {
        Thread* thread = pick();
        if (!thread) {
            if (deliver_one()) continue;
            report_deadlock();
        }
        Warp& warp = warps[thread->warp];
        warp.ready &= ~(1u << thread->lane);
        if (!warp.ready) ready_warps_ &= ~(1u << thread->warp);
        current_thread = thread;
        calls_in_a_row_ = 0;
        switch_context(scheduler_, thread->context);
        current_thread = nullptr;
        const bool busy = launch.settings.schedule == Schedule::kRandom ||
                          launch.settings.schedule == Schedule::kStarving;
        if (busy && !has_failed_ && random.one_in(16)) deliver_one();
    }
    if (!has_failed_) check_end();
    if (has_failed_) throw Error(failure_);
}

// ---- scheduling ----

bool Cta::is_starved(const Thread& thread) const {
    return static_cast<int>(thread.warp) == starved_warp_ &&
           (starved_lane_ < 0 || static_cast<int>(thread.lane) == starved_lane_);
}

Thread* Cta::pick() {
    if (!ready_warps_) return nullptr;
    const auto thread_of = [&](uint32_t warp, uint32_t lane) { return &threads[warp * 32 + lane]; };
    if (launch.settings.schedule == Schedule::kLate ||
        launch.settings.schedule == Schedule::kEager) {
        if (!(ready_warps_ >> turn_ & 1)) {
            const uint32_t later = turn_ < 31 ? ready_warps_ >> (turn_ + 1) << (turn_ + 1) : 0;
            turn_ = static_cast<uint32_t>(__builtin_ctz(later ? later : ready_warps_));
        }
        return thread_of(turn_, static_cast<uint32_t>(__builtin_ctz(warps[turn_].ready)));
    }
    uint32_t candidates = ready_warps_;
    uint32_t starved_lanes = 0;
    if (starved_warp_ >= 0) starved_lanes = starved_lane_ < 0 ? ~0u : 1u << starved_lane_;
    if (starved_lanes && !(warps[starved_warp_].ready & ~starved_lanes))
        candidates &= ~(1u << starved_warp_);
    if (!candidates) {
        // Only the starved are left; asynchronous work goes first, sometimes.
        if (random.one_in(2) && deliver_one()) return pick();
        candidates = ready_warps_;
        starved_lanes = 0;
    }
    const uint32_t warp = random.bit_of(candidates);
    uint32_t lanes = warps[warp].ready;
    if (static_cast<int>(warp) == starved_warp_) lanes &= ~starved_lanes;
    return thread_of(warp, random.bit_of(lanes));
}

bool Cta::deliver_one() {
    if (copies_in_flight.empty()) return false;
    const size_t chosen = random.below(static_cast<uint32_t>(copies_in_flight.size()));
    const BulkCopy copy = copies_in_flight[chosen];
    copies_in_flight.erase(copies_in_flight.begin() + static_cast<ptrdiff_t>(chosen));
    deliver(copy);
    return true;
}

void Cta::wake(Thread& thread) {
    thread.state = State::kReady;
    warps[thread.warp].ready |= 1u << thread.lane;
    ready_warps_ |= 1u << thread.warp;
}

void Cta::block(Thread& thread, uint32_t site, Wait wait) {
    thread.state = State::kWaiting;
    thread.wait_site = site;
    thread.wait = wait;
    switch_context(thread.context, scheduler_);
}

void Cta::yield(Thread& thread) {
    wake(thread);
    switch_context(thread.context, scheduler_);
}

void Cta::maybe_yield(Thread& thread) {
    const Schedule schedule = launch.settings.schedule;
    if (schedule != Schedule::kRandom && schedule != Schedule::kStarving) return;
    if (is_starved(thread) || random.one_in(4)) yield(thread);
}

bool Cta::enter(Instruction instruction, Site site, uint32_t& id) {
    id = sites.find(instruction, site);
    Sites::Entry& entry = sites[id];
    ++entry.calls;
    if (++calls_in_a_row_ > kMaxCallsInARow)
        fail("the thread has made " + std::to_string(kMaxCallsInARow) +
                 " calls without waiting for anything: it seems to loop for ever",
             id);
    if (!entry.ignored) return false;
    ++ignored_calls;
    return true;
}

bool Cta::gather_warp(Thread& thread, uint32_t site, void* argument) {
    Warp& warp = warps[thread.warp];
    if (!warp.arrived) {
        warp.collective_site = site;
    } else if (warp.collective_site != site) {
        const Sites::Entry& first = sites[warp.collective_site];
        const Sites::Entry& mine = sites[site];
        // Lanes may meet from several places, but not for different things.
        if (first.instruction != Instruction::kSyncWarp ||
            mine.instruction != Instruction::kSyncWarp)
            fail("its lane has come to " + sites.text(site) + ", but " + lanes_text(warp.arrived) +
                     " of its warp to " + sites.text(warp.collective_site) +
                     "; all 32 lanes have to make the same call",
                 site);
    }
    warp.arguments[thread.lane] = argument;
    warp.arrived |= 1u << thread.lane;
    if (warp.arrived != ~0u) return false;
    return true;
}

void Cta::release_warp(Thread& thread) {
    Warp& warp = warps[thread.warp];
    warp.arrived = 0;
    for (uint32_t lane = 0; lane < 32; ++lane)
        if (lane != thread.lane) wake(threads[thread.warp * 32 + lane]);
}

// ---- errors ----

std::string Cta::place(const Thread* thread, uint32_t site) const {
    std::ostringstream text;
    text << "kernel '" << launch.shape.name << "', CTA " << index;
    if (thread)
        text << ", thread " << thread->index << " (warp " << thread->warp << ", lane "
             << thread->lane << ")";
    if (site) text << ", " << sites.text(site);
    return text.str();
}

void Cta::fail(const std::string& what, uint32_t site) {
    static const char* const names[] = {"late", "eager", "random", "starving"};
    has_failed_ = true;
    failure_ = place(current_thread, site) + ": " + what + " [schedule " +
               names[static_cast<int>(launch.settings.schedule)] + ", seed " +
               std::to_string(launch.settings.seed) + "]";
    // The threads' stacks are abandoned where they stand.
    if (current_thread) switch_context(current_thread->context, scheduler_);
    throw Error(failure_);
}

void Cta::report_deadlock() {
    std::ostringstream text;
    text << "deadlock: no thread can go on";
    for (uint32_t w = 0; w < num_warps; ++w) {
        text << "\n  warp " << w << ":";
        uint32_t told = 0;
        const char* separator = " ";
        if (!warps[w].alive) text << " exited";
        for (uint32_t lane = 0; lane < 32; ++lane) {
            const Thread& thread = threads[w * 32 + lane];
            if (told >> lane & 1 || !(warps[w].alive >> lane & 1)) continue;
            uint32_t same = 0;
            for (uint32_t other = lane; other < 32; ++other) {
                const Thread& o = threads[w * 32 + other];
                if (warps[w].alive >> other & 1 && o.wait_site == thread.wait_site &&
                    o.wait == thread.wait)
                    same |= 1u << other;
            }
            told |= same;
            text << separator << lanes_text(same) << " in " << sites.text(thread.wait_site);
            if (thread.wait.mbarrier)
                text << " for parity " << thread.wait.parity << " of the mbarrier at "
                     << thread.wait.mbarrier - kSharedBase;
            if (thread.wait.what) text << " for " << thread.wait.what;
            separator = "; ";
        }
        const uint32_t gone = ~warps[w].alive;
        if (warps[w].alive && gone) text << separator << lanes_text(gone) << " exited";
    }
    for (const auto& barrier : mbarriers)
        text << "\n  mbarrier at " << barrier->address - kSharedBase << ": phase " << barrier->phase
             << " (parity " << barrier->phase % 2 << ") waits for " << barrier->pending << " of "
             << barrier->count << " arrivals and " << barrier->bytes << " bytes";
    for (uint32_t id = 0; id < 16; ++id)
        if (barriers[id].arrived)
            text << "\n  barrier " << id << ": " << barriers[id].arrived << " of "
                 << barriers[id].expected << " threads have come";
    current_thread = nullptr;
    fail(text.str(), 0);
}

void Cta::check_exit(Thread& thread) {
    Warp& warp = warps[thread.warp];
    if (!warp.wgmmas.empty()) {
        const Wgmma& op = warp.wgmmas.front();
        if (thread.wgmma_issued > warp.wgmma_first)
            fail("the thread exits while a wgmma is in flight: no wgmma_wait covers it", op.site);
    }
    if (!thread.copies.empty())
        fail("the thread exits while its copy is in flight: no copy_async_wait covers it",
             thread.copies.front().site);
}

void Cta::check_end() {
    for (const auto& barrier : mbarriers)
        if (barrier->waited_phases < barrier->copied_phases)
            fail("the CTA exits and nobody has waited for this copy", barrier->copy_site);
    for (size_t group = 0; group < wgmma_keys.size(); ++group)
        for (uint32_t w = 4 * static_cast<uint32_t>(group); w < num_warps && w < 4 * (group + 1);
             ++w)
            if (threads[w * 32].wgmma_issued != wgmma_keys[group].size())
                fail("warp " + std::to_string(w) + " has issued " +
                         std::to_string(threads[w * 32].wgmma_issued) +
                         " wgmma, but its warpgroup " + std::to_string(wgmma_keys[group].size()) +
                         "; all four warps have to issue each",
                     wgmma_keys[group].back().site);
}

// ---- knowledge ----

void Gathering::add(const Thread& thread, uint32_t agents, uint32_t threads, uint32_t warps) {
    if (!knowledge_) {
        knowledge_ = thread.known ? std::make_unique<Knowledge>(*thread.known)
                                  : std::make_unique<Knowledge>(agents);
        last_ = thread.known;
    } else if (thread.known && thread.known.get() != last_.get()) {
        knowledge_->join(*thread.known);
        last_ = thread.known;
    }
    knowledge_->see(thread.index, thread.now);
    knowledge_->fence(thread.index, thread.fenced);
    knowledge_->see(threads + thread.warp, thread.wgmma_done);
    knowledge_->see(threads + warps + thread.warp, thread.position);
}

KnowledgeRef Gathering::take() {
    last_ = {};
    return KnowledgeRef(knowledge_.release());
}

uint32_t Cta::new_agent(uint32_t site) {
    if (next_agent == num_agents)
        fail("the emulation has room for " + std::to_string(kMaxMbarriers) + " mbarriers", site);
    return next_agent++;
}

bool Cta::has_seen(const Thread& thread, uint32_t agent, uint32_t clock) const {
    if (agent == thread.index) return true;
    if (agent == wgmma_agent(thread.warp) && clock <= thread.wgmma_done) return true;
    return thread.known && thread.known->seen(agent) >= clock;
}

bool Cta::has_fenced(const Thread& thread, uint32_t agent, uint32_t clock) const {
    if (agent == thread.index && clock <= thread.fenced) return true;
    return thread.known && thread.known->fenced(agent) >= clock;
}

void Cta::release(Thread& thread, Gathering& gathering) {
    gathering.add(thread, num_agents, num_threads, num_warps);
    ++thread.now;
}

void Cta::acquire(Thread& thread, const KnowledgeRef& knowledge) {
    thread.known = warps[thread.warp].joiner.join(thread.known, knowledge);
}

void Cta::fence(Thread& thread) {
    thread.fenced = thread.now++;
    thread.known = warps[thread.warp].joiner.fence(thread.known);
}

std::string Cta::describe(uint32_t agent) const {
    if (agent < num_threads)
        return "thread " + std::to_string(agent) + " (warp " + std::to_string(agent / 32) +
               ", lane " + std::to_string(agent % 32) + ")";
    if (agent < num_threads + num_warps)
        return "the tensor cores for warp " + std::to_string(agent - num_threads);
    if (agent < num_threads + 2 * num_warps)
        return "warp " + std::to_string(agent - num_threads - num_warps);
    return "a bulk copy";
}

WarpObserver::WarpObserver(const Cta& cta, uint32_t warp)
    : cta_(cta), lanes_(&cta.threads[warp * 32]) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
        const Knowledge* known = lanes_[lane].known.get();
        if (std::find(known_.begin(), known_.end(), known) == known_.end()) known_.push_back(known);
    }
}

bool WarpObserver::has_seen(Epoch epoch) const {
    if (epoch.agent / 32 == lanes_->warp && epoch.agent < cta_.num_threads)
        return all_lanes([&](const Thread& thread) {
            return cta_.has_seen(thread, epoch.agent, epoch.clock);
        });
    return std::all_of(known_.begin(), known_.end(), [&](const Knowledge* known) {
        return known && known->seen(epoch.agent) >= epoch.clock;
    });
}

bool WarpObserver::has_fenced(Epoch epoch) const {
    return all_lanes([&](const Thread& thread) {
        return cta_.has_fenced(thread, epoch.agent, epoch.clock);
    });
}

template <class Test>
bool WarpObserver::all_lanes(Test test) const {
    return std::all_of(lanes_, lanes_ + 32, test);
}

// ---- shared memory ----

void Cta::check_shared(uint32_t address, uint32_t bytes, uint32_t alignment, uint32_t site) {
    const uint64_t offset = uint64_t{address} - kSharedBase;
    if (address < kSharedBase || offset + bytes > shared_bytes)
        fail("shared memory out of bounds: bytes " +
                 std::to_string(int64_t{address} - int64_t{kSharedBase}) + " to " +
                 std::to_string(int64_t{address} - int64_t{kSharedBase} + bytes - 1) + " of " +
                 std::to_string(shared_bytes),
             site);
    if (address % alignment)
        fail("shared memory misaligned: byte " + std::to_string(offset) + " is no multiple of " +
                 std::to_string(alignment),
             site);
}

void Cta::report_conflict(const Finding& finding, uint32_t site) {
    if (finding.conflict == Conflict::kNone) return;
    const Access& earlier = finding.earlier;
    const std::string at = "byte " + std::to_string(finding.offset) + " of shared memory ";
    const std::string by = sites.text(earlier.site) + " by " + describe(earlier.epoch.agent);
    switch (finding.conflict) {
        case Conflict::kWrite:
            fail("race: " + at + "was written in " + by + ", and nothing orders this access after",
                 site);
        case Conflict::kRead:
            fail("race: " + at + "is read in " + by + ", and nothing orders this write after",
                 site);
        case Conflict::kFence:
            fail("race between proxies: " + at + "was written in " + by +
                     ", and no fence_proxy_async lies between that and this asynchronous access",
                 site);
        case Conflict::kUnwritten: fail(at + "is read, and nothing has been written there", site);
        case Conflict::kInFlight:
            fail("race: " + at + "is the destination of " + by +
                     ", which no copy_async_wait has completed",
                 site);
        case Conflict::kMbarrier:
            fail(at + "holds the mbarrier of " + sites.text(earlier.site), site);
        case Conflict::kNone: break;
    }
}

void Cta::read_shared(const Thread& thread, uint32_t address, uint32_t bytes, uint32_t site,
                      uint16_t flags) {
    const Access access{{thread.now, static_cast<uint16_t>(thread.index), flags}, site};
    const ThreadObserver observer(*this, thread);
    Shadow::Memo memo;
    report_conflict(shadow.read(observer, access, address - kSharedBase, bytes, memo), site);
}

void Cta::write_shared(const Thread& thread, uint32_t address, uint32_t bytes, uint32_t site,
                       uint16_t flags) {
    const Access access{{thread.now, static_cast<uint16_t>(thread.index), flags}, site};
    const ThreadObserver observer(*this, thread);
    Shadow::Memo memo;
    report_conflict(shadow.write(observer, access, address - kSharedBase, bytes, memo), site);
}

}  // namespace nabla::emulation
