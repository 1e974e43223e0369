// The launches of each instruction set, and the table to choose from.
#pragma once

#include "params.h"

#define NABLA_DECLARE_KERNELS(isa)                           \
    namespace nabla::cpu::isa {                              \
    void block_mean(const BlockMeanParams&);                 \
    void pooled_scores(const ScoresParams&);                 \
    void block_mask(const BlockMaskParams&);                 \
    void attention_forward(const AttentionParams&);          \
    void attention_backward(const AttentionBackwardParams&); \
    }

NABLA_DECLARE_KERNELS(portable)
NABLA_DECLARE_KERNELS(avx2)
NABLA_DECLARE_KERNELS(avx512)
NABLA_DECLARE_KERNELS(avx512_bf16)

namespace nabla::cpu {

struct Kernels {
    const char* name;
    bool (*is_supported)();
    void (*block_mean)(const BlockMeanParams&);
    void (*pooled_scores)(const ScoresParams&);
    void (*block_mask)(const BlockMaskParams&);
    void (*attention_forward)(const AttentionParams&);
    void (*attention_backward)(const AttentionBackwardParams&);
};

extern const Kernels kKernels[];  // best first; the last one runs everywhere
extern const int kKernelsCount;

}  // namespace nabla::cpu
