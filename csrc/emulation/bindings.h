// What Python sets and reads of emulated launches; see emulation.h.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "emulation/emulation.h"

namespace nabla::emulation {

inline void define_emulation(pybind11::module_& m) {
    namespace py = pybind11;
    using py::arg;

    py::register_exception<Error>(m, "EmulationError", PyExc_RuntimeError);
    m.def(
        "configure",
        [](const std::string& schedule, uint64_t seed, int threads, const std::string& ignored) {
            configure({schedule_named(schedule), seed, threads, ignored});
        },
        arg("schedule") = "late", arg("seed") = 0, arg("threads") = 1, arg("ignored") = "",
        "How launches run from here on: schedule 'late', 'eager', 'random' or 'starving', its "
        "seed, "
        "host threads, and a call 'file:line:instruction' that is left out.");
    m.def(
        "register_memory",
        [](uintptr_t data, uint64_t bytes, bool writable, const std::string& name) {
            register_memory(reinterpret_cast<const void*>(data), bytes, writable, name);
        },
        arg("data"), arg("bytes"), arg("writable"), arg("name"),
        "Let kernels touch these bytes of memory.");
    m.def("clear_memory", clear_memory, "Let kernels touch no memory.");
    m.def(
        "sites",
        [] {
            std::vector<std::tuple<std::string, int, std::string, bool, uint64_t>> sites;
            for (const SiteCount& site : report().sites)
                sites.emplace_back(site.file, site.line, site.instruction, site.synchronises,
                                   site.calls);
            return sites;
        },
        "Calls of instructions so far: (file, line, instruction, whether it synchronises, calls).");
    m.def(
        "register_grants",
        [] {
            std::vector<std::tuple<std::string, uint32_t, int>> grants;
            for (const RegisterGrant& grant : report().registers)
                grants.emplace_back(grant.kernel, grant.warp, grant.registers);
            return grants;
        },
        "What set_max_registers granted so far: (kernel, warp, registers).");
    m.def(
        "ignored_calls", [] { return report().ignored_calls; }, "Calls that were left out so far.");
    m.def("clear_report", clear_report, "Forget the calls so far.");
}

}  // namespace nabla::emulation
