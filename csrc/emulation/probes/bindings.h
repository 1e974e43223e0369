// The probes as Python functions; tensors are addresses, shapes are those of probes.h.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "cuda/block_groups.cuh"
#include "emulation/probes/probes.h"

namespace nabla::emulation::probes {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// The fields of a tensor map: address, bytes of an element, extents, strides in bytes, box,
// swizzle.
using MapFields = std::tuple<uintptr_t, uint32_t, std::array<uint64_t, 4>, std::array<uint64_t, 4>,
                             std::array<uint32_t, 4>, bool>;

inline ptx::TensorMap tensor_map(const MapFields& fields) {
    const auto& [data, element_bytes, extents, strides, box, swizzle] = fields;
    ptx::TensorMap map{pointer<const void>(data), element_bytes, {}, {}, {}, swizzle};
    for (size_t d = 0; d < 4; ++d) {
        map.extents[d] = extents[d];
        map.strides[d] = strides[d];
        map.box[d] = box[d];
    }
    return map;
}

// The blocks of every group; -1 where a group has fewer.
template <int kSize>
std::vector<std::vector<int32_t>> block_groups(int32_t count, int32_t frame_blocks) {
    const BlockGroups<kSize> groups{count, frame_blocks};
    std::vector<std::vector<int32_t>> blocks(static_cast<size_t>(groups.count()));
    for (int32_t group = 0; group < groups.count(); ++group)
        for (int32_t member = 0; member < kSize; ++member)
            blocks[static_cast<size_t>(group)].push_back(groups.block(group, member));
    return blocks;
}

inline void define_probes(pybind11::module_ m) {
    namespace py = pybind11;
    using py::arg;
    using unlocked = py::call_guard<py::gil_scoped_release>;
    m.def(
        "wgmma",
        [](int type, int n, bool a_in_registers, bool transpose_b, bool accumulate, uintptr_t a,
           uintptr_t image, uint32_t image_bytes,
           std::array<uint32_t, 3> a_matrix, std::array<uint32_t, 3> b_matrix, uintptr_t d) {
            wgmma({type, n, a_in_registers, transpose_b, accumulate,
                   pointer<const uint32_t>(a), pointer<const uint8_t>(image), image_bytes,
                   a_matrix[0], a_matrix[1], a_matrix[2], b_matrix[0], b_matrix[1], b_matrix[2],
                   pointer<float>(d)});
        },
        unlocked());
    m.def(
        "copy",
        [](const MapFields& map, std::array<int32_t, 4> at, uintptr_t source, uint32_t bytes,
           uintptr_t image) {
            copy({tensor_map(map),
                  {at[0], at[1], at[2], at[3]},
                  pointer<const uint8_t>(source),
                  bytes,
                  pointer<uint8_t>(image)});
        },
        unlocked());
    m.def(
        "warp",
        [](int instruction, uint32_t argument, uintptr_t inputs, uintptr_t image,
           uint32_t image_bytes, uintptr_t outputs, uintptr_t image_out) {
            warp({instruction, argument, pointer<const uint32_t>(inputs),
                  pointer<const uint8_t>(image), image_bytes, pointer<uint32_t>(outputs),
                  pointer<uint8_t>(image_out)});
        },
        unlocked());
    m.def(
        "pipeline",
        [](int fault, int steps, const MapFields& b_map, uintptr_t a, uintptr_t b, uintptr_t out,
           uintptr_t counter, int ctas) {
            pipeline({fault, steps, tensor_map(b_map), pointer<const uint16_t>(a),
                      pointer<const uint16_t>(b), pointer<float>(out), pointer<float>(counter),
                      ctas});
        },
        unlocked());
    m.def("sum", [](uintptr_t result, int ctas) { sum(pointer<float>(result), ctas); }, unlocked());
    m.def("registers", registers, unlocked());
    m.def("block_groups", [](int size, int32_t count, int32_t frame_blocks) {
        return size == 2 ? block_groups<2>(count, frame_blocks)
                         : block_groups<3>(count, frame_blocks);
    });
    m.def("faults", [] {
        std::vector<std::string> names;
        for (int i = 0; i < faults(); ++i) names.push_back(fault_name(i));
        return names;
    });
}

}  // namespace nabla::emulation::probes
