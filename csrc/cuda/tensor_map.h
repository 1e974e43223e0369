// Maps of tensors [B, H, S, D] for bulk tensor copies, made on the host before a launch.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/ptx.cuh"
#include "params.h"

namespace nabla::cuda {

constexpr int kPanel = 64;  // channels of a box: 128 bytes, what the swizzle spans

// A tensor of 2-byte elements that is copied in boxes of `rows` tokens by kPanel channels, with the
// 128-byte swizzle. A box of batch b, head h has coordinates (channel, token, h * head_step,
// b * batch_step).
struct BoxedTensor {
    ptx::TensorMap map;
    int32_t head_step, batch_step;  // 1, or 0 where all share the same memory
};

struct Extents {
    int64_t batch, heads, tokens, head_dim;
};

namespace detail {

// Extents and strides of a map, innermost first.
struct MapShape {
    uint64_t extents[4];        // elements
    uint64_t strides_bytes[3];  // of the outer three
};

// A stride of 0 is none that a map takes, and that of one element is free: both become a dimension
// of one element.
inline MapShape map_shape(const View& x, const Extents& n) {
    if (x.stride_s == 0 && n.tokens > 1)
        throw std::invalid_argument("the tokens of a tensor share their memory: copy it");
    const auto extent = [](int64_t size, int64_t stride) {
        return static_cast<uint64_t>(stride ? size : 1);
    };
    const auto bytes = [](int64_t size, int64_t stride) {
        return static_cast<uint64_t>(size > 1 && stride ? 2 * stride : 16);
    };
    return {{static_cast<uint64_t>(n.head_dim), static_cast<uint64_t>(n.tokens),
             extent(n.heads, x.stride_h), extent(n.batch, x.stride_b)},
            {bytes(n.tokens, x.stride_s), bytes(n.heads, x.stride_h), bytes(n.batch, x.stride_b)}};
}

#ifdef NABLA_EMULATED

inline ptx::TensorMap encode(const View& x, const MapShape& shape, uint32_t rows) {
    ptx::TensorMap map{};
    map.data = x.data;
    map.element_bytes = 2;
    map.strides[0] = 2;
    for (int i = 0; i < 4; ++i) map.extents[i] = shape.extents[i];
    for (int i = 0; i < 3; ++i) map.strides[i + 1] = shape.strides_bytes[i];
    map.box[0] = kPanel;
    map.box[1] = rows;
    map.box[2] = map.box[3] = 1;
    map.swizzle_128 = true;
    return map;
}

#else

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, looked up at run time: the module does not link to the driver.
inline EncodeTiled encode_tiled() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                                12000, cudaEnableDefault, &found);
#else
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (status != cudaSuccess || found != cudaDriverEntryPointSuccess)
        throw std::runtime_error(std::string("the driver has no cuTensorMapEncodeTiled (") +
                                 cudaGetErrorString(status) + "): it is older than CUDA 12");
    return reinterpret_cast<EncodeTiled>(function);
}

inline ptx::TensorMap encode(const View& x, const MapShape& shape, uint32_t rows) {
    static const EncodeTiled function = encode_tiled();
    const cuuint64_t extents[4] = {shape.extents[0], shape.extents[1], shape.extents[2],
                                   shape.extents[3]};
    const cuuint64_t strides[3] = {shape.strides_bytes[0], shape.strides_bytes[1],
                                   shape.strides_bytes[2]};
    const cuuint32_t box[4] = {kPanel, rows, 1, 1}, step[4] = {1, 1, 1, 1};
    ptx::TensorMap map;
    // Bits are copied as they are, so bf16 and fp16 alike travel as 16-bit integers.
    const CUresult status =
        function(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, x.data, extents, strides, box, step,
                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        std::string message = "cuTensorMapEncodeTiled gives error " + std::to_string(status) +
                              " for (channels, tokens, heads, batch) of";
        for (const auto extent : extents) message += " " + std::to_string(extent);
        message += " with strides of";
        for (const auto stride : strides) message += " " + std::to_string(stride);
        throw std::runtime_error(message + " bytes");
    }
    return map;
}

#endif

}  // namespace detail

// Base and strides have to be multiples of 16 bytes.
inline BoxedTensor boxed_tensor(const View& x, const Extents& extents, uint32_t rows) {
    return {detail::encode(x, detail::map_shape(x, extents), rows), x.stride_h != 0,
            x.stride_b != 0};
}

}  // namespace nabla::cuda
