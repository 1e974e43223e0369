// What a test sets and reads of emulated launches. Settings hold for the process.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace nabla::emulation {

// What a GPU would punish, as a sentence with kernel, thread and line.
class Error : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// Which of the ready threads runs next, and when asynchronous work gets done.
enum class Schedule : uint8_t {
    kLate,      // warps in turn; asynchronous work when nothing else can run
    kEager,     // warps in turn; asynchronous work at once
    kRandom,    // any lane of any warp; asynchronous work at any time
    kStarving,  // as kRandom, but one warp or lane runs only when nothing else can
};

struct Settings {
    Schedule schedule = Schedule::kLate;
    uint64_t seed = 0;    // also of the order of CTAs; 0: ascending
    int threads = 1;      // host threads; without a race, the result depends on the seed only
    std::string ignored;  // "file:line:instruction" of a call that is left out; empty for none
};

// A call of an instruction in the kernels' sources.
struct SiteCount {
    std::string file;  // below csrc
    int line;
    std::string instruction;
    bool synchronises;  // a wait, fence, arrival, commit or barrier: something to leave out
    uint64_t calls;
};

struct RegisterGrant {
    std::string kernel;
    uint32_t warp;
    int registers;

    bool operator<(const RegisterGrant& other) const {
        return std::tie(kernel, warp, registers) <
               std::tie(other.kernel, other.warp, other.registers);
    }
};

// Of all launches since the last clear_report.
struct Report {
    std::vector<SiteCount> sites;
    std::vector<RegisterGrant> registers;  // each once
    uint64_t ignored_calls;
};

// Compute capability of the device that the launches of this host thread run on; 90 at first.
void set_architecture(int architecture);

Schedule schedule_named(const std::string& name);
void configure(const Settings& settings);
Settings settings();
Report report();
void clear_report();

// Kernels may touch the global memory that is registered, and no other.
void register_memory(const void* data, uint64_t bytes, bool writable, const std::string& name);
void clear_memory();

}  // namespace nabla::emulation
