#include "cpu/dispatch.h"

#include <algorithm>

#include "cpu/kernels.h"

namespace nabla::cpu {
namespace {

#define NABLA_KERNELS(isa)                                                          \
    Kernels {                                                                       \
        #isa, isa::block_mean, isa::pooled_scores, isa::block_mask,                 \
            isa::attention_forward, isa::attention_backward                         \
    }

constexpr Kernels kPortable = NABLA_KERNELS(portable);
#if defined(NABLA_X86)
constexpr Kernels kAvx2 = NABLA_KERNELS(avx2);
constexpr Kernels kAvx512 = NABLA_KERNELS(avx512);
constexpr Kernels kAvx512Bf16 = NABLA_KERNELS(avx512_bf16);
#endif

}  // namespace

Features features() {
    Features found;
#if defined(NABLA_X86)
// Asks cpuid and the operating system, by a literal.
#define NABLA_FEATURE(asks, name) \
    if (asks(name)) found.push_back(name)
    NABLA_FEATURE(__builtin_cpu_supports, "avx2");
    NABLA_FEATURE(__builtin_cpu_supports, "fma");
    NABLA_FEATURE(__builtin_cpu_supports, "f16c");
    NABLA_FEATURE(__builtin_cpu_supports, "avx512f");
    NABLA_FEATURE(__builtin_cpu_supports, "avx512bw");
    NABLA_FEATURE(__builtin_cpu_supports, "avx512vl");
    NABLA_FEATURE(__builtin_cpu_supports, "avx512dq");
    NABLA_FEATURE(__builtin_cpu_supports, "avx512bf16");
    NABLA_FEATURE(__builtin_cpu_is, "intel");
    NABLA_FEATURE(__builtin_cpu_is, "cooperlake");
#endif
    return found;
}

std::vector<Kernels> kernels_for([[maybe_unused]] const Features& features) {
    std::vector<Kernels> found;
#if defined(NABLA_X86)
    const auto has = [&](auto... names) {
        return (... && (std::find(features.begin(), features.end(), names) != features.end()));
    };
    const bool avx2 = has("avx2", "fma", "f16c");
    const bool avx512 = avx2 && has("avx512f", "avx512bw", "avx512vl", "avx512dq");
    const bool dots = avx512 && has("avx512bf16");
    // Intel's cores with AMX take four times as long for a vector of dot products as for one of
    // multiply-adds, which do half as much: there bfloat16 is faster as float.
    const bool are_slow = has("intel") && !has("cooperlake");
    if (dots && !are_slow) found.push_back(kAvx512Bf16);
    if (avx512) found.push_back(kAvx512);
    if (dots && are_slow) found.push_back(kAvx512Bf16);
    if (avx2) found.push_back(kAvx2);
#endif
    found.push_back(kPortable);
    return found;
}

}  // namespace nabla::cpu
