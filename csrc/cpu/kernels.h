// The launches of each instruction set.
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
