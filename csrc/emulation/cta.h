// One CTA: its threads as fibers, its shared memory, its barriers, and what is in flight.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulation/clock.h"
#include "emulation/emulation.h"
#include "emulation/fiber.h"
#include "emulation/memory.h"
#include "emulation/ptx.h"
#include "emulation/random.h"
#include "emulation/shadow.h"

namespace nabla::emulation {

// The instructions, in the order of their names in instructions.cpp.
enum class Instruction : uint8_t {
    kLoadShared,
    kStoreShared,
    kAtomicOrShared,
    kLoadGlobal,
    kStoreGlobal,
    kReduceAddGlobal,
    kSyncCta,
    kBarrierSync,
    kSyncWarp,
    kShuffle,
    kVote,
    kReduce,
    kElectOne,
    kMbarrierInit,
    kFenceMbarrierInit,
    kMbarrierArrive,
    kMbarrierArriveExpectTx,
    kMbarrierWait,
    kCopyTensor4d,
    kCopyBulk,
    kFenceProxyAsync,
    kCopyAsync16,
    kCopyAsyncCommit,
    kCopyAsyncWait,
    kWgmmaFence,
    kWgmmaCommit,
    kWgmmaWait,
    kWgmma,
    kLdmatrix,
    kMma,
    kSetMaxRegisters,
    kConvert,
};
const char* name(Instruction instruction);
bool synchronises(Instruction instruction);

// Calls of instructions in a kernel's sources, numbered.
class Sites {
  public:
    struct Entry {
        Site site{nullptr, 0};
        Instruction instruction{};
        uint64_t calls = 0;
        bool ignored = false;
    };

    explicit Sites(const std::string& ignored) : ignored_(ignored), slots_(kSlots) {}

    static std::string file(Site site);  // below csrc

    uint32_t find(Instruction instruction, Site site);
    Entry& operator[](uint32_t id) { return entries_[id]; }
    const std::vector<Entry>& entries() const { return entries_; }
    std::string text(uint32_t id) const;  // "instruction at file:line"

  private:
    static constexpr uint32_t kSlots = 1024;

    std::string ignored_;
    std::vector<uint32_t> slots_;  // id + 1; 0 for none
    std::vector<Entry> entries_;
};

enum class State : uint8_t { kReady, kWaiting, kExited };

// An asynchronous copy of a thread (copy_async_16).
struct ThreadCopy {
    uint32_t destination;
    const void* source;
    uint32_t valid_bytes;
    uint32_t group;
    uint32_t site;
};

// What a thread waits for, besides the call in which it waits.
struct Wait {
    const char* what = nullptr;
    uint32_t mbarrier = 0;  // address; 0 for none
    uint32_t parity = 0;

    bool operator==(const Wait& other) const {
        return what == other.what && mbarrier == other.mbarrier && parity == other.parity;
    }
};

struct Thread {
    uint32_t index = 0, warp = 0, lane = 0;
    Context context;
    State state = State::kReady;
    uint32_t wait_site = 0;  // of the call that waits
    Wait wait;

    // What the thread knows: what it has learnt, and of itself and its warp what follows.
    KnowledgeRef known;
    uint32_t now = 1;         // its clock
    uint32_t fenced = 0;      // its accesses up to this clock are ordered before asynchronous ones
    uint32_t position = 0;    // collectives of its warp that it has passed
    uint32_t wgmma_done = 0;  // groups of its warp that it has waited for

    uint32_t wgmma_issued = 0, wgmma_committed = 0;
    bool wgmma_fenced = false;
    uint32_t copies_committed = 0;
    std::vector<ThreadCopy> copies;
};

// Knowledge that arrivals bring together.
class Gathering {
  public:
    void add(const Thread& thread, uint32_t agents, uint32_t threads, uint32_t warps);
    void see(uint32_t agent, uint32_t clock) { knowledge_->see(agent, clock); }
    const Knowledge* get() const { return knowledge_.get(); }
    KnowledgeRef take();

  private:
    std::unique_ptr<Knowledge> knowledge_;
    KnowledgeRef last_;
};

struct Barrier {
    uint32_t expected = 0;  // threads; 0 while nobody has come
    uint32_t arrived = 0;
    Gathering gathering;
    std::vector<Thread*> waiting;
};

struct Mbarrier {
    uint32_t address = 0;
    uint32_t agent = 0;    // of the copies that report here
    uint32_t count = 0;    // arrivals of a phase
    uint32_t pending = 0;  // arrivals that the current phase still waits for
    int64_t bytes = 0;     // of copies that the current phase still waits for
    uint32_t phase = 0;
    Epoch init;
    bool init_fenced = false;
    uint32_t copies_in_flight = 0;
    uint32_t copied_phases = 0;  // one past the last phase that a copy reported to
    uint32_t waited_phases = 0;  // one past the last phase that somebody waited for
    uint32_t copy_site = 0;
    Gathering gathering;
    KnowledgeRef completed;  // by the last phase

