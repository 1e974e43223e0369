#include "cuda/kernels.h"

namespace nabla::cuda {

const Kernels kKernels[] = {
    {90, "sm_90a", sm90::block_mean, sm90::pooled_scores, sm90::block_mask, sm90::transpose,
     sm90::attention_forward, sm90::attention_backward},
};
const int kKernelsCount = sizeof kKernels / sizeof *kKernels;

}  // namespace nabla::cuda
