#include "cuda/kernels.h"

namespace nabla::cuda {
namespace {

// Of an architecture: they differ in attention only.
constexpr Kernels kernels(int architecture, const char* name,
                          void (*attention_forward)(const AttentionParams&),
                          void (*attention_backward)(const AttentionBackwardParams&)) {
    return {architecture, name,      block_mean,        pooled_scores,
            block_mask,   transpose, attention_forward, attention_backward};
}

}  // namespace

const Kernels kKernels[] = {
    kernels(80, "sm_80", sm80::attention_forward, sm80::attention_backward),
    kernels(86, "sm_86", sm80::attention_forward, sm80::attention_backward),
    kernels(89, "sm_89", sm80::attention_forward, sm80::attention_backward),
    kernels(90, "sm_90a", sm90::attention_forward, sm90::attention_backward),
};
const int kKernelsCount = sizeof kKernels / sizeof *kKernels;

}  // namespace nabla::cuda