    // Who has seen the last completed phase: the next one has to be ordered after that.
    struct Pass {
        uint32_t thread, clock, position, site;
    };
    std::vector<Pass> passes;
    std::vector<Thread*> waiting;
};

// A bulk copy into shared memory.
struct BulkCopy {
    uint32_t destination;
    uint32_t bytes;
    uint32_t mbarrier;  // index
    uint32_t site;
    const void* source;  // null: a box of `map`
    TensorMap map;
    int32_t coordinates[4];
};

// One wgmma of one warp. The tensor cores work on it after all lanes have issued it.
struct Wgmma {
    Type type;
    int n;
    bool accumulate, transpose_b, a_in_registers;
    uint64_t a_descriptor, b_descriptor;
    uint32_t site;
    uint32_t group;
    uint32_t lanes = 0;  // that have issued it
    uint32_t accumulator;
    uint32_t a[32][4];
    const uint32_t* a_registers[32];
    std::vector<KnowledgeRef> known;  // what the lanes knew, each once
    uint32_t now[32], fenced[32];
    bool is_done = false;
};

// Accumulators of a warp that some wgmma works on: d of every lane, poisoned meanwhile.
struct Accumulator {
    float* d[32] = {};
    int n = 0;
    uint32_t last = 0;          // number of the last wgmma on it
    uint32_t site = 0;          // of that one
    std::vector<float> values;  // [16, n]
};

struct Warp {
    uint32_t ready = 0;  // lanes
    uint32_t alive = 0;
    // The collective that lanes are gathering for.
    uint32_t arrived = 0;
    uint32_t collective_site = 0;
    void* arguments[32] = {};

    Joiner joiner;  // its lanes mostly learn the same
    int registers = 0;
    uint32_t wgmma_first = 0;  // number of wgmmas.front()
    std::vector<Wgmma> wgmmas;
    std::vector<Accumulator> accumulators;
};

// What the warps of a warpgroup have to agree on.
struct WgmmaKey {
    uint32_t site;
    uint64_t b_descriptor;
};

struct Launch {
    const LaunchShape& shape;
    const std::function<void()>& kernel;
    Settings settings;
    uint32_t elected_lane;
    Memory& memory;
    // Waits until all earlier CTAs are done, so that what CTAs add to is the same in every run.
    std::function<void()> wait_for_earlier_ctas;
};

class Cta {
  public:
    static constexpr uint32_t kSharedBase = 1024;

    Cta(const Launch& launch, uint32_t index, Stacks& stacks);

    // Runs the kernel; what goes wrong is an Error.
    void run();

    // The CTA and the thread that this host thread runs.
    static Cta& current();
    static Thread& self();

    const Launch& launch;
    const uint32_t index;
    Sites sites;
    std::vector<RegisterGrant> grants;
    uint64_t ignored_calls = 0;

    // ---- of the calling thread ----

    // Notes the call; whether it is to be left out.
    bool enter(Instruction instruction, Site site, uint32_t& id);
    void maybe_yield(Thread& thread);
    void yield(Thread& thread);
    // Until somebody calls wake.
    void block(Thread& thread, uint32_t site, Wait wait);
    void wake(Thread& thread);
    [[noreturn]] void fail(const std::string& what, uint32_t site);

    // Until all lanes are here; the last one calls compute(arguments of all lanes).
    template <class Argument, class Compute>
    void collective(Thread& thread, uint32_t site, Argument& argument, Compute compute) {
        if (gather_warp(thread, site, &argument)) {
            compute(reinterpret_cast<Argument* const*>(warps[thread.warp].arguments));
            release_warp(thread);
        } else {
            block(thread, site, {"the other lanes of its warp"});
        }
        ++thread.position;
    }

    // ---- knowledge ----

