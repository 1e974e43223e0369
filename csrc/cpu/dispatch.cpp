#include "cpu/kernels.h"

namespace nabla::cpu {

#define NABLA_KERNELS(isa, supported)                                              \
    Kernels {                                                                      \
        #isa, [] { return bool(supported); }, isa::block_mean, isa::pooled_scores, \
            isa::block_mask, isa::attention_forward, isa::attention_backward       \
    }

#if defined(NABLA_X86)
namespace {

// __builtin_cpu_supports asks cpuid and the operating system.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_bf16_dots() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Intel's cores with AMX take four times as long for a vector of dot products as for one of
// multiply-adds, which do half as much: there bfloat16 is faster as float.
bool has_slow_dots() {
    return has_bf16_dots() && __builtin_cpu_is("intel") && !__builtin_cpu_is("cooperlake");
}

}  // namespace
#endif

const Kernels kKernels[] = {
#if defined(NABLA_X86)
    NABLA_KERNELS(avx512_bf16, has_bf16_dots() && !has_slow_dots()),
    NABLA_KERNELS(avx512, has_avx512()),
    NABLA_KERNELS(avx512_bf16, has_slow_dots()),
    NABLA_KERNELS(avx2, has_avx2()),
#endif
    NABLA_KERNELS(portable, true),
};
const int kKernelsCount = sizeof kKernels / sizeof *kKernels;

}  // namespace nabla::cpu
