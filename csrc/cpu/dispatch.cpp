#include "cpu/kernels.h"

namespace nabla::cpu {

#define NABLA_KERNELS(isa, supported)                                              \
    Kernels {                                                                      \
        #isa, [] { return bool(supported); }, isa::block_mean, isa::pooled_scores, \
            isa::block_mask, isa::attention_forward, isa::attention_backward       \
    }

// __builtin_cpu_supports asks cpuid and the operating system.
const Kernels kKernels[] = {
#if defined(NABLA_X86)
    NABLA_KERNELS(avx512_bf16,
                  __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")),
    NABLA_KERNELS(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vl") &&
                              __builtin_cpu_supports("avx512dq")),
    NABLA_KERNELS(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                            __builtin_cpu_supports("f16c")),
#endif
    NABLA_KERNELS(portable, true),
};
const int kKernelsCount = sizeof kKernels / sizeof *kKernels;

}  // namespace nabla::cpu