    uint32_t wgmma_agent(uint32_t warp) const { return num_threads + warp; }
    uint32_t position_agent(uint32_t warp) const { return num_threads + num_warps + warp; }
    uint32_t new_agent(uint32_t site);
    bool has_seen(const Thread& thread, uint32_t agent, uint32_t clock) const;
    bool has_fenced(const Thread& thread, uint32_t agent, uint32_t clock) const;
    void release(Thread& thread, Gathering& gathering);
    void acquire(Thread& thread, const KnowledgeRef& knowledge);
    void fence(Thread& thread);
    std::string describe(uint32_t agent) const;

    // ---- shared memory ----

    uint8_t* shared(uint32_t address) { return shared_memory + (address - kSharedBase); }
    void check_shared(uint32_t address, uint32_t bytes, uint32_t alignment, uint32_t site);
    void report_conflict(const Finding& finding, uint32_t site);
    void read_shared(const Thread& thread, uint32_t address, uint32_t bytes, uint32_t site,
                     uint16_t flags = 0);
    void write_shared(const Thread& thread, uint32_t address, uint32_t bytes, uint32_t site,
                      uint16_t flags = 0);

    // ---- barriers ----

    void barrier(uint32_t id, uint32_t threads, uint32_t site);
    Mbarrier& mbarrier(uint32_t address, uint32_t site);
    void mbarrier_init(uint32_t address, uint32_t count, uint32_t site);
    void mbarrier_arrive(Mbarrier& barrier, uint32_t count, uint32_t expected_bytes,
                         uint32_t site);
    void mbarrier_complete(Mbarrier& barrier, uint32_t site);
    // Whether that phase is complete; then its knowledge is acquired.
    bool mbarrier_test(Mbarrier& barrier, uint32_t parity, uint32_t site);

    // ---- copies ----

    void issue_bulk_copy(BulkCopy copy, uint32_t mbarrier_address);
    void deliver(const BulkCopy& copy);
    void finish(const ThreadCopy& copy);

    // ---- wgmma ----

    void issue_wgmma(Thread& thread, const Wgmma& proto, float* d, const uint32_t* a);
    void check_operands(uint32_t warp, Wgmma& op);
    void execute(uint32_t warp, Wgmma& op);
    void finish_wgmmas(uint32_t warp, uint32_t group);

    uint32_t num_threads, num_warps;
    uint32_t num_agents;  // capacity
    uint32_t next_agent;
    uint8_t* shared_memory;
    uint32_t shared_bytes;
    Shadow& shadow;
    Random random;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barriers[16];
    std::vector<std::unique_ptr<Mbarrier>> mbarriers;
    std::unordered_map<uint32_t, uint32_t> mbarrier_at;  // index by address
    std::vector<BulkCopy> copies_in_flight;
    std::vector<std::vector<WgmmaKey>> wgmma_keys;  // by warpgroup
    int free_registers = 0;
    std::vector<Thread*> waiting_for_registers;

  private:
    bool gather_warp(Thread& thread, uint32_t site, void* argument);
    void release_warp(Thread& thread);
    Thread* pick();
    bool is_starved(const Thread& thread) const;
    bool deliver_one();
    void check_exit(Thread& thread);
    void check_end();
    [[noreturn]] void report_deadlock();
    std::string place(const Thread* thread, uint32_t site) const;
    static void enter_thread();

    Context scheduler_;
    std::vector<uint8_t> shared_storage_;
    uint32_t alive_ = 0;
    uint32_t turn_ = 0;  // the warp that runs
    uint32_t ready_warps_ = 0;
    int starved_warp_ = -1, starved_lane_ = -1;
    uint64_t calls_in_a_row_ = 0;  // of the running thread
    bool has_failed_ = false;
    std::string failure_;
};

// A thread, before its access.
class ThreadObserver : public Observer {
  public:
    ThreadObserver(const Cta& cta, const Thread& thread) : cta_(cta), thread_(thread) {}
    bool has_seen(Epoch epoch) const override {
        return cta_.has_seen(thread_, epoch.agent, epoch.clock);
    }
    bool has_fenced(Epoch epoch) const override {
        return cta_.has_fenced(thread_, epoch.agent, epoch.clock);
    }

  private:
    const Cta& cta_;
    const Thread& thread_;
};

// All lanes of a warp, before an access that they make together.
class WarpObserver : public Observer {
  public:
    WarpObserver(const Cta& cta, uint32_t warp);
    bool has_seen(Epoch epoch) const override;
    bool has_fenced(Epoch epoch) const override;

  private:
    template <class Test>
    bool all_lanes(Test test) const;

    const Cta& cta_;
    const Thread* lanes_;
    std::vector<const Knowledge*> known_;  // what the lanes know, each once
};

}  // namespace nabla::emulation
