// The module nabla._cpu: a launch of the kernels of one instruction set, without the interpreter
// lock.
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/fields.h"
#include "cpu/dispatch.h"
#include "cpu/huge_pages.h"

namespace nabla {
namespace {

std::vector<std::string> instruction_sets(const cpu::Features& features) {
    std::vector<std::string> names;
    for (const cpu::Kernels& kernels : cpu::kernels_for(features)) names.push_back(kernels.name);
    return names;
}

const cpu::Kernels& kernels(const std::string& name) {
    static const auto of_this_machine = cpu::kernels_for(cpu::features());
    for (const cpu::Kernels& kernels : of_this_machine)
        if (kernels.name == name) return kernels;
    throw std::invalid_argument("instruction set '" + name + "' is not available on this machine");
}

// Define name(instruction_set, **fields), which runs one stage of the chosen kernels.
template <class Params>
void define_launch(py::module_& m, const char* name, Params (*parse)(const Fields&),
                   void (*cpu::Kernels::*stage)(const Params&)) {
    m.def(name, [parse, stage](const std::string& instruction_set, const py::kwargs& fields) {
        const auto launch = kernels(instruction_set).*stage;
        const Params params = parse(Fields(fields));
        const py::gil_scoped_release unlocked;
        launch(params);
    });
}

}  // namespace
}  // namespace nabla

PYBIND11_MODULE(_cpu, m) {
    using nabla::cpu::Kernels;
    m.doc() = "Native CPU kernels; see csrc/params.h for the fields of each launch.";
    m.def("features", nabla::cpu::features, "What this machine has that the choice depends on.");
    m.def("instruction_sets", nabla::instruction_sets, pybind11::arg("features"),
          "Those that a machine of such features runs, best first.");
    m.def("prefer_huge_pages", nabla::cpu::prefer_huge_pages, "Under bytes from an address on.");
    nabla::define_launch(m, "block_mean", nabla::block_mean_params, &Kernels::block_mean);
    nabla::define_launch(m, "pooled_scores", nabla::scores_params, &Kernels::pooled_scores);
    nabla::define_launch(m, "block_mask", nabla::block_mask_params, &Kernels::block_mask);
    nabla::define_launch(m, "attention_forward", nabla::attention_params,
                         &Kernels::attention_forward);
    nabla::define_launch(m, "attention_backward", nabla::attention_backward_params,
                         &Kernels::attention_backward);
}
