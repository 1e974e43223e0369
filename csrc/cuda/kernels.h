// The launches of each architecture, and the table to choose from. A launch returns when it is
// queued on the stream of its Params.
#pragma once

#include "params.h"

namespace nabla::sm80 {
void attention_forward(const AttentionParams&);
void attention_backward(const AttentionBackwardParams&);
}  // namespace nabla::sm80

namespace nabla::sm90 {
void attention_forward(const AttentionParams&);
void attention_backward(const AttentionBackwardParams&);
}  // namespace nabla::sm90

namespace nabla::cuda {

// For every architecture.
void block_mean(const BlockMeanParams&);
void pooled_scores(const ScoresParams&);
void block_mask(const BlockMaskParams&);
void transpose(const TransposeParams&);

struct Kernels {
    int architecture;  // compute capability, 90 for 9.0
    const char* name;  // what nvcc compiles for
    void (*block_mean)(const BlockMeanParams&);
    void (*pooled_scores)(const ScoresParams&);
    void (*block_mask)(const BlockMaskParams&);
    void (*transpose)(const TransposeParams&);
    void (*attention_forward)(const AttentionParams&);
    void (*attention_backward)(const AttentionBackwardParams&);
};

extern const Kernels kKernels[];
extern const int kKernelsCount;

}  // namespace nabla::cuda
