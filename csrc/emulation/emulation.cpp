#include "emulation/emulation.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <numeric>
#include <set>
#include <thread>

#include "emulation/cta.h"

namespace nabla::emulation {
namespace {

constexpr uint32_t kMaxThreads = 1024;

thread_local int architecture = 90;

// Everything that outlives a launch. Launches follow one another, as in a stream.
struct Process {
    std::mutex mutex;
    Settings settings;
    Memory memory;
    std::map<std::tuple<std::string, int, Instruction>, uint64_t> sites;
    std::set<RegisterGrant> registers;
    uint64_t ignored_calls = 0;
};

Process& process() {
    static Process process;
    return process;
}

void keep_report(Process& all, const Cta& cta) {
    for (const Sites::Entry& entry : cta.sites.entries())
        if (entry.calls)
            all.sites[{Sites::file(entry.site), entry.site.line, entry.instruction}] += entry.calls;
    all.registers.insert(cta.grants.begin(), cta.grants.end());
    all.ignored_calls += cta.ignored_calls;
}

Stacks& stacks_of_host_thread(uint32_t count) {
    static thread_local std::unique_ptr<Stacks> stacks;
    if (!stacks || stacks->count() < count) stacks = std::make_unique<Stacks>(count);
    return *stacks;
}

// The CTAs of a launch, taken in an order that the seed decides, by one or several host threads.
class Grid {
  public:
    Grid(Process& all, const LaunchShape& shape, const std::function<void()>& kernel)
        : all_(all), shape_(shape), kernel_(kernel), order_(shape.ctas), done_(shape.ctas) {
        std::iota(order_.begin(), order_.end(), 0u);
        Random random(all.settings.seed);
        if (all.settings.seed) {
            for (uint32_t i = shape.ctas; i > 1; --i)
                std::swap(order_[i - 1], order_[random.below(i)]);
            elected_lane_ = random.below(32);
        }
    }

    void run() {
        const uint32_t threads =
            std::min(static_cast<uint32_t>(std::max(all_.settings.threads, 1)), shape_.ctas);
        std::vector<std::thread> others;
        for (uint32_t i = 1; i < threads; ++i) others.emplace_back([this] { work(); });
        work();
        for (std::thread& other : others) other.join();
        if (error_) std::rethrow_exception(error_);
    }

  private:
    void work() {
        while (true) {
            const uint32_t place = next_++;
            if (place >= shape_.ctas || has_failed_) return;
            run_cta(place);
        }
    }

    void run_cta(uint32_t place) {
        const Launch launch{shape_,        kernel_,     all_.settings,
                            elected_lane_, all_.memory, [this, place] { wait_for(place); }};
        std::exception_ptr error;
        std::unique_ptr<Cta> cta;
        try {
            cta =
                std::make_unique<Cta>(launch, order_[place], stacks_of_host_thread(shape_.threads));
            cta->run();
        } catch (...) {
            error = std::current_exception();
        }
        const std::lock_guard lock(mutex_);
        if (cta) keep_report(all_, *cta);
        // Of several errors, the one that a single host thread would have met.
        if (error && place < failed_place_) {
            failed_place_ = place;
            error_ = error;
            has_failed_ = true;
        }
        done_[place] = true;
        while (first_running_ < shape_.ctas && done_[first_running_]) ++first_running_;
        finished_.notify_all();
    }

    void wait_for(uint32_t place) {
        std::unique_lock lock(mutex_);
        finished_.wait(lock, [&] { return first_running_ >= place; });
    }

    Process& all_;
    const LaunchShape& shape_;
    const std::function<void()>& kernel_;
    std::vector<uint32_t> order_;
    uint32_t elected_lane_ = 0;

    std::atomic<uint32_t> next_{0};
    std::atomic<bool> has_failed_{false};
    std::mutex mutex_;
    std::condition_variable finished_;
    std::vector<bool> done_;      // by place in the order
    uint32_t first_running_ = 0;  // the first place that is not done
    uint32_t failed_place_ = ~0u;
    std::exception_ptr error_;
};

}  // namespace

void set_architecture(int value) { architecture = value; }

uint32_t max_shared_bytes() {
    switch (architecture) {
        case 80: return 163 << 10;
        case 86:
        case 89: return 99 << 10;
        default: return 227 << 10;
    }
}

void run(const LaunchShape& shape, const std::function<void()>& kernel) {
    if (!shape.ctas) return;
    const std::string launch = std::string("kernel '") + shape.name + "': a launch of CTAs of " +
                               std::to_string(shape.threads) + " threads and " +
                               std::to_string(shape.shared_bytes) + " bytes of shared memory";
    if (!shape.threads || shape.threads > kMaxThreads || shape.threads % 32)
        throw Error(launch + ": the threads are a multiple of 32 up to 1024");
    if (shape.shared_bytes > max_shared_bytes())
        throw Error(launch + ": a CTA of sm_" + std::to_string(architecture) + " has at most " +
                    std::to_string(max_shared_bytes()) + " bytes");
    Process& all = process();
    const std::lock_guard lock(all.mutex);
    all.memory.launch = all.memory.launch % 0xfff + 1;
    Grid(all, shape, kernel).run();
}

Schedule schedule_named(const std::string& name) {
    if (name == "late") return Schedule::kLate;
    if (name == "eager") return Schedule::kEager;
    if (name == "random") return Schedule::kRandom;
    if (name == "starving") return Schedule::kStarving;
    throw std::invalid_argument("schedule '" + name +
                                "': one of 'late', 'eager', 'random' and 'starving'");
}

void configure(const Settings& settings) {
    const std::lock_guard lock(process().mutex);
    process().settings = settings;
}

Settings settings() {
    const std::lock_guard lock(process().mutex);
    return process().settings;
}

Report report() {
    Process& all = process();
    const std::lock_guard lock(all.mutex);
    Report report;
    for (const auto& [key, calls] : all.sites) {
        const auto& [file, line, instruction] = key;
        report.sites.push_back({file, line, name(instruction), synchronises(instruction), calls});
    }
    report.registers.assign(all.registers.begin(), all.registers.end());
    report.ignored_calls = all.ignored_calls;
    return report;
}

void clear_report() {
    Process& all = process();
    const std::lock_guard lock(all.mutex);
    all.sites.clear();
    all.registers.clear();
    all.ignored_calls = 0;
}

void register_memory(const void* data, uint64_t bytes, bool writable, const std::string& name) {
    const std::lock_guard lock(process().mutex);
    process().memory.add(data, bytes, writable, name);
}

void clear_memory() {
    const std::lock_guard lock(process().mutex);
    process().memory.clear();
}

}  // namespace nabla::emulation
