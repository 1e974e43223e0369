// The modules nabla._cuda and, compiled for the emulator, nabla._cuda_emulated: a launch of the
// kernels of one architecture, without the interpreter lock.
#include <map>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings/fields.h"
#include "cuda/kernels.h"

#ifdef NABLA_EMULATED
#include "emulation/bindings.h"
#include "emulation/probes/bindings.h"
#define NABLA_MODULE _cuda_emulated
#else
#include <cuda_runtime_api.h>
#define NABLA_MODULE _cuda
#endif

namespace nabla {
namespace {

#ifdef NABLA_EMULATED
using LaunchError = emulation::Error;
#else
using LaunchError = std::runtime_error;
#endif

std::map<int, std::string> architectures() {
    std::map<int, std::string> names;
    for (int i = 0; i < cuda::kKernelsCount; ++i)
        names[cuda::kKernels[i].architecture] = cuda::kKernels[i].name;
    return names;
}

const cuda::Kernels& kernels(int architecture) {
    for (int i = 0; i < cuda::kKernelsCount; ++i)
        if (cuda::kKernels[i].architecture == architecture) return cuda::kKernels[i];
    throw std::invalid_argument("there are no kernels for sm_" + std::to_string(architecture));
}

// Why the CUDA runtime finds no device.
std::optional<std::string> device_error() {
#ifdef NABLA_EMULATED
    return std::nullopt;
#else
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaSuccess) return std::nullopt;
    return cudaGetErrorString(status);
#endif
}

// What a launch was asked for, for its errors.
template <class Params>
std::string problem(const Params& p) {
    return "B=" + std::to_string(p.batch) + ", H=" + std::to_string(p.heads) + ", " +
           std::to_string(p.blocks.count) + " blocks";
}
std::string problem(const BlockMaskParams& p) { return problem(p.scores); }
std::string problem(const AttentionBackwardParams& p) { return problem(p.forward); }

// Define name(architecture, **fields), which queues one stage; its errors name the problem.
template <class Params>
void define_launch(py::module_& m, const char* name, Params (*parse)(const Fields&),
                   void (*cuda::Kernels::*stage)(const Params&)) {
    m.def(name, [name, parse, stage](int architecture, const py::kwargs& fields) {
        const auto launch = kernels(architecture).*stage;
        if (!launch)
            throw std::invalid_argument("there is no " + std::string(name) + " for sm_" +
                                        std::to_string(architecture));
        const Params params = parse(Fields(fields));
        const py::gil_scoped_release unlocked;
#ifdef NABLA_EMULATED
        emulation::set_architecture(architecture);
#endif
        try {
            launch(params);
        } catch (const LaunchError& error) {
            throw LaunchError(std::string(name) + " of " + problem(params) + ": " + error.what());
        }
    });
}

}  // namespace
}  // namespace nabla

PYBIND11_MODULE(NABLA_MODULE, m) {
    using nabla::cuda::Kernels;
#ifdef NABLA_EMULATED
    nabla::emulation::define_emulation(m);
    nabla::emulation::probes::define_probes(m.def_submodule("probes", "Kernels that test it."));
#endif
    m.doc() = "CUDA kernels; see csrc/params.h for the fields of each launch.";
    m.def("architectures", nabla::architectures, "Name by compute capability, as in {80: 'sm_80'}.");
    m.def("device_error", nabla::device_error, "Why the CUDA runtime finds no device, or None.");
    nabla::define_launch(m, "block_mean", nabla::block_mean_params, &Kernels::block_mean);
    nabla::define_launch(m, "pooled_scores", nabla::scores_params, &Kernels::pooled_scores);
    nabla::define_launch(m, "block_mask", nabla::block_mask_params, &Kernels::block_mask);
    nabla::define_launch(m, "transpose", nabla::transpose_params, &Kernels::transpose);
    nabla::define_launch(m, "attention_forward", nabla::attention_params,
                         &Kernels::attention_forward);
    nabla::define_launch(m, "attention_backward", nabla::attention_backward_params,
                         &Kernels::attention_backward);
}
