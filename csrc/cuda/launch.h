// What launches share: from values of Params to template arguments.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/ptx.cuh"
#include "params.h"

namespace nabla::cuda {

template <int kValue>
using Int = std::integral_constant<int, kValue>;

// visit(T{}, Int<D>{}) for the element type and the head dimension.
template <class Visit>
void with_type_and_head_dim(DType dtype, int head_dim, Visit visit) {
    const auto with_head_dim = [&](auto type) {
        if (head_dim == 64) return visit(type, Int<64>{});
        if (head_dim == 128) return visit(type, Int<128>{});
        throw std::invalid_argument("head_dim is " + std::to_string(head_dim) +
                                    ", the kernels take 64 and 128");
    };
    if (dtype == DType::kBFloat16) return with_head_dim(ptx::BFloat16{});
    if (dtype == DType::kFloat16) return with_head_dim(ptx::Float16{});
    throw std::invalid_argument("the kernels take bfloat16 and float16");
}

template <class T>
constexpr T ceil_div(T x, T y) {
    return (x + y - 1) / y;
}

}  // namespace nabla::cuda
