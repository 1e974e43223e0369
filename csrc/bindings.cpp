// The module nabla._cpu: keyword arguments become Params, Params become a launch without the
// interpreter lock. Pointers are integers, a tensor [B, H, S, D] is (pointer, stride_b, stride_h,
// stride_s).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace nabla {
namespace {

// Fields of a launch by name; a missing one is a KeyError.
class Fields {
  public:
    explicit Fields(const py::kwargs& fields) : fields_(fields) {}

    template <class T>
    T get(const char* name) const {
        return fields_[name].cast<T>();
    }
    int32_t integer(const char* name) const { return get<int32_t>(name); }
    DType dtype() const { return static_cast<DType>(integer("dtype")); }

    template <class T>
    T* pointer(const char* name) const {  // None is a null pointer
        const py::object value = fields_[name];
        return value.is_none() ? nullptr : reinterpret_cast<T*>(value.cast<uintptr_t>());
    }
    View view(const char* name) const {
        const auto t = get<std::array<int64_t, 4>>(name);
        return {reinterpret_cast<void*>(t[0]), t[1], t[2], t[3]};
    }
    Blocks blocks() const {  // (starts, count, grid_count, nt, nh, nw)
        const auto b = get<std::array<int64_t, 6>>("blocks");
        const auto extent = [&](int i) { return static_cast<int32_t>(b[i]); };
        return {reinterpret_cast<const int32_t*>(b[0]),
                extent(1),
                extent(2),
                extent(3),
                extent(4),
                extent(5)};
    }
    Window window() const {
        const auto w = get<std::array<int32_t, 3>>("window");
        return {w[0], w[1], w[2]};
    }

  private:
    const py::kwargs& fields_;
};

BlockMeanParams block_mean_params(const Fields& f) {
    BlockMeanParams p;
    p.dtype = f.dtype();
    p.batch = f.integer("batch");
    p.heads = f.integer("heads");
    p.head_dim = f.integer("head_dim");
    p.blocks = f.integer("blocks");
    p.x = f.view("x");
    p.starts = f.pointer<const int32_t>("starts");
    p.mean = f.pointer<float>("mean");
    p.mean_stride = f.integer("mean_stride");
    p.threads = f.integer("threads");
    return p;
}

ScoresParams scores_params(const Fields& f) {
    ScoresParams p;
    p.batch = f.integer("batch");
    p.heads = f.integer("heads");
    p.kv_heads = f.integer("kv_heads");
    p.head_dim = f.integer("head_dim");
    p.q_blocks = f.integer("q_blocks");
    p.q_block_offset = f.integer("q_block_offset");
    p.blocks = f.blocks();
    p.scale = f.get<float>("scale");
    p.q_mean = f.pointer<const float>("q_mean");
    p.k_mean = f.pointer<const float>("k_mean");
    p.k_mean_stride = f.integer("k_mean_stride");
    p.scores = f.pointer<float>("scores");
    p.threads = f.integer("threads");
    return p;
}

BlockMaskParams block_mask_params(const Fields& f) {
    BlockMaskParams p;
    p.scores = scores_params(f);
    p.window = f.window();
    p.top_p = f.pointer<const float>("top_p");
    p.bits = f.pointer<uint32_t>("bits");
    return p;
}

AttentionParams attention_params(const Fields& f) {
    AttentionParams p;
    p.dtype = f.dtype();
    p.batch = f.integer("batch");
    p.heads = f.integer("heads");
    p.kv_heads = f.integer("kv_heads");
    p.head_dim = f.integer("head_dim");
    p.q_blocks = f.integer("q_blocks");
    p.q_block_offset = f.integer("q_block_offset");
    p.blocks = f.blocks();
    p.scale = f.get<float>("scale");
    p.q = f.view("q");
    p.k = f.view("k");
    p.v = f.view("v");
    p.out = f.view("out");
    p.lse = f.pointer<float>("lse");
    p.bits = f.pointer<const uint32_t>("bits");
    p.bits_stride_b = f.get<int64_t>("bits_stride_b");
    p.bits_stride_h = f.get<int64_t>("bits_stride_h");
    p.threads = f.integer("threads");
    return p;
}

AttentionBackwardParams attention_backward_params(const Fields& f) {
    AttentionBackwardParams p;
    p.forward = attention_params(f);
    p.dout = f.view("dout");
    p.dlse = f.pointer<const float>("dlse");
    p.delta = f.pointer<float>("delta");
    p.dq = f.view("dq");
    p.dk = f.view("dk");
    p.dv = f.view("dv");
    p.dq_sum = f.view("dq_sum");
    p.dk_sum = f.view("dk_sum");
    p.dv_sum = f.view("dv_sum");
    return p;
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (int i = 0; i < cpu::kKernelsCount; ++i)
        if (cpu::kKernels[i].is_supported()) names.push_back(cpu::kKernels[i].name);
    return names;
}

const cpu::Kernels& kernels(const std::string& name) {
    for (int i = 0; i < cpu::kKernelsCount; ++i)
        if (cpu::kKernels[i].name == name && cpu::kKernels[i].is_supported())
            return cpu::kKernels[i];
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
    m.def("instruction_sets", nabla::instruction_sets, "Those this machine runs, best first.");
    m.def("prefer_huge_pages", nabla::cpu::prefer_huge_pages, "Under bytes from an address on.");
    nabla::define_launch(m, "block_mean", nabla::block_mean_params, &Kernels::block_mean);
    nabla::define_launch(m, "pooled_scores", nabla::scores_params, &Kernels::pooled_scores);
    nabla::define_launch(m, "block_mask", nabla::block_mask_params, &Kernels::block_mask);
    nabla::define_launch(m, "attention_forward", nabla::attention_params,
                         &Kernels::attention_forward);
    nabla::define_launch(m, "attention_backward", nabla::attention_backward_params,
                         &Kernels::attention_backward);
}
